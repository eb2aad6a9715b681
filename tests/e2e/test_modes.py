"""OpenRLHF's modes with DEPO on the real stack: four launches and a resume, each for several modes at once."""

import json
import math
import shlex
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import fmean

import numpy as np
import pytest
from reward_func import reward_func
from stack import HELPERS, SEED, assert_learned, base_flags, client_states, launch, problems, summary

from depo_plugin.estimator import checkpoint

BATCH, GROUP = 8, 4  # prompts of a step, responses to each
PEAK, FLOOR = 1e-4, 0.1  # learning rate, and the share of it that a cosine ends at


def flags(out, pool, *extra):
    """The quickstart's launch, made small: `pool` prompts, batches of 8 with 4 responses each."""
    samples = BATCH * GROUP
    sizes = f"""
        --data.max_samples {pool} --rollout.batch_size {BATCH} --rollout.n_samples_per_prompt {GROUP}
        --rollout.micro_batch_size {samples // 4} --train.batch_size {samples} --train.micro_batch_size {samples // 4}
        --depo.filter.warmup_steps 2 --actor.lr_scheduler cosine_with_min_lr
    """
    return base_flags(out, *sizes.split(), *(word for part in extra for word in shlex.split(part)))


def cosine(step, steps):
    """The learning rate after this many of so many optimizer steps: 3% warm-up, then a cosine down to FLOOR."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return PEAK * step / warmup
    turn = math.pi * (step - warmup) / (steps - warmup)
    return PEAK * (FLOOR + (1 - FLOOR) * (1 + math.cos(turn)) / 2)


def stream(prompts, length):
    """The pool's prompts in the order in which the loader meets them, pass after pass."""
    passes = (np.random.default_rng([SEED, 0, n]).permutation(len(prompts)) for n in range(length // len(prompts) + 1))
    return [prompts[i] for order in passes for i in order][:length]


def total(rows, name):
    """The sum of a metric over steps."""
    return sum(row.get(name, 0) for row in rows)


# ── Asynchronous, a queue of three, oversampling, two ranks and two engines; killed and resumed ──

AHEAD = 2 * BATCH  # vLLM makes two batches at a time
POOL_A = 50  # gives 48 prompts, 6 steps an episode
SAVED, KILLED = 8, 9  # the checkpoint is of step 8, in the second episode; the kill comes when step 9 is trained


def async_flags(out, *extra):
    return flags(
        out,
        POOL_A,
        "--train.async_enable --train.async_queue_size 3 --actor.num_gpus_per_node 2 --vllm.num_engines 2",
        f"--rollout.vllm_generate_batch_size {AHEAD} --ckpt.save_steps 4 --eval.steps -1",
        "--depo.advantage.importance_rescale true --depo.filter.epsilon 0.1",
        *extra,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("async")
    return launch(out, async_flags(out), num_gpus=4, kill_when=lambda line: f"Global step {KILLED}:" in line)


@pytest.fixture(scope="module")
def resumed(killed, tmp_path_factory):
    out = tmp_path_factory.mktemp("async resumed")
    checkpoints = shlex.quote(str(killed.out / "checkpoints"))
    run = launch(out, async_flags(out, f"--ckpt.path {checkpoints} --ckpt.load_enable"), num_gpus=4)
    assert run.status == 0, run.output[-5000:]
    return run


def test_two_ranks_two_engines_and_a_queue_of_three_train_on_what_was_kept(killed, resumed):
    assert killed.status == -9
    assert (killed.out / "checkpoints" / "_actor" / "latest").read_text() in ("global_step8", "global_step12")
    for run in (killed, resumed):
        assert "world_size=3" in run.output  # rank 0 sends weights to two engines
        assert "did not answer" not in run.output
        for row in run.metrics:
            assert row["rollout/num_samples"] == BATCH * GROUP
            assert (row["depo/kept"], row["depo/unmatched"]) == (BATCH, 0)  # so that each has its importance weight
    shards = [path.name for path in (killed.out / "checkpoints" / "_actor" / f"global_step{SAVED}").iterdir()]
    for rank in (0, 1):
        assert any(name.endswith(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt") for name in shards)
    rows = killed.metrics[:SAVED] + resumed.metrics
    assert total(rows, "depo/scanned") > total(rows, "depo/kept") + BATCH  # the filter did something


def test_a_killed_async_run_goes_on_at_its_step_learning_rate_episode_and_total(killed, resumed):
    assert [row["step"] for row in killed.steps[:KILLED]] == list(range(1, KILLED + 1))
    assert [row["step"] for row in resumed.steps] == list(range(SAVED + 1, 13))
    for row in killed.steps + resumed.steps:
        assert row["actor_lr"] == pytest.approx(cosine(row["step"], 12), rel=1e-6)
    assert resumed.steps[-1]["actor_lr"] == pytest.approx(PEAK * FLOOR)
    states = client_states(killed.out, f"global_step{SAVED}")
    assert (states["episode"], states["global_step"], states["total_consumed_prompts"]) == (1, SAVED, SAVED * BATCH)
    states = client_states(killed.out, "global_step12")  # the resumed run saves there, too
    assert (states["episode"], states["global_step"], states["total_consumed_prompts"]) == (1, 12, 12 * BATCH)
    assert "Episode [2/2]:  33%" in resumed.output  # 16 of 48
    assert "Episode [1/2]" not in resumed.output
    assert checkpoint.load(killed.out / "checkpoints" / "depo" / f"global_step{SAVED}")["updates"] == SAVED


def test_the_first_prompts_after_the_kill_are_those_that_followed_the_checkpoint(killed, resumed):
    """The loader's state of a checkpoint is that of the moment in which the rollouts of its step left for the queue.

    vLLM makes 16 prompts at a time: call c (from 0) is trained as steps 2c + 1 and 2c + 2. Step 8 ends call 3, so its
    state has 4 calls behind it, however far ahead of the trainer the rollouts were (calls 4 and 5 may have waited in
    the queue), and what is next is call 4: steps 9 and 10, of which the killed run trained step 9. (After an odd step
    the second half of a call would be lost, with OpenRLHF's buffer of responses.)

    The responses of a call follow each other in the reward log: a call ends before the next begins. Candidates whose
    scores were asked for when the state was saved are decided alike in both runs; where they do not fill the batch,
    more are asked for, of an estimator that may have learned more in the killed run: those are not compared.
    """
    state = client_states(killed.out, f"global_step{SAVED}")["data_loader_state_dict"]["depo"]
    assert state["queue"] == []
    assert state["asked"]["scores"] is not None
    pool = problems(killed.out / "data" / "train.jsonl")[:POOL_A]
    first, asked = state["cursor"], state["asked"]["count"]
    known = set(stream(pool, first + asked)[first:])
    size = AHEAD * GROUP
    before, after = killed.asked[4 * size : 5 * size], resumed.asked[:size]
    assert len(before) == len(after) == size
    both = [Counter(prompt for prompt in part if prompt in known) for part in (before, after)]
    assert both[0] == both[1]
    a, b = (np.array(state["asked"]["scores"][name], float) for name in ("a", "b"))
    passing = int(((0.15 <= a / (a + b)) & (a / (a + b) <= 0.85)).sum())
    assert both[0].total() >= GROUP * min(passing, AHEAD) > 0, "all that pass the filter were compared"
    assert len(resumed.asked) == 2 * size  # calls 4 and 5: nothing is left out or made twice
    assert set(killed.asked[: 4 * size]) <= set(stream(pool, first))


# ── Asynchronous, partial rollouts, an agent of two turns, two blended datasets ──

AGENT = HELPERS / "two_turn_agent.py"


@pytest.fixture(scope="module")
def agent_run(tmp_path_factory):
    """Two files, one of problems the policy can do and one of those it cannot, drawn from with even chances."""
    out = tmp_path_factory.mktemp("agent")
    given = flags(
        out,
        60,
        "--train.async_enable --train.partial_rollout_enable --data.prompt_probs 0.5,0.5 --eval.steps 4",
        f"--train.agent_func_path {shlex.quote(str(AGENT))} --depo.advantage.base dr_grpo --train.num_episodes 2",
    )
    rows = summary.read_rows(out / "data" / "train.jsonl")
    halves = {
        "can": [r for r in rows if "mul" not in r["datasource"]],
        "cannot": [r for r in rows if "mul" in r["datasource"]],
    }
    for name, half in halves.items():
        text = "".join(json.dumps(row | {"datasource": name}) + "\n" for row in half)
        (out / "data" / f"{name}.jsonl").write_text(text)
    paths = ",".join(str(out / "data" / f"{name}.jsonl") for name in halves)
    run = launch(out, [*given, "--data.prompt_dataset", paths])
    assert run.status == 0, run.output[-5000:]
    return run


def talks(run):
    """Each conversation's prompt, in order of its first answer, and the second answers that were asked for."""
    rows = summary.read_rows(run.out / "rollouts.jsonl")
    held_out = set(problems(run.out / "data" / "eval.jsonl"))
    rows = [row for row in rows if row["prompt"] not in held_out]
    return [row["prompt"] for row in rows if row["turn"] == 1], [row for row in rows if row["turn"] == 2]


def test_a_two_turn_agent_with_partial_rollouts_trains_on_what_was_kept(agent_run):
    assert [row["step"] for row in agent_run.steps] == list(range(1, 15))  # 2 · 60 // 8
    first, second = talks(agent_run)
    assert len(first) == 14 * BATCH * GROUP
    assert {row["reward"] for row in second} == {0.0, 0.5}
    rewards = sum(row["reward"] for row in summary.read_rows(agent_run.out / "rollouts.jsonl"))
    assert rewards > 0
    for row in agent_run.metrics:
        assert (row["depo/kept"], row["depo/unmatched"]) == (BATCH, 0)
        assert row["depo/target_mean"] == pytest.approx(row["rollout/reward_mean"], abs=1e-6)
        assert 1 <= row["turns"] <= 2
        assert row["actor_lr"] == pytest.approx(cosine(row["step"], 14), rel=1e-6)
    assert total(agent_run.metrics, "depo/scanned") > total(agent_run.metrics, "depo/kept") + BATCH


def test_kept_rejected_and_pass_rate_are_told_by_data_source(agent_run):
    source_of = {}
    for name in ("can", "cannot"):
        source_of |= dict.fromkeys(problems(agent_run.out / "data" / f"{name}.jsonl"), name)
    asked = Counter(source_of[prompt] for prompt in talks(agent_run)[0])
    rows = agent_run.metrics
    assert set(asked) == {"can", "cannot"}
    for name, count in asked.items():
        assert total(rows, f"depo/kept/{name}") == count / GROUP
    rejected = {name: total(rows, f"depo/rejected/{name}") for name in asked}
    assert sum(rejected.values()) == pytest.approx(total(rows, "depo/scanned") - total(rows, "depo/kept"))
    assert rejected["cannot"] / (asked["cannot"] / GROUP) > rejected["can"] / (asked["can"] / GROUP)
    rates = {
        name: [row[f"depo/pass_rate/{name}"] for row in rows if f"depo/pass_rate/{name}" in row] for name in asked
    }
    assert fmean(rates["can"]) > fmean(rates["cannot"])


# ── Synchronous, dynamic filtering after ours, a pool of no whole number of batches, single-sample evaluation; rewards
# from a server ──

POOL_C = 164  # 20 batches and a rest. In a smaller pool the groups thrown away in warm-up would exceed one extra pass
STEPS_C = POOL_C // BATCH


class Grader(BaseHTTPRequestHandler):
    """Answers as `openrlhf.cli.serve_rm` does: lists, one entry per query."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        graded = reward_func(asked["query"], asked["prompts"], asked["labels"])
        lists = {name: graded[name].tolist() for name in ("rewards", "scores")}
        extra = {name: values.tolist() for name, values in graded["extra_logs"].items()}
        body = json.dumps(lists | {"extra_logs": extra}).encode()
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


@pytest.fixture(scope="module")
def filtered_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("filtered")
    with Server(("127.0.0.1", 0), Grader) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPO_REWARD_LOG", str(out / "rollouts.jsonl"))  # of the server, which is in this process
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = launch(
            out,
            flags(
                out,
                POOL_C,
                "--algo.dynamic_filtering_enable --depo.advantage.base rloo --depo.filter.epsilon 0.1",
                f"--train.num_episodes 1 --reward.remote_url http://127.0.0.1:{server.server_port}/get_reward",
                "--eval.steps 4 --eval.n_samples_per_prompt 1 --ckpt.save_steps 1 --ckpt.max_num 99",
            ),
        )
        server.shutdown()
    assert run.status == 0, run.output[-5000:]
    return run


def test_a_reward_server_that_answers_with_lists_trains_and_teaches(filtered_run):
    assert_learned(filtered_run, STEPS_C)
    made = sum(row["depo/kept"] for row in filtered_run.metrics)
    assert made > STEPS_C * BATCH, "also from the groups that were thrown away"
    assert all(0 < row["rollout/reward_mean"] < 1 for row in filtered_run.steps)


def test_dynamic_filtering_after_ours_trains_full_batches_of_groups_with_signal(filtered_run):
    held_out = set(problems(filtered_run.out / "data" / "eval.jsonl"))
    asked = [prompt for prompt in filtered_run.asked if prompt not in held_out]
    states = [client_states(filtered_run.out, f"global_step{row['step']}") for row in filtered_run.steps]
    assert {row["rollout/num_samples"] for row in filtered_run.steps} == {BATCH * GROUP}  # also the last of the pass
    drawn = [state["total_consumed_prompts"] for state in states]
    assert all(later - earlier >= BATCH for earlier, later in zip([0, *drawn], drawn, strict=False))
    assert (
        len(asked) >= drawn[-1] * GROUP > len(filtered_run.steps) * BATCH * GROUP
    )  # groups thrown away were paid for
    rows = filtered_run.metrics
    assert total(rows, "depo/kept") + total(rows, "depo/unmatched") == drawn[-1]  # all were judged, each once
    assert total(rows, "depo/unmatched") == 0
    assert all(row["dynamic_filtering_pass_rate"] <= 100 * GROUP for row in filtered_run.steps)


def test_groups_thrown_away_are_replaced_so_that_steps_and_schedule_stay(filtered_run):
    assert [row["step"] for row in filtered_run.steps] == list(range(1, STEPS_C + 1))
    for row in filtered_run.metrics:
        assert row["actor_lr"] == pytest.approx(cosine(row["step"], STEPS_C), rel=1e-6)


def test_each_prompt_is_asked_at_most_as_often_as_the_stream_passes_it(filtered_run):
    pool = problems(filtered_run.out / "data" / "train.jsonl")[:POOL_C]
    last = client_states(filtered_run.out, f"global_step{STEPS_C}")
    held_out = set(problems(filtered_run.out / "data" / "eval.jsonl"))
    asked = Counter(prompt for prompt in filtered_run.asked if prompt not in held_out)
    met = Counter(stream(pool, last["data_loader_state_dict"]["depo"]["cursor"]))
    assert set(asked) <= set(met)
    assert all(count % GROUP == 0 and count // GROUP <= met[prompt] for prompt, count in asked.items())


def test_single_sample_evaluation_asks_each_held_out_prompt_once(filtered_run):
    held_out = problems(filtered_run.out / "data" / "eval.jsonl")[:POOL_C]
    evaluations = [row["eval"] for row in filtered_run.rows if "eval" in row]
    assert len(evaluations) == len(filtered_run.steps) // 4 > 0
    counts = Counter(prompt for prompt in filtered_run.asked if prompt in set(held_out))
    assert counts == dict.fromkeys(held_out, len(evaluations))
    assert all(row["eval_num_samples"] == len(held_out) for row in evaluations)


# ── Synchronous, everything colocated on one GPU: policy, reference, vLLM and the estimator's DeepSpeed engine ──

POOL_D = 60


@pytest.fixture(scope="module")
def colocated_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("colocated")
    run = launch(
        out,
        flags(
            out,
            POOL_D,
            "--train.colocate_all --ds.enable_sleep --algo.kl.init_coef 0.01 --ref.num_gpus_per_node 1",
            "--depo.advantage.base reinforce_baseline --depo.estimator.num_gpus 0.4 --eval.steps -1",
            "--train.num_episodes 1",
        ),
        num_gpus=1,
    )
    assert run.status == 0, run.output[-5000:]
    return run


def test_everything_colocated_on_one_gpu_trains_and_filters(colocated_run):
    assert [row["step"] for row in colocated_run.steps] == list(range(1, 8))  # 60 // 8
    for row in colocated_run.metrics:
        assert (row["depo/kept"], row["depo/unmatched"]) == (BATCH, 0)
        assert row["actor_lr"] == pytest.approx(cosine(row["step"], 7), rel=1e-6)
    assert any(row["kl"] != 0 for row in colocated_run.steps)  # the reference model is there
    assert "depo/loss" in colocated_run.metrics[-1]
    assert "did not answer" not in colocated_run.output
