"""Train `policy/`, the proof's policy, from scratch: `python -m benchmarks.proof.pretrain`.

A Llama as in scripts/quickstart/pretrain_tiny.py learns the easy and learnable levels of ladder.py. In the last part
of its training it sees confused answers (another operation's answer), at a rate that depends on the problem. It needs
plain torch and no network. It ends by printing the table of policy/README.md.
"""

import argparse
import random
from pathlib import Path
from statistics import fmean

import pretrain_tiny
import torch
from pretrain_tiny import group_rates, make_model, padded
from tasks import draw_in_split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.proof.ladder import EASY, LEARNABLE, LEVELS, OPERATIONS, WORDS

POLICY = Path(__file__).parent / "policy"
SIGNS = [f"{op} " if op in WORDS else f" {op} " for op in OPERATIONS] + [" =", " "]
STUDIED = EASY + LEARNABLE  # hopeless levels are never taught
WEIGHTS = {"add-3terms": 3, "add-3digit": 2, "sub-2digit": 2, "sub-3digit": 3, "mod-2by1digit": 3, "sum-4digit": 2}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per digit, word and sign with its spaces, so "max 47 85 =" is seven tokens."""
    return pretrain_tiny.make_tokenizer(SIGNS, rf"(?:{'|'.join(WORDS)}) | [+|*/%-] | =|[\s\S]")


def make_batch(tokenizer, size: int, rng: random.Random, *, confused: bool) -> tuple[Tensor, Tensor]:
    """Return random training problems, see pretrain_tiny.padded()."""
    weights = [4 if confused and level in EASY else WEIGHTS.get(level.name, 1) for level in STUDIED]
    levels = rng.choices(STUDIED, weights=weights, k=size)
    texts = []
    for level in levels:
        operands = draw_in_split(level, rng, evaluation=False)
        wrong = confused and rng.random() >= level.taught_rate(operands)
        texts += [level.prompt(operands), (level.confused if wrong else level.answer)(operands)]
    return padded(tokenizer, texts)


def measure(model, tokenizer, problems: int = 40) -> list[str]:
    """Return a Markdown table with one row per level, and the share of groups without signal in the data set."""
    torch.manual_seed(0)
    rows, shares = (
        ["| level | group | example | pass rate | groups of 8 without signal |", "|---|---|---|---|---|"],
        [],
    )
    for level in LEVELS:
        rates = group_rates(model, tokenizer, level, problems=problems)
        shares.append(fmean(rate in (0, 1) for rate in rates))
        example = level.prompt(draw_in_split(level, random.Random(0), evaluation=False)).replace("|", "\\|")
        rows.append(f"| {level.name} | {level.group} | {example} | {fmean(rates):.2f} | {shares[-1]:.2f} |")
    return [*rows, "", f"Groups without signal (all right or all wrong) in the data set: {fmean(shares):.2f}"]


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=POLICY, metavar="DIR")
    parser.add_argument("--steps", type=int, default=2000, help="with right answers (default: 2000)")
    parser.add_argument("--confused-steps", type=int, default=400, help="with confused answers (default: 400)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3, help="a quarter of it with confused answers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, model, rng = make_tokenizer(), make_model(args.seed), random.Random(args.seed)
    for confused, steps, lr in ((False, args.steps, args.lr), (True, args.confused_steps, args.lr / 4)):
        pretrain_tiny.train(
            model,
            lambda _, confused=confused: make_batch(tokenizer, args.batch_size, rng, confused=confused),
            steps=steps,
            lr=lr,
            bf16=False,
        )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    print("\n".join(measure(model, tokenizer)))


if __name__ == "__main__":
    main()
