"""The parser and validation of any release of OpenRLHF, in this process: no import of openrlhf, Ray or vLLM.

real_parser.py runs the whole module, which needs the CPU patch; that one exists for the newest releases only.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import sys
from types import SimpleNamespace

from depo_plugin import hooks


def launch(root, flags, monkeypatch):
    """Put flags through the parser and validation below `__main__` of a patched copy; return args, or what is said."""
    tree = ast.parse((root / "openrlhf/cli/train_ppo_ray.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    standard = [node for node in tree.body if isinstance(node, ast.Import)]
    spec = importlib.util.spec_from_file_location("openrlhf.utils.config", root / "openrlhf/utils/config.py")
    config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(config)
    for name, module in (("openrlhf", SimpleNamespace()), ("openrlhf.utils", SimpleNamespace())):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "openrlhf.utils.config", config)
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray.py", *flags])
    monkeypatch.setattr(hooks, "_process", hooks.Process())
    given = []
    names = {"depo_hooks": hooks, "train": given.append, "__name__": "__main__"}
    names |= {node.names[0].asname or node.names[0].name: None for node in standard}
    names |= {"argparse": argparse, "os": __import__("os"), "datetime": __import__("datetime").datetime}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(compile(ast.Module(block.body, []), "train_ppo_ray.py", "exec"), names)
        except (SystemExit, AssertionError, Exception) as stop:  # noqa: BLE001, whatever refuses a launch
            said.write(f"{type(stop).__name__} {stop}")
    return (given[0] if given else None), said.getvalue()
