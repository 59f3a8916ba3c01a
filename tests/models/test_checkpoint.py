"""Ordinary checkpoints become dual-channel ones, and those survive saving."""

import pytest

pytest.importorskip("torch", reason="models need torch")
pytest.importorskip("transformers", reason="models need transformers")

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from models.common.errors import ArchitectureError, ConfigError, VocabularyError
from models.parrot.backbones import BACKBONES, DualLlama, DualPhi, load
from models.parrot.modeling import DualChannelModel
from tests.models import tiny

TEXT_VOCABULARY = 29


def ordinary(backbone: type[DualChannelModel], folder: Path, **changes: Any) -> Any:
    """An ordinary random checkpoint of that backbone, saved by its own class."""
    config = backbone.backbone_config(**tiny.settings(vocab_size=TEXT_VOCABULARY, **changes))
    causal_lm = next(base for base in backbone.__bases__ if base is not DualChannelModel)
    torch.manual_seed(3)
    model = causal_lm(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("tied", [False, True])
def test_an_ordinary_checkpoint_becomes_dual_channel(
    backbone: type[DualChannelModel], tied: bool, tmp_path: Path
) -> None:
    text = ordinary(backbone, tmp_path / "text", tie_word_embeddings=tied)
    model = backbone.from_pretrained(tmp_path / "text", codebook_size=tiny.CODES, num_codebooks=2)
    grown = TEXT_VOCABULARY + 2 * 2 * 13
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == grown
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    state = model.state_dict()
    for name, weight in text.state_dict().items():
        assert torch.equal(state[name][: weight.shape[0]], weight), name
    assert set(state) - set(text.state_dict()) == set(DualChannelModel.new_parameters)
    new = state["model.embed_tokens.weight"][TEXT_VOCABULARY:]
    assert 0.2 < float(new.std()) < 0.4  # drawn with the backbone's initializer_range

    frames = tiny.codes(model.eval())
    assert torch.isfinite(tiny.logits(model, frames)).all()
    model.save_pretrained(tmp_path / "dual")
    again = load(tmp_path / "dual").eval()
    assert type(again) is backbone
    assert torch.equal(tiny.logits(again, frames), tiny.logits(model, frames))


@pytest.mark.parametrize(("backbone", "shape"), tiny.EVERY, ids=tiny.EVERY_ID)
def test_saved_and_loaded(
    backbone: type[DualChannelModel], shape: dict[str, Any], tmp_path: Path
) -> None:
    """From scratch, without text rows; either join loads the other's weights."""
    model = tiny.model(backbone, delays=list(range(shape["num_codebooks"])), **shape)
    model.save_pretrained(tmp_path)
    again = backbone.from_pretrained(tmp_path).eval()
    frames = tiny.codes(model)
    assert again.config.delays == model.config.delays
    assert torch.equal(tiny.logits(again, frames), tiny.logits(model, frames))
    changed = backbone.from_pretrained(tmp_path, join={"pair": "sum", "sum": "pair"}[shape["join"]])
    assert changed.config.join != shape["join"]
    for name, weight in model.state_dict().items():
        assert torch.equal(changed.state_dict()[name], weight), name
    assert torch.isfinite(tiny.logits(changed, frames)).all()


def test_the_same_text_model_underneath(tmp_path: Path) -> None:
    """With the channels' parameters at zero, a channel alone is the ordinary model's text."""
    text = ordinary(DualLlama, tmp_path).eval()
    model = DualLlama.from_pretrained(tmp_path, codebook_size=TEXT_VOCABULARY - 2).eval()
    with torch.no_grad():
        model.channel_embed.weight.zero_()
        for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
            weight[TEXT_VOCABULARY:] = weight[:TEXT_VOCABULARY].repeat(2, 1)
    first = torch.randint(0, TEXT_VOCABULARY, (2, 1))
    frames = first[:, None, None].expand(2, 1, 2, 1)  # both channels say the same
    expected = text(first).logits[:, 0]
    for channel in (0, 1):
        torch.testing.assert_close(tiny.logits(model, frames)[:, 0, channel, 0], expected)


def test_attention_and_precision_can_be_chosen(tmp_path: Path) -> None:
    ordinary(DualLlama, tmp_path)
    model = DualLlama.from_pretrained(
        tmp_path, codebook_size=5, attn_implementation="eager", dtype=torch.bfloat16
    )
    assert model.lm_head.weight.dtype == model.channel_embed.weight.dtype == torch.bfloat16
    frames = tiny.codes(model)
    plain = tiny.logits(model, frames)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(tiny.logits(model, frames), plain, rtol=0.1, atol=0.1)
    with pytest.raises(ConfigError, match="flash_attention_2"):
        DualLlama.from_pretrained(
            tmp_path, codebook_size=5, attn_implementation="flash_attention_2"
        )


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path / "gpt2")
    ordinary(DualLlama, tmp_path / "llama")
    tiny.model(DualPhi).save_pretrained(tmp_path / "dual_phi")
    with pytest.raises(ArchitectureError, match="'gpt2'"):
        load(tmp_path / "gpt2")
    with pytest.raises(ArchitectureError, match="'llama' model; DualPhi takes 'dual_phi'"):
        DualPhi.from_pretrained(tmp_path / "llama")
    with pytest.raises(ArchitectureError, match="'dual_phi' model"):
        DualLlama.from_pretrained(tmp_path / "dual_phi")
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "config.json").write_text(json.dumps({"hidden_size": 8}))
    with pytest.raises(ArchitectureError, match="no model_type"):
        load(nameless)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny.model(num_codebooks=2).save_pretrained(tmp_path)
    for name, value in (("codebook_size", 12), ("num_codebooks", 3), ("share_tokens", True)):
        with pytest.raises(VocabularyError, match=name):
            DualLlama.from_pretrained(tmp_path, **{name: value})
    other = DualLlama.config_class(**tiny.settings(codebook_size=12, num_codebooks=2))
    with pytest.raises(VocabularyError, match=r"\(52, 32\), the configuration asks for \(56, 32\)"):
        DualLlama.from_pretrained(tmp_path, config=other)
    assert DualLlama.from_pretrained(tmp_path, codebook_size=tiny.CODES).config.num_codebooks == 2


def test_a_checkpoint_without_its_channels_is_refused(tmp_path: Path) -> None:
    """Weights that would be random must not pass for trained ones."""
    text = LlamaForCausalLM(LlamaConfig(**tiny.settings(vocab_size=26)))
    text.save_pretrained(tmp_path)
    tiny.model().config.save_pretrained(tmp_path)
    with pytest.raises(ArchitectureError, match=r"lacks channel_embed\.weight"):
        DualLlama.from_pretrained(tmp_path)
