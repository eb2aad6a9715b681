"""OpenRLHF's real parser and validation, without Ray: what would a launch with these flags run with?

Everything of `python -m openrlhf.cli.train_ppo_ray` lies below `__main__`, so it is run as that, in a process of its
own, up to the first thing that train() does after Ray is up, get_strategy(args). That call is where this stops.
Nothing of OpenRLHF is replaced but that one function and the answer to "is Ray up?".

    outcomes = launches([["--train.seed", "1"], ...], patched_copy)     # one slow import for all of them
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How one launch ended.

    args: OpenRLHF's validated arguments, {"train": {"seed": 1}, ...} (inf as "inf", tuples as lists), or None where
    the launch was refused. status: the exit status then; None with args. error: the exception's name and text, where
    it was one. out, err: what was printed. ray_wanted: whether train() was reached, which starts Ray first of all.
    """

    args: dict | None
    status: int | None
    error: str | None
    out: str
    err: str
    ray_wanted: bool


def launches(flag_lists: list[list[str]], copy: Path) -> list[Outcome]:
    """Put each list of flags through the OpenRLHF in the folder `copy` (a patched copy, as `depo patch` writes it)."""
    env = os.environ | {"PYTHONPATH": f"{copy}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(flag_lists),
        env=env,
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert Path(report["openrlhf"]).is_relative_to(copy), report["openrlhf"]
    return [Outcome(**outcome) for outcome in report["outcomes"]]


# ---- In the process of its own


class _Stop(Exception):
    """Carries the validated arguments out of train()."""


def _plain(value):
    if isinstance(value, SimpleNamespace):
        return {name: _plain(part) for name, part in vars(value).items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return str(value)
    return value


def _launch(flags: list[str]) -> dict:
    import runpy

    import ray

    asked = []
    ray.is_initialized = lambda: asked.append(True) or True
    outcome = {"args": None, "status": None, "error": None}
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["train_ppo_ray.py", *flags]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
        except _Stop as stop:
            outcome["args"] = _plain(stop.args[0])
        except SystemExit as stop:
            outcome["status"] = stop.code
        except Exception as error:  # noqa: BLE001, whatever refuses a launch is an outcome
            outcome["status"], outcome["error"] = 1, f"{type(error).__name__}: {error}"
    return outcome | {"out": out.getvalue(), "err": err.getvalue(), "ray_wanted": bool(asked)}


def _main() -> None:
    flag_lists = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        import openrlhf.utils

        def stop(args):
            raise _Stop(args)

        openrlhf.utils.get_strategy = stop
        outcomes = [_launch(flags) for flags in flag_lists]
    sys.stdout.write(json.dumps({"openrlhf": openrlhf.utils.__file__, "outcomes": outcomes}))


if __name__ == "__main__":
    _main()
