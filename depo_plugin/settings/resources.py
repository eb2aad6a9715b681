"""Find the files that are shipped with the package: the diffs and the YAML presets."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def resource_dir(name: str) -> Path:
    """Return the folder `name` ("patches" or "configs"): in the package if it was built into a wheel, else beside it.

    Raise FileNotFoundError, with both places, if neither holds it.
    """
    places = [_PACKAGE / name, _PACKAGE.parent / name]
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"openrlhf-depo's own folder {name!r} is missing (looked for {' and '.join(map(str, places))}). "
        "Reinstall openrlhf-depo, or run it from a complete checkout."
    )
