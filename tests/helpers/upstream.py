"""A server with vLLM's addresses whose answers a test chooses: for faults that a real vLLM cannot be asked for.

The request's `user` says what to do: "slow", "stream", "cut" or "half" (a stream, or another answer, that ends
half-way), "error" (status 400). Without one it answers.
"""

import asyncio
import contextlib
import json
import threading

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from benchmarks.vllm_server import free_port


class Cut(Exception):
    """Ends a response half-way."""


class Upstream:
    """The app, and what it was asked."""

    def __init__(self, model):
        self.model, self.asked, self.headers, self.left = model, [], [], 0
        self.headers_of_models = {}
        paths = ("/v1/completions", "/v1/chat/completions")
        routes = [Route(path, self.answer, methods=["POST"]) for path in paths]
        self.app = Starlette(routes=[*routes, Route("/v1/models", self.models)])

    async def models(self, request):
        self.headers_of_models = dict(request.headers)
        return JSONResponse({"data": [{"id": self.model}]})

    async def answer(self, request):
        body = await request.json()
        self.asked.append(body)
        self.headers.append(dict(request.headers))
        if body["model"] != self.model:
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, 404)
        how = body.get("user")
        if how == "error":
            return JSONResponse({"error": {"message": "as asked"}}, 400)
        if how == "slow":
            for _ in range(600):
                await asyncio.sleep(0.05)
                if await request.is_disconnected():
                    self.left += 1
                    break
        if how in ("stream", "cut"):
            return StreamingResponse(self.events(how), media_type="text/event-stream")
        if how == "half":
            return StreamingResponse(self.events("cut"), media_type="application/json")
        answer = {"model": self.model, "choices": [{"text": "4", "finish_reason": "stop"}]}
        return JSONResponse(answer, headers={"set-cookie": f"session={len(self.asked)}; Path=/"})

    async def events(self, how):
        for i in range(3):
            yield f"data: {json.dumps({'model': self.model, 'choices': [{'text': str(i)}]})}\n\n"
            await asyncio.sleep(0.05)
        if how == "cut":
            raise Cut
        yield "data: [DONE]\n\n"


@contextlib.contextmanager
def serving(app):
    """Serve an ASGI app in a thread; yields its address."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
