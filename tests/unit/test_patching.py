"""`depo patch`: on a made-up release of three files, where every result is known, and on the real OpenRLHF.

The made-up release is 9.9. Its patches: "depo" changes a.py and sub/b.py, "cpu" changes a.py further down and adds
added.py. The expected files are written with str.replace here, the diffs with difflib, the sums with hashlib.
"""

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

import pytest

from depo_plugin import __version__
from depo_plugin.commands import patching
from depo_plugin.commands.cli import main
from depo_plugin.commands.patching import PatchError

REPO = Path(__file__).resolve().parents[2]
LINES = "".join(f"line {i}\n" for i in range(1, 31))
OTHER = "".join(f"other {i}\n" for i in range(1, 11))
PRISTINE = {"openrlhf/a.py": LINES, "openrlhf/sub/b.py": OTHER}
SEAM = {
    "openrlhf/a.py": ("line 5\n", "line 5\nseam\n"),
    "openrlhf/sub/b.py": ("other 5\n", "other five\n"),
}
CPU = {"openrlhf/a.py": ("line 25\n", "line 25 on cpu\n")}
NEW = "made by the cpu patch\n"
STATES = {"original": (), "depo": ("depo",), "cpu": ("cpu",), "depo+cpu": ("depo", "cpu")}
BOTH = {"depo", "cpu"}


def expected(state):
    """The made-up release with the patches in `state`: path -> text of the files that patches touch."""
    files = dict(PRISTINE)
    for name, edits in (("depo", SEAM), ("cpu", CPU)):
        if name in state:
            files |= {path: files[path].replace(*edit) for path, edit in edits.items()}
    return files | ({"openrlhf/added.py": NEW} if "cpu" in state else {})


def diff(before, after):
    """A unified diff between two {path: text}."""
    text = ""
    for path in sorted(before.keys() | after.keys()):
        old, new = before.get(path, ""), after.get(path, "")
        names = (f"a/{path}" if path in before else "/dev/null", f"b/{path}" if path in after else "/dev/null")
        if old != new:
            text += f"diff --git a/{path} b/{path}\n" + ("" if path in before else "new file mode 100644\n")
            text += "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), *names))
    return text


def write(root, files):
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


def snapshot(root):
    """Everything below a folder except byte code: path -> (mode, bytes). Shows files that are left over, too."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(root)): (path.stat().st_mode, path.read_bytes()) for path in files}


def texts(root):
    """The files of a copy that the made-up patches touch, as text."""
    return {path: (root / path).read_text() for path in expected(BOTH) if (root / path).exists()}


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """The patch folder of the made-up release, in the place of the shipped ones."""
    folder = tmp_path / "patches" / "openrlhf-9.9"
    write(folder.parent, {"0001-depo.patch": diff(PRISTINE, expected({"depo"}))})
    write(folder.parent, {"0002-cpu.patch": diff(PRISTINE, expected({"cpu"}))})
    for name, state in STATES.items():
        sums = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in expected(state).items()}
        write(folder, {f"SHA256SUMS.{name}": "".join(f"{digest}  {path}\n" for path, digest in sums.items())})
    monkeypatch.setattr(patching, "resource_dir", lambda name: folder.parent)
    return folder


@pytest.fixture
def root(tmp_path, patches):
    """A pristine copy of the made-up release, a checkout in a folder with a space in its name."""
    root = tmp_path / "a checkout"
    write(root, PRISTINE | {"openrlhf/__init__.py": "", "openrlhf/c.py": "untouched\n", "version.txt": "9.9\n"})
    write(root, {"setup.py": 'setup(name="openrlhf")\n'})
    return root


# --- what it does -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [*STATES.values()][1:])
def test_apply_gives_the_patched_text_twice_and_revert_the_same_bytes(root, monkeypatch, state):
    monkeypatch.setenv("PATH", "/nonexistent")  # neither git nor patch is needed
    before = snapshot(root)
    changed = patching.apply(root, set(state))
    assert texts(root) == expected(state)
    assert changed == sorted(path for path in expected(state) if expected(state)[path] != PRISTINE.get(path))
    assert patching.inspect(root).applied == state

    inodes = {path: (root / path).stat().st_ino for path in snapshot(root)}
    assert patching.apply(root, set(state)) == []
    assert {path: (root / path).stat().st_ino for path in snapshot(root)} == inodes  # nothing was even rewritten

    assert patching.revert(root) == changed
    assert snapshot(root) == before
    assert patching.revert(root) == []


def test_modes_are_kept_and_hard_links_not_written_through(root, tmp_path):
    """Package managers link site-packages to their cache: a write in place would change the cache."""
    (root / "openrlhf/a.py").chmod(0o640)
    (root / "openrlhf/__init__.py").chmod(0o604)
    os.link(root / "openrlhf/a.py", tmp_path / "cache")
    patching.apply(root, BOTH)
    assert (tmp_path / "cache").read_text() == LINES
    assert (root / "openrlhf/a.py").stat().st_mode & 0o777 == 0o640
    assert (root / "openrlhf/added.py").stat().st_mode & 0o777 == 0o604  # as the package's __init__.py


# --- what it refuses, with nothing changed ----------------------------------------------------------------------


def refuses(action, root, *words):
    """Run `action`, which must raise a PatchError with every one of `words` and leave `root` as it was."""
    before = snapshot(root)
    with pytest.raises(PatchError) as caught:
        action()
    for word in words:
        assert word in str(caught.value)
    assert snapshot(root) == before
    return str(caught.value)


@pytest.mark.parametrize("kind", ["checkout", "install"])
def test_another_version_is_refused_even_if_the_files_are_the_same(root, kind):
    write(root, {"version.txt": "9.8\n"})
    if kind == "install":
        (root / "version.txt").unlink()
        write(root, {"openrlhf-9.8.dist-info/METADATA": "Metadata-Version: 2.1\nName: openrlhf\nVersion: 9.8\n"})
    for action in (lambda: patching.apply(root, {"depo"}), lambda: patching.revert(root)):
        refuses(action, root, str(root), "OpenRLHF 9.8", "is made for 9.9", "pip install openrlhf==9.9")


@pytest.mark.parametrize("state", STATES.values())
def test_an_edited_file_is_refused_by_name(root, state):
    patching.apply(root, set(state))
    text = (root / "openrlhf/a.py").read_text().replace("line 15\n", "line 15, mine\n")  # outside every hunk
    write(root, {"openrlhf/a.py": text})
    for action in (lambda: patching.apply(root, {"depo"}), lambda: patching.revert(root)):
        words = ("neither OpenRLHF 9.9 as released", "Edited:\n  openrlhf/a.py\nNothing was changed")
        refuses(action, root, *words, f"git -C {root} checkout -- openrlhf/a.py (at release 9.9)")
    (root / "openrlhf/a.py").unlink()
    refuses(lambda: patching.apply(root, {"depo"}), root, "Edited:\n  openrlhf/a.py\nNothing was changed")
    (root / "setup.py").unlink()  # an install now
    refuses(lambda: patching.revert(root), root, "pip install --force-reinstall --no-deps openrlhf==9.9")


def test_a_file_of_the_users_at_the_path_of_an_added_one_is_refused(root):
    write(root, {"openrlhf/added.py": "mine\n"})
    refuses(lambda: patching.apply(root, {"cpu"}), root, "other contents:\n  openrlhf/added.py\n", "Move them away")


@pytest.mark.parametrize("line", ["\n line 3\n", "\n+seam\n"])
def test_a_diff_that_does_not_give_the_sums_is_refused(root, patches, line):
    """One changed line of context keeps the hunk out, one changed line of code gives other contents."""
    seam = patches.parent / "0001-depo.patch"
    text = seam.read_text()
    assert text.count(line) == 1
    seam.write_text(text.replace(line, line[:-1] + "s\n"))
    words = (
        str(patches.parent),
        "do not apply",
        "openrlhf/a.py is not as in SHA256SUMS.depo",
        "Reinstall openrlhf-depo",
    )
    refuses(lambda: patching.apply(root, {"depo"}), root, *words)


@pytest.mark.parametrize("missing", ["openrlhf-9.9/SHA256SUMS.depo", "0001-depo.patch", "0002-cpu.patch"])
def test_an_incomplete_patch_folder_is_refused(root, patches, missing):
    (patches.parent / missing).unlink()
    refuses(lambda: patching.apply(root, {"depo"}), root, missing, "missing", "Reinstall")


def test_a_release_that_no_patch_runs_without_a_gpu(root, patches):
    for name in ("cpu", "depo+cpu"):
        (patches / f"SHA256SUMS.{name}").unlink()
    refuses(lambda: patching.apply(root, {"cpu"}), root, "OpenRLHF 9.9", "no patch that runs it without a GPU")
    patching.apply(root, {"depo"})
    assert texts(root) == expected({"depo"})


@pytest.mark.parametrize(("version", "nearest"), [("9.7.post2", "9.9"), ("9.10", "10.0"), ("10.1", "10.0")])
def test_an_unknown_release_is_told_the_nearest_and_a_newer_one_the_way_out(root, patches, version, nearest):
    shutil.copytree(patches, patches.with_name("openrlhf-10.0"))
    write(root, {"version.txt": f"{version}\n"})
    said = refuses(lambda: patching.apply(root, {"depo"}), root, f"is OpenRLHF {version}", "made for 9.9, 10.0")
    assert f"pip install openrlhf=={nearest}" in said
    assert ("--unverified" in said) == (version != "9.7.post2")


def test_a_folder_without_openrlhf_is_refused(root):
    message = refuses(lambda: patching.apply(root / "openrlhf", {"depo"}), root, "no openrlhf/ package")
    assert str(root / "openrlhf") in message


# --- never half-patched -----------------------------------------------------------------------------------------


def as_other_user(action):
    """Run `action` without root's rights: root may write to every folder."""
    if os.geteuid() != 0:
        return action()
    os.seteuid(65534)
    try:
        return action()
    finally:
        os.seteuid(0)


@pytest.fixture
def shared(root, patches, monkeypatch):
    """A copy of `root` in a folder that every user may enter (only its owner may enter pytest's own)."""
    with tempfile.TemporaryDirectory(prefix="depo-test-") as made:
        Path(made).chmod(0o755)
        shutil.copytree(patches.parent, Path(made, "patches"))
        monkeypatch.setattr(patching, "resource_dir", lambda name: Path(made, "patches"))
        yield Path(shutil.copytree(root, Path(made, "checkout")))


def give_away(folder, mode):
    folder.chmod(mode)
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)


@pytest.mark.parametrize("locked", [["openrlhf", "openrlhf/sub"], ["openrlhf/sub"], ["target"]])
def test_a_folder_without_write_permission_is_refused(shared, locked):
    """In place, both folders or only the second one cannot be written."""
    (shared / "target").mkdir()
    for name in ("openrlhf", "openrlhf/sub", "target"):
        give_away(shared / name, 0o555 if name in locked else 0o755)
    if locked == ["target"]:
        action = lambda: patching.write_copy(shared, shared / "target", BOTH)  # noqa: E731
        words = (f"cannot write {shared / 'target/openrlhf'}", "Name a folder you may write: --target DIR")
    else:
        action = lambda: patching.apply(shared, BOTH)  # noqa: E731
        words = (f"cannot write to {shared / 'openrlhf'}", "Nothing was changed", "depo patch --target DIR")
    refuses(lambda: as_other_user(action), shared, "Permission denied", *words)
    for mode in (0o755, 0o555):  # once patched, there is nothing to write
        for name in locked:
            give_away(shared / name, mode)
        as_other_user(action)
        assert texts(shared / "target" if locked == ["target"] else shared) == expected(BOTH)


@pytest.mark.parametrize("revert", [False, True])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_half_way_is_rolled_back(root, monkeypatch, failing, fault, revert):
    """The n-th of three files cannot be put in its place (a.py, then added.py comes or goes, then sub/b.py)."""
    if revert:
        patching.apply(root, BOTH)
    before, calls = snapshot(root), []

    def flaky(move):
        def call(*paths):
            calls.append(paths)
            if len(calls) == failing + 1:
                raise fault
            return move(*paths)

        return staticmethod(call)

    moves = {"replace": flaky(os.replace), "unlink": flaky(os.unlink)}
    with monkeypatch.context() as patched:
        patched.setattr(patching, "os", type("Os", (), vars(os) | moves))
        with pytest.raises(PatchError if isinstance(fault, OSError) else KeyboardInterrupt) as caught:
            patching.revert(root) if revert else patching.apply(root, BOTH)
    assert len(calls) == 2 * failing + 1  # what was done is undone
    if isinstance(fault, OSError):
        assert "No space left on device" in str(caught.value)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "killed",
    [
        {"openrlhf/a.py": BOTH},
        {"openrlhf/a.py": BOTH, "openrlhf/sub/b.py": BOTH},
        {"openrlhf/a.py": {"cpu"}, "openrlhf/sub/b.py": {"depo"}, "openrlhf/added.py": {"cpu"}},
        {"openrlhf/added.py": {"cpu"}},  # after a reinstall: pip does not know the file that a patch added
    ],
)
def test_a_killed_run_is_recognised_finished_and_undone(root, killed):
    before = snapshot(root)
    for wanted in ({"depo"}, {"cpu"}, BOTH, None):
        write(root, {path: expected(state)[path] for path, state in killed.items()})
        assert patching.inspect(root).applied is None
        if wanted:
            patching.apply(root, wanted)
            assert texts(root) == expected(wanted)
        patching.revert(root)
        assert snapshot(root) == before


# --- copies (--target) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_state", "state"),
    [((), ("depo", "cpu")), (("depo",), ("cpu",)), (("cpu",), ("depo",)), (("depo", "cpu"), ("depo",))],
)
def test_a_copy_has_what_was_asked_and_its_base_is_only_read(root, tmp_path, base_state, state):
    patching.apply(root, set(base_state))
    write(root, {"openrlhf/__pycache__/a.cpython-311.pyc": "", "openrlhf/data.json": "{}"})
    before, target = snapshot(root), tmp_path / "new" / "target"
    patching.write_copy(root, target, set(state))
    assert texts(target) == expected(state)
    assert sorted(path.name for path in target.iterdir()) == ["openrlhf"]
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert names == expected(state).keys() | {"openrlhf/__init__.py", "openrlhf/c.py", "openrlhf/data.json"}
    assert snapshot(root) == before

    assert patching.write_copy(root, target, set(state)) == []
    patching.write_copy(root, target, {"cpu"})
    assert texts(target) == expected({"cpu"})
    patching.revert(target)
    assert texts(target) == PRISTINE


def test_of_several_nodes_that_write_one_copy_the_later_ones_find_it(root, tmp_path, monkeypatch):
    target, rename = tmp_path / "target", os.rename

    def slower(old, new):
        monkeypatch.setattr(os, "rename", rename)
        patching.write_copy(root, target, {"depo"})  # the other node
        rename(old, new)  # [Errno 39] Directory not empty

    monkeypatch.setattr(os, "rename", slower)
    assert patching.write_copy(root, target, {"depo"}) == []
    assert texts(target) == expected({"depo"})
    assert sorted(path.name for path in target.iterdir()) == ["openrlhf"]


def test_a_copy_leaves_out_what_a_patch_of_its_base_is_writing(root, tmp_path):
    """Or what a patch that was killed has left there."""
    write(root, {"openrlhf/.depo-patch-abc/new/openrlhf/a.py": "half"})
    for _ in range(2):
        patching.write_copy(root, tmp_path / "target", {"depo"})
        assert not list((tmp_path / "target").rglob("*depo-patch*"))


def test_an_owner_that_a_container_does_not_know_is_left_out(root, monkeypatch):
    def refused(*args):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "chown", refused)
    patching.apply(root, {"depo"})
    assert texts(root) == expected({"depo"})


def test_another_projects_version_is_not_openrlhfs(root, tmp_path):
    """`depo patch --target .` in a project of the user's own."""
    project = tmp_path / "project"
    write(project, {"pyproject.toml": '[project]\nname = "mine"\n', "version.txt": "1.2.0"})
    patching.write_copy(root, project, {"depo"})
    assert patching.version_of(project) != "1.2.0"


def test_a_stale_an_edited_and_the_same_copy_are_refused(root, tmp_path):
    target = tmp_path / "target"
    patching.write_copy(root, target, {"depo"})
    write(root, {"openrlhf/c.py": "the next release\n"})
    refuses(lambda: patching.write_copy(root, target, {"depo"}), target, "c.py", f"Remove {target / 'openrlhf'}")
    write(root, {"openrlhf/c.py": "untouched\n"})
    write(target, {"openrlhf/a.py": "mine\n"})
    action = lambda: patching.write_copy(root, target, {"depo"})  # noqa: E731
    refuses(action, target, "openrlhf/a.py", "remove it and run this again")
    refuses(lambda: patching.write_copy(root, root, {"depo"}), root, "Leave --target out")


# --- the command ------------------------------------------------------------------------------------------------


def test_patch_check_revert_by_command(root, capsys):
    assert main(["patch", "--source", str(root)]) == 0
    assert "patches applied: depo (2 files written)" in capsys.readouterr().out
    assert main(["patch", "--source", str(root)]) == 0
    assert "already there, nothing to do" in capsys.readouterr().out
    assert main(["patch", "--source", str(root), "--cpu"]) == 0
    assert "patches applied: depo, cpu (2 files written)" in capsys.readouterr().out
    assert texts(root) == expected(BOTH)
    assert main(["patch", "--source", str(root)]) == 0
    assert "patches applied: depo, cpu (already there" in capsys.readouterr().out
    assert main(["patch", "--source", str(root), "--revert"]) == 0
    assert "3 files restored" in capsys.readouterr().out
    assert texts(root) == PRISTINE
    assert main(["patch", "--source", str(root), "--revert"]) == 0
    assert "no patch is in, nothing to do" in capsys.readouterr().out


def test_no_seam_gives_the_cpu_patch_alone(root, tmp_path, capsys):
    assert main(["patch", "--source", str(root), "--target", str(tmp_path / "t"), "--cpu", "--no-seam"]) == 0
    assert texts(tmp_path / "t") == expected({"cpu"})
    assert f'export PYTHONPATH="{tmp_path / "t"}' in capsys.readouterr().out
    assert main(["patch", "--source", str(root)]) == 0
    assert main(["patch", "--source", str(root), "--cpu", "--no-seam"]) == 1
    assert "depo patch --revert" in capsys.readouterr().err
    assert texts(root) == expected({"depo"})


@pytest.mark.parametrize("options", [["--no-seam"], ["--check", "--cpu"], ["--revert", "--cpu", "--no-seam"]])
def test_contradictions_are_wrong_usage(options, capsys):
    assert main(["patch", *options]) == 2
    assert "--cpu" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["pat"], ["patch", "--chec"], ["patch", "--check", "--revert"], ["--vers"]])
def test_abbreviations_and_unknown_words_are_wrong_usage(argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_check_names_the_copy_that_would_run_and_warns_about_another(root, tmp_path, monkeypatch, capsys):
    """A launch takes the current folder first, then PYTHONPATH, then what is installed."""
    write(tmp_path / "here", PRISTINE | {"openrlhf/__init__.py": ""})
    here, there = tmp_path / "here" / "openrlhf", root / "openrlhf"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    assert main(["patch", "--check"]) == 1
    assert f"imports:\n  {there}: OpenRLHF 9.9, patches applied: none" in capsys.readouterr().out

    assert main(["patch", "--source", str(root), "--cpu"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["patch", "--check"]) == 0
    captured = capsys.readouterr()
    assert f"imports:\n  {there}: OpenRLHF 9.9, patches applied: depo, cpu" in captured.out
    assert captured.err == ""

    monkeypatch.chdir(tmp_path / "here")
    assert main(["patch", "--check"]) == 1
    captured = capsys.readouterr()
    assert f"imports:\n  {here}: OpenRLHF 9.9, patches applied: none" in captured.out
    assert f"  {there}: OpenRLHF 9.9, patches applied: depo, cpu" in captured.out.split("other copies:")[1]
    assert f"imports {here}, not the patched {there}" in captured.err
    assert f'export PYTHONPATH="{root}' in captured.err
    assert main(["patch", "--source", str(root)]) == 0
    assert f"imports {here}, not the patched" in capsys.readouterr().err


def empty_environment(folder):
    """Make a virtual environment with nothing in it and return its site-packages."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    return next((folder / "lib").glob("python*")) / "site-packages"


@pytest.mark.usefixtures("patches")
def test_the_installed_copy_is_found_behind_others(tmp_path, monkeypatch, capsys):
    """The current folder and PYTHONPATH come first at a launch; `depo patch` still takes what is installed.

    Its files are links into a package manager's cache, which stays as it is.
    """
    installed, here, before = empty_environment(tmp_path / "env"), tmp_path / "here", tmp_path / "before"
    for folder in (installed, here, before):
        write(folder, PRISTINE | {"openrlhf/__init__.py": ""})
    write(installed, {"openrlhf-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: openrlhf\nVersion: 9.9\n"})
    write(tmp_path / "cache", PRISTINE | {"openrlhf/__init__.py": ""})
    for name in [*PRISTINE, "openrlhf/__init__.py"]:
        (installed / name).unlink()
        (installed / name).symlink_to(tmp_path / "cache" / name)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    monkeypatch.setenv("PYTHONPATH", str(before))
    monkeypatch.chdir(here)
    assert main(["patch"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{installed / 'openrlhf'}: OpenRLHF 9.9, patches applied: depo (")
    assert f"imports {here / 'openrlhf'}, not the patched" in captured.err
    assert texts(installed) == expected({"depo"})
    assert texts(here) == texts(before) == texts(tmp_path / "cache") == PRISTINE

    assert main(["patch", "--check"]) == 1
    imported, others = capsys.readouterr().out.split("other copies:")
    assert f"{here / 'openrlhf'}: OpenRLHF 9.9, patches applied: none" in imported
    assert f"{before / 'openrlhf'}: OpenRLHF 9.9, patches applied: none" in others
    assert f"{installed / 'openrlhf'}: OpenRLHF 9.9, patches applied: depo" in others


@pytest.mark.usefixtures("patches")
def test_without_an_installed_openrlhf_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    empty_environment(tmp_path / "env")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["patch"]) == 1
    message = capsys.readouterr().err
    for word in ("openrlhf is not installed", "pip install openrlhf==9.9", "depo patch --source DIR"):
        assert word in message
    assert main(["patch", "--check"]) == 1
    assert "no openrlhf: none is installed" in capsys.readouterr().out

    write(tmp_path, PRISTINE | {"openrlhf/__init__.py": ""})
    assert main(["patch"]) == 1
    assert f"depo patch --source {tmp_path}\n" in capsys.readouterr().err


def test_check_tells_an_interrupted_and_an_edited_copy(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    write(root, {"openrlhf/a.py": expected({"depo"})["openrlhf/a.py"]})
    assert main(["patch", "--check"]) == 1
    assert "PARTLY patched" in capsys.readouterr().out
    write(root, {"openrlhf/a.py": "mine\n"})
    assert main(["patch", "--check"]) == 1
    assert "Edited:\n  openrlhf/a.py" in capsys.readouterr().out


# --- the real OpenRLHF and the shipped patches ------------------------------------------------------------------

RELEASE = "0.11.2"
SHIPPED = REPO / "patches" / f"openrlhf-{RELEASE}"


def test_every_shipped_release_has_its_patches_and_sums():
    found = patching.releases()
    assert RELEASE in found
    sums, without_gpu = {"SHA256SUMS.original", "SHA256SUMS.depo"}, {"SHA256SUMS.cpu", "SHA256SUMS.depo+cpu"}
    assert list(found) == ["0.10.2", "0.10.3", "0.10.4", "0.11.0", "0.11.1", "0.11.2"]
    for release, folder in found.items():
        on_cpu = without_gpu if release in ("0.11.1", RELEASE) else set()
        assert {path.name for path in folder.iterdir()} == sums | on_cpu


@pytest.fixture(scope="session")
def pristine():
    """site-packages with the pristine OpenRLHF in it."""
    found = metadata.distribution("openrlhf")
    assert found.version == RELEASE
    site = Path(found.locate_file("."))
    check_sums(site, "original")
    return site


def check_sums(root, name):
    """Check with another tool than `depo patch` that a copy is in the state `name`."""
    command = ["sha256sum", "--check", "--quiet", str(SHIPPED / f"SHA256SUMS.{name}")]
    subprocess.run(command, cwd=root, check=True)


def install_editable(checkout, environment):
    """pip's own editable install, with this environment's setuptools and no network."""
    import setuptools

    setup = 'name="openrlhf", version=open("version.txt").read().strip(), packages=find_packages()'
    write(checkout, {"version.txt": f"{RELEASE}\n"})
    write(checkout, {"setup.py": f"from setuptools import find_packages, setup\nsetup({setup})\n"})
    build = '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    write(checkout, {"pyproject.toml": build})
    bridge = environment.with_name("setuptools")
    bridge.mkdir()
    site = Path(setuptools.__file__).parents[1]
    for path in [*site.glob("setuptools*"), *site.glob("_distutils_hack"), *site.glob("pkg_resources")]:
        os.symlink(path, bridge / path.name)
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "-q"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-e", str(checkout)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(bridge)}, check=True)


@pytest.mark.wheel
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_the_real_release_is_patched_reverted_and_refused(pristine, tmp_path, kind):
    site, info, decoy = empty_environment(tmp_path / "env"), f"openrlhf-{RELEASE}.dist-info", tmp_path / "decoy"
    root = site if kind == "wheel" else tmp_path / "Open RLHF"
    shutil.copytree(pristine / "openrlhf", root / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    if kind == "wheel":
        shutil.copytree(pristine / info, site / info)
    else:
        install_editable(root, tmp_path / "env")
    write(decoy, {"openrlhf/__init__.py": ""})

    def depo(*options, cwd=tmp_path):
        """Run `depo patch` with the environment's own Python."""
        command = [str(tmp_path / "env/bin/python"), "-m", "depo_plugin.commands.cli", "patch", *options]
        env = os.environ | {"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    before = snapshot(root / "openrlhf")
    for options, applied in (([], "depo"), (["--cpu"], "depo, cpu")):
        code, out, err = depo(*options, cwd=decoy)
        assert code == 0, err
        assert f"OpenRLHF {RELEASE}, patches applied: {applied} (" in out
        check_sums(root, applied.replace(", ", "+"))
        code, out, err = depo("--check")
        assert (code, err) == (0, "")
        assert f"imports:\n  {root / 'openrlhf'}: OpenRLHF {RELEASE}, patches applied: {applied}" in out
    assert depo("--revert")[0] == 0
    assert snapshot(root / "openrlhf") == before

    edited = root / "openrlhf/trainer/ppo_trainer.py"
    original = edited.read_bytes()
    edited.write_bytes(original + b"\n# mine\n")
    code, _, err = depo()
    assert code == 1
    assert "Edited:\n  openrlhf/trainer/ppo_trainer.py\n" in err
    edited.write_bytes(original)
    version = root / ("version.txt" if kind == "editable" else f"{info}/METADATA")
    version.write_text(version.read_text().replace(RELEASE, "0.11.3"))
    code, _, err = depo()
    assert code == 1
    assert f"is OpenRLHF 0.11.3, and openrlhf-depo {__version__} is made for 0.10.2, " in err
    assert snapshot(root / "openrlhf") == before


@pytest.mark.wheel
def test_every_state_of_the_real_release_is_reached_from_every_other_and_compiles(pristine, tmp_path):
    """The CPU patch finds its lines further down if the DEPO patch is in."""
    for before in STATES.values():
        for name, state in STATES.items():
            patching.write_copy(pristine, tmp_path, set(before))
            patching.write_copy(pristine, tmp_path, set(state))
            check_sums(tmp_path, name)
            assert patching.inspect(tmp_path).applied == state
    for path in patching.inspect(tmp_path).names:  # in the last state, with both patches
        compile((tmp_path / path).read_text(), path, "exec")
    assert "depo_hooks" in (tmp_path / "openrlhf/trainer/ppo_trainer.py").read_text()


@pytest.mark.wheel
def test_the_shipped_sums_are_those_that_the_script_writes(pristine, tmp_path):
    shutil.copytree(SHIPPED.parent, tmp_path / "patches", ignore=shutil.ignore_patterns("SHA256SUMS.*"))
    made = tmp_path / "patches" / SHIPPED.name
    for options, names in ((), ["original", "depo"]), (["--cpu"], STATES):
        subprocess.run(["bash", str(REPO / "scripts/patch_sums.sh"), str(made), str(pristine), *options], check=True)
        assert {path.name for path in made.iterdir()} == {f"SHA256SUMS.{name}" for name in names}
    for path in made.iterdir():
        assert path.read_text() == (SHIPPED / path.name).read_text()

    diffs = "".join(path.read_text() for path in SHIPPED.parent.glob("*.patch"))
    touched = set(re.findall(r"^(?:--- a|\+\+\+ b)/(\S+)", diffs, flags=re.MULTILINE))
    assert len(touched) > 10
    assert set(patching.inspect(pristine).names) == touched
