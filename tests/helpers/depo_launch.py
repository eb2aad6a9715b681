"""A launch as the hooks see it: OpenRLHF's nested arguments, and a stand-in for the way to the estimator."""

import argparse

from nested_args import nested

from depo_plugin import hooks
from depo_plugin.estimator.metrics import Judgement
from depo_plugin.remote.handle import DROPPED, TALLY
from depo_plugin.settings import config


def launch(*flags, **others):
    """OpenRLHF's nested arguments of a launch that can work, with these flags of DEPO and other values by name."""
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    values = {
        "algo.advantage.estimator": "gae",
        "depo.chosen": [("--advantage_estimator", "depo")],
        "algo.kl.init_coef": 0.0,
        "ckpt.path": "checkpoints",
        "ckpt.output_dir": "out",
        "data.max_images_per_prompt": 0,
        "reward.model_name_or_path": None,
        "reward.remote_url": "reward.py",
        "rollout.batch_size": 16,
        "rollout.n_samples_per_prompt": 2,
        "train.agent_func_path": None,
        "train.async_enable": False,
        "train.batch_size": 32,
        "train.colocate_all": False,
        "train.dynamic_batch_enable": False,
        "use_ms": False,
        "vllm.num_engines": 1,
    }
    return nested(values | others | vars(parser.parse_args(flags)))


def resolved(*flags, **others):
    """The same after hooks.resolve()."""
    args = launch(*flags, **others)
    hooks.resolve(args)
    return args


class Recorder:
    """Stands where a process has its RemoteEstimator; keeps what is sent and answers what it was given.

    metrics, groups: what wait() answers, a Judgement; None without metrics. call: the answer of judge(), None if the
    estimator is behind.
    """

    def __init__(self, metrics=None, weights=None, save_s=0.5, call="sent", groups=()):
        self.metrics, self.weights, self.save_s, self.call, self.groups = metrics, weights, save_s, call, groups
        self.calls = []
        self.tally = dict.fromkeys([*TALLY, DROPPED], 0.0)

    def keep_weights(self, prompts, labels):
        self.calls.append(("keep_weights", prompts, labels))
        return self.weights

    def judge(self, labels):
        self.calls.append(("judge", labels))
        return self.call

    def learn(self):
        self.calls.append(("learn",))

    def reject(self, label):
        self.calls.append(("reject", label))

    def wait(self, call):
        self.calls.append(("wait", call))
        return None if self.metrics is None else Judgement(dict(self.metrics), list(self.groups))

    def take_tally(self):
        taken = {name: self.tally[name] for name in TALLY}
        self.tally |= dict.fromkeys(TALLY, 0.0)
        return taken

    def save(self, tag, live_tags):
        self.calls.append(("save", tag, live_tags))
        return self.save_s
