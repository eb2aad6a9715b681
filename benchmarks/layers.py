"""Which layer of the frozen encoder predicts difficulty best? `python -m benchmarks.layers [--seeds N] [--json FILE]`

For each layer, a ridge regression on mean-pooled unit embeddings learns from noisy logits of some prompts, and
predicts the text's part of the logit of other prompts. Prompts are from the families of the replay's pools, and from
other families. Prints the mean R² over worlds, for the penalty with the best R² on the tested prompts.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.replay import texts

OTHERS = tuple(
    "ab binary_alternation bitwise_arithmetic count_primes decimal_arithmetic dice group_anagrams letter_jumble "
    "number_filtering number_format number_sorting polynomial_multiplication power_function "
    "propositional_logic ransom_note simple_geometry string_manipulation word_sorting".split()
)
SETS = {"the pools' families": texts.FAMILIES, "other families": OTHERS}
PROMPTS, TESTED = 3000, 1000
TOLD = (320, 640, 1280, 2000)
SPREAD, NOISE = 2.0, 2.0  # standard deviations of the text's part of a logit, and of the rest
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


def r_squared(x_NE: np.ndarray, text_N: np.ndarray, logit_N: np.ndarray, told: int) -> float:
    """Return R² of predicting text_N on the last TESTED prompts, after learning logit_N of the first `told` ones."""
    found = texts.ridge_predictions(x_NE[:told], logit_N[:told], x_NE[-TESTED:], PENALTIES)
    return float(max(1 - np.mean((out - text_N[-TESTED:]) ** 2) / text_N[-TESTED:].var() for out in found))


def main() -> None:
    """Print a table for each set of families, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="worlds (%(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name, families in SETS.items():
        prompts, family_N, level_N = texts.gym_texts(PROMPTS, texts.default_cache(), families)
        states_LNE = texts.layer_means(prompts).astype(np.float64)
        states_LNE /= np.linalg.norm(states_LNE, axis=2, keepdims=True)
        for seed in range(args.seeds):
            rng = np.random.default_rng(seed)
            effect, slope = rng.normal(size=len(families)), rng.uniform(0.5, 1.5, size=len(families))
            text_N = effect[family_N] - slope[family_N] * level_N
            text_N *= SPREAD / text_N.std()
            logit_N = text_N + rng.normal(0.0, NOISE, PROMPTS)
            for layer, x_NE in enumerate(states_LNE):
                values = {told: r_squared(x_NE, text_N, logit_N, told) for told in TOLD}
                rows += [{"set": name, "seed": seed, "layer": layer, "told": k, "r2": r2} for k, r2 in values.items()]
        print(f"\n| {name}, layer | " + " | ".join(f"{told:,} prompts" for told in TOLD) + " |\n|" + "---|" * 5)
        for layer in range(len(states_LNE)):
            found = [[r["r2"] for r in rows if (r["set"], r["layer"], r["told"]) == (name, layer, k)] for k in TOLD]
            print(f"| {layer or 'input'} | " + " | ".join(f"{np.mean(values):.3f}" for values in found) + " |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
