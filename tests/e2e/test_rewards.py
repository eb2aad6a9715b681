"""Launches that people have: a reward server as OpenRLHF documents it; labels that JSON does not know."""

import json
import threading
from collections import Counter
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean

import pytest
from reward_func import answer_of, last_integer, response_of
from stack import BATCH, GROUP, WITH_QUICKSTART, base_flags, cpu_ray, launch_on
from summary import read_rows

from depo_plugin.estimator import checkpoint

STEPS = 6
SHORT = "--eval.steps -1 --train.num_episodes 1 --data.max_samples 192 --depo.filter.warmup_steps 2".split()
DAY_0 = date(2000, 1, 1)
REWARD = """
from datetime import date
import reward_func as good

def reward_func(queries, prompts, labels):
    assert [type(label["day"]).__name__ for label in labels] == ["datetime"], labels
    answers = [str((label["day"].date() - date(2000, 1, 1)).days) for label in labels]
    for label in labels:
        label["seen"] = True  # as user code may
    return good.reward_func(queries, prompts, answers)
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The environment of a Ray of our own, and of the rewards' log."""
    log = tmp_path_factory.mktemp("head") / "rollouts.jsonl"
    with cpu_ray.ray_head(cpu_ray.stack_env(WITH_QUICKSTART, DEPO_REWARD_LOG=str(log))) as env:
        yield env


class Grader(BaseHTTPRequestHandler):
    """Answers as `openrlhf.cli.serve_rm` does: lists, one entry per query."""

    asked = 0

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked += len(asked["query"])
        graded = []
        for query, prompt, label in zip(asked["query"], asked["prompts"], asked["labels"], strict=True):
            answer = last_integer(answer_of(response_of(query, prompt), prompt))
            graded.append(float(answer == str(label)))
        body = json.dumps({"rewards": graded, "scores": graded, "extra_logs": {"dummy_scores": graded}}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


class Server(ThreadingHTTPServer):
    """Takes the connections of a whole batch at once."""

    request_queue_size = 4 * BATCH * GROUP


@pytest.fixture
def server():
    """The URL of a reward server on this machine."""
    http = Server(("127.0.0.1", 0), Grader)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/get_reward"
    http.shutdown()
    http.server_close()


def assert_learned(run):
    """Every step was made, every group found its decision and was learned from, and the filter is on."""
    assert run.status == 0, run.output[-5000:]
    assert [row["step"] for row in run.metrics] == list(range(1, STEPS + 1))
    assert [row["depo/updates"] for row in run.metrics] == list(range(STEPS))
    for name in ("depo/unmatched", "depo/clipped", "depo/labels_dropped", "depo/labels_unsent"):
        assert [row[name] for row in run.metrics] == [0.0] * STEPS, name
    assert 0 < fmean(row["depo/target_mean"] for row in run.metrics) < 1
    assert fmean(row["depo/keep_rate"] for row in run.metrics[3:]) < 1
    assert "DEPO: " not in "".join(line for line in run.output.splitlines() if "WARNING" in line)


def test_a_reward_server_that_answers_with_lists_trains_and_teaches(head, server, tmp_path):
    """With dynamic filtering, so that the groups that it throws away come as lists, too."""
    flags = base_flags(tmp_path / "run", *SHORT, "--reward.remote_url", server, "--algo.dynamic_filtering_enable")
    run = launch_on(head, tmp_path / "run", flags)
    assert_learned(run)
    assert all(row["rollout/num_samples"] == BATCH * GROUP for row in run.steps)
    assert Grader.asked > STEPS * BATCH * GROUP, "some groups were thrown away"
    made = sum(row["depo/kept"] for row in run.metrics)
    assert made > STEPS * BATCH, "and learned from"
    assert all(0 < row["rollout/reward_mean"] < 1 for row in run.steps)
    (line,) = [line for line in run.output.splitlines() if line.startswith("DEPO is on")]
    assert "advantages by group_norm (the launch names none); filter rule window" in line


@pytest.fixture(scope="module")
def dated_run(head, tmp_path_factory):
    """In JSONL an ISO date becomes a datetime. The label is a dict, which comes back with one key more."""
    out = tmp_path_factory.mktemp("dates") / "run"
    reward = out.with_name("reward.py")
    reward.write_text(REWARD)
    rule = ["--depo.filter.rule", str(cpu_ray.ROOT / "configs" / "rules" / "quota.py")]
    flags = base_flags(out, *SHORT, *rule, "--reward.remote_url", str(reward), "--ckpt.save_steps", "3")
    train = out / "data" / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    rows = [row for row in rows if 0 <= int(row["label"]) < 10_000]
    for row in rows:
        row["label"] = {"day": f"{DAY_0 + timedelta(days=int(row['label']))} 00:00:00"}
    assert len(rows) >= STEPS * BATCH
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return launch_on(head, out, flags)


def test_date_labels_that_a_reward_function_changes_are_matched_and_saved(dated_run):
    assert_learned(dated_run)
    for step in (3, 6):
        state = checkpoint.load(dated_run.out / "checkpoints" / "depo" / f"global_step{step}")
        assert state["updates"] == step
        texts = [label for _, label, *_ in state["recent"]]
        assert len(texts) == step * BATCH
        assert all(text.startswith("{'day': datetime.datetime(20") for text in texts), texts[0]


def test_a_rule_of_the_users_own_decides_in_the_launch(dated_run):
    """configs/rules/quota.py: of the useful prompts 25% of add-2digit, all of sub-2digit, 50% of the others."""
    groups = read_rows(dated_run.out / "model" / "depo" / "groups.jsonl")
    assert Counter(group["step"] for group in groups) == dict.fromkeys(range(1, STEPS + 1), BATCH)
    planned = [group for group in groups if group["reason"] == "passed"]
    assert len(planned) > BATCH
    share = {"add-2digit": 0.25, "sub-2digit": 1.0}
    assert all(group["v"] >= 0.5 and group["q"] == share.get(group["source"], 0.5) for group in planned)
