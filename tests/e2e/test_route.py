"""`depo route` before two real vLLM servers: the policy before a run and after it, and the run's estimator."""

import asyncio
import signal
import statistics
import time

import httpx
import openai
import pytest
from stack import QUICKSTART, problems

from benchmarks.vllm_server import routing, serving

THRESHOLD = 0.5


def saved(run):
    """The estimator's checkpoint of a run."""
    return run.out / "checkpoints" / "depo" / "global_step16.safetensors"


@pytest.fixture(scope="module")
def servers(depo_run):
    """The trained policy as the small model, the untrained one as the large."""
    with serving(depo_run.out / "model", QUICKSTART / "tiny") as both:
        yield both


@pytest.fixture(scope="module")
def router(depo_run, servers, tmp_path_factory):
    with routing(saved(depo_run), *servers, tmp_path_factory.mktemp("route") / "log", THRESHOLD) as server:
        yield server.url


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def test_each_prompt_gets_the_answer_of_the_model_it_was_sent_to(depo_run, servers, router):
    routed, sent = client_of(router), {"small": 0, "large": 0}
    for prompt in problems(depo_run.out / "data" / "eval.jsonl")[:24]:
        request = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
        raw = routed.completions.with_raw_response.create(model="any", **request)
        name = raw.headers["x-depo-model"]
        rate = float(raw.headers["x-depo-pass-rate"])  # rounded
        assert rate == pytest.approx(THRESHOLD, abs=6e-4) or (rate >= THRESHOLD) == (name == "small")
        server = servers[name == "large"]
        direct = client_of(server.url).completions.create(model=server.model, **request)
        assert raw.parse().choices[0].text == direct.choices[0].text
        sent[name] += 1
    assert min(sent.values()) >= 3  # both models were needed


def test_a_chat_and_a_stream(router):
    client, messages = client_of(router), [{"role": "user", "content": "12 + 3 ="}]
    options = {"model": "any", "messages": messages, "max_tokens": 24, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**options).choices[0].message.content
    parts = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**options, stream=True)]
    assert len(parts) > 5
    assert "".join(parts) == whole


def test_the_servers_refusals_come_through(router):
    answer = httpx.post(f"{router}/v1/completions", json={"prompt": "7 " * (5 << 20), "max_tokens": 8}, timeout=120)
    assert answer.status_code == 400  # ten megabytes are more than the model's context
    assert "maximum context length" in answer.text
    answer = httpx.post(f"{router}/v1/completions", json={"prompt": "1 + 1 =", "temperature": "warm"})
    assert answer.status_code in (400, 422)
    assert httpx.post(f"{router}/v1/completions", content=b"{").status_code == 400


def test_two_hundred_at_once(depo_run, router):
    prompts = (problems(depo_run.out / "data" / "eval.jsonl") * 4)[:200]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{router}/v1", api_key="none", max_retries=0, timeout=300) as client:
            asked = [client.completions.create(model="any", prompt=prompt, max_tokens=8) for prompt in prompts]
            return await asyncio.gather(*asked)

    assert all(answer.choices[0].text for answer in asyncio.run(ask()))
    end = time.monotonic() + 10  # a request ends a little after its client has the answer
    while "depo_route_in_flight 0.0" not in (metrics := httpx.get(f"{router}/metrics").text):
        assert time.monotonic() < end, metrics


def test_the_router_costs_little(depo_run, servers, router):
    request = {"prompt": problems(depo_run.out / "data" / "eval.jsonl")[0], "max_tokens": 1}
    times = {"direct": [], "routed": []}
    with httpx.Client(timeout=60) as client:
        chosen = client.post(f"{router}/v1/completions", json=request).headers["x-depo-model"]
        server = servers[chosen == "large"]
        model = server.model
        for i in range(60):
            one = request | {"prompt": f"{i} + 1 ="}
            for name, url in (("direct", server.url), ("routed", router)):
                start = time.perf_counter()
                client.post(f"{url}/v1/completions", json=one | {"model": model}).raise_for_status()
                times[name].append(time.perf_counter() - start)
    added = statistics.median(times["routed"]) - statistics.median(times["direct"])
    assert added < 0.25  # two busy cores; benchmarks/route.py measures it


def tokens_of(stream, at_the_first):
    """Return how many tokens a whole stream had, by its last part; calls a function when the first has come."""
    next(stream)
    at_the_first()
    *_, last = stream
    return last.usage.completion_tokens


def test_a_server_that_is_killed_and_a_stop_with_requests_in_progress(depo_run, servers, tmp_path):
    with serving(depo_run.out / "model") as (doomed,):
        pair = [doomed, servers[1]]
        with routing(saved(depo_run), *pair, tmp_path / "log", THRESHOLD) as router:
            client, long = client_of(router.url), {"model": "any", "max_tokens": 48, "stream": True}
            long |= {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
            with pytest.raises(openai.APIError, match="the small model broke off"):
                tokens_of(client.completions.create(prompt="12 + 3 =", **long), doomed.kill)
            with pytest.raises(openai.APIStatusError) as gone:
                client.completions.create(model="any", prompt="12 + 3 =")
            assert gone.value.status_code == 502
            assert "the small model cannot be asked" in gone.value.message
            # SIGTERM: the stream goes on to its end, and then the process ends.
            stream = client.completions.create(prompt="4811 * 9402 =", **long)
            assert tokens_of(stream, lambda: router.process.send_signal(signal.SIGTERM)) == 48
            assert router.process.wait(30) == -signal.SIGTERM
    log = (tmp_path / "log").read_text()
    assert "/v1/completions: large, 200, pass rate 0." in log
    assert "Traceback" not in log
