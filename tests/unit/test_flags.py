"""The frozen list of flags. A flag is a promise to every launch script: a change here is a change for users."""

import argparse

from depo_plugin.settings import config

FLAGS = """
--depo.config
--depo.shadow
--depo.filter.rule
--depo.filter.low
--depo.filter.high
--depo.filter.min_utility
--depo.filter.soft_utility
--depo.filter.epsilon
--depo.filter.warmup_steps
--depo.filter.max_scan
--depo.labels.reward_range
--depo.advantage.base
--depo.advantage.importance_rescale
--depo.advantage.clip
--depo.estimator.mode
--depo.estimator.model
--depo.estimator.depth
--depo.estimator.max_length
--depo.estimator.lr
--depo.estimator.encoder_lr_ratio
--depo.estimator.w_distill
--depo.estimator.w_rank
--depo.estimator.micro_batch_tokens
--depo.estimator.dtype
--depo.estimator.num_gpus
--depo.estimator.num_cpus
--depo.estimator.threads
--depo.estimator.timeout_s
--depo.estimator.cache_dir
--depo.estimator.updates_per_step
--depo.estimator.replay
--depo.history.kappa
--depo.history.discount
--depo.history.drift
--depo.history.prior
--depo.history.prior_weight
--depo.history.share
""".split()


def test_the_flags_are_exactly_these():
    assert config.flag_names() == FLAGS


def test_the_parser_gets_exactly_these():
    parser = argparse.ArgumentParser(add_help=False)
    config.add_arguments(parser)
    assert [option for action in parser._actions for option in action.option_strings] == FLAGS
