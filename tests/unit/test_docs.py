"""The pages: their commands run or parse, and what they name exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from depo_plugin.estimator import metrics
from depo_plugin.remote.handle import TALLY
from depo_plugin.settings import config

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
TEXTS = {page.relative_to(REPO).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}

# Blocks that are only parsed: the beginning of the block, and why it is not run.
NOT_RUN = {
    "bash scripts/quickstart_cpu.sh": "trains on the real stack for minutes; tests/e2e launches the same model",
    "bash scripts/test.sh": "runs all tests, so this one, too",
    ".venv/bin/python -m pytest": "runs other tests",
    'pip install --no-deps "openrlhf-depo @': "installs into the environment and launches on GPUs",
    ".venv/bin/python -m benchmarks.replay": "needs a pool file of the user's own",
    "pip install --no-deps --target PRISTINE": "needs a release of OpenRLHF that does not exist yet",
    "cp -r PRISTINE": "the same",
    "bash scripts/patch_sums.sh": "the same",
    "depo score runs/a": "needs a checkpoint and a launch; test_score.py runs both ways",
    "depo route runs/a": "needs a checkpoint and labelled requests; test_route.py runs it",
    "pip install 'openrlhf-depo[route,report]'": "installs, and needs labelled requests; test_route.py runs it",
    "vllm serve SMALL": "serves two models; tests/e2e/test_route.py does the same",
    "pip install --no-deps --target /shared/depo": "needs a package index and a shared folder",
    "ray job submit": "needs a cluster; tests/e2e/test_launch_script.py submits such jobs",
    "depo doctor -- python3": "needs a launch and a log; test_doctor.py, test_backtest.py and test_off.py run them",
}


def bash_blocks(text):
    """The text of every fenced bash block, without the indentation of its fence."""
    found = re.findall(r"^( *)```bash\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", body, flags=re.MULTILINE) for indent, body in found]


BLOCKS = [(page, block) for page, text in TEXTS.items() for block in bash_blocks(text)]


def not_run(block):
    return [start for start in NOT_RUN if block.startswith(start)]


def test_the_pages_are_found():
    names = ("clusters", "design", "faults", "metrics", "openrlhf", "testing")
    assert {f"docs/{name}.md" for name in names} <= set(TEXTS)
    assert sum(text.count("```bash") for text in TEXTS.values()) == len(BLOCKS) >= 10
    used = {start for _, block in BLOCKS for start in not_run(block)}
    assert used == set(NOT_RUN), "an exception without a block"


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=[f"{page}: {block.splitlines()[0]}" for page, block in BLOCKS])
def test_a_bash_block_runs_or_parses(page, block, tmp_path):
    parsed = subprocess.run(["bash", "-n", "-c", block], capture_output=True, text=True, check=False)
    assert (parsed.returncode, parsed.stderr) == (0, "")
    if not_run(block):
        return
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    paths = [link.split("#")[0] for link in links if not re.match(r"\w+:|#", link)]
    missing = [path for path in paths if not ((REPO / page).parent / path).exists()]
    assert missing == []


def test_the_tests_that_pages_name_exist():
    code = {path.name: path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("*.py")}
    exist = set(code) | set(re.findall(r"^def (test_\w+)\(", "\n".join(code.values()), re.MULTILINE))
    named = {page: set(re.findall(r"\btest_\w+(?:\.py)?", text)) for page, text in TEXTS.items()}
    assert len(named["docs/faults.md"]) >= 50
    assert {page: names - exist for page, names in named.items() if names - exist} == {}


def test_the_flags_that_pages_name_exist():
    named = {page: set(re.findall(r"--depo\.[a-z]+\.[a-z_]+", text)) for page, text in TEXTS.items()}
    assert len(named["README.md"]) >= 8
    known = set(config.flag_names())
    assert {page: flags - known for page, flags in named.items() if flags - known} == {}


def test_the_readmes_table_has_the_defaults():
    rows = re.findall(r"^\| (`--depo\..*?) \| (.*?) \|", TEXTS["README.md"], re.MULTILINE)
    assert len(rows) >= 8
    said = {"bundled MiniLM": None, "half of the cores, at most 4": None}
    for flags, defaults in rows:
        settings = [config.SETTINGS[key] for key in re.findall(r"--depo\.([\w.]+)", flags)]
        wanted = [setting.default for setting in settings]
        wanted = list(wanted[0]) if isinstance(wanted[0], tuple) else wanted
        values = [defaults] if defaults in said else re.split(r",? ", defaults)
        given = [said[value] if value in said else config.flag_value(value) for value in values]
        assert given == wanted, flags


def test_the_settings_page_lists_every_setting_with_its_default_and_help():
    rows = re.findall(r"^\| `--depo\.(.+?)` \| (.+?) \| (.+?) \|$", TEXTS["docs/settings.md"], re.MULTILINE)
    assert rows == [
        (leaf.key, config.show(list(leaf.default) if isinstance(leaf.default, tuple) else leaf.default), leaf.help)
        for leaf in config.SETTINGS.values()
    ]


def test_the_metrics_page_lists_every_metric_once():
    listed = re.findall(r"^\| `depo/(.+?)` \|", TEXTS["docs/metrics.md"], re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(metrics.NAMES) | set(TALLY)


def test_pre_commit_runs_the_ruff_of_ci():
    locked = re.findall(r"^ruff==.*$", (REPO / "scripts/requirements-cpu.txt").read_text(), re.MULTILINE)
    hooks = re.findall(r"ruff==[\d.]+", (REPO / ".pre-commit-config.yaml").read_text())
    assert hooks == locked * 2
