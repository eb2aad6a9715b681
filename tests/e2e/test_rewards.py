"""Labels that JSON does not know, which the reward function changes; a rule of the user's own. One launch."""

import json
from collections import Counter
from datetime import date, timedelta

import pytest
from stack import BATCH, assert_learned, base_flags, cpu_ray, launch
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
def dated_run(tmp_path_factory):
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
    return launch(out, flags)


def test_date_labels_that_a_reward_function_changes_are_matched_and_saved(dated_run):
    assert_learned(dated_run, STEPS)
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
