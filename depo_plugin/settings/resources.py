"""Where the files are that travel with the package: the diffs and the YAML presets."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource_dir(name: str) -> Path:
    """The folder `name` ("patches" or "configs"): inside the package when it was built into a wheel, else beside it.

    Raises FileNotFoundError naming both places when neither holds it.
    """
    places = [_PACKAGE / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"openrlhf-depo's own folder {name!r} is missing (looked for {' and '.join(map(str, places))}). "
        "Reinstall openrlhf-depo, or run it from a complete checkout."
    )
