"""A random BERT of 2 layers and its WordPiece tokenizer, written as any encoder on disk is; comparing states."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

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


def weights(made):
    """Copies of an estimator's weights by name."""
    return {name: value.clone() for name, value in made.backend.model.state_dict().items()}


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
