"""Strict YAML for settings: files and flags read numbers in the same way, and no key may be set twice."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml


class YamlError(ValueError):
    """The file cannot be used as settings. The text names the line, if known, and the reason."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is set twice (PyYAML silently keeps the last) and reads 2e-4 as a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text if _Loader or plain YAML 1.1 would read it as anything but text."""


# PyYAML reads YAML 1.1: there 2e-4 is a text (no dot), 1:30 is 90, 010 is 8, and 2026-02-06 is a date.
_LITERALS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _LITERALS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9_]*)"),
    ("tag:yaml.org,2002:float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"),
):
    yaml.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"), _Loader, _Dumper)


def parse(text: str) -> Any:
    """Return the value of one YAML document, of plain types only. Raise yaml.YAMLError or ValueError if invalid."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def flag_value(text: str) -> Any:
    """Return a flag's text as YAML reads a value, but never None: argparse uses None if a flag is not given."""
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if value is None else value


def dump(value: Any) -> str:
    """Return one value as YAML, on one line."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None  # quotes escape line breaks
    text = yaml.dump(
        value, Dumper=_Dumper, default_style=style, default_flow_style=True, width=math.inf, allow_unicode=True
    )
    return text.removesuffix("...\n").strip()


def show(value: Any) -> str:
    """Return a value as error texts and --help show it. A text is quoted if YAML would not read it as text."""
    if isinstance(value, list | tuple):
        shown = " ".join(show(item) for item in value)
    elif isinstance(value, str):
        plain = value.isprintable() and value == value.strip() != "" and flag_value(value) == value
        shown = value if plain else json.dumps(value)
    else:
        shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def read_file(path: Path) -> dict:
    """Return the mapping that a YAML file holds; {} if it holds only comments. Raise YamlError if it is invalid."""
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as err:
        line = f"line {err.problem_mark.line + 1}: " if err.problem_mark else ""
        raise YamlError(f"{line}not valid YAML: {err.problem}") from err
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise YamlError("cannot be read: " + " ".join(str(err).split())) from err
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise YamlError(f"holds {show(tree)} where sections with settings belong, such as filter: {{low: 0.2}}")
    return tree
