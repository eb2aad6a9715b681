"""One run of the proof: a real launch of OpenRLHF on the CPU, and what it reached, as one JSON row.

An entry of `evals` has what was spent until then (rollouts, groups with a signal, generated and trained tokens, and
seconds) and the held-out pass rate by level. `steps` has a number for each step: groups made and groups with a signal.
"""

import ast
import hashlib
import json
import shutil
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import cpu_ray
import run as quickstart
import summary
from tasks import LADDERS, make_split, write_jsonl
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.proof import ladder

HERE = Path(__file__).resolve().parent
GROUP_SIZE = 8
EVAL_SAMPLES = 8  # of each held-out problem


@dataclass(frozen=True)
class Size:
    """A batch size and what goes with it. Methods of one size make the same number of rollouts."""

    prompts: int  # of a step
    steps: int  # of GRPO
    episodes: int  # of GRPO, over a pool of prompts * steps / episodes problems
    lr: float  # of the policy
    evals: int = 8  # evaluations, evenly over the steps
    held_out: int = 240  # problems, evenly from all levels

    @property
    def pool(self) -> int:
        """Training problems."""
        return self.prompts * self.steps // self.episodes

    @property
    def rollouts(self) -> int:
        """Responses that are generated for training."""
        return self.prompts * self.steps * GROUP_SIZE


def model_folder(model: str) -> Path:
    """Return the folder of the policy's weights."""
    return HERE / "policy" if model == "ladder" else quickstart.prepare_model(model)


def levels_of(model: str) -> dict[str, str]:
    """Return level -> "easy", "learnable" or "hopeless"."""
    if model == "ladder":
        return {level.name: level.group for level in ladder.LEVELS}
    rates = {"smollm2": {"add-1digit": "easy", "mul-2digit": "hopeless", "mul-3digit": "hopeless"}}[model]
    return {level.name: rates.get(level.name, "learnable") for level in LADDERS[model]}


def write_data(model: str, folder: Path, size: Size, seed: int) -> None:
    """Write train.jsonl, which depends on the seed, and eval.jsonl, which is the same for all runs."""
    levels = ladder.LEVELS if model == "ladder" else LADDERS[model]
    for name, count, at in (("train", size.pool, seed), ("eval", size.held_out, 0)):
        write_jsonl(folder / f"{name}.jsonl", make_split(count, at, evaluation=name == "eval", levels=levels))


def flags_of(model: str, size: Size, method: list[str], seed: int, out: Path) -> list[str]:
    """Return the flags of a launch: the quickstart's, with this size's."""
    args = quickstart.parse_args(["--steps", str(size.steps), "--seed", str(seed), "--out", str(out)])
    args.method = "grpo"
    base = quickstart.PRESETS["smollm2" if model == "smollm2" else "tiny"]
    samples = size.prompts * GROUP_SIZE
    every = size.steps // size.evals
    if "--algo.dynamic_filtering_enable" in method:
        every = max(1, every // 3)  # it makes about a third of the steps
    flags = quickstart.launch_flags(args, base, model_folder(model), out / "data", size.episodes)
    more = {
        "--rollout.batch_size": size.prompts,
        "--rollout.n_samples_per_prompt": GROUP_SIZE,
        "--rollout.micro_batch_size": samples // 2,
        "--train.batch_size": samples,
        "--train.micro_batch_size": samples // 2,
        "--actor.adam.lr": size.lr,
        "--eval.steps": every,
        "--eval.n_samples_per_prompt": EVAL_SAMPLES,
        "--ckpt.best_metric_key": "none",
    }
    return [*flags, *(str(word) for pair in more.items() for word in pair), *method]


def run_key(model: str, size: Size, method: list[str], seed: int) -> str:
    """Return what a finished run is known by: a digest of its flags and data, and of the policy's weights.

    The digest is the same wherever the project lies.
    """
    weights = (model_folder(model) / "model.safetensors").read_bytes()
    flags = [flag.replace(str(cpu_ray.ROOT), "") for flag in flags_of(model, size, method, seed, cpu_ray.ROOT / "run")]
    text = json.dumps([flags, asdict(size), hashlib.sha256(weights).hexdigest()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def launch(model: str, size: Size, method: list[str], seed: int, out: Path) -> dict:
    """Run one launch in the folder `out`, which is emptied first; return `evals` and `steps` of its row.

    Raises RuntimeError with the end of the output if the launch fails.
    """
    shutil.rmtree(out, ignore_errors=True)
    write_data(model, out / "data", size, seed)
    rows, tail = [], deque(maxlen=30)
    flags = flags_of(model, size, method, seed, out)
    bar = tqdm(total=size.steps, desc=out.name, unit="step", leave=False, disable=None)
    with bar, cpu_ray.ray_head(cpu_ray.stack_env(DEPO_REWARD_LOG=str(out / "rollouts.jsonl"))) as env:
        process = cpu_ray.start_training(flags, env, cwd=out)
        with (out / "train.log").open("w") as log:
            for line in process.stdout:
                log.write(line)
                tail.append(line)
                if match := quickstart.STEP.search(line):
                    rows.append({"step": int(match[1]), **ast.literal_eval(match[2])})
                    bar.update()
                elif match := quickstart.EVAL.search(line):
                    rows.append({"step": int(match[1]), "eval": ast.literal_eval(match[2])})
        status = process.wait()
    if status:
        raise RuntimeError(f"OpenRLHF ended with status {status}; its log is {out / 'train.log'}:\n{''.join(tail)}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(model))
    return row_of(rows, groups_of(out, tokenizer), list(levels_of(model)))


class Group(NamedTuple):
    """One group that was rolled out for training. tokens: of its responses; signal: whether its rewards differ."""

    tokens: int
    signal: bool


def groups_of(out: Path, tokenizer) -> list[Group]:
    """Return the groups of a run in order of completion, from the reward function's log."""
    held_out = {row["input"] for row in summary.read_rows(out / "data" / "eval.jsonl")}
    waiting, groups = defaultdict(list), []
    for row in summary.read_rows(out / "rollouts.jsonl"):
        problem = summary.problem_of(row["prompt"])
        if problem in held_out:
            continue
        waiting[problem].append(row)
        if len(waiting[problem]) == GROUP_SIZE:
            done = waiting.pop(problem)
            tokens = sum(map(len, tokenizer([sample["response"] for sample in done]).input_ids))
            groups.append(Group(tokens, len({sample["reward"] for sample in done}) > 1))
    return groups


def row_of(rows: list[dict], groups: list[Group], levels: list[str]) -> dict:
    """Return `evals` and `steps` of a finished run.

    rows: OpenRLHF's status of each step, and {"step", "eval"} of each evaluation; groups: in order of completion.
    """
    spent = dict.fromkeys(("rollouts", "signal", "generated_tokens", "trained_tokens", "seconds"), 0.0)
    evals, at = [], 0
    steps: dict[str, list[int]] = {"groups": [], "signal": []}
    for row in rows:
        if "eval" in row:
            rates = {level: round(row["eval"][f"eval_{level}_pass1"], 4) for level in levels}
            evals.append({"step": row["step"], **spent, "levels": rates})
            continue
        rate = row.get("dynamic_filtering_pass_rate")  # 100 * responses trained / prompts drawn
        drawn = round(row["rollout/num_samples"] / GROUP_SIZE)
        if rate is not None:
            drawn = round(row["rollout/num_samples"] * 100 / rate)
        made, at = groups[at : at + drawn], at + drawn
        tokens = sum(group.tokens for group in made)
        signal = sum(group.signal for group in made)
        spent["rollouts"] += drawn * GROUP_SIZE
        spent["signal"] += signal
        spent["generated_tokens"] += tokens
        spent["trained_tokens"] += tokens if rate is None else sum(g.tokens for g in made if g.signal)
        spent["seconds"] = round(spent["seconds"] + row["timing/step_total"], 2)
        steps["groups"].append(drawn)
        steps["signal"].append(signal)
    return {"evals": evals, "steps": steps}
