"""The quickstart's own parts: its Ray head, its install script and its summary."""

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

import cpu_ray  # noqa: E402
import summary  # noqa: E402

# Starts ACTORS actors at once. Prints the addresses on which the processes of the head's session (Ray's services and
# workers) listen, and the names of Ray's logs that complain of a port in use.
ACTORS = 6
DRIVER = f"""
import json, os, pathlib, psutil, ray
ray.init("auto", log_to_driver=False)

@ray.remote
class Actor:
    def session(self):
        return os.getsid(0)

actors = [Actor.remote() for _ in range({ACTORS})]
[session] = set(ray.get([actor.session.remote() for actor in actors], timeout=60))
own = [process for process in psutil.process_iter() if os.getsid(process.pid) == session]
sockets = [socket for process in own for socket in process.net_connections("inet")]
logs = pathlib.Path(ray._private.worker.global_worker.node.get_logs_dir_path()).iterdir()
clashes = [log.name for log in logs if log.is_file() and "already in use" in log.read_text(errors="replace")]
addresses = [socket.laddr for socket in sockets if socket.status == "LISTEN"]
print(json.dumps({{"addresses": addresses, "clashes": clashes}}))
"""


@pytest.mark.slow
def test_two_heads_at_once_share_no_port():
    with contextlib.ExitStack() as stack:
        heads = [stack.enter_context(cpu_ray.ray_head(cpu_ray.stack_env())) for _ in range(2)]
        command = [cpu_ray.PYTHON, "-c", DRIVER]
        drivers = [subprocess.Popen(command, env=env, stdout=-1, stderr=-1, text=True) for env in heads]
        outputs = [driver.communicate(timeout=120) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    runs = [json.loads(out) for out, _ in outputs]
    lowest_free = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for run in runs:
        assert run["clashes"] == []
        assert len(run["addresses"]) > ACTORS
        assert min(port for _, port in run["addresses"]) >= lowest_free
    first, second = ({tuple(address) for address in run["addresses"]} for run in runs)
    assert first.isdisjoint(second)


# Stands for Python in `python -m ray...start`: hangs, then ends, and then says what a head says.
HEAD = """#!/bin/bash
starts=$(dirname "$0")/starts
echo "$$" >>"$starts"
case $(wc -l <"$starts") in
    1) exec sleep 60 ;;
    2) echo "a port is in use" && exit 1 ;;
    *) echo "ray start --address='192.0.2.1:6379'" && exec sleep 60 ;;
esac
"""


@pytest.mark.parametrize("enough", [True, False])
def test_a_head_that_hangs_or_ends_is_started_anew(tmp_path, monkeypatch, enough):
    (tmp_path / "python").write_text(HEAD)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(cpu_ray, "PYTHON", str(tmp_path / "python"))
    monkeypatch.setattr(cpu_ray, "HEAD_START_S", 2.0)
    start = time.monotonic()
    if enough:
        with cpu_ray.ray_head(cpu_ray.stack_env()) as env:
            assert env["RAY_ADDRESS"] == "192.0.2.1:6379"
    else:
        monkeypatch.setattr(cpu_ray, "HEAD_STARTS", 2)
        with pytest.raises(RuntimeError, match=r"did not start 2 times.*\na port is in use"):
            cpu_ray.ray_head(cpu_ray.stack_env()).__enter__()
    started = [int(line) for line in (tmp_path / "starts").read_text().split()]
    assert len(started) == (3 if enough else 2)
    assert time.monotonic() - start < 40, "the first was not waited for to its end"
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)


@pytest.mark.parametrize("scripts", ["real/scripts", "link/scripts", "scripts_link"])
def test_root_is_the_real_folder_if_the_script_is_reached_through_a_link(tmp_path, scripts):
    (tmp_path / "real" / "scripts").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "scripts_link").symlink_to("real/scripts")
    shutil.copy(SCRIPTS / "setup_cpu.sh", tmp_path / "real" / "scripts")
    command = ["bash", "-c", 'source "$1/setup_cpu.sh" && echo "$root"', "bash", tmp_path / scripts]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == f"{(tmp_path / 'real').resolve()}\n"


def depo_step(number, **metrics):
    status = {"step": number, "rollout/reward_mean": 0.5, "timing/step_total": 2.0}
    return status | {f"depo/{name}": value for name, value in metrics.items()}


def depo_run(folder, steps):
    """Write what a run with these steps leaves in its folder; return the five lines."""
    rollouts = [{"prompt": "1 + 1 =", "reward": reward} for reward in (0.0, 1.0)]
    (folder / "data").mkdir()
    for name, rows in (("steps", steps), ("rollouts", rollouts), ("data/eval", [{"input": "2 + 2 ="}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return summary.lines(folder, "depo", warmup_steps=0, group_size=2)


def test_summary_leaves_out_steps_without_signal_and_metrics_that_are_absent(tmp_path):
    known = {"keep_rate": 0.5, "reward_unfiltered": 0.25, "rollouts_saved": 6.0}
    steps = [
        depo_step(1, effective_ratio=0.5, effective_gain=1.0, **known),  # warm-up
        depo_step(2, effective_ratio=0.6, effective_gain=2.0, **known),  # 0.6 / 2 = 30% without the filter
        depo_step(3, effective_ratio=0.0, effective_gain=0.0, **known | {"reward_unfiltered": 0.75}),
        depo_step(4),
    ]
    lines = depo_run(tmp_path, steps)
    assert lines[1].endswith("50% in warm-up, 50% after")
    assert lines[2].endswith("30% with the filter, 30% without (estimated on the same stream)")  # (60% + 0%) / 2
    assert lines[3].endswith("6 beside the 2 made")
    assert lines[4].endswith("0.250 -> 0.750 in training")
    assert summary.unfiltered_ratio(steps) == pytest.approx([0.5, 0.3, float("nan"), float("nan")], nan_ok=True)


def test_summary_of_a_run_whose_estimator_never_answered(tmp_path):
    lines = depo_run(tmp_path, [depo_step(1), depo_step(2)])
    assert lines[1].endswith("- in warm-up, - after")
    assert lines[2].endswith("- with the filter, - without (estimated on the same stream)")
    assert lines[3].endswith("- beside the 2 made")
    assert lines[4].endswith("- -> - in training")
