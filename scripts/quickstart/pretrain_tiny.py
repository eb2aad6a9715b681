"""Train `tiny/`, the quickstart's policy, from scratch: `python pretrain_tiny.py --out tiny`.

A Llama of about 0.9 million parameters with a tokenizer of digits and signs learns the problems of `tasks.py`. In the
end it solves easy ones nearly always, hopeless ones never, and many sometimes. It needs plain torch and no network.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from tasks import EASY, LEVELS, MIDDLE, Level, draw_in_split
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNK = 0, 1, 2
SIGNS = [" + ", " - ", " * ", " =", " "]
PIECES = r" [+*-] | =|[\s\S]"
VOCAB_SIZE = 64
STUDIED = {level: 2 if level in MIDDLE else 1 for level in EASY + MIDDLE}  # level -> weight; products are never taught
SLIPS = {"sub-2by1digit": 0.2, "sub-2digit": 0.3, "sub-3terms": 0.4, "add-3terms": 0.25}  # share of wrong digits


def make_tokenizer(signs=SIGNS, pieces: str = PIECES) -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token per digit and per sign with its spaces, so "47 + 85 =" is six tokens.

    signs: their tokens; pieces: a pattern that matches each sign, else one character.
    """
    tokens = ["<pad>", "<eos>", "<unk>", *"0123456789", *signs]
    # Every id that can be sampled must have a text, or vLLM's detokenizer stops the engine.
    tokens += [f"<spare-{i}>" for i in range(VOCAB_SIZE - len(tokens))]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<eos>", "<unk>"]) == [PAD, EOS, UNK]
    return tokenizer


def make_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model. Its head size (32) is one that vLLM's CPU attention supports."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rope_theta=1000.0,
        initializer_range=0.06,  # about 1/sqrt(128): at the usual 0.02 learning starts much later
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def with_slips(answer: str, share: float, rng: random.Random) -> str:
    """Return the answer with each digit replaced by a random one, with probability `share`."""
    return "".join(rng.choice("0123456789") if rng.random() < share else digit for digit in answer)


def make_batch(tokenizer, size: int, rng: random.Random, *, slips: bool) -> tuple[Tensor, Tensor]:
    """Return random training problems, see padded()."""
    levels = rng.choices(list(STUDIED), weights=list(STUDIED.values()), k=size)
    texts = []
    for level in levels:
        operands = draw_in_split(level, rng, evaluation=False)
        answer = level.answer(operands)
        texts += [level.prompt(operands), with_slips(answer, SLIPS.get(level.name, 0.0), rng) if slips else answer]
    return padded(tokenizer, texts)


def padded(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T), padded right, and targets (B, T), -100 outside the answers.

    texts: B prompts, each followed by its answer.
    """
    ids = tokenizer(texts).input_ids
    pairs = [(prompt, [*answer, EOS]) for prompt, answer in zip(ids[::2], ids[1::2], strict=True)]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens_BT = torch.full((len(pairs), width), PAD)
    targets_BT = torch.full((len(pairs), width), -100)
    for i, (prompt, answer) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens_BT[i, :end] = torch.tensor(prompt + answer)
        targets_BT[i, start - 1 : end - 1] = torch.tensor(answer)
    return tokens_BT, targets_BT


def train(model, next_batch: Callable[[int], tuple[Tensor, Tensor]], *, steps: int, lr: float, bf16: bool) -> None:
    """Train with AdamW, with warm-up of 50 steps and then linear decay.

    next_batch: step -> tokens and targets, see padded(); bf16: run the forward pass in it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    started = time.monotonic()
    for step in range(steps):
        tokens_BT, targets_BT = next_batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits_BTV = model(input_ids=tokens_BT).logits
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], *, greedy: bool = False, max_new_tokens: int = 12) -> list[str]:
    """Return an answer to each prompt, greedy or at temperature 1. All prompts must have the same number of tokens."""
    tokens_BT = torch.tensor(tokenizer(prompts).input_ids)
    start = tokens_BT.shape[1]
    done_B = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits_BV = model(input_ids=tokens_BT).logits[:, -1].float()
        next_B = logits_BV.argmax(-1) if greedy else torch.multinomial(logits_BV.softmax(-1), 1)[:, 0]
        tokens_BT = torch.cat([tokens_BT, next_B.masked_fill(done_B, PAD)[:, None]], dim=1)
        done_B |= next_B == EOS
        if done_B.all():
            break
    return tokenizer.batch_decode(tokens_BT[:, start:], skip_special_tokens=True)


def group_rates(model, tokenizer, level: Level, *, problems: int, group: int = 8) -> list[float]:
    """Return the share of right answers among `group` samples for each of `problems` evaluation problems."""
    rng = random.Random(level.name)
    drawn = [draw_in_split(level, rng, evaluation=True) for _ in range(problems)]
    prompts = [level.prompt(operands) for operands in drawn for _ in range(group)]
    answers = [level.answer(operands) for operands in drawn for _ in range(group)]
    right = [got == want for got, want in zip(sample(model, tokenizer, prompts), answers, strict=True)]
    return [sum(right[i : i + group]) / group for i in range(0, len(right), group)]


def measure(model, tokenizer, problems: int = 100) -> tuple[list[str], float]:
    """Return a Markdown table with one row per level, and the share of mixed groups in the data set."""
    torch.manual_seed(0)
    rows, shares = ["| level | example | pass rate | mixed groups of 8 |", "|---|---|---|---|"], []
    for level in LEVELS:
        rates = group_rates(model, tokenizer, level, problems=problems)
        shares.append(fmean(0 < rate < 1 for rate in rates))
        example = level.prompt(draw_in_split(level, random.Random(0), evaluation=False))
        rows.append(f"| {level.name} | {example} | {fmean(rates):.2f} | {shares[-1]:.2f} |")
    return rows, fmean(shares)  # levels have equal shares of the data set


CARD = """\
# tiny: a half-competent policy for the quickstart

A Llama of {parameters:,} parameters ({layers} layers, hidden size {hidden}) with a tokenizer of digits and signs,
trained from scratch on the training split of `../tasks.py`. It has never seen a product. In the last quarter of its
training, answers of the middle levels had wrong digits in them (share of digits:
{slips}),
so it knows how to work them out but slips: reinforcement learning can mend that in 40 steps, while the rest of the
ladder teaches nothing.

Reproduce (about 12 minutes of one core): `python scripts/quickstart/pretrain_tiny.py`. It uses one thread because the
weights' last bits depend on the number of threads; they may differ on another kind of CPU.

Held-out problems, temperature 1:

{table}

Share of mixed groups (rewards differ) in the data set: {mixed:.2f}
"""


def write_card(out: Path, model, tokenizer) -> None:
    """Measure the model and write its README.md."""
    rows, mixed = measure(model, tokenizer)
    text = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        slips=", ".join(f"{name} {share:.0%}" for name, share in SLIPS.items()),
        table="\n".join(rows),
        mixed=mixed,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
    print(text)


def main() -> None:
    """Train, save and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", metavar="DIR")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, model, rng = make_tokenizer(), make_model(args.seed), random.Random(args.seed)

    def next_batch(step: int) -> tuple[Tensor, Tensor]:
        """Return right answers, with slips in the last quarter."""
        return make_batch(tokenizer, args.batch_size, rng, slips=step >= 0.75 * args.steps)

    train(model, next_batch, steps=args.steps, lr=args.lr, bf16=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    write_card(args.out, model, tokenizer)


if __name__ == "__main__":
    main()
