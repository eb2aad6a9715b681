"""The YAML files that are shipped."""

from pathlib import Path

import pytest
import yaml

from benchmarks.proof.methods import METHODS
from depo_plugin.estimator import backends, losses
from depo_plugin.settings import config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.y*ml"))


def test_all_files_are_looked_at():
    assert {"depo.yaml", "depo_paper.yaml", "depo_wide.yaml"} <= {path.name for path in FILES}
    assert len(FILES) >= 3


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_loads_by_path_and_by_name(path):
    cfg = config.load_config(str(path), {})
    assert cfg == config.load_config(path.stem, {}) == config.load_config(path.name, {})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_sets_every_key_and_plain_yaml_reads_the_same(path):
    """So that a preset keeps its meaning when a default changes, and other tools read what we read."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = [f"{section}.{name}" for section, part in tree.items() for name in part]
    assert keys == list(config.SETTINGS)
    given = {f"{section}.{name}": value for section, part in tree.items() for name, value in part.items()}
    assert config.load_config(None, given) == config.load_config(str(path), {})


@pytest.mark.parametrize("name", ["depo", "depo_wide"])
def test_each_setting_has_its_help_beside_it(name):
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    body = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#")).lstrip("\n")
    assert body == config.to_yaml(config.load_config(name, {}))


def test_recommended_is_the_defaults():
    assert config.load_config("depo", {}) == config.DepoConfig()


def test_the_wide_preset_is_the_rule_that_was_measured():
    """What benchmarks.proof calls rehearsal, by its flags; all else are the defaults."""
    flags = METHODS["rehearsal"].words
    values = dict(zip(flags[2::2], flags[3::2], strict=True))  # after --advantage_estimator depo
    changed = {name.removeprefix("--depo."): yaml.safe_load(value) for name, value in values.items()}
    assert config.load_config("depo_wide", {}) == config.load_config(None, changed)


def test_paper_preset_has_the_papers_numbers():
    """arXiv 2602.06375: estimator losses, optimizer, encoder, warm-up and window; no exploration, no history."""
    cfg = config.load_config("depo_paper", {})
    est = cfg.estimator
    assert (est.w_distill, est.w_rank, losses.RANK_DELTA, losses.RANK_MARGIN) == (0.5, 3.0, 0.05, 0.5)
    assert (est.lr, est.encoder_lr_ratio, backends.MAX_NORM, est.max_length) == (2e-4, 0.2, 1.0, 512)
    assert (est.model, est.depth) == ("distilbert-base-uncased", 1.0)
    assert (cfg.filter.rule, cfg.filter.low, cfg.filter.high) == ("window", 0.15, 0.85)
    assert (cfg.filter.warmup_steps, cfg.filter.epsilon) == (100, 0.0)
    assert config.with_base(cfg, None).advantage == config.AdvantageConfig("group_norm", False, None)
    assert (est.mode, est.updates_per_step, est.replay) == ("finetune", 1, 0)
    assert (cfg.history.kappa, cfg.history.drift, cfg.history.share) == ("inf", False, False)
