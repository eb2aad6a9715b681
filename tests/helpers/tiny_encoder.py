"""A random BERT of 2 layers, written as any encoder on disk is, settings for it, and comparing states."""

import functools
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from depo_plugin.estimator import text_model
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.heads import DifficultyHeads, DifficultyModel
from depo_plugin.estimator.text_model import TextModel
from depo_plugin.settings.config import DepoConfig, EstimatorConfig, HistoryConfig

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WIDTH = 32


def write(folder: Path, dropout: float = 0.1, seed: int = 0) -> str:
    """Write the encoder into `folder` and return its path. Words are split into characters: 2-100 tokens a prompt.

    seed: of its weights.
    """
    characters = list("0123456789+-*=abcdefghijklmnopqrstuvwxyz")
    vocabulary = SPECIAL + characters + ["##" + c for c in characters]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=128,
                hidden_dropout_prob=dropout,
                attention_probs_dropout_prob=dropout,
                initializer_range=0.5,  # large enough that prompts differ in their pooled vectors
            )
        )
    encoder.save_pretrained(folder, safe_serialization=True)
    return str(folder)


def narrow_heads(monkeypatch, hidden=64):
    """Make heads `hidden` wide instead of 1024: the same layers, 100 times fewer weights."""
    for part in (DifficultyHeads, DifficultyModel):
        monkeypatch.setattr(text_model, part.__name__, functools.partial(part, hidden=hidden))


def settings(folder, **given):
    """Return settings of both sections by name: one optimizer step in fp32 and no replay, unless `given` says more."""
    fixed = {"mode": "finetune", "model": folder, "dtype": "fp32", "updates_per_step": 1, "replay": 0}
    history = {name: given.pop(name) for name in ("kappa", "discount", "drift", "share") if name in given}
    return DepoConfig(estimator=EstimatorConfig(**(fixed | given)), history=HistoryConfig(**history))


def make_text_model(folder, seed=0, cache_dir=None, **given):
    """Return a text model of the encoder in `folder`. given: as in settings()."""
    return TextModel(settings(folder, **given).estimator, seed, cache_dir=cache_dir)


def make_estimator(folder, seed=0, group_size=4, cache_dir=None, **given):
    """Return an estimator of the encoder in `folder`. given: as in settings()."""
    return DifficultyEstimator(settings(folder, **given), group_size, seed, cache_dir=cache_dir)


def weights(made):
    """Return copies of an estimator's weights by name."""
    return {name: value.clone() for name, value in made.text.model.state_dict().items()}


def assert_same_weights(mine, theirs):
    """Tensors by name, bit for bit."""
    assert mine.keys() == theirs.keys()
    assert len(mine) >= 20
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def assert_same_state(mine, theirs, path="state"):
    """State dicts, bit for bit; NaN equals NaN. The saved names where they differ are in the message."""
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys(), path
        for name in mine:
            assert_same_state(mine[name], theirs[name], f"{path}/{name}")
    elif isinstance(mine, torch.Tensor | np.ndarray):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs), err_msg=path)
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs), path
        for i, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_same_state(*pair, f"{path}/{i}")
    else:
        assert mine == theirs or (mine != mine and theirs != theirs), f"{path}: {mine} {theirs}"
