"""The seam on the pristine files of every supported release: one diff, real flags, OpenRLHF's own loops."""

import ast
import shutil
import sys
from pathlib import Path

import pytest
from numbered_pool import ACCEPT_ALL, flat, make, stream
from openrlhf_loops import fit, generator
from release_parser import launch

from depo_plugin.commands import patching
from depo_plugin.commands.cli import main

pytestmark = pytest.mark.wheel

RELEASES = list(patching.releases())
OLD = ("0.10.2", "0.10.3", "0.10.4")  # these end an episode before they train what came with its end


@pytest.fixture
def copied(pristine, tmp_path):
    """A copy of it that may be changed, in a folder with a space in its name."""
    return shutil.copytree(pristine, tmp_path / "a copy", ignore=shutil.ignore_patterns("__pycache__"))


def contents(root):
    files = [path for path in (root / "openrlhf").rglob("*.py")]
    return {path.relative_to(root): path.read_bytes() for path in files}


# ── The diff ──


def test_it_is_applied_once_and_reverted_to_the_byte(copied):
    before = contents(copied)
    assert patching.apply(copied, {"depo"}) == list(patching.PLACES)
    assert patching.apply(copied, {"depo"}) == []
    assert patching.inspect(copied).applied == ("depo",)
    assert patching.revert(copied) == list(patching.PLACES)
    assert contents(copied) == before


def neighbours(source):
    """Each `if` around a hook's call: its text, and the first lines of the statements before and after it."""
    tree, found = ast.parse(source), []
    for owner in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(owner, field, [])
            for i, statement in enumerate(statements if isinstance(statements, list) else []):
                text = ast.unparse(statement)
                if isinstance(statement, ast.If) and text.startswith("if depo_hooks"):
                    around = [ast.unparse(one) for one in (*statements[:i][-1:], *statements[i + 1 : i + 2])]
                    found.append((text, [line.splitlines()[0] for line in around]))
    return found


def test_every_call_lands_in_its_function_between_the_same_statements(copied):
    patching.apply(copied, {"depo"})
    newest = Path(sys.prefix) / "openrlhf-releases" / RELEASES[-1]
    for name, places in patching.PLACES.items():
        patched = (copied / name).read_bytes()
        assert patching.call_sites(patched) == places
        original = (newest / name).read_bytes()
        for old, new in patching._read_hunks(patching.resource_dir("patches") / "0001-depo.patch")[name]:
            original = original.replace(old, new, 1)
        assert neighbours(patched) == neighbours(original)
        assert len(neighbours(patched)) == len(places)


def test_an_unknown_release_is_copied_with_the_call_sites_if_they_fit(copied, tmp_path, capsys):
    (told,) = copied.glob("openrlhf-*.dist-info/METADATA")
    told.write_text("Metadata-Version: 2.1\nName: openrlhf\nVersion: 0.12.0\n")
    before, target = contents(copied), tmp_path / "target"
    options = ["patch", "--source", str(copied), "--unverified"]
    assert main([*options, "--target", str(target)]) == 0
    said = capsys.readouterr().out
    assert "OpenRLHF 0.12.0, UNVERIFIED, patches applied: depo (3 files)" in said
    assert "Not verified: the files' checksums" in said
    assert contents(copied) == before
    for name, places in patching.PLACES.items():
        assert patching.call_sites((target / name).read_bytes()) == places
    main(["patch", "--check", "--target", str(target)])
    assert f"{target / 'openrlhf'}: OpenRLHF 0.12.0, UNVERIFIED" in capsys.readouterr().out

    assert main([*options, "--target", str(target)]) == 1
    assert "exists. Remove it" in capsys.readouterr().err
    generator_file = copied / "openrlhf/trainer/ppo_utils/samples_generator.py"
    text = generator_file.read_text().replace("def _dispatch_prompts_to_vllm(", "def _dispatch(")
    generator_file.write_text(text.replace("if dynamic_filtering and all(", "if all("))
    assert main([*options, "--target", str(tmp_path / "other")]) == 1
    said = capsys.readouterr().err
    assert "samples_generator.py: hunk 3 has 0 places instead of 1" in said
    assert not (tmp_path / "other").exists()
    assert main(options) == 2
    told.write_text("Metadata-Version: 2.1\nName: openrlhf\nVersion: 0.11.2\n")
    assert main([*options, "--target", str(tmp_path / "other")]) == 1
    assert "which is known. Leave --unverified out" in capsys.readouterr().err


# ── Flags and validation ──

BASE = (
    "--actor.model_name_or_path m --reward.remote_url reward.py --data.prompt_dataset d"
    " --rollout.n_samples_per_prompt 8 --actor.num_gpus_per_node 1 --vllm.num_engines 1"
).split()
DEPO = ["--advantage_estimator", "depo"]


def test_the_releases_own_parser_and_validation(copied, monkeypatch):
    patching.apply(copied, {"depo"})
    args, said = launch(copied, [*BASE, *DEPO], monkeypatch)
    assert args is not None, said
    assert args.algo.advantage.estimator == "group_norm"
    assert args.depo.enabled
    assert said.startswith("DEPO is on: ")
    args, _ = launch(copied, [*DEPO, *BASE, "--algo.advantage.estimator", "rloo", "--train.async_enable"], monkeypatch)
    assert (args.algo.advantage.estimator, args.train.async_enable) == ("rloo", True)
    args, said = launch(copied, [*BASE, "--algo.advantage.estimator", "dr_grpo"], monkeypatch)
    assert not hasattr(args, "depo"), said
    for flags, words in {
        ("--algo.advantage.estimator", "gae"): "which has no critic",
        ("--rollout.n_samples_per_prompt", "1"): "must be at least 2",
        ("--depo.filter.hihg", "0.9"): "Did you mean --depo.filter.high",
    }.items():
        args, said = launch(copied, [*BASE, *DEPO, *flags], monkeypatch)
        assert args is None
        assert words in said
    args, said = launch(copied, [*BASE, *DEPO, "--depo.advantage.base", "flash_reinforce"], monkeypatch)
    known = "flash_reinforce" in (copied / "openrlhf/cli/train_ppo_ray.py").read_text()
    assert (args is not None) == known
    assert known or "--depo.advantage.base flash_reinforce: this OpenRLHF does not know it" in said


# ── OpenRLHF's own loops ──


@pytest.mark.parametrize("asynchronous", [False, True])
def test_its_loops_train_full_batches_and_resume_at_every_step(pristine, asynchronous):
    def train(**start):
        loader, _ = make(22, 5, episodes=2, **ACCEPT_ALL)
        return fit(loader, generator(loader, 5, root=pristine), 2, asynchronous=asynchronous, root=pristine, **start)

    whole = train()
    batches = flat(whole.trained)
    assert [len(batch) for batch in batches] == [5] * 8
    assert flat(batches) == stream(22, 0, 40)
    for step, state in enumerate(whole.saved, start=1):
        assert flat(train(start=state).trained) == batches[step:]


def test_its_loop_replaces_groups_that_dynamic_filtering_throws_away(pristine):
    """The old releases drop an episode's last batch if the pool ends while its groups are replaced."""

    def two_thirds(i):
        return i % 3 > 0

    loader, _ = make(43, 10, episodes=1, **ACCEPT_ALL)
    (trained,) = fit(loader, generator(loader, 10, accept=two_thirds, root=pristine), 1, root=pristine).trained
    assert [len(batch) for batch in trained] == [10] * 4
    loader, _ = make(12, 10, episodes=1, **ACCEPT_ALL)
    rare = fit(loader, generator(loader, 10, accept=lambda i: i == 0, root=pristine), 1, root=pristine).trained
    assert [len(batch) for batch in rare[0]] == ([] if pristine.name in OLD else [1])
