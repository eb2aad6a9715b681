"""`depo patch`: put the diffs of `patches/` into a copy of OpenRLHF, or take them out again.

    read the files that the diffs touch -> look up their state by sha256 -> replace the lines of each hunk
    -> check the result by sha256 -> write the files that differ

A copy is named by its *root*: the folder that holds `openrlhf/`. Its *state* is the set of patches that are in.
Nothing is recorded in the copy: patches/openrlhf-<release>/SHA256SUMS.original, .depo, .cpu and .depo+cpu list the
sums of its files in each state. A run that was killed half-way leaves files of different states; the next run finishes
or undoes it. A release that is not known can be copied with the call sites, on request, if every line of the diff has
its one place in the right function.

After you change a diff, run scripts/patch_sums.sh. A diff may add a file, in a folder that exists. A hunk goes to the
first place that has its lines, so make the diff with more context (git diff -U5) if the tests say that it is wrong.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from depo_plugin import __version__
from depo_plugin.settings.resources import resource_dir

Files = dict[str, bytes]  # path below the root, as the diffs write it -> contents
Sums = dict[str, str]  # path below the root -> sha256
State = tuple[str, ...]  # the patches that are in, in PATCHES' order

# In the order they are applied.
PATCHES = {"depo": "0001-depo.patch", "cpu": "0002-cpu.patch"}
STATES: tuple[State, ...] = ((), ("depo",), ("cpu",), ("depo", "cpu"))

# Where the call sites are: file -> (function, hook) of each.
PLACES = {
    "openrlhf/cli/train_ppo_ray.py": [
        ("train", "start_estimator"),
        ("train", "check_attached"),
        ("<module>", "add_arguments"),
        ("<module>", "resolve"),
    ],
    "openrlhf/trainer/ppo_trainer.py": [
        ("prepare_datasets", "wrap_loader"),
        ("BasePPOTrainer.__init__", "attach"),
        ("BasePPOTrainer.train_step", "check_rewards"),
        ("BasePPOTrainer.train_step", "observe"),
        ("BasePPOTrainer.train_step", "log"),
        ("BasePPOTrainer.save_best_checkpoint", "save"),
        ("BasePPOTrainer.save_logs_and_checkpoints", "save"),
        ("BasePPOTrainer.init_checkpoint_states", "load"),
    ],
    "openrlhf/trainer/ppo_utils/samples_generator.py": [
        ("SamplesGenerator.__init__", "attach"),
        ("SamplesGenerator._generate_vllm", "received"),
        ("SamplesGenerator._generate_vllm", "reject"),
        ("SamplesGenerator._dispatch_prompts_to_vllm", "dispatched"),
    ],
}


class PatchError(Exception):
    """`depo patch` refuses and has changed nothing. The text names the fault, the place and the fix."""


@dataclass(frozen=True)
class Copy:
    """A copy of OpenRLHF whose files all belong to known states."""

    root: Path  # the folder that holds openrlhf/
    release: str  # of OpenRLHF, such as 0.11.2
    folder: Path  # the sums of this release; the diffs lie beside it
    files: Files  # the files that any diff changes or adds, as they are now
    present: Sums  # the sums of these files now
    sums: dict[State, Sums]  # the sums of these files in each state that this release can be in

    @property
    def applied(self) -> State | None:
        """The patches that are in, or None if the files are of different states (a run was interrupted)."""
        return next((state for state in self.sums if self.sums[state] == self.present), None)

    @property
    def names(self) -> list[str]:
        """The paths below the root of all files that any diff changes or adds."""
        return sorted(set().union(*self.sums.values()))

    def patches_in(self, name: str) -> State:
        """Return the patches that one file has in it, () if it is absent."""
        return next(state for state in self.sums if self.sums[state].get(name) == self.present.get(name))


def sha256_of(path: str | Path) -> str:
    """Return the hex sha256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def releases() -> dict[str, Path]:
    """Return the OpenRLHF releases that can be patched, the oldest first: version -> folder of its sums."""
    folders = {folder.name.removeprefix("openrlhf-"): folder for folder in resource_dir("patches").glob("openrlhf-*")}
    return dict(sorted(folders.items(), key=lambda item: _numbers(item[0])))


def _numbers(version: str) -> list[int]:
    """Return a version's numbers, in whose order releases stand: 0.10.1.post2 -> [0, 10, 1, 2]."""
    return [int(number) for number in re.findall(r"\d+", version)]


_NO_SOURCE = re.compile(r"/(__pycache__|\.depo-patch-[^/]*)/")  # compiled files, and what a patch in progress writes

# --- finding copies ---------------------------------------------------------------------------------------------

# Runs in a new interpreter, because editable installs may hook the import system. `python -c` puts the current folder
# first on sys.path, as `python -m` does. The answer is the last line: sitecustomize may print before it.
_PROBE = """
import importlib.util, json, sys
if "installed" in sys.argv:
    sys.path[:] = [place for place in sys.path if place]
spec = importlib.util.find_spec("openrlhf")
print()
print(json.dumps([spec and spec.origin, sys.path]))
"""


def _probe(*, installed: bool) -> tuple[Path | None, list[Path]]:
    """Return the root of the copy that Python imports, and sys.path. `installed` ignores cwd and PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if not (installed and k == "PYTHONPATH")}
    command = [sys.executable, "-c", _PROBE, *(["installed"] if installed else [])]
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise PatchError(f"{sys.executable} cannot look for openrlhf:\n{result.stderr.strip()}")
    origin, places = json.loads(result.stdout.splitlines()[-1])
    # A link of the folder is followed, one of the file is not: it may lead into a package manager's cache.
    return (Path(origin).parent.resolve().parent if origin else None), [Path(place).resolve() for place in places]


def installed_root() -> Path:
    """Return the root of the installed OpenRLHF (editable or not), even if cwd or PYTHONPATH hold another copy."""
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
    """Return the root of the copy that `python -m openrlhf...` imports from here, and the roots of other copies."""
    root, places = _probe(installed=False)
    others = [place for place in places if (place / "openrlhf" / "__init__.py").is_file()]
    installed, _ = _probe(installed=True)
    others += [installed] if installed else []
    return root, [place for place in dict.fromkeys(others) if place != root]


def version_of(root: Path) -> str | None:
    """Return the version in a checkout's version.txt or an install's metadata, None if there is neither."""
    version = root / "version.txt"
    if version.is_file() and any("openrlhf" in text for text in _build_files(root)):
        return version.read_text().strip()
    found = next(iter(metadata.distributions(name="openrlhf", path=[str(root)])), None)
    return found.version if found else None


# --- reading a copy ---------------------------------------------------------------------------------------------


def inspect(root: Path) -> Copy:
    """Return the copy of OpenRLHF in `root`. Raise PatchError if its version or one of its files is unknown."""
    if not (root / "openrlhf" / "__init__.py").is_file():
        raise PatchError(f"{root} holds no openrlhf/ package. Name the folder that has openrlhf/ in it.")
    known = releases()
    version = version_of(root)
    if version is not None and version not in known:
        old = _numbers(version) < _numbers(next(iter(known)))
        nearest = next(iter(known)) if old else _newest()
        raise PatchError(
            f"{root} is OpenRLHF {version}, and openrlhf-depo {__version__} is made for {', '.join(known)}.\n"
            f"The nearest of these is {nearest}: pip install openrlhf=={nearest}, or git checkout v{nearest}."
            + ("" if old else "\nOr try it with this one, in a copy: depo patch --unverified --target DIR")
        )
    # A --target folder does not tell its version: try every release, the newest first.
    faults = []
    for release in [version] if version else reversed(known):
        try:
            return _inspect_as(root, release, known[release])
        except PatchError as err:
            faults.append(err)
    raise faults[0]


def _inspect_as(root: Path, release: str, folder: Path) -> Copy:
    """Return the copy if it is of this release. Raise PatchError naming the files that belong to no state."""
    needed = [_diff(folder, patch) for patch in PATCHES] + [folder / _sums_file(state) for state in STATES[:2]]
    for file in needed:
        if not file.is_file():
            raise PatchError(f"{file} is missing. Reinstall openrlhf-depo {__version__}.")
    sums: dict[State, Sums] = {}
    for state in STATES:
        if (file := folder / _sums_file(state)).is_file():  # not every release runs on a CPU
            sums[state] = {name: digest for digest, name in map(str.split, file.read_text().splitlines())}
    paths = {name: root / name for state in sums for name in sums[state]}
    files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    present = {name: hashlib.sha256(contents).hexdigest() for name, contents in files.items()}
    copy = Copy(root, release, folder, files, present, sums)
    unknown = [name for name in copy.names if all(present.get(name) != sums[state].get(name) for state in sums)]
    if edited := [name for name in unknown if name in sums[()]]:
        if _is_checkout(root):
            restore = f"git -C {root} checkout -- {' '.join(edited)} (at release {release})"
        else:
            restore = f"pip install --force-reinstall --no-deps openrlhf=={release}"
        raise PatchError(
            f"{root} is neither OpenRLHF {release} as released nor as openrlhf-depo {__version__} patches it. "
            "Edited:\n  " + "\n  ".join(edited) + f"\nNothing was changed. Put the originals back: {restore}\n"
            "Then run depo patch again. (If another release of openrlhf-depo patched this copy, you can also run "
            "depo patch --revert of that release. To keep your edits, leave this copy alone and make the same edits "
            "in a patched one: depo patch --source PRISTINE --target DIR)"
        )
    if unknown:
        raise PatchError(
            f"The patches of openrlhf-depo {__version__} add files to {root} that exist there with other contents:\n  "
            + "\n  ".join(unknown)
            + "\nNothing was changed. Move them away and run this again."
        )
    return copy


# --- changing a copy --------------------------------------------------------------------------------------------


def apply(root: Path, wanted: set[str]) -> list[str]:
    """Add the patches `wanted` to those that are in. Return the changed paths: [] if all were in already."""
    copy = inspect(root)
    return _replace(copy, _state_of(wanted | set(copy.applied or ())))


def revert(root: Path) -> list[str]:
    """Put the original files back. Return the changed paths: [] if no patch was in."""
    return _replace(inspect(root), ())


def write_copy(base: Path, target: Path, wanted: set[str]) -> list[str]:
    """Write the copy in `base` to `target`/openrlhf with exactly the patches `wanted`. `base` is only read.

    If `target` holds an earlier copy, only its patches change. Return the changed paths.
    """
    copy = inspect(base)
    package = target / "openrlhf"
    found = (path for path in (base / "openrlhf").rglob("*") if path.is_file())
    paths = {path.relative_to(base).as_posix(): path for path in found}
    source = {name: path.read_bytes() for name, path in paths.items() if not _NO_SOURCE.search(name)}
    if package.resolve() == (base / "openrlhf").resolve():
        raise PatchError(f"--target {target} is the copy to be copied. Leave --target out to patch it in place.")
    if package.exists():
        for name in sorted(source.keys() - set(copy.names)):
            if not (target / name).is_file() or (target / name).read_bytes() != source[name]:
                raise PatchError(f"{target / name} differs from {base / name}. Remove {package} and run this again.")
        try:
            written = inspect(target)
        except PatchError as err:
            raise PatchError(f"{err}\nOr, as {package} is a copy: remove it and run this again.") from err
        return _replace(written, _state_of(wanted))
    merged = source | _changes(copy, _state_of(wanted))
    contents: Files = {name: data for name, data in merged.items() if data is not None}
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".openrlhf-", dir=target) as made:
            for name, data in contents.items():
                (Path(made) / name).parent.mkdir(parents=True, exist_ok=True)
                (Path(made) / name).write_bytes(data)
            os.rename(Path(made) / "openrlhf", package)
    except OSError as err:
        if package.exists():  # another process, perhaps on another node, was faster
            return write_copy(base, target, wanted)
        raise PatchError(f"cannot write {package}: {err}\nName a folder you may write: --target DIR") from err
    return sorted(contents)


def write_unverified(base: Path, target: Path) -> list[str]:
    """Write a copy of a release that is not known to `target`/openrlhf, with the call sites. `base` is only read.

    Each hunk must have exactly one place, and each call must land in the function of PLACES. Return the changed paths.
    Raise PatchError naming what does not fit.
    """
    version = version_of(base) or "0+unknown"
    if version in releases():
        raise PatchError(f"{base} is OpenRLHF {version}, which is known. Leave --unverified out.")
    package = target / "openrlhf"
    if package.exists():
        raise PatchError(f"{package} exists. Remove it, or name another folder: --target DIR")
    patched, faults = {}, []
    for name, hunks in _read_hunks(resource_dir("patches") / PATCHES["depo"]).items():
        contents = (base / name).read_bytes() if (base / name).is_file() else b""
        for number, (old, new) in enumerate(hunks, start=1):
            if (count := contents.count(old)) != 1:
                faults.append(f"{name}: hunk {number} has {count} places instead of 1")
            contents = contents.replace(old, new, 1)
        patched[name] = contents
        if not faults and (found := call_sites(contents)) != PLACES[name]:
            faults.append(f"{name}: the calls are {found} instead of {PLACES[name]}")
    if faults:
        raise PatchError(
            f"The call sites do not fit {base}:\n  " + "\n  ".join(faults) + "\nNothing was written. "
            f"Use OpenRLHF {_newest()}, or port the diff by hand (docs/openrlhf.md)."
        )
    try:
        shutil.copytree(base / "openrlhf", package, ignore=shutil.ignore_patterns("__pycache__"))
        for name, contents in patched.items():
            (target / name).write_bytes(contents)
        told = target / f"openrlhf-{version}.dist-info" / "METADATA"  # so that the copy tells its version
        told.parent.mkdir()
        told.write_text(f"Metadata-Version: 2.1\nName: openrlhf\nVersion: {version}\n")
    except OSError as err:
        raise PatchError(f"cannot write {package}: {err}\nName a folder you may write: --target DIR") from err
    return list(patched)


def call_sites(source: bytes) -> list[tuple[str, str]]:
    """Return (function, hook) of each call of a hook in a patched file, in its order; outside functions: <module>."""
    found = []

    def visit(node: ast.AST, place: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inside = place
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inside = (*place, child.name)
            if isinstance(child, ast.Call) and ast.unparse(child.func).startswith("depo_hooks."):
                hook = ast.unparse(child.func).removeprefix("depo_hooks.")
                found.append((".".join(place) or "<module>", hook))
            visit(child, inside)

    visit(ast.parse(source), ())
    return [site for site in found if site[1] != "enabled"]


def is_unverified(root: Path) -> bool:
    """Return whether a copy is of a release that is not known and has every call site in it."""
    if version_of(root) in (None, *releases()):
        return False
    try:
        return all(call_sites((root / name).read_bytes()) == sites for name, sites in PLACES.items())
    except (OSError, SyntaxError):
        return False


def _changes(copy: Copy, state: State) -> dict[str, bytes | None]:
    """Return the changes that bring `copy` to `state`: path -> new contents, None to remove the file.

    Raise PatchError if the diffs do not give the sums of `state`.
    """
    if state not in copy.sums:
        raise PatchError(
            f"{copy.root} is OpenRLHF {copy.release}, and there is no patch that runs it without a GPU. Leave --cpu "
            "out."
        )
    hunks = {patch: _read_hunks(_diff(copy.folder, patch)) for patch in PATCHES}
    changes: dict[str, bytes | None] = {}
    for name in copy.names:
        wanted = copy.sums[state].get(name)
        if wanted == copy.present.get(name):
            continue
        contents = copy.files.get(name, b"")
        for patch in reversed(copy.patches_in(name)):
            for old, new in hunks[patch].get(name, []):
                contents = contents.replace(new, old, 1)
        for patch in state:
            for old, new in hunks[patch].get(name, []):
                contents = contents.replace(old, new, 1)
        if wanted and hashlib.sha256(contents).hexdigest() != wanted:
            raise PatchError(
                f"The diffs in {copy.folder.parent} do not apply to the files they were made for: {name} is not as in "
                f"{_sums_file(state)} afterwards.\n"
                f"Nothing was changed. Reinstall openrlhf-depo {__version__}; if that does not help, report it."
            )
        changes[name] = contents if wanted else None
    return changes


def _read_hunks(patch: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    """Return the hunks of a diff: path below the root -> old and new lines of each hunk."""
    hunks: dict[str, list[tuple[bytes, bytes]]] = {}
    for section in re.split(rb"(?m)^diff --git a/.* b/", patch.read_bytes())[1:]:
        header, *bodies = re.split(rb"(?m)^@@ -.*\n", section)
        pairs = hunks[header.split(b"\n")[0].decode()] = []
        for lines in (body.splitlines(keepends=True) for body in bodies):
            old = b"".join(line[1:] for line in lines if line[:1] in b" -")
            new = b"".join(line[1:] for line in lines if line[:1] in b" +")
            pairs.append((old, new))
    return hunks


def _replace(copy: Copy, state: State) -> list[str]:
    """Bring the copy to `state`: change all files or none. Return the changed paths."""
    changes = _changes(copy, state)
    if not changes:
        return []
    package = copy.root / "openrlhf"
    try:
        # Everything is on the disk of `package` before the first file changes, so that only renames are left to do.
        with tempfile.TemporaryDirectory(prefix=".depo-patch-", dir=package) as made, ExitStack() as undo:
            new, old = Path(made, "new"), Path(made, "old")
            for name, contents in changes.items():
                like = copy.root / name if name in copy.files else package / "__init__.py"
                for folder, data in ((new, contents), (old, copy.files.get(name))):
                    if data is not None:
                        _write_like(like, folder / name, data)
            for name, contents in changes.items():
                if contents is None:
                    os.unlink(copy.root / name)
                else:
                    os.replace(new / name, copy.root / name)
                if name in copy.files:
                    undo.callback(os.replace, old / name, copy.root / name)
                else:
                    undo.callback(os.unlink, copy.root / name)
            undo.pop_all()
    except OSError as err:
        raise PatchError(
            f"cannot write to {package}: {err}\n"
            "Nothing was changed. Run this as the owner of that folder, or write a patched copy elsewhere and put it "
            "first on PYTHONPATH: depo patch --target DIR"
        ) from err
    return list(changes)


def _write_like(like: Path, path: Path, contents: bytes) -> None:
    """Write a new file with the mode and owner of the file `like`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(like, path)
    if os.geteuid() == 0:
        with suppress(OSError):  # in a container that does not know the owner
            os.chown(path, like.stat().st_uid, like.stat().st_gid)


def _state_of(wanted: set[str]) -> State:
    return tuple(name for name in PATCHES if name in wanted)


def _diff(folder: Path, patch: str) -> Path:
    return folder.parent / PATCHES[patch]


def _sums_file(state: State) -> str:
    return f"SHA256SUMS.{'+'.join(state) or 'original'}"


def _is_checkout(root: Path) -> bool:
    return bool(_build_files(root))


def _build_files(root: Path) -> list[str]:
    """Return the texts of the files from which a checkout is built."""
    paths = (root / "setup.py", root / "pyproject.toml")
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]


def _newest() -> str:
    return list(releases())[-1]
