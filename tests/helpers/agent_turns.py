"""Run an agent file in OpenRLHF's own loop of turns, with an engine that gives texts from a list.

agent_turns.py AGENT <'{"name": ["first answer", "second answer"], ...}'; prints what each talk came to.
"""

import asyncio
import json
import sys
from types import SimpleNamespace

import torch
from openrlhf.trainer.ray.vllm_engine import _load_agent_executor


class CharTokenizer:
    """One token per character, so that any text survives."""

    def __call__(self, text, **kwargs):
        return {"input_ids": torch.tensor([[ord(letter) for letter in text]], dtype=torch.long)}

    def decode(self, tokens, **kwargs):
        return "".join(map(chr, tokens))


class Engine:
    """Gives the next text, whatever it is asked."""

    def __init__(self, texts):
        self.texts, self.seen = list(texts), []

    async def generate(self, tokens, params, **kwargs):
        self.seen.append(tokens)
        text = self.texts.pop(0)
        output = SimpleNamespace(text=text, token_ids=[ord(letter) for letter in text], finish_reason="stop")
        return SimpleNamespace(outputs=[output])


async def talk(executor, texts):
    params = SimpleNamespace(max_tokens=100, logprobs=None)
    engine, tokenizer = Engine(texts), CharTokenizer()
    got = await executor.execute("2 + 2 = ?", "4", params, 1000, tokenizer, engine)
    words = got["observation_tokens"]
    spans = got["action_ranges"]
    between = words[spans[0][1] : spans[1][0]] if len(spans) > 1 else []
    return {
        "reward": got["reward"],
        "scores": got["scores"],
        "turns": got["extra_logs"]["turns"],
        "actions": [tokenizer.decode(words[start:end]) for start, end in spans],
        "feedback": tokenizer.decode(between),
        "left": len(engine.texts),
    }


def main():
    executor = _load_agent_executor(sys.argv[1])
    talks = json.load(sys.stdin)
    print(json.dumps({name: asyncio.run(talk(executor, texts)) for name, texts in talks.items()}))


if __name__ == "__main__":
    main()
