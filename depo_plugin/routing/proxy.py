"""An OpenAI-compatible proxy that sends each request to the small or to the large model.

    client -> read the request -> pass rate of the small model -> small, if it is at least the threshold, else large
           <- the model's own answer, chunk by chunk

A request without a pass rate goes to the large model. What a model's server answers is passed on as it is, errors
included; the proxy's own errors have OpenAI's form.
"""

import asyncio
import contextlib
import json
import logging
import time
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import anyio
import anyio.lowlevel
import httpx
from anyio.abc import TaskGroup
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from depo_plugin.routing.rater import Rater, Template, Unrated, prompts_of

logger = logging.getLogger(__name__)

PATHS = ("/v1/chat/completions", "/v1/completions")
MODEL = "depo-route"  # what /v1/models lists; requests may name any model
BODY_BYTES = 64 << 20  # longest request
IN_FLIGHT = 1024  # most requests at a time
CONNECT_S = 5.0
KEEPALIVE_S = 2.0  # of an idle connection to a model's server; uvicorn, and so vLLM, closes it after 5 s
SILENCE_S = 30.0  # longest silence of a client that has not sent its whole request
# Headers of one connection, not of the message (RFC 9110, 7.6.1), and those that are made anew.
OF_CONNECTION = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te"}
OF_CONNECTION |= {"trailer", "transfer-encoding", "upgrade"}
OF_REQUEST = OF_CONNECTION | {"host", "content-length", "content-type", "expect"}
OF_ANSWER = (b"accept", b"if-", b"range")  # about the client's own answer: not sent when we ask for /v1/models


class Refused(Exception):
    """The proxy answers by itself: with this status, OpenAI's type of error, and this text."""

    def __init__(self, status: int, kind: str, said: str):
        super().__init__(said)
        self.status, self.body = status, {"message": said, "type": kind, "param": None, "code": status}


class Upstream:
    """One model's server."""

    def __init__(self, name: str, url: str, client: httpx.AsyncClient):
        """name: "small" or "large"; url: with or without /v1."""
        self.name = name
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = client
        self._model: str | None = None

    async def send(self, path: str, headers: list[tuple[bytes, bytes]], request: dict[str, Any]) -> httpx.Response:
        """Send a request under the name that this server has for its model; return its answer, whose body waits.

        Raises Refused if the server cannot be reached or does not answer in time.
        """
        try:
            if self._model is None:
                known = [(name, value) for name, value in headers if not name.startswith(OF_ANSWER)]
                listed = await self._client.get(f"{self._url}/v1/models", headers=known)
                self._model = listed.json()["data"][0]["id"] if listed.is_success else None
            named = request | ({"model": self._model} if self._model else {})
            body = await run_in_threadpool(lambda: json.dumps(named).encode())
            sent = self._client.build_request(
                "POST", self._url + path, headers=[*headers, (b"content-type", b"application/json")], content=body
            )
            answer = await self._client.send(sent, stream=True)
        except httpx.TimeoutException as error:
            raise Refused(504, "timeout", f"the {self.name} model did not answer in time: {_said(error)}") from None
        except (httpx.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise Refused(502, "bad_gateway", f"the {self.name} model cannot be asked: {_said(error)}") from None
        if answer.status_code == 404:
            self._model = None  # the server may have been started anew with another model
        return answer


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


class Metrics:
    """Counters and histograms for Prometheus."""

    def __init__(self):
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry, "namespace": "depo_route"}
        self.requests = Counter("requests", "Answered requests", ["model", "status"], **made)
        self.unrated = Counter("unrated", "Requests that went to the large model unrated", ["reason"], **made)
        self.broken = Counter("broken", "Answers that a server or client broke off", ["model"], **made)
        self.in_flight = Gauge("in_flight", "Requests in progress", **made)
        tenths = [i / 10 for i in range(1, 10)]
        self.pass_rate = Histogram("pass_rate", "Believed pass rates of the small model", buckets=tenths, **made)
        fine = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
        self.rated = Histogram("rating_seconds", "Time to read and rate a request", buckets=fine, **made)


@dataclass
class Told:
    """What the log says of one request.

    model: "small", "large", or "none" if the proxy answered itself
    rate: the believed pass rate
    rated_s: seconds that it took
    status: of the answer; 499 if the client went away before it
    broken: why an answer did not reach its end; empty if it did
    refused: what the proxy itself said instead of an answer
    """

    model: str = "none"
    rate: str = "unknown"
    rated_s: float = 0.0
    status: int = 499
    broken: str = "the client went away"
    refused: str = ""


class Router:
    """The endpoint of PATHS."""

    def __init__(
        self, rater: Rater, small: str, large: str, threshold: float, template: Template, timeout_s: float = 600.0
    ):
        """small, large: addresses; threshold: in [0, 1]; timeout_s: longest silence of a model's server."""
        self._rater, self._threshold, self._template = rater, threshold, template
        self.metrics = Metrics()
        self._in_flight = 0
        self.metrics.in_flight.set_function(lambda: self._in_flight)
        timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=IN_FLIGHT, keepalive_expiry=KEEPALIVE_S)
        plain = {"accept-encoding": "identity"}  # for clients that name no encoding; the answer's is passed on
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))  # one client's must not go out with another's
        self._client = httpx.AsyncClient(
            headers=plain, timeout=timeout, limits=limits, cookies=no_cookies, trust_env=False
        )
        self._small, self._large = (Upstream(*one, self._client) for one in (("small", small), ("large", large)))

    @contextlib.asynccontextmanager
    async def running(self, _app: Starlette):
        """Rate requests inside; Starlette's lifespan."""
        task = asyncio.create_task(self._rater.run())
        try:
            yield
        finally:
            task.cancel()
            await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; stop if the client goes away."""
        told, start = Told(), time.perf_counter()
        self._in_flight += 1
        try:
            async with anyio.create_task_group() as group:
                await self._answer(scope, receive, send, told, group)
                group.cancel_scope.cancel()
        finally:
            self._in_flight -= 1
            self._tell(scope["path"], told, time.perf_counter() - start)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, told: Told, group: TaskGroup) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name.decode("latin-1") not in OF_REQUEST]
        try:
            if self._in_flight > IN_FLIGHT:
                raise Refused(503, "overloaded", f"{IN_FLIGHT} requests are in progress: try again later")
            request = await _parsed(await _whole(receive, group.cancel_scope))
            group.start_soon(_cancel_if_gone, receive, group.cancel_scope)
            upstream = await self._chosen(request, told)
            answer = await upstream.send(scope["path"], headers, request)
        except Refused as refused:
            told.status = refused.status
            await JSONResponse({"error": refused.body}, refused.status)(scope, _nothing, send)
            told.broken, told.refused = "", str(refused)
            return
        told.status = answer.status_code
        try:
            await self._pass_on(answer, upstream, send, told)
        finally:
            with anyio.CancelScope(shield=True):
                await answer.aclose()

    async def _chosen(self, request: dict[str, Any], told: Told) -> Upstream:
        """Return the model for a request: the small one if it is believed to do well enough, else the large one."""
        start = time.perf_counter()
        try:
            rate = await self._rater.rate(await run_in_threadpool(prompts_of, request, self._template))
        except Unrated as unrated:
            self.metrics.unrated.labels(unrated.reason).inc()
            told.rate = f"unknown ({unrated.reason})"
            chosen = self._large
        else:
            self.metrics.pass_rate.observe(rate)
            told.rate = f"{rate:.3f}"
            chosen = self._small if rate >= self._threshold else self._large
        told.model, told.rated_s = chosen.name, time.perf_counter() - start
        self.metrics.rated.observe(told.rated_s)
        return chosen

    async def _pass_on(self, answer: httpx.Response, upstream: Upstream, send: Send, told: Told) -> None:
        """Send a server's answer to the client as it comes.

        If the server breaks off, the client's connection is closed before the answer's end, so that nobody takes half
        an answer for a whole one. A stream of events ends with an error event.
        """
        raw = [
            (name, value) for name, value in answer.headers.raw if name.decode("latin-1").lower() not in OF_CONNECTION
        ]
        raw += [(b"x-depo-model", upstream.name.encode()), (b"x-depo-pass-rate", told.rate.encode())]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": raw})
        try:
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except httpx.HTTPError as error:
            told.broken = f"the {upstream.name} model broke off: {_said(error)}"
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                event = json.dumps({"error": Refused(502, "bad_gateway", told.broken).body})
                await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        told.broken = ""

    def _tell(self, path: str, told: Told, seconds: float) -> None:
        """Write the request's line and count it."""
        if told.broken:
            self.metrics.broken.labels(told.model).inc()
        self.metrics.requests.labels(told.model, told.status).inc()
        ended = f", {told.broken or told.refused}" if told.broken or told.refused else ""
        logger.info(
            "%s: %s, %s, pass rate %s, rated in %.0f ms, %.0f ms in all%s",
            *(path, told.model, told.status, told.rate, 1000 * told.rated_s, 1000 * seconds, ended),
        )


async def _whole(receive: Receive, scope: anyio.CancelScope) -> bytearray:
    """Return the request's body, or its beginning if it is longer than BODY_BYTES.

    Raises Refused if nothing comes for SILENCE_S. Cancels the answer if the client goes away.
    """
    body, more = bytearray(), True
    while more and len(body) <= BODY_BYTES:
        with anyio.move_on_after(SILENCE_S) as silence:
            message = await receive()
        if silence.cancelled_caught:
            raise Refused(408, "timeout", f"nothing came for {SILENCE_S:g} s, and the request is not whole")
        if message["type"] == "http.disconnect":
            scope.cancel()
            await anyio.lowlevel.checkpoint()  # ends here
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


async def _cancel_if_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Cancel the answer when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _parsed(body: bytearray) -> dict[str, Any]:
    if len(body) > BODY_BYTES:
        raise Refused(413, "invalid_request_error", f"the request is longer than {BODY_BYTES >> 20} MB")
    try:
        request = await run_in_threadpool(json.loads, body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "invalid_request_error", f"the request is no JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refused(400, "invalid_request_error", "the request must be a JSON object")
    return request


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def app(router: Router) -> Starlette:
    """Return the service: PATHS, /v1/models, /metrics and /health."""

    def models(_request: Request) -> Response:
        return JSONResponse(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "openrlhf-depo"}]}
        )

    def metrics(_request: Request) -> Response:
        return Response(generate_latest(router.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    routes = [Route(path, router, methods=["POST"]) for path in PATHS]
    routes += [Route("/v1/models", models), Route("/metrics", metrics), Route("/health", health)]
    return Starlette(routes=routes, lifespan=router.running)
