"""`depo watch`: what a view says, and a run that is followed while it writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import made_run
import numpy as np
import pytest
from rich.console import Console

from depo_plugin.commands import cli
from depo_plugin.report import live
from depo_plugin.report.numbers import Numbers
from depo_plugin.report.runs import RunFiles

DEADLINE_S = 30


def shown(folder, now=None, width=100):
    """A view as text, as in a pipe."""
    files = RunFiles(folder)
    files.update()
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(live.view(Numbers(files, "run"), time.time() if now is None else now))
    return capture.get()


def test_a_view_says_what_the_metrics_say(tmp_path):
    """Two steps: 8 of 16 and 8 of 24 prompts kept, 6 and 4 of 8 groups with a signal, half of that without."""
    rows = [
        {"step": 1, "depo/kept": 8, "depo/scanned": 16, "depo/effective_ratio": 0.75, "depo/effective_gain": 2.0},
        {"step": 2, "depo/kept": 8, "depo/scanned": 24, "depo/effective_ratio": 0.5, "depo/effective_gain": 2.0},
    ]
    for row in rows:
        row |= {"depo/pred_mean": 0.5, "depo/target_mean": 0.625, "depo/reward_unfiltered": 0.25}
        row |= {"depo/time_blocked": 2.0, "depo/time_step": 10.0, "depo/forced": 4}
        row |= {"depo/kept/\x1b[31mred": 5, "depo/rejected/\x1b[31mred": 0, "depo/pass_rate/\x1b[31mred": 1.0}
    made_run.dump(tmp_path / "metrics.jsonl", rows)
    text = shown(tmp_path)
    assert "\x1b" not in text
    lines = {line[:24].strip(): line[24:].split() for line in text.splitlines()}
    assert lines["rolled out"] == ["40%", "▅▃"]  # 16 of 40; places round(7·0.5) = 4 and round(7·0.333) = 2
    assert lines["groups with a signal"][0] == "62%"
    assert lines["without the filter"][0] == "31%"
    assert lines["pass rate, all prompts"][0] == "0.25"
    assert lines["predicted pass rate"][0] == "0.50"
    assert lines["observed"][0] == "0.62"
    assert lines["?[31mred"] == ["1.00", "██"]
    assert "2 s a step" in text
    assert "20% of the time" in text
    assert "! 50% of the groups filled batches up" in text
    assert "! Training waits 20% of the time for the estimator." in text


def test_a_late_step_is_a_warning(tmp_path):
    folder = made_run.write(tmp_path)
    written = (folder / "metrics.jsonl").stat().st_mtime
    assert "No new step" not in shown(folder, written + 400)  # a step takes 82 to 90 s
    text = shown(folder, written + 600, width=200)
    assert "! No new step for 10 min (a step takes about 8" in text
    assert "last step 10 min ago" in text


@pytest.mark.parametrize("width", [40, 80])
def test_a_view_fits_the_terminal(tmp_path, width):
    lines = shown(made_run.write(tmp_path), width=width).splitlines()
    assert len(lines) >= 12
    assert max(map(len, lines)) <= width
    assert any("<scr" in line for line in lines)


def test_sparklines():
    assert live.sparkline(np.array([0.0, 0.5, np.nan, 1.0, 7.0])) == "▁▅ ██"
    assert [live.duration(s) for s in (42.4, 180, 7500)] == ["42 s", "3 min", "2 h 05 min"]


def test_once(tmp_path, capsys):
    made_run.write(tmp_path)
    assert cli.main(["watch", str(tmp_path), "--once"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"\S+: step 40, started ", out)
    assert "\x1b" not in out
    (tmp_path / "empty").mkdir()
    assert cli.main(["watch", str(tmp_path / "empty"), "--once"]) == 1
    assert "looked for depo/metrics.jsonl" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert cli.main(["watch", str(tmp_path), "--once"]) == 1
    assert "pip install 'openrlhf-depo[report]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_waited_for_and_followed_until_ctrl_c(tmp_path):
    """In a pipe: one line while it waits, a view for each new step, status 0 and no traceback at the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "depo_plugin.commands.cli", "watch", str(tmp_path / "run"), "--interval", "0.1"]
    with out.open("wb") as file:
        env = os.environ | {"PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
    try:
        wait_for(out, "Waiting: ")
        path = tmp_path / "run" / "model" / "depo" / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        with path.open("a") as file:
            for step in (1, 2):
                line = json.dumps({"step": step, "depo/kept": 8, "depo/scanned": 16}) + "\n"
                file.write(line[:9])
                file.flush()
                time.sleep(0.2)
                file.write(line[9:])
                file.flush()
                wait_for(out, f"run: step {step}, last step")
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    text = out.read_text()
    assert text.count("Waiting: ") == 1
    assert "\x1b" not in text
    assert "Traceback" not in text


def wait_for(path, text):
    deadline = time.monotonic() + DEADLINE_S
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.05)
