"""The checks of `depo doctor`: each looks at one thing that a launch needs, and says what it saw.

They use OpenRLHF's own parser, validation, tokenizer, data set and reward call, in this process, without Ray. So does
`depo embed`, to get at the prompts.
"""

import contextlib
import fcntl
import importlib.util
import io
import json
import math
import mmap
import os
import runpy
import shutil
import sqlite3
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from depo_plugin.commands import patching

TRAINER = "openrlhf.cli.train_ppo_ray"
OK, WARN, FAIL = "OK", "WARN", "FAIL"
SAMPLE = 16  # prompts that the encoder's speed is measured with
KEPT = 0.45  # of the prompts scanned, as a guess of what a filter keeps
SERVER_TIMEOUT_S = 10
EMBEDDING_BYTES = 870  # of one prompt, with the bundled encoder
CHECKPOINT_FACTOR = 8  # a policy's checkpoint by its 16-bit weights: with them Adam's two moments and weights in fp32


@dataclass(frozen=True)
class Check:
    """What one check found. status: OK, WARN or FAIL; fix: how to mend it, "" if there is nothing to mend."""

    name: str
    status: str
    said: str
    fix: str = ""


class _Parsed(Exception):
    """Carries the validated arguments out of OpenRLHF's train()."""


def flags_of(words: list[str]) -> list[str] | None:
    """Return the trainer's flags in a launch's command line, None if it does not start the trainer."""
    at = next((i for i, word in enumerate(words) if word == TRAINER or word.endswith("train_ppo_ray.py")), None)
    return None if at is None else words[at + 1 :]


def all_of(flags: list[str]) -> Iterator[Check]:
    """Yield every check of a launch with these flags; those that need an earlier one's result end with it."""
    copy = check_copy()
    yield copy
    if copy.status == FAIL:
        return
    parsed, args = check_flags(flags)
    yield parsed
    if args is None:
        return
    prompts: list[str] = []
    labels: list[Any] = []
    yield guarded("data", lambda: check_data(args, prompts, labels))
    if prompts:
        yield guarded("reward", lambda: check_reward(args, prompts[0], labels[0]))
    yield guarded("gpus", lambda: check_gpus(args))
    yield guarded("cpus", lambda: check_cpus(args))
    yield guarded("folder", lambda: check_folder(Path(args.ckpt.path)))
    yield guarded("disk", lambda: check_disk(args))
    yield guarded("encoder", lambda: check_encoder(args, prompts))


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """Return the check's result; an error in what it looks at is a FAIL with its text."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what data sets and reward functions print
            return check()
    except (Exception, SystemExit) as error:  # noqa: BLE001, whatever breaks a launch is a result, sys.exit() too
        return Check(
            name, FAIL, f"{type(error).__name__}: {error}", "mend what it names: the launch would end with it"
        )


def check_copy() -> Check:
    """Which copy of OpenRLHF is imported from here, and whether it has the call sites."""
    root, _ = patching.imported_root()
    if root is None:
        return Check("openrlhf", FAIL, f"not importable by {sys.executable}", "use the Python that the launch uses")
    try:
        copy = patching.inspect(root)
    except patching.PatchError as error:
        if patching.is_unverified(root):
            return Check("openrlhf", WARN, f"{root}: {patching.version_of(root)}, unverified, with DEPO's call sites")
        return Check("openrlhf", FAIL, str(error).splitlines()[0], "depo patch --check tells more")
    if "depo" not in (copy.applied or ()):
        return Check("openrlhf", FAIL, f"{root}: {copy.release}, without DEPO's call sites", "depo patch")
    return Check("openrlhf", OK, f"{root}: {copy.release}, patches applied: {', '.join(copy.applied or ())}")


def check_flags(flags: list[str]) -> tuple[Check, Any]:
    """Put the flags through OpenRLHF's parser and validation; return the check and args, None if they are refused."""
    said, args, refused = io.StringIO(), None, "the trainer was not reached"
    before = sys.argv
    sys.argv = ["train_ppo_ray.py", *flags]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            import openrlhf.utils
            import ray

            ray.is_initialized = lambda: True  # train() starts Ray, unless it is up
            openrlhf.utils.get_strategy = _stop  # and then asks for this
            runpy.run_module(TRAINER, run_name="__main__")
    except _Parsed as parsed:
        args = parsed.args[0]
    except SystemExit:
        refused = " | ".join(line for line in said.getvalue().splitlines() if line.strip())[-1500:]
    except Exception as error:  # noqa: BLE001, whatever refuses the launch is the result
        refused = f"{type(error).__name__}: {error}"
    finally:
        sys.argv = before
    if args is None:
        return Check("flags", FAIL, refused, "change the flags as it says"), None
    if not getattr(getattr(args, "depo", None), "enabled", False):
        return Check("flags", FAIL, "DEPO is off in this launch", "add --advantage_estimator depo"), None
    changed = [line for line in said.getvalue().splitlines() if line.startswith("[Warning]")]
    lines = [line for line in said.getvalue().splitlines() if line.startswith("DEPO")]
    return Check("flags", WARN if changed else OK, " | ".join([*changed, *lines])), args


def _stop(args: Any) -> None:
    raise _Parsed(args)


def rows_of(args: Any) -> Any:
    """Return the launch's rows (a datasets.Dataset), read as OpenRLHF reads them."""
    from openrlhf.datasets.utils import blending_datasets

    return blending_datasets(
        args.data.prompt_dataset,
        args.data.prompt_probs,
        SimpleNamespace(args=args, print=lambda *words: None, is_rank_0=lambda: False),
        args.train.seed,
        max_count=args.data.max_samples,
        dataset_split=args.data.prompt_split,
    )


def prompt_dataset(args: Any, rows: Any, **changes: Any) -> Any:
    """Return OpenRLHF's PromptDataset of these rows, through the chat template. changes: of args.data."""
    from openrlhf.datasets.prompts_dataset import PromptDataset
    from openrlhf.utils.utils import get_tokenizer

    data = SimpleNamespace(**(vars(args.data) | changes))
    strategy = SimpleNamespace(args=SimpleNamespace(data=data), is_rank_0=lambda: False)
    fast = not args.data.disable_fast_tokenizer
    tokenizer = get_tokenizer(args.actor.model_name_or_path, None, "left", strategy, use_fast=fast)
    return PromptDataset(rows, tokenizer, strategy, input_template=args.data.input_template)


def check_data(args: Any, prompts: list[str], labels: list[Any]) -> Check:
    """Read the data set as OpenRLHF does, a sample through the chat template, which fills prompts and labels."""
    rows = rows_of(args)
    needed = [key for key in (args.data.input_key, args.data.label_key) if key]
    missing = [key for key in needed if key not in rows.column_names]
    if args.data.input_key not in missing:
        few = rows.select(range(min(SAMPLE, len(rows))))
        label_key = None if args.data.label_key in missing else args.data.label_key
        dataset = prompt_dataset(args, few, label_key=label_key)
        prompts += dataset.prompts
        labels += dataset.labels
    if missing:
        return Check(
            "data",
            FAIL,
            f"{args.data.prompt_dataset} has the columns {', '.join(rows.column_names)}, not {', '.join(missing)}",
            "set --data.input_key and --data.label_key to columns that are there",
        )
    if not isinstance(prompts[0], str):
        prompts.clear()
        return Check("data", FAIL, "a prompt is not text", "add --data.apply_chat_template, or name the text's column")
    size, batch = min(len(rows), args.data.max_samples), args.rollout.vllm_generate_batch_size
    said = f"{size:,} prompts; the first is {prompts[0][:60]!r}"
    if size < batch:
        return Check("data", WARN, f"{said}; fewer than a batch ({batch})", "lower --rollout.batch_size")
    if args.data.label_key is None:
        return Check("data", WARN, f"{said}; no labels", "set --data.label_key, if the reward needs an answer")
    return Check("data", OK, said)


def check_reward(args: Any, prompt: str, label: Any) -> Check:
    """Call the reward once, as OpenRLHF calls it, with the label as the response."""
    if args.train.agent_func_path:
        _module("agent_module", args.train.agent_func_path).AgentExecutor  # noqa: B018, an AttributeError is a FAIL
        return Check("reward", OK, f"{args.train.agent_func_path} has AgentExecutor; not called: it needs the policy")
    if not args.reward.remote_url:
        return Check("reward", OK, f"reward model {args.reward.model_name_or_path}; not called")
    urls = [args.reward.remote_url] if isinstance(args.reward.remote_url, str) else args.reward.remote_url
    told = {"query": [prompt + str(label)], "prompts": [prompt], "labels": [label]}
    if urls[0].endswith(".py"):
        answer = _module("reward_func", urls[0]).reward_func(*told.values())
        return _judge_reward(args, urls[0], answer)
    for url in urls:
        request = urllib.request.Request(url, json.dumps(told).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=SERVER_TIMEOUT_S) as answer:
            check = _judge_reward(args, url, json.load(answer))
        if check.status != OK:
            return check
    return check


def _module(name: str, path: str):
    """Return the module of a file, imported as OpenRLHF does it: it is not in sys.modules under this name."""
    spec: Any = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _judge_reward(args: Any, name: str, answer: Any) -> Check:
    import torch

    wanted = 'return {"rewards": tensor of one value, "scores": the same for the accuracy}'
    if not isinstance(answer, dict) or answer.get("rewards") is None:
        return Check("reward", FAIL, f"{name} returned {type(answer).__name__} without 'rewards'", wanted)
    score = answer["scores"] if answer.get("scores") is not None else answer["rewards"]
    values = [torch.as_tensor(part, dtype=torch.float32).flatten().tolist() for part in (answer["rewards"], score)]
    if any(len(part) != 1 for part in values):
        return Check("reward", FAIL, f"{name} returned {len(values[0])} rewards for one response", wanted)
    reward, score = values[0][0], values[1][0]
    if not (math.isfinite(reward) and math.isfinite(score)):
        return Check("reward", FAIL, f"{name} returned reward {reward}, score {score}", "return finite numbers")
    low, high = args.depo.labels.reward_range
    said = f"{name} gives the label as a response reward {reward:g}, score {score:g}"
    if not low <= score <= high:
        fix = "set --depo.labels.reward_range to the scores of a wrong and of a right response"
        return Check("reward", WARN, f"{said}, outside --depo.labels.reward_range {low:g} {high:g}", fix)
    return Check("reward", OK, said)


def gpus_needed(args: Any) -> float:
    """Return how many GPUs the launch's models take, by OpenRLHF's arithmetic."""
    needed, engines = _shared_gpus(args)
    together = args.train.colocate_all
    if args.algo.kl.init_coef > 0 and not (together or args.train.colocate_actor_ref):
        needed += args.ref.num_nodes * args.ref.num_gpus_per_node
    if not together or args.train.async_enable:
        needed += engines
    if not args.reward.remote_url and not args.train.agent_func_path and not together:
        needed += args.reward.num_nodes * args.reward.num_gpus_per_node
    return needed + (0 if together else args.depo.estimator.num_gpus)


def _shared_gpus(args: Any) -> tuple[int, int]:
    """Return the GPUs of the policy and of vLLM, which --train.colocate_all lets share."""
    actor = args.actor.num_nodes * args.actor.num_gpus_per_node
    return actor, (args.vllm.num_engines or 0) * args.vllm.tensor_parallel_size


def check_gpus(args: Any) -> Check:
    """Compare the GPUs that the launch takes with those that are here."""
    import torch

    needed, here = gpus_needed(args), torch.cuda.device_count()
    actor, engines = _shared_gpus(args)
    if args.train.colocate_all and not args.train.async_enable and engines != actor:
        return Check(
            "gpus",
            FAIL,
            f"--train.colocate_all with {actor} GPUs for training and {engines} for vLLM",
            "--vllm.num_engines times --vllm.tensor_parallel_size must be the actor's nodes times GPUs",
        )
    said = f"the launch takes {needed:g}, here are {here}"
    if needed <= here:
        return Check("gpus", OK, said)
    if here == 0 or args.actor.num_nodes > 1 or "RAY_ADDRESS" in os.environ:
        return Check("gpus", WARN, said, "the cluster must have the rest: ray status")
    return Check("gpus", FAIL, said, "fewer --actor.num_gpus_per_node or --vllm.num_engines, or --train.colocate_all")


def check_cpus(args: Any) -> Check:
    """Whether a CPU is left for the estimator beside one for each of the models' processes."""
    here, wanted = len(os.sched_getaffinity(0)), args.depo.estimator.num_cpus
    others = math.ceil(gpus_needed(args)) + 2  # the trainer, and one for what else Ray runs
    said = f"{here} CPUs: about {others} for the models and the trainer, {wanted} for the estimator"
    if here < others + wanted:
        fix = "give Ray more CPUs (ray start --num-cpus), or free some"
        return Check("cpus", WARN, f"{said}; Ray may find no place for it", fix)
    return Check("cpus", OK, said)


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists, as an absolute path."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def check_folder(path: Path) -> Check:
    """Whether the checkpoint folder can be written, with rename, fsync, locks and memory maps."""
    above = _existing(path)
    try:
        made = tempfile.TemporaryDirectory(prefix=".depo-doctor-", dir=above)
    except OSError as error:
        return Check("folder", FAIL, f"{above}: {error}", "name a folder that you may write with --ckpt.path")
    lacking = []
    with made as folder:
        for name, attempt in _FILE_SYSTEM.items():
            try:
                attempt(Path(folder))
            except (OSError, sqlite3.Error, ValueError) as error:
                lacking.append(f"{name} ({error})")
    if lacking:
        fix = "a local disk for --ckpt.path: without these, embeddings or the estimator's checkpoints may not be kept"
        return Check("folder", WARN, f"{above} lacks {', '.join(lacking)}", fix)
    return Check("folder", OK, f"{path} can be written")


def _rename(folder: Path) -> None:
    (folder / "a").write_bytes(b"0" * mmap.PAGESIZE)
    os.replace(folder / "a", folder / "b")


def _fsync(folder: Path) -> None:
    for path, mode in ((folder / "b", os.O_RDWR), (folder, os.O_RDONLY)):
        descriptor = os.open(path, mode)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(folder: Path) -> None:
    with (folder / "b").open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what SQLite uses
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _map(folder: Path) -> None:
    with (folder / "b").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[0] = 1


def _sqlite(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "c")) as db:
        db.execute("CREATE TABLE t (x)")
        db.commit()


_FILE_SYSTEM = {"rename": _rename, "fsync": _fsync, "locks": _lock, "memory maps": _map, "SQLite": _sqlite}


def check_disk(args: Any) -> Check:
    """Compare the free disk with what the policy's checkpoints take, if its weights are a local folder."""
    free = shutil.disk_usage(_existing(Path(args.ckpt.path))).free
    weights = Path(args.actor.model_name_or_path)
    size = sum(file.stat().st_size for file in weights.glob("*.safetensors")) if weights.is_dir() else 0
    said = f"{free / 2**30:.0f} GiB free; {EMBEDDING_BYTES} bytes for each prompt's embedding"
    if not size or args.ckpt.save_steps in (-1, float("inf")):
        return Check("disk", OK, said)
    needed = CHECKPOINT_FACTOR * size * (args.ckpt.max_num + 1)
    said += f", about {needed / 2**30:.0f} GiB for {args.ckpt.max_num} checkpoints and the one being written"
    if needed > free:
        return Check("disk", WARN, said, "free some, or lower --ckpt.max_num")
    return Check("disk", OK, said)


def check_encoder(args: Any, prompts: list[str]) -> Check:
    """Load the encoder and measure how many new prompts it reads a second, against what a batch needs."""
    import torch

    from depo_plugin.estimator.text_model import TextModel
    from depo_plugin.remote.actor import default_threads
    from depo_plugin.settings import config

    cfg = config.from_namespace(args.depo).estimator
    name = cfg.model or "the bundled encoder"
    before = torch.get_num_threads()
    torch.set_num_threads(cfg.threads or default_threads())
    try:
        model = TextModel(cfg, args.train.seed)
        if not prompts:
            return Check("encoder", OK, f"{name} can be loaded")
        model.embed([f"{prompt} " for prompt in prompts[:1]])  # the first call takes longer
        start = time.perf_counter()
        model.embed(prompts)
        rate = len(prompts) / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    needed = args.rollout.vllm_generate_batch_size / KEPT
    said = (
        f"{name} reads {rate:.0f} new prompts/s on this CPU; until each prompt was seen once, a batch needs about "
        f"{needed:.0f}: {needed / rate:.0f} s a step, beside the rollouts"
    )
    if needed / rate > cfg.timeout_s:
        fix = "more --depo.estimator.threads, --depo.estimator.num_gpus 0.1, or a shorter --depo.estimator.max_length"
        return Check("encoder", WARN, f"{said}, more than --depo.estimator.timeout_s {cfg.timeout_s:g}", fix)
    return Check("encoder", OK, said)
