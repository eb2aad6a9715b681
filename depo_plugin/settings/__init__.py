"""DEPO's settings: flags, YAML files and the tree of dataclasses."""
