"""What the estimator believes of a served prompt: from a request's body to a pass rate of the small model.

The belief comes from the prompt's text alone: a served prompt has no history.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from depo_plugin.estimator.estimator import DifficultyEstimator

logger = logging.getLogger(__name__)

SERVED = "\0served"  # stands for the label, so that no served prompt is taken for one of the training run
WAITING = 1024  # most requests that wait for a rating
BATCH = 16  # most requests that are rated together
PROMPTS = 64  # most prompts of one request that are rated
WAIT_S = 5.0  # longest wait for a rating
REMEMBERED = 100_000  # embeddings that are kept for prompts that come again

Template = Callable[[list[dict]], str]


class Unrated(Exception):
    """The request has no pass rate. reason: one word, for metrics and the log."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def plain_text(messages: list[dict]) -> str:
    """Return the messages' texts joined by newlines: the prompt of a launch without a chat template."""
    return "\n".join(map(_content, messages))


def chat_template(tokenizer: str) -> Template:
    """Return a function from messages to the prompt that --data.apply_chat_template makes of them.

    tokenizer: path or hub name. Raises OSError or ValueError if it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    if not loaded.chat_template:
        raise ValueError(f"{tokenizer} has no chat template. Leave out --tokenizer, or name another one.")

    def render(messages: list[dict]) -> str:
        texts = [message | {"content": _content(message)} for message in messages]
        return loaded.apply_chat_template(texts, tokenize=False, add_generation_prompt=True)

    return render


def _content(message: dict) -> str:
    """Return a message's text; images and other parts are left out."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))


def prompts_of(request: dict[str, Any], template: Template) -> list[str]:
    """Return the texts that a request asks about: of a chat one, of a completion one or several.

    Raises Unrated if there is none: token ids, no prompt, too many, or messages that the template refuses.
    """
    if "messages" in request:
        try:
            return [template(request["messages"])]
        except Exception as error:  # noqa: BLE001 - the template is the model's own code, and upstream judges the request
            logger.debug("messages cannot be read: %s", error)
            raise Unrated("messages") from None
    prompt = request.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise Unrated("prompt")
    if len(prompts) > PROMPTS:
        raise Unrated("many")
    return prompts


class Rater:
    """Believed pass rates, computed in one thread for several requests at a time."""

    def __init__(self, estimator: DifficultyEstimator):
        """Take the estimator. run() must go on for as long as rate() is used."""
        self._estimator = estimator
        self._waiting: asyncio.Queue[tuple[list[str], asyncio.Future[float]]] = asyncio.Queue(WAITING)
        self._thread = ThreadPoolExecutor(1)
        self._embedded = 0

    async def rate(self, prompts: list[str]) -> float:
        """Return the lowest believed pass rate of these prompts, in (0, 1).

        Raises Unrated if too many requests wait, if it takes longer than WAIT_S, or if the estimator fails.
        """
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((prompts, future))
            return await asyncio.wait_for(future, WAIT_S)
        except asyncio.QueueFull:
            raise Unrated("queue") from None
        except (TimeoutError, asyncio.TimeoutError):
            raise Unrated("timeout") from None

    async def run(self) -> None:
        """Rate what is waiting, until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(prompts, future) for prompts, future in batch if not future.done()]  # it may have given up
            texts = [prompt for prompts, _ in batch for prompt in prompts]
            try:
                rates = await asyncio.get_running_loop().run_in_executor(self._thread, self.rates, texts)
            except Exception:  # the estimator is advice: its faults must not end the service
                logger.exception("The estimator failed: these requests go to the large model.")
                rates = None
            for prompts, future in batch:
                if future.done():
                    pass
                elif rates is None:
                    future.set_exception(Unrated("estimator"))
                else:
                    future.set_result(min(rates[: len(prompts)]))
                rates = rates and rates[len(prompts) :]

    def rates(self, prompts: list[str]) -> list[float]:
        """Return the believed pass rates of these prompts, each in (0, 1)."""
        if self._embedded > REMEMBERED:
            self._estimator.text.forget()
            self._embedded = 0
        self._embedded += len(prompts)
        scores = self._estimator.score(prompts, [SERVED] * len(prompts))
        return (scores.a / (scores.a + scores.b)).tolist()
