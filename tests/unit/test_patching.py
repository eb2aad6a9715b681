"""`depo patch`: on a made-up release of three files, where every result is known, and on the real OpenRLHF.

The made-up release is 9.9. Its patches: "depo" changes a.py and sub/b.py, "cpu" changes a.py further down and adds
sub/new.py. What a patched file should be is written with str.replace here, the diffs with difflib.
"""

import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path

import pytest

from depo_plugin.commands import patching
from depo_plugin.commands.cli import main
from depo_plugin.commands.patching import PatchError
from depo_plugin.settings.resources import resource_dir

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
STATES = [(), ("depo",), ("cpu",), ("depo", "cpu")]


def expected(state):
    """The made-up release in `state`: path -> text of the files that patches touch."""
    files = dict(PRISTINE)
    for name, edits in (("depo", SEAM), ("cpu", CPU)):
        if name in state:
            files |= {path: files[path].replace(*edit) for path, edit in edits.items()}
    return files | ({"openrlhf/sub/new.py": NEW} if "cpu" in state else {})


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
    """Everything below a folder: path -> (mode, bytes). Byte code aside, nothing may be left over."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(root)): (path.stat().st_mode, path.read_bytes()) for path in files}


def texts(root):
    """The Python files of a copy that the made-up patches know, as text."""
    known = expected(("depo", "cpu"))
    return {path: (root / path).read_text() for path in known if (root / path).exists()}


@pytest.fixture
def patches(tmp_path, monkeypatch):
    """The patch folder of the made-up release, put in the place of the shipped ones."""
    folder = tmp_path / "patches" / "openrlhf-9.9"
    folder.mkdir(parents=True)
    (folder / "0001-depo.patch").write_text(diff(PRISTINE, expected(("depo",))))
    (folder / "0002-cpu.patch").write_text(diff(PRISTINE, expected(("cpu",))))
    sums = [f"{hashlib.sha256(text.encode()).hexdigest()}  {path}\n" for path, text in PRISTINE.items()]
    (folder / "SHA256SUMS").write_text("".join(sums))
    monkeypatch.setattr(patching, "resource_dir", lambda name: folder.parent)
    return folder


@pytest.fixture
def root(tmp_path, patches):
    """A pristine copy of the made-up release, a checkout in a folder with a space in its name."""
    root = tmp_path / "a checkout"
    write(root, PRISTINE | {"openrlhf/__init__.py": "", "openrlhf/c.py": "untouched\n", "version.txt": "9.9\n"})
    write(root, {"setup.py": ""})
    return root


@pytest.fixture(params=["git", "patch"])
def tool(request, tmp_path, monkeypatch):
    """Only one of the two tools that can apply a diff is there."""
    (tmp_path / "bin").mkdir()
    os.symlink(shutil.which(request.param), tmp_path / "bin" / request.param)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


# --- what it does -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize("state", STATES[1:])
def test_apply_gives_the_patched_text_twice_and_revert_the_same_bytes(root, state):
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


def test_a_second_patch_joins_the_first(root):
    patching.apply(root, {"depo"})
    assert patching.apply(root, {"cpu"}) == ["openrlhf/a.py", "openrlhf/sub/new.py"]
    assert texts(root) == expected(("depo", "cpu"))
    assert patching.apply(root, {"depo"}) == []


def test_modes_are_kept_and_hard_links_not_written_through(root, tmp_path):
    """Package managers link site-packages to their cache: a write in place would change the cache."""
    (root / "openrlhf/a.py").chmod(0o640)
    (root / "openrlhf/__init__.py").chmod(0o604)
    os.link(root / "openrlhf/a.py", tmp_path / "cache")
    patching.apply(root, {"depo", "cpu"})
    assert (tmp_path / "cache").read_text() == LINES
    assert (root / "openrlhf/a.py").stat().st_mode & 0o777 == 0o640
    assert (root / "openrlhf/sub/new.py").stat().st_mode & 0o777 == 0o604  # as its package's


def test_neither_git_settings_nor_an_enclosing_repository_matter(root, tmp_path, monkeypatch):
    """In a repository `git apply` skips, without a word, files that it takes for outside its folder.

    A settings file that git cannot read is what `sudo -u other depo patch` may find in HOME.
    """
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(home)], check=True)
    (home / ".gitconfig").write_text("not a settings file\n")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GIT_DIR", str(home / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home / "tmp"))
    patching.apply(root, {"depo", "cpu"})
    assert texts(root) == expected(("depo", "cpu"))


# --- what it refuses, with nothing changed ----------------------------------------------------------------------


def refuses(action, root, *words):
    """Runs `action`, which must raise a PatchError with every one of `words` and leave `root` as it was."""
    before = snapshot(root)
    with pytest.raises(PatchError) as caught:
        action()
    for word in words:
        assert word in str(caught.value)
    assert snapshot(root) == before
    return str(caught.value)


def test_another_version_is_refused_even_if_the_files_are_the_same(root):
    (root / "version.txt").write_text("9.8\n")
    for action in (lambda: patching.apply(root, {"depo"}), lambda: patching.revert(root)):
        refuses(action, root, str(root), "OpenRLHF 9.8", "has patches for 9.9", "pip install openrlhf==9.9")


def test_another_installed_version_is_refused(root):
    (root / "version.txt").unlink()
    write(root, {"openrlhf-9.8.dist-info/METADATA": "Metadata-Version: 2.1\nName: openrlhf\nVersion: 9.8\n"})
    refuses(lambda: patching.apply(root, {"depo"}), root, "OpenRLHF 9.8", "has patches for 9.9")


def test_the_files_decide_where_no_version_is_told(root):
    (root / "version.txt").unlink()
    patching.apply(root, {"depo"})
    assert patching.inspect(root).release == "9.9"
    write(root, {"openrlhf/a.py": "something else\n"})
    refuses(lambda: patching.revert(root), root, "neither OpenRLHF 9.9 as released", "openrlhf/a.py")


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize("state", STATES)
def test_an_edited_file_is_refused_by_name(root, state):
    patching.apply(root, set(state))
    text = (root / "openrlhf/a.py").read_text().replace("line 15\n", "line 15, mine\n")  # outside every hunk
    (root / "openrlhf/a.py").write_text(text)
    for action in (lambda: patching.apply(root, {"depo"}), lambda: patching.revert(root)):
        message = refuses(action, root, "openrlhf/a.py", "Nothing was changed", "checkout -- openrlhf/a.py")
        assert "sub/b.py" not in message  # patched, not edited


def test_an_edited_install_is_told_to_reinstall(root):
    (root / "setup.py").unlink()
    (root / "openrlhf/a.py").write_text("mine\n")
    refuses(lambda: patching.apply(root, {"depo"}), root, "pip install --force-reinstall --no-deps openrlhf==9.9")


def test_an_edit_in_another_file_stays(root):
    (root / "openrlhf/c.py").write_text("mine\n")
    patching.apply(root, {"depo"})
    patching.revert(root)
    assert (root / "openrlhf/c.py").read_text() == "mine\n"


def test_a_file_of_the_users_where_a_patch_adds_one_is_refused(root):
    write(root, {"openrlhf/sub/new.py": "mine\n"})
    refuses(lambda: patching.apply(root, {"cpu"}), root, "openrlhf/sub/new.py", "Move them away")


def test_a_file_left_by_a_reinstall_is_taken_over(root):
    """pip puts its own files back over a patched install, and does not know the file that a patch added."""
    patching.apply(root, {"cpu"})
    write(root, PRISTINE)
    patching.apply(root, {"cpu"})
    assert texts(root) == expected(("cpu",))
    patching.revert(root)
    assert texts(root) == PRISTINE


@pytest.mark.usefixtures("tool")
def test_a_patch_is_never_applied_with_fuzz(root, patches):
    """A context line that differs is what GNU patch shrugs off by default (fuzz 2)."""
    text = (patches / "0001-depo.patch").read_text()
    assert "\n line 3\n" in text  # the first of three context lines
    (patches / "0001-depo.patch").write_text(text.replace("\n line 3\n", "\n line three\n"))
    refuses(lambda: patching.apply(root, {"depo"}), root, "0001-depo.patch does not apply", "Reinstall openrlhf-depo")


def test_without_git_and_patch_it_says_so(root, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    refuses(lambda: patching.apply(root, {"depo"}), root, "needs git or patch")


@pytest.mark.parametrize("missing", ["SHA256SUMS", "0001-depo.patch"])
def test_an_incomplete_patch_folder_is_refused(root, patches, missing):
    (patches / missing).unlink()
    refuses(lambda: patching.apply(root, {"depo"}), root, missing, "missing", "Reinstall")


def test_a_folder_without_openrlhf_is_refused(root):
    message = refuses(lambda: patching.apply(root / "openrlhf", {"depo"}), root, "no openrlhf/ package")
    assert str(root / "openrlhf") in message


# --- never half-patched -----------------------------------------------------------------------------------------


@pytest.fixture
def shared_tmp():
    """A folder that every user may enter (pytest's own may be entered by its owner only)."""
    folder = Path(tempfile.mkdtemp(prefix="depo-test-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def as_other_user(action):
    """Runs `action` without root's rights (they ignore mode bits); returns the text of its PatchError, or None."""
    if os.geteuid() != 0:
        try:
            action()
        except PatchError as err:
            return str(err)
        return None
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        message = "died"
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            action()
            message = ""
        except PatchError as err:
            message = str(err)
        finally:
            os.write(write_end, message.encode())
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    return message or None


@pytest.mark.parametrize("locked", ["openrlhf", "openrlhf/sub"])
def test_a_folder_one_may_not_write_is_refused(root, patches, shared_tmp, monkeypatch, locked):
    """Of two folders, all or only the second cannot be written."""
    here = Path(shutil.copytree(root, shared_tmp / "checkout"))
    shutil.copytree(patches.parent, shared_tmp / "patches")
    monkeypatch.setattr(patching, "resource_dir", lambda name: shared_tmp / "patches")
    folders = [here / "openrlhf", here / "openrlhf/sub"]
    for folder in folders:
        if folder == here / locked or locked == "openrlhf":
            folder.chmod(0o555)
        elif os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
    before = snapshot(here)

    message = as_other_user(lambda: patching.apply(here, {"depo", "cpu"}))
    assert message is not None
    for word in (f"cannot write to {here / 'openrlhf'}", "Permission denied", "Nothing was changed", "--target DIR"):
        assert word in message
    assert snapshot(here) == before

    for folder in folders:
        folder.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
    assert as_other_user(lambda: patching.apply(here, {"depo", "cpu"})) is None
    assert texts(here) == expected(("depo", "cpu"))


def test_a_target_one_may_not_write_is_refused(root, patches, shared_tmp, monkeypatch):
    here = Path(shutil.copytree(root, shared_tmp / "checkout"))
    shutil.copytree(patches.parent, shared_tmp / "patches")
    monkeypatch.setattr(patching, "resource_dir", lambda name: shared_tmp / "patches")
    (shared_tmp / "target").mkdir()
    (shared_tmp / "target").chmod(0o555)
    message = as_other_user(lambda: patching.write_copy(here, shared_tmp / "target", {"depo"}))
    assert message is not None
    assert f"cannot write {shared_tmp / 'target' / 'openrlhf'}" in message
    assert "Name a folder you may write" in message
    assert list((shared_tmp / "target").iterdir()) == []


@pytest.mark.parametrize("revert", [False, True])
@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_half_way_is_rolled_back(root, monkeypatch, failing, fault, revert):
    """The n-th of three files cannot be put in its place (a.py, sub/b.py, then sub/new.py comes or goes)."""
    if revert:
        patching.apply(root, {"depo", "cpu"})
    before, moves, calls = snapshot(root), {"replace": os.replace, "unlink": os.unlink}, []

    def flaky(verb):
        def move(*paths, **options):
            if not str(paths[0]).endswith(".tmp") or verb == "replace":
                calls.append(paths)
                if len(calls) == failing + 1:
                    raise fault
            return moves[verb](*paths, **options)

        return move

    with monkeypatch.context() as patched:
        patched.setattr(patching, "os", type("Os", (), vars(os) | {v: staticmethod(flaky(v)) for v in moves}))
        with pytest.raises(PatchError if isinstance(fault, OSError) else KeyboardInterrupt) as caught:
            patching.revert(root) if revert else patching.apply(root, {"depo", "cpu"})
    assert len(calls) > failing
    if isinstance(fault, OSError):
        assert "No space left on device" in str(caught.value)
    assert snapshot(root) == before


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize("done", [1, 2])
def test_a_killed_run_is_recognised_finished_and_undone(root, done):
    before = snapshot(root)
    half = dict(sorted(expected(("depo", "cpu")).items())[:done])
    for finish in (False, True):
        write(root, half)
        assert patching.inspect(root).applied is None
        if finish:
            patching.apply(root, {"depo", "cpu"})
            assert texts(root) == expected(("depo", "cpu"))
        patching.revert(root)
        assert snapshot(root) == before


# --- copies (--target) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_state", "state"), [*zip(STATES, [STATES[3], STATES[2], STATES[1], STATES[1]], strict=True)]
)
def test_a_copy_has_what_was_asked_and_its_base_is_only_read(root, tmp_path, base_state, state):
    patching.apply(root, set(base_state))
    write(root, {"openrlhf/__pycache__/a.cpython-311.pyc": "", "openrlhf/data.json": "{}"})
    before, target = snapshot(root), tmp_path / "new" / "target"
    patching.write_copy(root, target, set(state))
    assert texts(target) == expected(state)
    assert sorted(path.name for path in target.iterdir()) == ["openrlhf"]
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    others = {"openrlhf/__init__.py", "openrlhf/c.py", "openrlhf/data.json"}
    assert names == expected(state).keys() | others
    assert snapshot(root) == before

    assert patching.write_copy(root, target, set(state)) == []
    patching.write_copy(root, target, {"cpu"})
    assert texts(target) == expected(("cpu",))
    patching.revert(target)
    assert texts(target) == PRISTINE


def test_a_stale_copy_is_refused(root, tmp_path):
    patching.write_copy(root, tmp_path / "target", {"depo"})
    write(root, {"openrlhf/c.py": "the next release\n"})
    message = refuses(lambda: patching.write_copy(root, tmp_path / "target", {"depo"}), tmp_path / "target", "c.py")
    assert f"Remove {tmp_path / 'target' / 'openrlhf'}" in message


def test_an_edited_copy_is_refused(root, tmp_path):
    patching.write_copy(root, tmp_path / "target", {"depo"})
    write(tmp_path / "target", {"openrlhf/a.py": "mine\n"})
    action = lambda: patching.write_copy(root, tmp_path / "target", {"depo"})  # noqa: E731
    refuses(action, tmp_path / "target", "openrlhf/a.py", "remove it and run this again")


def test_a_copy_onto_itself_is_refused(root):
    refuses(lambda: patching.write_copy(root, root, {"depo"}), root, "Leave --target out")


# --- the command ------------------------------------------------------------------------------------------------


def test_patch_check_revert_by_command(root, capsys):
    assert main(["patch", "--source", str(root)]) == 0
    assert "patches applied: depo (2 files written)" in capsys.readouterr().out
    assert main(["patch", "--source", str(root)]) == 0
    assert "already there, nothing to do" in capsys.readouterr().out
    assert main(["patch", "--source", str(root), "--cpu"]) == 0
    assert texts(root) == expected(("depo", "cpu"))
    assert main(["patch", "--source", str(root), "--revert"]) == 0
    assert "3 files restored" in capsys.readouterr().out
    assert texts(root) == PRISTINE


def test_no_seam_gives_the_cpu_patch_alone(root, tmp_path, capsys):
    assert main(["patch", "--source", str(root), "--target", str(tmp_path / "t"), "--cpu", "--no-seam"]) == 0
    assert texts(tmp_path / "t") == expected(("cpu",))
    assert f'export PYTHONPATH="{tmp_path / "t"}' in capsys.readouterr().out
    assert main(["patch", "--source", str(root)]) == 0
    assert main(["patch", "--source", str(root), "--cpu", "--no-seam"]) == 1
    assert "depo patch --revert" in capsys.readouterr().err
    assert texts(root) == expected(("depo",))


@pytest.mark.parametrize("options", [["--no-seam"], ["--check", "--cpu"], ["--revert", "--cpu", "--no-seam"]])
def test_contradictions_are_wrong_usage(options, capsys):
    assert main(["patch", *options]) == 2
    assert "--cpu" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["pat"], ["patch", "--chec"], ["patch", "--check", "--revert"], ["--vers"]])
def test_abbreviations_and_unknown_words_are_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_check_names_the_copy_that_would_run_and_warns_about_another(root, tmp_path, monkeypatch, capsys):
    """A launch takes the current folder first, then PYTHONPATH, then what is installed."""
    write(tmp_path / "here", PRISTINE | {"openrlhf/__init__.py": ""})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    assert main(["patch", "--check"]) == 1
    out = capsys.readouterr().out
    assert f"imports:\n  {root / 'openrlhf'}: OpenRLHF 9.9, patches applied: none" in out

    assert main(["patch", "--source", str(root), "--cpu"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["patch", "--check"]) == 0
    captured = capsys.readouterr()
    assert f"imports:\n  {root / 'openrlhf'}: OpenRLHF 9.9, patches applied: depo, cpu" in captured.out
    assert captured.err == ""

    monkeypatch.chdir(tmp_path / "here")
    assert main(["patch", "--check"]) == 1
    captured = capsys.readouterr()
    here = tmp_path / "here" / "openrlhf"
    assert f"imports:\n  {here}: OpenRLHF 9.9, patches applied: none" in captured.out
    assert f"  {root / 'openrlhf'}: OpenRLHF 9.9, patches applied: depo, cpu" in captured.out.split("other copies:")[1]
    assert f"imports {here}, not the patched {root / 'openrlhf'}" in captured.err
    assert f'export PYTHONPATH="{root}' in captured.err
    assert main(["patch", "--source", str(root)]) == 0
    assert f"imports {here}, not the patched" in capsys.readouterr().err


FINDER = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {init!r}) if name == "openrlhf" else None
sys.meta_path.append(Finder)
"""


@pytest.mark.parametrize("how", ["folder", "import hook"])
def test_the_installed_copy_is_found_behind_others(root, tmp_path, monkeypatch, capsys, how):
    """The current folder and PYTHONPATH come first at a launch; `depo patch` takes what is installed all the same."""
    site = empty_environment(tmp_path / "env")
    if how == "folder":
        installed = site
        write(site, PRISTINE | {"openrlhf/__init__.py": ""})
        write(site, {"openrlhf-9.9.dist-info/METADATA": "Metadata-Version: 2.1\nName: openrlhf\nVersion: 9.9\n"})
    else:  # as some editable installs do it
        installed = root
        write(site, {"finder.py": FINDER.format(init=str(root / "openrlhf/__init__.py")), "a.pth": "import finder\n"})
    for name in ("here", "before"):
        write(tmp_path / name, PRISTINE | {"openrlhf/__init__.py": ""})
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "before"))
    monkeypatch.chdir(tmp_path / "here")
    assert main(["patch"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{installed / 'openrlhf'}: OpenRLHF 9.9, patches applied: depo (")
    assert f"imports {tmp_path / 'here' / 'openrlhf'}, not the patched" in captured.err
    assert texts(installed) == expected(("depo",))
    assert texts(tmp_path / "here") == texts(tmp_path / "before") == PRISTINE

    assert main(["patch", "--check"]) == 1
    out = capsys.readouterr().out
    imported, others = out.split("other copies:")
    assert f"{tmp_path / 'here' / 'openrlhf'}: OpenRLHF 9.9, patches applied: none" in imported
    assert f"{tmp_path / 'before' / 'openrlhf'}: OpenRLHF 9.9, patches applied: none" in others
    assert f"{installed / 'openrlhf'}: OpenRLHF 9.9, patches applied: depo" in others


@pytest.mark.usefixtures("patches")
def test_without_an_installed_openrlhf_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    empty_environment(tmp_path / "env")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env/bin/python"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["patch"]) == 1
    message = capsys.readouterr().err
    assert "openrlhf is not installed" in message
    assert "pip install openrlhf==9.9" in message
    assert "depo patch --source DIR" in message
    assert main(["patch", "--check"]) == 1
    assert "no openrlhf: none is installed" in capsys.readouterr().out

    write(tmp_path, PRISTINE | {"openrlhf/__init__.py": ""})
    assert main(["patch"]) == 1
    assert f"depo patch --source {tmp_path}\n" in capsys.readouterr().err


def test_check_tells_an_interrupted_and_an_edited_copy(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    write(root, dict([sorted(expected(("depo",)).items())[0]]))
    assert main(["patch", "--check"]) == 1
    assert "PARTLY patched" in capsys.readouterr().out
    write(root, {"openrlhf/a.py": "mine\n"})
    assert main(["patch", "--check"]) == 1
    assert "Edited:\n  openrlhf/a.py" in capsys.readouterr().out


# --- the real OpenRLHF and the shipped patches ------------------------------------------------------------------

RELEASE = "0.11.2"
SHIPPED = REPO / "patches" / f"openrlhf-{RELEASE}"


@pytest.fixture(scope="session")
def pristine():
    """site-packages with the pristine OpenRLHF in it: (package folder, its metadata folder)."""
    found = metadata.distribution("openrlhf")
    assert found.version == RELEASE
    package, info = Path(found.locate_file("openrlhf")), Path(found.locate_file(f"openrlhf-{RELEASE}.dist-info"))
    for name, digest in shipped_sums().items():
        assert patching.sha256_of(package.parent / name) == digest, f"{name} is not pristine: depo patch --revert"
    return package, info


def shipped_sums():
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in map(str.split, lines)}


def copy_package(pristine, folder):
    shutil.copytree(pristine[0], folder / "openrlhf", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def empty_environment(folder):
    """A virtual environment with nothing in it; returns its site-packages."""
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    return next((folder / "lib").glob("python*")) / "site-packages"


def make_checkout(pristine, folder):
    copy_package(pristine, folder)
    write(folder, {"version.txt": f"{RELEASE}\n"})
    setup = 'name="openrlhf", version=open("version.txt").read().strip(), packages=find_packages()'
    write(folder, {"setup.py": f"from setuptools import find_packages, setup\nsetup({setup})\n"})
    write(folder, {"pyproject.toml": '[build-system]\nrequires = ["setuptools"]\n'})
    write(
        folder,
        {"pyproject.toml": (folder / "pyproject.toml").read_text() + 'build-backend = "setuptools.build_meta"\n'},
    )
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return folder


def make_editable(pristine, folder, environment):
    """pip's own editable install, with this environment's setuptools and no network."""
    import setuptools

    checkout = make_checkout(pristine, folder)
    bridge = environment.with_name("setuptools")
    bridge.mkdir()
    site = Path(setuptools.__file__).parents[1]
    for path in [*site.glob("setuptools*"), *site.glob("_distutils_hack"), *site.glob("pkg_resources")]:
        os.symlink(path, bridge / path.name)
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "-q"]
    command += ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-e", str(checkout)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(bridge)}, check=True)
    return checkout


class Setting:
    """One way of having OpenRLHF: the folder that holds it, and how `depo patch` is run for it."""

    def __init__(self, pristine, kind, folder):
        self.kind, self.folder = kind, folder
        site = empty_environment(folder / "env")
        self.options = []
        if kind == "wheel":
            self.root = copy_package(pristine, site)
            shutil.copytree(pristine[1], site / pristine[1].name)
        elif kind == "editable":
            self.root = make_editable(pristine, folder / "Open RLHF", folder / "env")
        else:
            self.root = make_checkout(pristine, folder / "Open RLHF")
            self.options = ["--source", str(self.root)]

    def depo(self, *options):
        """Runs `depo patch` with the environment's own Python, from a folder without openrlhf/."""
        command = [
            str(self.folder / "env/bin/python"),
            "-m",
            "depo_plugin.commands.cli",
            "patch",
            *self.options,
            *options,
        ]
        env = os.environ | {"PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def code(self):
        return snapshot(self.root / "openrlhf")


@pytest.fixture(params=["wheel", "editable", "checkout"])
def setting(request, tmp_path, pristine):
    return Setting(pristine, request.param, tmp_path)


@pytest.mark.wheel
def test_the_real_release_is_patched_twice_and_reverted(setting):
    before = setting.code()
    for options, applied in (([], "depo"), (["--cpu"], "depo, cpu")):
        done = setting.depo(*options)
        assert done.returncode == 0, done.stderr
        assert f"OpenRLHF {RELEASE}, patches applied: {applied} (" in done.stdout
        patched = setting.code()
        again = setting.depo(*options)
        assert again.returncode == 0, again.stderr
        assert f"patches applied: {applied} (already there, nothing to do)" in again.stdout
        assert setting.code() == patched

        check = setting.depo("--check")
        assert f"{setting.root / 'openrlhf'}: OpenRLHF {RELEASE}, patches applied: {applied}" in check.stdout
        imported = setting.kind != "checkout"  # a plain checkout is imported only from inside, or by PYTHONPATH
        assert check.returncode == (0 if imported else 1)
        assert ("warning" in check.stderr) != imported

    assert setting.depo("--revert").returncode == 0
    assert setting.code() == before
    if setting.kind == "checkout":
        assert setting.depo("--cpu", "--no-seam").returncode == 0
        assert setting.depo("--revert").returncode == 0
        assert setting.code() == before


@pytest.mark.wheel
def test_the_real_release_edited_or_of_another_version_is_refused(setting):
    edited = setting.root / "openrlhf/trainer/ppo_trainer.py"
    original = edited.read_bytes()
    edited.write_bytes(original + b"\n# mine\n")
    before = setting.code()
    refused = setting.depo()
    assert refused.returncode == 1
    assert "Edited:\n  openrlhf/trainer/ppo_trainer.py\n" in refused.stderr
    assert setting.code() == before

    edited.write_bytes(original)
    if setting.kind == "wheel":
        stated = setting.root / f"openrlhf-{RELEASE}.dist-info" / "METADATA"
    else:
        stated = setting.root / "version.txt"
    stated.write_text(stated.read_text().replace(RELEASE, "0.11.3"))
    before = setting.code()
    refused = setting.depo()
    assert refused.returncode == 1
    assert "is OpenRLHF 0.11.3, and openrlhf-depo" in refused.stderr
    assert f"has patches for {RELEASE}" in refused.stderr
    assert setting.code() == before


@pytest.mark.wheel
def test_the_real_release_in_a_folder_one_may_not_write_is_refused(pristine, shared_tmp, monkeypatch):
    root = copy_package(pristine, shared_tmp / "site")
    shutil.copytree(resource_dir("patches"), shared_tmp / "patches")
    monkeypatch.setattr(patching, "resource_dir", lambda name: shared_tmp / "patches")
    for folder in [root / "openrlhf", *(path for path in root.rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    before = snapshot(root)
    message = as_other_user(lambda: patching.apply(root, {"depo", "cpu"}))
    assert message is not None
    assert "Permission denied" in message
    assert snapshot(root) == before


@pytest.mark.wheel
@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize("state", STATES[1:])
def test_every_state_of_the_real_release_compiles_and_reverts(pristine, tmp_path, state):
    root = copy_package(pristine, tmp_path / "site")
    before = snapshot(root)
    changed = patching.apply(root, set(state))
    assert len(changed) >= 3
    for name in changed:
        compile((root / name).read_text(), name, "exec")
    assert ("depo_hooks" in (root / "openrlhf/trainer/ppo_trainer.py").read_text()) == ("depo" in state)
    patching.revert(root)
    assert snapshot(root) == before


@pytest.mark.wheel
def test_git_and_patch_give_the_same_bytes(pristine, tmp_path, monkeypatch):
    """The CPU patch finds its lines further down once the DEPO patch is in: both tools must find the same ones."""
    root = copy_package(pristine, tmp_path / "site")
    states = []
    for tool in ("git", "patch"):
        (tmp_path / tool).mkdir()
        os.symlink(shutil.which(tool), tmp_path / tool / tool)
        with monkeypatch.context() as only:
            only.setenv("PATH", str(tmp_path / tool))
            states.append(patching.inspect(root).states)
    assert list(states[0]) == STATES
    assert states[0] == states[1]


@pytest.mark.wheel
def test_the_sums_are_of_the_files_that_the_shipped_patches_touch(pristine, tmp_path):
    touched, added = set(), set()
    shipped = sorted(SHIPPED.glob("*.patch"))
    assert [path.name for path in shipped] == list(patching.PATCHES.values())
    for path in shipped:
        command = ["git", "apply", "--numstat", "--summary", str(path)]
        lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
        added |= {line.split()[-1] for line in lines if line.startswith(" create mode")}
        touched |= {line.split("\t")[2] for line in lines if "\t" in line}
    assert shipped_sums().keys() == touched - added
    for name in added:  # depo patch makes no folders
        assert name.endswith(".py")
        assert (pristine[0].parent / name).parent.is_dir()


def test_every_shipped_release_has_its_two_patches_and_its_sums():
    found = patching.releases()
    assert RELEASE in found
    for folder in found.values():
        assert {path.name for path in folder.iterdir()} >= {*patching.PATCHES.values(), "SHA256SUMS"}
