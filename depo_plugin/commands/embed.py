"""Embed a launch's prompts ahead of the run, so that the filter works from the first pass on.

  depo embed -- python3 -m openrlhf.cli.train_ppo_ray ... --advantage_estimator depo

Everything after the first -- is the launch's own command line. Run this in the launch's folder, with its Python, on a
machine whose CPU is like that of the estimator's node (the precision is chosen by the CPU, unless
--depo.estimator.dtype names one). The embeddings go to the folder in which the launch looks for them:
--depo.estimator.cache_dir, or depo_embeddings in --ckpt.path. All cores are used. Prompts that are there already are
passed over, so it can be stopped and started again. In mode finetune there is nothing to embed ahead.

Exit status: 0 if done, 1 if the launch's flags or data cannot be used, 2 if the options are wrong.
"""

import argparse
import os
import sys
from pathlib import Path

from depo_plugin.commands import checks

BATCH = 64  # prompts from one look at the progress bar to the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `depo embed`."""
    parser.add_argument("launch", nargs="+", metavar="COMMAND", help="after --: the launch's own command line")


def run(args: argparse.Namespace) -> int:
    """Run `depo embed` and return the exit status."""
    flags = checks.flags_of(args.launch)
    if flags is None:
        print(f"depo embed: after --, give the launch's command line, with {checks.TRAINER} in it.", file=sys.stderr)
        return 2
    check, launch = checks.check_flags(flags)
    if launch is None:
        print(f"depo embed: {check.said}. To mend it: {check.fix}", file=sys.stderr)
        return 1
    if launch.depo.estimator.mode != "frozen":
        print("depo embed: --depo.estimator.mode finetune keeps no embeddings: nothing to do.")
        return 0
    prompts: list[str] = []

    def read() -> checks.Check:
        found = checks.check_data(launch, [], [])
        if found.status != checks.FAIL:
            prompts.extend(checks.prompt_dataset(launch, checks.rows_of(launch)).prompts)
            if not all(isinstance(prompt, str) for prompt in prompts):
                return checks.Check("data", checks.FAIL, "a prompt is not text", "remove it, or mend its row")
        return found

    data = checks.guarded("data", read)
    if data.status == checks.FAIL:
        print(f"depo embed: {data.said}. To mend it: {data.fix}", file=sys.stderr)
        return 1
    from depo_plugin.estimator.embedding_cache import folder_of
    from depo_plugin.estimator.encoder import EncoderError
    from depo_plugin.estimator.text_model import EstimatorError

    folder = folder_of(launch.depo.estimator.cache_dir, Path(launch.ckpt.path))
    try:
        lasting = fill(launch, prompts, folder)
    except (EncoderError, EstimatorError) as error:
        print(f"depo embed: {error}", file=sys.stderr)
        return 1
    if not lasting:
        print(f"depo embed: {folder} cannot keep the embeddings; the warning above says why.", file=sys.stderr)
        return 1
    print(f"{folder}: {len(prompts):,} prompts are embedded")
    return 0


def fill(launch, prompts: list[str], folder: Path) -> bool:
    """Embed prompts into the cache in `folder`, with a progress bar; return whether it kept them.

    launch: OpenRLHF's arguments after resolve(). Raises EncoderError or EstimatorError.
    """
    import torch
    from tqdm import tqdm

    from depo_plugin.estimator.text_model import TextModel
    from depo_plugin.settings import config

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = TextModel(config.from_namespace(launch.depo).estimator, launch.train.seed, cache_dir=folder)
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            model.embed(part)
            bar.update(len(part))
    return model.lasting
