"""`depo patch`: the diffs in `patches/openrlhf-<version>/` go into a copy of OpenRLHF, or come out again.

    files under openrlhf/ -> originals (checked by SHA256SUMS) -> contents of every state -> replace what differs

A copy is named by its *root*: the folder that holds `openrlhf/`. Nothing is recorded in it. Which patches are in
follows from its files: each is turned back with the shipped diffs until its sha256 is the original's, and the
originals with any set of patches on top (a *state*) are computed from there. So a run that was killed half-way is
recognised too, and finished or undone by the next one.

For maintainers, after a patch touches other files, in a folder that holds the pristine `openrlhf/`:
    sha256sum $(grep -h '^--- a/' "$PATCHES"/*.patch | cut -c7- | cut -f1 | sort -u) > "$PATCHES"/SHA256SUMS
A patch may add a file, in a folder that exists.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from itertools import combinations
from pathlib import Path

from depo_plugin import __version__
from depo_plugin.settings.resources import resource_dir

# In the order they are applied.
PATCHES = {"depo": "0001-depo.patch", "cpu": "0002-cpu.patch"}
_RELEASE_PREFIX = "openrlhf-"

Files = dict[str, bytes]  # path below the root, as the diffs write it -> contents
State = tuple[str, ...]  # the patches that are in, in PATCHES' order


class PatchError(Exception):
    """Refused, and nothing was changed: what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Copy:
    """One copy of OpenRLHF, read and understood.

    present: its Python files as they are. states: for every set of patches the contents of the files that the
    patches touch or add; () holds the originals. applied: the state it is in, None when a run was interrupted.
    """

    root: Path
    release: str
    present: Files
    states: dict[State, Files]

    @property
    def applied(self) -> State | None:
        """The patches that are in, or None where some files are patched and others not."""
        return next((state for state in self.states if not self.changes(state)), None)

    def changes(self, state: State) -> dict[str, bytes | None]:
        """What takes this copy to `state`: path -> new contents, None to remove the file."""
        names = sorted({name for files in self.states.values() for name in files})
        wanted = self.states[state]
        return {name: wanted.get(name) for name in names if self.present.get(name) != wanted.get(name)}


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    return _sha256(Path(path).read_bytes())


def releases() -> dict[str, Path]:
    """The OpenRLHF releases there are patches for: version -> folder of its diffs."""
    folders = sorted(resource_dir("patches").glob(f"{_RELEASE_PREFIX}*"))
    return {folder.name.removeprefix(_RELEASE_PREFIX): folder for folder in folders}


def state_of(wanted: set[str]) -> State:
    """The set of patch names in the order they are applied."""
    return tuple(name for name in PATCHES if name in wanted)


# --- finding copies ---------------------------------------------------------------------------------------------

# Asked of a new interpreter: `python -c` puts the current folder first on sys.path exactly as `python -m` does, and
# editable installs may hook the import system. The answer is the last line, whatever sitecustomize prints.
_PROBE = """
import importlib.util, json, sys
if "installed" in sys.argv:
    sys.path[:] = [place for place in sys.path if place]
spec = importlib.util.find_spec("openrlhf")
print()
print(json.dumps([spec and spec.origin, sys.path]))
"""


def _probe(*, installed: bool) -> tuple[Path | None, list[Path]]:
    """Root of the copy that Python would import (installed: without cwd and PYTHONPATH), and its sys.path."""
    env = {k: v for k, v in os.environ.items() if not (installed and k == "PYTHONPATH")}
    command = [sys.executable, "-c", _PROBE, *(["installed"] if installed else [])]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PatchError(f"{sys.executable} cannot look for openrlhf:\n{result.stderr.strip()}")
    origin, places = json.loads(result.stdout.splitlines()[-1])
    return (Path(origin).resolve().parent.parent if origin else None), [Path(place).resolve() for place in places]


def installed_root() -> Path:
    """Root of the installed OpenRLHF (editable installs too), whatever cwd and PYTHONPATH put before it."""
    root, _ = _probe(installed=True)
    if root is None:
        here, _ = _probe(installed=False)
        raise PatchError(
            f"openrlhf is not installed for {sys.executable}.\n"
            + (f"To patch the copy that it imports from here: depo patch --source {here}\n" if here else "")
            + f"Install it (pip install openrlhf=={_newest()}), or name a checkout: depo patch --source DIR"
        )
    return root


def imported_root() -> tuple[Path | None, list[Path]]:
    """Root of the copy that `python -m openrlhf...` imports from here, and the roots of the others it could find."""
    root, places = _probe(installed=False)
    others = [place for place in places if (place / "openrlhf" / "__init__.py").is_file()]
    installed, _ = _probe(installed=True)
    others += [installed] if installed else []
    return root, [place for place in dict.fromkeys(others) if place != root]


def version_of(root: Path) -> str | None:
    """The version that a checkout (version.txt) or an install (its metadata) says it is, None if it says nothing."""
    version = root / "version.txt"
    if version.is_file() and _is_checkout(root):
        return version.read_text().strip()
    found = next(iter(metadata.distributions(name="openrlhf", path=[str(root)])), None)
    return found.version if found else None


# --- reading a copy ---------------------------------------------------------------------------------------------


def inspect(root: Path) -> Copy:
    """Reads the copy of OpenRLHF in `root`; PatchError for another version and for files that are not ours."""
    if not (root / "openrlhf" / "__init__.py").is_file():
        raise PatchError(f"{root} holds no openrlhf/ package. Name the folder that has openrlhf/ in it.")
    known = releases()
    version = version_of(root)
    if version is not None and version not in known:
        raise PatchError(
            f"{root} is OpenRLHF {version}, and openrlhf-depo {__version__} has patches for {', '.join(known)} only.\n"
            f"Use that release (pip install openrlhf=={_newest()}, or git checkout v{_newest()}), or a release of "
            f"openrlhf-depo made for OpenRLHF {version}."
        )
    # A copy that says no version (a --target folder) is what its files are.
    versions = [version] if version else list(known)[::-1]
    present = {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "openrlhf").rglob("*.py")}
    faults = []
    for candidate in versions:
        try:
            return _inspect_as(root, candidate, known[candidate], present)
        except PatchError as err:
            faults.append(err)
    raise faults[0]


def _inspect_as(root: Path, release: str, folder: Path, present: Files) -> Copy:
    """The copy, taken for `release`; PatchError naming the files that are neither its originals nor patched."""
    sums = _read_sums(folder)
    states = [state for n in range(len(PATCHES) + 1) for state in combinations(PATCHES, n)]
    originals: Files = {}
    for state in states:
        if len(originals) < len(sums):
            turned_back = _turn_back(present, state, folder)
            originals |= {name: data for name, data in turned_back.items() if _sha256(data) == sums.get(name)}
    if edited := sorted(sums.keys() - originals.keys()):
        raise PatchError(_edited(root, release, edited))
    contents: dict[State, Files] = {(): originals}
    for state in states[1:]:
        contents[state] = _patched(contents[state[:-1]], folder / PATCHES[state[-1]])
    copy = Copy(root, release, present, contents)
    strange = [
        name
        for name in copy.changes(())
        if name in present and all(present[name] != files.get(name) for files in copy.states.values())
    ]
    if strange:
        raise PatchError(
            f"{root} has files in it that the patches of openrlhf-depo {__version__} write otherwise:\n  "
            + "\n  ".join(strange)
            + "\nNothing was changed. Move them away and run this again."
        )
    return copy


def _edited(root: Path, release: str, names: list[str]) -> str:
    """What to do about files that are neither original nor patched."""
    if _is_checkout(root):
        restore = f"git -C {root} checkout -- {' '.join(names)} (at release {release})"
    else:
        restore = f"pip install --force-reinstall --no-deps openrlhf=={release}"
    return (
        f"{root} is neither OpenRLHF {release} as released nor as openrlhf-depo {__version__} patches it. Edited:\n  "
        + "\n  ".join(names)
        + f"\nNothing was changed. Put the originals back: {restore}\nThen run depo patch again. (If another release "
        "of openrlhf-depo patched them, its own depo patch --revert does it too. To keep your edits, leave this copy "
        "alone and carry them over to a patched one: depo patch --source PRISTINE --target DIR)"
    )


def _read_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS of a patch folder: path below the root -> sha256 of the original."""
    try:
        lines = (folder / "SHA256SUMS").read_text().splitlines()
    except FileNotFoundError as err:
        raise PatchError(f"{folder}/SHA256SUMS is missing. Reinstall openrlhf-depo {__version__}.") from err
    return {name.lstrip("*"): digest for digest, name in (line.split(maxsplit=1) for line in lines if line)}


def _patched(files: Files, patch: Path) -> Files:
    """The files with one diff applied; one that does not apply to what it was made for is our own fault."""
    after, complaint = _run_diff(files, patch, reverse=False)
    if complaint is not None:
        raise PatchError(
            f"{patch} does not apply to the files it was made for:\n{complaint}\n"
            f"Nothing was changed. Reinstall openrlhf-depo {__version__}; if that does not help, report it."
        )
    return after


def _turn_back(present: Files, state: State, folder: Path) -> Files:
    """`present` with the patches of `state` taken out wherever their lines are found; sums decide what that is."""
    files = present
    for name in reversed(state):
        files, _ = _run_diff(files, folder / PATCHES[name], reverse=True)
    return files


def _run_diff(files: Files, patch: Path, *, reverse: bool) -> tuple[Files, str | None]:
    """Applies one diff in a temporary folder, never with fuzz; a file with a rejected hunk keeps the others.

    Returns the Python files afterwards, and what the tool complained of (None: every hunk went in).
    """
    if not patch.is_file():
        raise PatchError(f"{patch} is missing. Reinstall openrlhf-depo {__version__}.")
    with tempfile.TemporaryDirectory(prefix="depo-patch-") as made:
        folder = Path(made).resolve()
        for name, contents in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents)
        # The user's git settings (whitespace, line endings) and an enclosing repository must not matter.
        env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        env |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "LC_ALL": "C"}
        env |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_ATTR_NOSYSTEM": "1", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        if shutil.which("git"):
            command = ["git", "apply", "--reject", "--whitespace=nowarn", str(patch.resolve())]
        elif shutil.which("patch"):
            command = ["patch", "-p1", "--force", "--fuzz=0", "--no-backup-if-mismatch", "--reject-file=-"]
            command += ["-i", str(patch.resolve())]
        else:
            raise PatchError("depo patch needs git or patch to apply a diff, and finds neither. Install one of them.")
        command += ["--reverse"] if reverse else []
        result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        after = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    return after, (result.stderr + result.stdout).strip() if result.returncode else None


# --- changing a copy --------------------------------------------------------------------------------------------


def apply(root: Path, wanted: set[str]) -> list[str]:
    """Adds the patches `wanted` to those that are in; returns the paths that changed ([]: all were in already)."""
    copy = inspect(root)
    return _replace(copy, state_of(wanted | set(copy.applied or ())))


def revert(root: Path) -> list[str]:
    """Takes every patch out, byte for byte; returns the paths that changed ([]: none was in)."""
    return _replace(inspect(root), ())


def write_copy(base: Path, target: Path, wanted: set[str]) -> list[str]:
    """Writes the copy in `base` to `target`/openrlhf with exactly the patches `wanted`; `base` is only read.

    A `target` written before is brought to `wanted`. Returns the paths that changed in it.
    """
    copy = inspect(base)
    package = target / "openrlhf"
    files = {path.relative_to(base).as_posix(): path for path in (base / "openrlhf").rglob("*") if path.is_file()}
    source = {name: path.read_bytes() for name, path in files.items() if "__pycache__" not in name}
    if package.resolve() == (base / "openrlhf").resolve():
        raise PatchError(f"--target {target} is the copy to be copied. Leave --target out to patch it in place.")
    if package.exists():
        touched = {name for files in copy.states.values() for name in files}
        for name in sorted(source.keys() - touched):
            if not (target / name).is_file() or (target / name).read_bytes() != source[name]:
                raise PatchError(f"{target / name} differs from {base / name}. Remove {package} and run this again.")
        try:
            written = inspect(target)
        except PatchError as err:
            raise PatchError(f"{err}\nOr, as {package} is a copy: remove it and run this again.") from err
        return _replace(written, state_of(wanted))
    merged = source | copy.changes(state_of(wanted))
    contents: Files = {name: data for name, data in merged.items() if data is not None}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".openrlhf-", dir=target) as made:
            for name, data in contents.items():
                (Path(made) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(made) / name).write_bytes(data)
            os.rename(Path(made) / "openrlhf", package)
    except OSError as err:
        raise PatchError(f"cannot write {package}: {err}\nName a folder you may write: --target DIR") from err
    return sorted(contents)


def _replace(copy: Copy, state: State) -> list[str]:
    """Takes the copy to `state`, all or nothing: everything is written beside its place first, then renamed."""
    changes = copy.changes(state)
    new: dict[str, Path] = {}
    old: dict[str, Path] = {}
    done: list[str] = []
    try:
        for name, contents in changes.items():
            if contents is not None:
                new[name] = _write_beside(copy.root, name, contents)
            if name in copy.present:
                old[name] = _write_beside(copy.root, name, copy.present[name])
        for name in changes:
            if name in new:
                os.replace(new[name], copy.root / name)
            else:
                os.unlink(copy.root / name)
            done.append(name)
    except BaseException as err:
        for name in reversed(done):
            if name in old:
                os.replace(old[name], copy.root / name)
            else:
                (copy.root / name).unlink(missing_ok=True)
        if not isinstance(err, OSError):
            raise
        raise PatchError(
            f"cannot write to {copy.root / 'openrlhf'}: {err}\n"
            "Nothing was changed. Run this as the owner of that folder, or write a patched copy elsewhere and put it "
            "first on PYTHONPATH: depo patch --target DIR"
        ) from err
    finally:
        for path in [*new.values(), *old.values()]:
            path.unlink(missing_ok=True)
    return sorted(changes)


def _write_beside(root: Path, name: str, contents: bytes) -> Path:
    """A temporary file beside `root`/`name`, with the mode and owner of that file (if new: of the package's own)."""
    like = root / name if (root / name).exists() else root / "openrlhf" / "__init__.py"
    handle, made = tempfile.mkstemp(dir=(root / name).parent, prefix=f".{Path(name).name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(like, made)
        if os.geteuid() == 0:
            os.chown(made, like.stat().st_uid, like.stat().st_gid)
    except BaseException:
        os.unlink(made)
        raise
    return Path(made)


def _is_checkout(root: Path) -> bool:
    return (root / "setup.py").is_file() or (root / "pyproject.toml").is_file()


def _sha256(contents: bytes) -> str:
    return hashlib.sha256(contents).hexdigest()


def _newest() -> str:
    return list(releases())[-1]
