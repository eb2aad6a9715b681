"""Which layer of the frozen encoder tells most of difficulty? `python -m benchmarks.layers [--seeds N] [--json FILE]`

A ridge regression on each layer's mean-pooled embeddings of unit length is told noisy logits of some prompts and
predicts what the text says of others: the families of the replay's pools, and families that are in none of them.
Printed is the R² of the text's part, means over worlds, with the penalty that is best in hindsight.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.replay import texts
from depo_plugin import encode
from depo_plugin.model import load_encoder, masked_mean, token_limit

OTHERS = tuple(
    "ab binary_alternation bitwise_arithmetic count_primes decimal_arithmetic dice group_anagrams letter_jumble "
    "number_filtering number_format number_sorting polynomial_multiplication power_function "
    "propositional_logic ransom_note simple_geometry string_manipulation word_sorting".split()
)
SETS = {"the pools' families": texts.FAMILIES, "other families": OTHERS}
PROMPTS, TESTED = 3000, 1000
TOLD = (320, 640, 1280, 2000)
SPREAD, NOISE = 2.0, 2.0  # of the text's part and of what it does not tell
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
CHUNK = 24


def hidden_states(prompts: list[str]) -> np.ndarray:
    """Return each layer's mean-pooled hidden states, the input's first, float64 of unit length, (layers, N, E)."""
    encoder, tokenizer = load_encoder(None)
    encoder.eval()
    ids = encode.tokenize(tokenizer, prompts, token_limit(encoder, tokenizer, 512))
    order = np.argsort([len(one) for one in ids], kind="stable")
    shape = encoder.config.num_hidden_layers + 1, len(ids), encoder.config.hidden_size
    rows_LNE = np.empty(shape)
    with torch.inference_mode():
        for batch in (order[i : i + CHUNK] for i in range(0, len(order), CHUNK)):
            tokens, mask = encode.pad([ids[i] for i in batch], tokenizer.pad_token_id, torch.device("cpu"))
            states = encoder(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
            for rows_NE, state in zip(rows_LNE, states, strict=True):
                rows_NE[batch] = masked_mean(state, mask).numpy()
    return rows_LNE / np.linalg.norm(rows_LNE, axis=2, keepdims=True)


def r_squared(x_NE: np.ndarray, text_N: np.ndarray, logit_N: np.ndarray, told: int) -> float:
    """Return R² of text_N on the last TESTED prompts, told logit_N of the first ones."""
    x_in, x_out = x_NE[:told], x_NE[-TESTED:]
    mean, found = logit_N[:told].mean(), []
    for penalty in PENALTIES:
        system = x_in.T @ x_in + penalty * np.eye(x_in.shape[1])
        out = mean + x_out @ np.linalg.solve(system, x_in.T @ (logit_N[:told] - mean))
        found.append(1 - np.mean((out - text_N[-TESTED:]) ** 2) / text_N[-TESTED:].var())
    return float(max(found))


def main() -> None:
    """Print a table for each set of families; write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="worlds (%(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name, families in SETS.items():
        prompts, family_N, level_N = texts.gym_texts(PROMPTS, texts.default_cache(), families)
        states_LNE = hidden_states(prompts)
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
