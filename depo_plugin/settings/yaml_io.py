"""YAML for settings, strictly: one reading of numbers for files and flags, and no key twice."""

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml


class YamlError(ValueError):
    """A file that cannot be used as settings; the text says where and why."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice (PyYAML keeps the last, silently) and reads numbers as people do."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is set twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text if either _Loader or plain YAML 1.1 would read it as something else."""


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
    """The value of one YAML document, of plain types only. Raises yaml.YAMLError or ValueError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def flag_value(text: str) -> Any:
    """A flag's text, read as YAML reads a value; never None, which stands for a flag that was not given."""
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError):
        return text
    return text if value is None else value


def dump(value: Any) -> str:
    """One value as YAML, on one line."""
    style = '"' if isinstance(value, str) and not value.isprintable() else None  # so that line breaks are escaped
    options = {"default_style": style, "default_flow_style": True, "width": math.inf, "allow_unicode": True}
    text = yaml.dump(value, Dumper=_Dumper, **options)
    return text.removesuffix("...\n").strip()


def show(value: Any) -> str:
    """A value as an error text or --help shows it; a text in quotes if it would read as something else without."""
    if isinstance(value, list | tuple):
        shown = " ".join(show(item) for item in value)
    elif isinstance(value, str):
        plain = value.isprintable() and value == value.strip() != "" and flag_value(value) == value
        shown = value if plain else json.dumps(value)
    else:
        shown = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def read_file(path: Path) -> dict:
    """The mapping that a YAML file holds; {} where it holds nothing but comments. Raises YamlError."""
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
