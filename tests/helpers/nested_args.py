"""OpenRLHF's nested arguments."""

from types import SimpleNamespace


def nested(values):
    """What OpenRLHF's hierarchize() makes of dotted names."""
    root = SimpleNamespace()
    for dest, value in values.items():
        *path, name = dest.split(".")
        node = root
        for part in path:
            node = node.__dict__.setdefault(part, SimpleNamespace())
        setattr(node, name, value)
    return root
