"""vLLM's OpenAI-compatible server on the CPU, and `depo route` before it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cpu_ray

START_S = 600  # longest start, on a busy machine
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"  # models without a template of their own


@dataclass(frozen=True)
class Server:
    """A server that answers. url: without /v1; kill(): ends it as a crash would, with all of its processes."""

    url: str
    process: subprocess.Popen

    @property
    def model(self) -> str:
        """The name that a model's server has for its model."""
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as answer:
            return json.load(answer)["data"][0]["id"]

    def kill(self) -> None:
        """End every process of the server by SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serving(*models: Path) -> Iterator[list[Server]]:
    """Serve models, each by a server of its own on loopback, all started at once; end them at the end.

    Raises RuntimeError with the end of the output if one does not start.
    """
    with contextlib.ExitStack() as stack:
        started = []
        for model in models:
            log = stack.enter_context(tempfile.TemporaryFile("w+"))
            port = free_port()
            words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
            words += ["--port", str(port), "--chat-template", CHAT]
            words += ["--enforce-eager", "--max-num-seqs", "64"]
            process = subprocess.Popen(
                [cpu_ray.PYTHON, *words], env=cpu_ray.stack_env(), stdout=log, stderr=log, start_new_session=True
            )
            server = Server(f"http://127.0.0.1:{port}", process)
            stack.callback(server.kill)
            started.append((server, log))
        for server, log in started:
            _wait(server, log)
        yield [server for server, _ in started]


@contextlib.contextmanager
def routing(checkpoint: Path, small: Server, large: Server, log: Path, threshold: float = 0.5) -> Iterator[Server]:
    """Run `depo route` as a user would; its output goes to `log`."""
    port = free_port()
    words = ["-m", "depo_plugin", "route", str(checkpoint), "--port", str(port)]
    words += ["--small", small.url, "--large", large.url, "--threshold", str(threshold)]
    with log.open("w+") as out:
        process = subprocess.Popen(
            [cpu_ray.PYTHON, *words], env=cpu_ray.stack_env(), stdout=out, stderr=out, start_new_session=True
        )
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            _wait(server, out)
            yield server
        finally:
            server.kill()


def _wait(server: Server, log) -> None:
    """Return when the server answers; raise RuntimeError with the end of its output if it ends, or after START_S."""
    end = time.monotonic() + START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        if server.process.poll() is not None or time.monotonic() > end:
            log.seek(0)
            raise RuntimeError(f"{server.url} did not start:\n{log.read()[-3000:]}")
        time.sleep(0.5)
