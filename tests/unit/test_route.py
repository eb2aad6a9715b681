"""`depo route`: the threshold, the rating of requests, and the proxy before two servers that can fail."""

import asyncio
import json
import logging
import socket
import time

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from upstream import Upstream, serving

from benchmarks.vllm_server import free_port
from depo_plugin.commands import cli
from depo_plugin.estimator import checkpoint
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.messages import Label
from depo_plugin.routing import curve, proxy, rater
from depo_plugin.settings.config import load_config

pytestmark = pytest.mark.slow

SERVE = ["--small", "http://a", "--large", "http://b", "--threshold", "0.5"]
EASY, HARD = "12 + 3 =", "4811 * 9402 ="  # what the small model solves, and what it does not


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(checkpoint, settings) of a run in which short sums were solved and long products were not."""
    cfg = load_config(None, {})
    estimator, rng = DifficultyEstimator(cfg, 8, seed=0), np.random.default_rng(0)
    for _ in range(15):
        labels = []
        for easy in (True, False) * 8:
            a, b = rng.integers(*((10, 99) if easy else (1000, 9999)), 2)
            right = int(rng.binomial(8, 0.9 if easy else 0.05))
            text = f"{a} {'+' if easy else '*'} {b} ="
            labels.append(Label(text, str(a), right / 8, None, 8, 0 < right < 8, None))
        estimator.learn(labels)
    folder = tmp_path_factory.mktemp("route")
    checkpoint.save(folder / "global_step15", estimator.state_dict())
    return folder / "global_step15.safetensors", cfg


@pytest.fixture(scope="module")
def estimator(saved):
    path, cfg = saved
    return DifficultyEstimator.from_checkpoint(path, cfg)


class Service:
    """A router before two servers."""

    def __init__(self, router, url, small, large):
        self.router, self.url, self.small, self.large = router, url, small, large
        self.client = httpx.Client(base_url=url, timeout=60)

    def ask(self, prompt, how=None):
        return self.client.post("/v1/completions", json={"model": "any", "prompt": prompt, "user": how})

    def count(self, name, **labels):
        """A metric's value once no request is in progress: one ends a little after its client has the answer."""
        end = time.monotonic() + 10
        while "in_flight 0.0" not in (text := self.client.get("/metrics").text) and time.monotonic() < end:
            time.sleep(0.02)
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        found = [one for one in samples if one.name == f"depo_route_{name}" and labels.items() <= one.labels.items()]
        return sum(one.value for one in found)


@pytest.fixture
def service(estimator):
    small, large = Upstream("s"), Upstream("l")
    with serving(small.app) as at, serving(large.app) as other:
        router = proxy.Router(rater.Rater(estimator), at + "/v1", other, 0.5, rater.plain_text, timeout_s=4.0)
        with serving(proxy.app(router)) as url:
            yield Service(router, url, small, large)


def test_easy_prompts_go_to_the_small_model_and_hard_ones_to_the_large(service, estimator):
    easy, hard = service.ask(EASY), service.ask(HARD)
    assert [one.json()["model"] for one in (easy, hard)] == ["s", "l"]
    assert [one.headers["x-depo-model"] for one in (easy, hard)] == ["small", "large"]
    believed = rater.Rater(estimator).rates([EASY, HARD])
    assert [float(one.headers["x-depo-pass-rate"]) for one in (easy, hard)] == pytest.approx(believed, abs=6e-4)
    assert believed[0] > 0.6
    assert believed[1] < 0.4
    assert service.count("requests_total", model="small", status="200") == 1
    assert service.count("requests_total", model="large", status="200") == 1
    assert service.count("pass_rate_count") == 2
    assert service.count("in_flight") == 0


def test_a_chat_goes_by_its_messages_and_several_prompts_by_the_hardest(service):
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": HARD}]
    for content, model in ((EASY, "s"), (HARD, "l"), (parts, "l")):
        request = {"model": "any", "messages": [{"role": "user", "content": content}]}
        assert service.client.post("/v1/chat/completions", json=request).json()["model"] == model
    assert service.ask([EASY, EASY]).json()["model"] == "s"
    assert service.ask([EASY, HARD]).json()["model"] == "l"


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": [[1], [2]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({}, "prompt"),
        ({"messages": "no list of messages", "prompt": "ok"}, "messages"),
        ({"prompt": ["ok"] * 65}, "many"),
    ],
)
def test_what_cannot_be_rated_goes_to_the_large_model(service, request_, reason):
    service.client.post("/v1/completions", json={"model": "any"} | request_)
    assert len(service.large.asked) == 1
    assert service.small.asked == []
    assert service.count("unrated_total", reason=reason) == 1


def test_the_request_reaches_the_server_as_it_was_but_for_the_models_name(service):
    more = {"temperature": 0.1, "seed": 2**62 + 1, "logit_bias": {"5": -1e-7}, "stop": "ünïcode \ud83d"}
    sent = {"model": "any", "prompt": EASY, **more}
    headers = {"authorization": "Bearer secret", "x-request-id": "7", "accept-encoding": "br", "te": "trailers"}
    answer = service.client.post("/v1/completions", content=json.dumps(sent), headers=headers)
    assert answer.status_code == 200
    assert service.small.asked == [sent | {"model": "s"}]
    (got,) = service.small.headers
    assert (got["authorization"], got["x-request-id"], got["accept-encoding"]) == ("Bearer secret", "7", "br")
    assert "te" not in got
    assert service.small.headers_of_models["authorization"] == "Bearer secret"
    assert service.small.headers_of_models["accept-encoding"] == "identity"  # the router reads that answer itself


def test_a_cookie_goes_to_the_client_that_it_is_for_and_to_no_other(service):
    body = {"prompt": EASY}
    assert httpx.post(f"{service.url}/v1/completions", json=body).cookies["session"] == "1"
    own = {"cookie": "session=own"}
    assert httpx.post(f"{service.url}/v1/completions", json=body, headers=own).cookies["session"] == "2"
    httpx.post(f"{service.url}/v1/completions", json=body)
    assert [headers.get("cookie") for headers in service.small.headers] == [None, "session=own", None]


def half_sent(service):
    """A connection on which a request has begun."""
    client = socket.create_connection(("127.0.0.1", httpx.URL(service.url).port), timeout=30)
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
    return client


def test_a_request_that_never_becomes_whole_gives_its_place_back(service, monkeypatch):
    monkeypatch.setattr(proxy, "SILENCE_S", 0.3)
    with half_sent(service) as client:
        answer = client.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"nothing came for 0.3 s" in answer
    assert service.count("in_flight") == 0


def test_a_client_that_goes_away_before_its_request_is_whole_is_counted_as_that(service):
    half_sent(service).close()
    end = time.monotonic() + 10
    while not service.count("requests_total", status="499") and time.monotonic() < end:
        time.sleep(0.02)
    assert service.count("requests_total", status="499") == 1
    assert service.count("broken_total", model="none") == 1


def test_a_stream_is_passed_on_as_it_comes(service):
    start, times = time.perf_counter(), []
    request = {"model": "any", "prompt": EASY, "user": "stream", "stream": True}
    with service.client.stream("POST", "/v1/completions", json=request) as answer:
        lines = []
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            times.append(time.perf_counter() - start)
    assert [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]] == ["0", "1", "2"]
    assert lines[-1] == "data: [DONE]"
    assert times[-1] - times[0] > 0.08  # three pauses of 0.05 s: not gathered first


def test_a_servers_own_errors_are_passed_on(service):
    answer = service.ask(EASY, "error")
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "as asked"}})


def test_a_server_that_breaks_off_is_not_taken_for_a_whole_answer(service):
    client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.APIError, match="the small model broke off"):
        list(client.completions.create(model="any", prompt=EASY, user="cut", stream=True))
    with pytest.raises(httpx.RemoteProtocolError):
        service.ask(EASY, "half")
    assert service.count("broken_total", model="small") == 2
    assert service.ask(EASY).status_code == 200


def test_time_outs_and_servers_that_are_gone_have_openais_form(service, estimator):
    answer = service.ask(EASY, "slow")
    assert answer.status_code == 504
    assert answer.json()["error"]["message"].startswith("the small model did not answer in time: ReadTimeout")
    at = f"http://127.0.0.1:{free_port()}"
    with serving(proxy.app(proxy.Router(rater.Rater(estimator), at, at, 0.5, rater.plain_text))) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": EASY})
        assert answer.status_code == 502
        assert "the small model cannot be asked: ConnectError" in answer.json()["error"]["message"]


def test_a_client_that_goes_away_ends_the_servers_work(service):
    with pytest.raises(httpx.ReadTimeout):
        service.client.post("/v1/completions", json={"prompt": EASY, "user": "slow"}, timeout=1.5)
    end = time.monotonic() + 2  # below the router's own time-out
    while not service.small.left and time.monotonic() < end:
        time.sleep(0.02)
    assert service.small.left == 1
    assert service.count("requests_total", status="499") == 1


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "the request is no JSON"),
        (b"\xff", 400, "the request is no JSON"),
        (b"[" * 100_000, 400, "the request is no JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b"x" * ((64 << 20) + 1), 413, "longer than 64 MB"),
    ],
)
def test_a_bad_request_gets_one_clear_error(service, body, status, said):
    answer = service.client.post("/v1/completions", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in answer.json()["error"]["message"]
    assert service.small.asked == service.large.asked == []


def test_ten_megabytes_and_two_hundred_at_once(service):
    long = service.ask("7 " * (5 << 20) + HARD)
    assert long.json()["model"] == "l"

    async def many():
        async with httpx.AsyncClient(
            base_url=service.url, timeout=60, limits=httpx.Limits(max_connections=200)
        ) as client:
            asked = [client.post("/v1/completions", json={"prompt": (EASY, HARD)[i % 2]}) for i in range(200)]
            return [one.json()["model"] for one in await asyncio.gather(*asked)]

    assert asyncio.run(many()) == ["s", "l"] * 100
    assert service.count("unrated_total") == 0


def test_too_many_requests_are_refused_and_a_full_queue_is_passed_by(service, monkeypatch):
    monkeypatch.setattr(proxy, "IN_FLIGHT", 0)
    assert service.ask(EASY).status_code == 503
    monkeypatch.undo()
    monkeypatch.setattr(rater, "WAIT_S", 0.0)
    assert service.ask(EASY).json()["model"] == "l"
    assert service.count("unrated_total", reason="timeout") == 1


def test_a_fault_of_the_estimator_sends_all_to_the_large_model(service, estimator, monkeypatch):
    monkeypatch.setattr(type(estimator), "score", lambda *_: 1 / 0)
    assert service.ask(EASY).json()["model"] == "l"
    assert service.count("unrated_total", reason="estimator") == 1
    monkeypatch.undo()
    assert service.ask(EASY).json()["model"] == "s"


def test_a_server_that_came_back_with_another_model_is_asked_by_its_new_name(service):
    assert service.ask(EASY).status_code == 200
    service.small.model = "other"
    assert service.ask(EASY).status_code == 404
    assert service.ask(EASY).json()["model"] == "other"


def test_every_request_has_a_line(service, caplog):
    caplog.set_level(logging.INFO, logger="depo_plugin.routing.proxy")
    service.ask(EASY)
    service.ask(HARD, "error")
    service.client.post("/v1/completions", content=b"{")
    end, lines = time.monotonic() + 5, []
    while len(lines) < 3 and time.monotonic() < end:  # a line follows the answer
        lines = [one.getMessage() for one in caplog.records if one.name.endswith("proxy")]
    assert lines[0].startswith("/v1/completions: small, 200, pass rate 0.")
    assert lines[1].startswith("/v1/completions: large, 400, pass rate 0.")
    assert "broke" not in "".join(lines)
    assert ", the request is no JSON: Expecting property name" in lines[2]


def test_other_addresses(service):
    assert service.client.get("/v1/models").json()["data"][0]["id"] == "depo-route"
    assert service.client.get("/health").text == "ok\n"
    assert service.client.get("/v1/completions").status_code == 405
    assert service.client.post("/v1/embeddings").status_code == 404


def test_embeddings_are_not_kept_for_ever(estimator, monkeypatch):
    monkeypatch.setattr(rater, "REMEMBERED", 3)
    one = rater.Rater(estimator)
    for i in range(10):
        one.rates([f"{i} + 1 ="])
    assert len(estimator.text._cache) <= 4


# ── The threshold ──


def sample(n=400, seed=0):
    """A small model whose pass rate is known with noise, and a large one that solves nine of ten."""
    rng = np.random.default_rng(seed)
    true = rng.uniform(0, 1, n)
    believed = np.clip(true + rng.normal(0, 0.1, n), 0.01, 0.99)
    return curve.Sample(believed, rng.binomial(1, true).astype(float), rng.binomial(1, 0.9, n).astype(float))


def test_the_curve_by_hand():
    s = curve.Sample(np.array([0.9, 0.1, 0.5, 0.3]), np.array([1.0, 0, 0, 1]), np.array([1.0, 1, 1, 0]))
    # From small's 2 of 4: prompt 1 gains, prompt 3 loses, prompt 2 gains, prompt 0 is the same.
    assert curve.accuracies(curve.by_difficulty(s), s).tolist() == [0.5, 0.75, 0.5, 0.75, 0.75]
    assert curve.accuracies(curve.by_gain(s), s).tolist() == [0.5, 0.75, 1.0, 1.0, 0.75]
    assert curve.threshold_of(s, curve.Target(share=0.25)) == 0.3
    assert curve.threshold_of(s, curve.Target(share=0.0)) == 0.1
    assert curve.threshold_of(s, curve.Target(share=1.0)) == 1.0
    assert curve.threshold_of(s, curve.Target(accuracy=0.7)) == 0.3
    got = curve.outcome(0.3, s)
    assert got == (0.25, 0.75, 0.75 - (0.75 * 0.5 + 0.25 * 0.75))


def test_requests_of_one_pass_rate_go_together():
    s = curve.Sample(np.array([0.2, 0.2, 0.5, 0.8]), np.array([0.0, 0, 1, 1]), np.ones(4))
    for target in (0.6, 0.75, 1.0):  # one of the first two would reach .75, but no threshold parts them
        assert curve.threshold_of(s, curve.Target(accuracy=target)) == 0.5
        assert curve.choose(s, curve.Target(accuracy=target), seed=0).labelled.accuracy == 1.0
    assert curve.threshold_of(s, curve.Target(accuracy=0.5)) == 0.2


def test_the_threshold_keeps_what_it_promises_on_new_requests(monkeypatch):
    monkeypatch.setattr(curve, "REPLICATES", 300)
    target, inside = curve.Target(share=0.3), np.zeros(3)
    for seed in range(100):
        choice = curve.choose(sample(seed=seed), target, seed=0)
        new = curve.outcome(choice.threshold, sample(seed=1000 + seed))
        inside += [low <= one <= high for low, one, high in zip(choice.low, new, choice.high, strict=True)]
        assert choice.labelled.share == pytest.approx(0.3, abs=0.01)
        assert choice.random < choice.labelled.accuracy < choice.oracle
        assert choice.low.lead > 0
    assert (inside >= 89).all()  # 95 are expected, 2.2 their standard deviation
    assert (inside <= 99).any()  # intervals that hold everything tell nothing


def test_a_blind_estimator_is_told_of():
    s = sample()
    blind = s._replace(p_N=np.random.default_rng(1).uniform(0, 1, 400))
    choice = curve.choose(blind, curve.Target(share=0.5), seed=0)
    assert choice.low.lead < 0 < choice.high.lead
    assert "[Warning] This may be no better than chance" in curve.sentences(choice)[-1]
    assert "[Warning]" not in "".join(curve.sentences(curve.choose(s, curve.Target(share=0.5), seed=0)))
    for target in (curve.Target(share=0.0), curve.Target(share=1.0), curve.Target(accuracy=0.4)):
        assert "[Warning]" not in "".join(curve.sentences(curve.choose(blind, target, seed=0)))  # nothing is chosen


def labelled_file(path, rows=300):
    rng = np.random.default_rng(3)
    with path.open("w") as out:
        for i in range(rows):
            easy = bool(i % 2)
            a, b = rng.integers(*((10, 99) if easy else (1000, 9999)), 2)
            row = {"small": float(rng.binomial(1, 0.9 if easy else 0.05)), "large": float(rng.binomial(1, 0.95))}
            text = f"{a} {'+' if easy else '*'} {b} ="
            row |= {"messages": [{"role": "user", "content": text}]} if i % 3 else {"prompt": text}
            out.write(json.dumps(row) + "\n")
    return path


def test_calibrate_says_what_the_threshold_does_and_draws_it(saved, tmp_path, capsys):
    path, _ = saved
    out = tmp_path / "a curve"
    argv = ["route", str(path), "--calibrate", str(labelled_file(tmp_path / "l.jsonl")), "--out", str(out)]
    assert cli.main([*argv, "--accuracy", "0.9"]) == 0
    said = capsys.readouterr().out
    row = json.loads((out / "curve.json").read_text())
    assert row["labelled"]["accuracy"] >= 0.9
    assert row["labelled"]["share"] < 0.6  # half of the requests are hard
    assert row["low"]["share"] <= row["labelled"]["share"] <= row["high"]["share"]
    assert len(row["curves"]["share"]) == len(row["curves"]["oracle"]) == 301
    assert said.startswith(f"Threshold {row['threshold']:.6g}: ")
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*argv, "--accuracy", "1"]) == 1
    assert "no threshold reaches an accuracy of 1: the best is 0.9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--small", "http://a"], 2, "--large, --threshold: missing"),
        (["--small", "a", "--large", "http://b", "--threshold", "0.5"], 2, "--small a: must be http://HOST:PORT"),
        (["--small", "http://", "--large", "http://b", "--threshold", "0.5"], 2, "--small http://: must be http"),
        (["--small", "http://b/x", "--large", "http://b", "--threshold", "0"], 2, "--small http://b/x: must be"),
        (["--small", "http://b:x", "--large", "http://b", "--threshold", "0"], 2, "--small http://b:x: must be"),
        (["--small", "http://b:99999", "--large", "http://b", "--threshold", "0"], 2, "http://b:99999: must be"),
        (["--small", "http://b?x=1", "--large", "http://b", "--threshold", "0"], 2, "--small http://b?x=1: must be"),
        ([*SERVE, "--port", "99999"], 2, "--port 99999: must be from 0 to 65535"),
        ([*SERVE, "--timeout", "0"], 2, "--timeout 0: must be a finite number above 0"),
        ([*SERVE, "--timeout", "nan"], 2, "--timeout nan: must be a finite number above 0"),
        (["--calibrate", "x.jsonl", "--share", "0.5"], 2, "--calibrate needs --out DIR"),
        (["--calibrate", "x.jsonl", "--out", "o"], 2, "either --share S or --accuracy A"),
        (["--calibrate", "x.jsonl", "--out", "o", "--share", "0.5", "--threshold", "0.1"], 2, "--threshold: with"),
        (["--share", "0.5", "--small", "http://a"], 2, "--share: needs --calibrate FILE"),
        (["--calibrate", "x.jsonl", "--out", "o", "--share", "0.5"], 1, "x.jsonl"),
        (["--calibrate", "bad.jsonl", "--out", "o", "--share", "0.5"], 1, "bad.jsonl, line 2: no field 'large'"),
        (["--calibrate", "rate.jsonl", "--out", "o", "--share", "0.5"], 1, "numbers from 0 to 1"),
    ],
)
def test_wrong_options_and_files(saved, tmp_path, capsys, monkeypatch, words, status, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "small": 1, "large": 1}\n{"prompt": "a", "small": 1}\n')
    (tmp_path / "rate.jsonl").write_text('{"prompt": "a", "small": 1, "large": 2}\n')
    path, _ = saved
    assert cli.main(["route", str(path), *words]) == status
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken_ends_it_with_status_1(saved, caplog):
    caplog.set_level(logging.ERROR, logger="uvicorn.error")  # the servers of other tests say nothing
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["route", str(saved[0]), *SERVE, "--port", str(taken.getsockname()[1])]) == 1
    assert "address already in use" in caplog.text


def test_a_checkpoint_that_cannot_be_used(saved, tmp_path, capsys):
    assert cli.main(["route", str(tmp_path / "none.safetensors"), *SERVE]) == 1
    assert "none.safetensors: cannot be read" in capsys.readouterr().err
    path, _ = saved
    assert cli.main(["route", str(path), *SERVE, "--depo.estimator.depth", "0.5"]) == 1
    assert "--depo.estimator.depth) was 4, is 3" in capsys.readouterr().err
