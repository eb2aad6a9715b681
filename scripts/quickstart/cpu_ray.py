"""Start a Ray head of our own on a machine without a GPU, and launch OpenRLHF on it.

Other people's processes are not touched. The head has its own port, folder and session; only processes in that
session, or with this run's mark in their environment, are ended.
"""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "DEPO_CPU_RUN"


def without_space(folder: Path) -> Path:
    """Return the folder, or a link to it if its path has a space: Ray splits its workers' command at spaces.

    The link is not removed, so that the next run finds DeepSpeed's compiled operators under the same path.
    """
    if " " not in str(folder):
        return folder
    digest = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    link = Path(tempfile.gettempdir()) / f"depo-venv-{os.getuid()}-{digest}"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(folder)
    if os.readlink(link) != str(folder):
        raise RuntimeError(f"{link} is not a link to {folder}; remove it")
    return link


VENV = without_space(ROOT / ".venv")
PYTHON = str(VENV / "bin" / "python")
PATCHED = VENV / "openrlhf-patched"

# See the docs of vLLM's CPU backend and DeepSpeed's accelerators. Ray must not hide GPUs that exist only as a count.
STACK_ENV = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # else a process of its own for the worker, which spins on a core
    "OMP_NUM_THREADS": "1",  # several processes share few cores, and more threads would wait for each other
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TORCH_EXTENSIONS_DIR": str(VENV / "torch_extensions"),
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    # Ray's two metrics servers take a free port each, so that several heads can run on one machine.
    "AUTOSCALER_METRIC_PORT": "0",
    "DASHBOARD_METRIC_PORT": "0",
    # Ray waits 30 or 60 seconds for a head's processes: too short on a busy machine.
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "600",
    "RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT": "600",
    "RAY_raylet_start_wait_time_s": "600",
}

STALE_S = 900  # a compilation takes one to five minutes
HEAD_STARTS, HEAD_START_S = 3, 240  # on a busy machine a head takes a minute; now and then one hangs for ever

# Flags of `ray start` whose default is a fixed port, or a fixed range of ports; 0 takes any free port.
FREE_PORTS = "--port 0 --min-worker-port 0 --max-worker-port 0 --dashboard-port 0 --dashboard-agent-listen-port 0"


def stack_env(python_path=PATCHED, **extra) -> dict[str, str]:
    """Return the environment for Ray and the launch; python_path: the folder that holds the patched openrlhf."""
    paths = [str(python_path), os.environ.get("PYTHONPATH", "")]
    return (
        os.environ
        | STACK_ENV
        | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "PATH": f"{VENV / 'bin'}{os.pathsep}{os.environ['PATH']}",
            **extra,
        }
    )


def param_dtype() -> str:
    """Return bf16, OpenRLHF's default, if this CPU has instructions for it; else fp32, then 4 times faster."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def own_processes(mark: str, session: int) -> list[int]:
    """Return the ids of this run's processes: with its mark, or in the head's session (Ray's agents hide the mark)."""
    needle = f"{MARK}={mark}".encode()
    found = []
    for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            zombie = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if not zombie and (os.getsid(pid) == session or needle in environ):
                found.append(pid)
    return found


def end_own(mark: str, session: int, grace_s: float = 10.0) -> None:
    """End every process of this run: SIGTERM, then SIGKILL for those still there after grace_s seconds."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + grace_s
        for pid in own_processes(mark, session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        while own_processes(mark, session) and time.monotonic() < deadline:
            time.sleep(0.2)


@contextlib.contextmanager
def ray_head(env: dict[str, str], num_gpus: int = 2, num_cpus: int = 8, dashboard: bool = False):
    """Run a Ray head that reports num_gpus GPUs although there are none. Yield the environment for the launch.

    dashboard: whether the head takes jobs (`ray job submit`), at the same RAY_ADDRESS. It starts ten more processes.
    At the end, also after an exception or Ctrl-C, end every process of the run. Raise RuntimeError if Ray fails.
    """
    mark = uuid.uuid4().hex
    env = env | {MARK: mark}
    for lock in (VENV / "torch_extensions").glob("*/lock"):  # a compilation that was killed: DeepSpeed waits for ever
        if time.time() - lock.stat().st_mtime > STALE_S:
            lock.unlink(missing_ok=True)
    command = f"-m ray.scripts.scripts start --head --block --num-cpus {num_cpus} --num-gpus {num_gpus} {FREE_PORTS}"
    flags = [f"--include-dashboard={str(dashboard).lower()}", "--disable-usage-stats"]
    for attempt in range(1, HEAD_STARTS + 1):
        with _started([PYTHON, *command.split(), *flags], env, mark) as (address, said):
            if address:
                yield env | {"RAY_ADDRESS": address}
                return
        if attempt == HEAD_STARTS:
            raise RuntimeError(f"Ray did not start {HEAD_STARTS} times. It said last:\n{said}")


@contextlib.contextmanager
def _started(command: list[str], env: dict[str, str], mark: str):
    """Start a head; yield its address, None if it ends or hangs, and the end of its output. End its processes."""
    temporary = tempfile.TemporaryDirectory(prefix="depo-ray-", ignore_cleanup_errors=True)
    with temporary as temp_dir, socket.socket() as reserved:
        # Ray's client server does not accept port 0. It can listen on a port that this process has only reserved.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("", 0))
        log = Path(temp_dir) / "head.log"
        flags = ["--ray-client-server-port", str(reserved.getsockname()[1]), f"--temp-dir={temp_dir}"]
        with log.open("w") as out:
            head = subprocess.Popen(
                [*command, *flags], env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            deadline = time.monotonic() + HEAD_START_S
            while not (address := re.search(r"--address='([\d.:]+)'", log.read_text())):
                if head.poll() is not None or time.monotonic() > deadline:
                    break
                time.sleep(0.2)
            yield address and address[1], log.read_text()[-2000:]
        finally:
            end_own(mark, head.pid)
            head.wait()


def compile_operators() -> None:
    """Compile DeepSpeed's CPU operators ahead, which the first launch else does: about five minutes of one core."""
    code = "from deepspeed.ops.op_builder.cpu import *; CPUAdamBuilder().load(); ShareMemCommBuilder().load()"
    subprocess.run(
        [PYTHON, "-c", code], env=stack_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True
    )


def start_training(flags: list[str], env: dict[str, str], cwd=None) -> subprocess.Popen:
    """Start OpenRLHF's own entry point with these flags; its output is piped, line by line."""
    command = [PYTHON, "-u", "-m", "openrlhf.cli.train_ppo_ray", *flags]
    return subprocess.Popen(
        command,
        env=env,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
