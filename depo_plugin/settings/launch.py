"""What a launch was set to, for `depo report`: DEPO's settings and OpenRLHF's, without what can hold a secret."""

import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from depo_plugin import __version__
from depo_plugin.settings import config

SECTIONS = ("actor", "algo", "data", "eval", "rollout", "train", "vllm", "ds")  # never logger, reward or ckpt
SECRET = re.compile("key|token|secret|password", re.IGNORECASE)  # in a name, at any depth


def settings_of(args: Any) -> dict[str, Any]:
    """Return version, DEPO's effective settings, and SECTIONS of the launch without texts whose name is SECRET.

    args: OpenRLHF's nested arguments after hooks.resolve.
    """
    return {
        "version": __version__,
        "depo": {"shadow": args.depo.shadow} | config.to_dict(config.from_namespace(args.depo)),
        "launch": {name: _plain(getattr(args, name)) for name in SECTIONS if hasattr(args, name)},
    }


def write(path: Path, args: Any) -> None:
    """Write settings_of(args) as JSON. Raise OSError, with an older file left as it was, if that fails."""
    text = json.dumps(settings_of(args), indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a namespace or dict as dict, all else as text; no text whose name is SECRET."""
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        shown = {
            name: part for name, part in value.items() if not (isinstance(part, str) and SECRET.search(str(name)))
        }
        return {str(name): _plain(part) for name, part in shown.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
