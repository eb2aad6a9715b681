"""Train `tiny/`, the quickstart's policy, from scratch: `python pretrain_tiny.py --out tiny`.

A Llama of about two million parameters with a tokenizer of digits and signs learns the ladder of `tasks.py` until it
is half-competent: easy problems nearly always right, hopeless ones never, a wide middle. Plain torch, no network.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from tasks import LEVELS, Level, answer_of, draw_in_split, prompt_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNK = 0, 1, 2
SIGNS = [" + ", " - ", " * ", " =", " "]
VOCAB_SIZE = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per digit and per sign with its spaces, so "47 + 85 =" is six tokens."""
    tokens = ["<pad>", "<eos>", "<unk>", *"0123456789", *SIGNS]
    tokens += [f"<spare-{i}>" for i in range(VOCAB_SIZE - len(tokens))]  # vLLM wants every id it samples to have a text
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" [+*-] | =|[\s\S]"), behavior="isolated")
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
    """Build the untrained model; its head size (32) is one that vLLM's CPU attention can do."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, level: Level, operands: list[int]) -> tuple[list[int], list[int]]:
    """Return the tokens of a problem and of its answer, the latter with <eos>."""
    prompt, answer = tokenizer([prompt_of(level, operands), answer_of(level, operands)]).input_ids
    return prompt, [*answer, EOS]


def make_batch(tokenizer: PreTrainedTokenizerFast, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Draw problems of the training split: tokens (B, T), padded right, and targets (B, T), -100 outside answers."""
    levels = rng.choices(LEVELS, weights=[TRAIN_WEIGHTS[level.name] for level in LEVELS], k=size)
    pairs = [encode(tokenizer, level, draw_in_split(level, rng, evaluation=False)) for level in levels]
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    tokens_BT = torch.full((size, width), PAD)
    targets_BT = torch.full((size, width), -100)
    for i, (prompt, answer) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(answer)
        tokens_BT[i, :end] = torch.tensor(prompt + answer)
        targets_BT[i, start - 1 : end - 1] = torch.tensor(answer)
    return tokens_BT, targets_BT


def train(model, tokenizer, *, steps: int, batch_size: int, lr: float, seed: int) -> None:
    """Supervised training with AdamW, a short warm-up and a cosine schedule."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - step / steps))
    started = time.monotonic()
    for step in range(1, steps + 1):
        tokens_BT, targets_BT = make_batch(tokenizer, batch_size, rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(input_ids=tokens_BT).logits
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


TRAIN_WEIGHTS = {
    "add-2digit": 2,
    "sub-2digit": 2,
    "add-3digit": 2,
    "sub-3digit": 2,
    "add-3terms": 2,
    "add-4digit": 2,
    "mul-3digit": 0.5,
    "mul-4digit": 0.5,
}


@torch.no_grad()
def sample(model, tokenizer, prompts: list[str], *, temperature: float = 1.0, max_new_tokens: int = 12) -> list[str]:
    """Sample one response per prompt; all prompts must have the same number of tokens. Temperature 0 is greedy."""
    tokens_BT = torch.tensor(tokenizer(prompts).input_ids)
    start = tokens_BT.shape[1]
    done_B = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits_BV = model(input_ids=tokens_BT).logits[:, -1].float()
        if temperature == 0:
            next_B = logits_BV.argmax(-1)
        else:
            next_B = torch.multinomial((logits_BV / temperature).softmax(-1), 1)[:, 0]
        tokens_BT = torch.cat([tokens_BT, next_B.masked_fill(done_B, PAD)[:, None]], dim=1)
        done_B |= next_B == EOS
        if done_B.all():
            break
    return tokenizer.batch_decode(tokens_BT[:, start:], skip_special_tokens=True)


def pass_rates(model, tokenizer, level: Level, *, problems: int = 64, group: int = 8, seed: int = 0) -> list[float]:
    """Return the share of right answers among `group` samples for each of `problems` evaluation problems."""
    rng = random.Random(seed)
    drawn = [draw_in_split(level, rng, evaluation=True) for _ in range(problems)]
    prompts = [prompt_of(level, operands) for operands in drawn for _ in range(group)]
    answers = [answer_of(level, operands) for operands in drawn for _ in range(group)]
    right = [got == want for got, want in zip(sample(model, tokenizer, prompts), answers, strict=True)]
    return [sum(right[i : i + group]) / group for i in range(0, len(right), group)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", metavar="DIR")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer, model = make_tokenizer(), make_model(args.seed)
    train(model, tokenizer, steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    torch.manual_seed(1)
    for level in LEVELS:
        rates = pass_rates(model, tokenizer, level)
        print(level.name, sum(rates)/len(rates), sum(0 < r < 1 for r in rates)/len(rates), [round(r*8) for r in rates[:30]])


if __name__ == "__main__":
    main()
