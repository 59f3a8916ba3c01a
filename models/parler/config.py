"""What a Parler-TTS checkpoint's `config.json` and `generation_config.json` say.

Field names are those of `parler-tts` 0.2.3 (huggingface/parler-tts, configuration_parler_tts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from transformers import DacConfig, T5Config

from models.common.errors import ArchitectureError, ConfigError
from models.common.sampling import Sampling

T = TypeVar("T", int, float)

MODEL_TYPE = "parler_tts"
MAX_LENGTH = 2580
"""30 s, as the released models say."""
DAC_TYPES = ("dac", "dac_on_the_hub")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The decoder of audio codes. Raises `ConfigError`."""

    vocab_size: int = 2049
    """Ids that a head predicts; embeddings have one more."""
    max_position_embeddings: int = 2048
    num_hidden_layers: int = 24
    ffn_dim: int = 4096
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    num_cross_attention_key_value_heads: int | None = None
    activation_function: str = "gelu"
    hidden_size: int = 1024
    cross_attention_hidden_size: int | None = None
    num_codebooks: int = 4
    pad_token_id: int = 2048
    bos_token_id: int = 2049
    eos_token_id: int = 2048
    rope_embeddings: bool = False
    rope_theta: float = 10_000.0
    use_fused_lm_heads: bool = False

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        for heads in (self.key_heads, self.cross_key_heads):
            if self.num_attention_heads % heads:
                raise ConfigError(f"{self.num_attention_heads} heads on {heads} key-value heads")

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def key_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def cross_key_heads(self) -> int:
        return self.num_cross_attention_key_value_heads or self.key_heads


@dataclass(frozen=True, slots=True)
class Generation:
    """How long and how freely to speak; positions count the first, which holds no code."""

    max_length: int = MAX_LENGTH
    min_new_tokens: int = 10
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0, top_k=50))

    def changed(
        self,
        *,
        max_length: int | None = None,
        min_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Generation:
        """With what is not None. Raises `ConfigError`."""
        old = self.sampling
        drawn = do_sample if do_sample is not None else old.temperature > 0
        sampling = Sampling()
        if drawn:
            sampling = Sampling(
                _or(temperature, old.temperature or 1.0),
                _or(top_k, old.top_k),
                _or(top_p, old.top_p),
            )
        return Generation(
            _or(max_length, self.max_length), _or(min_new_tokens, self.min_new_tokens), sampling
        )

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Generation:
        """From `generation_config.json`. Raises `ConfigError`."""
        sampling = Sampling()
        if saved.get("do_sample", False):
            sampling = Sampling(
                saved.get("temperature", 1.0), saved.get("top_k", 50), saved.get("top_p", 1.0)
            )
        length = saved.get("max_length") or MAX_LENGTH
        return cls(length, saved.get("min_new_tokens") or 0, sampling)


@dataclass(frozen=True, slots=True)
class ParlerConfig:
    vocab_size: int
    """Of the text to speak."""
    prompt_cross_attention: bool
    """The text is attended to beside the description, else it stands before the codes."""
    text_encoder: T5Config
    decoder: DecoderConfig
    codec: DacConfig

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> ParlerConfig:
        """From `config.json`. Raises `ArchitectureError`, `ConfigError`."""
        if saved.get("model_type") != MODEL_TYPE:
            raise ArchitectureError(f"model_type is {saved.get('model_type')!r}, not {MODEL_TYPE}")
        for part in ("text_encoder", "audio_encoder", "decoder"):
            if not isinstance(saved.get(part), dict):
                raise ConfigError(f"config.json has no {part!r}")
        text, audio = dict(saved["text_encoder"]), dict(saved["audio_encoder"])
        if text.pop("model_type", "t5") != "t5":
            raise ArchitectureError("the text encoder is no T5")
        known = {each.name for each in fields(DecoderConfig)}
        decoder = DecoderConfig(**{k: v for k, v in saved["decoder"].items() if k in known})
        codec = _codec(audio)
        if codec.n_codebooks != decoder.num_codebooks:
            books = f"{decoder.num_codebooks} codebooks, {codec.n_codebooks} in the codec"
            raise ConfigError(f"a decoder of {books}")
        return cls(
            vocab_size=saved.get("vocab_size", 1024),
            prompt_cross_attention=saved.get("prompt_cross_attention", False),
            text_encoder=T5Config(**text),
            decoder=decoder,
            codec=codec,
        )

    @property
    def projects_description(self) -> bool:
        """The description's states have another width than the decoder's."""
        same = self.text_encoder.hidden_size == self.decoder.hidden_size
        return not same and self.decoder.cross_attention_hidden_size is None

    def with_special_ids(self, generation: Mapping[str, Any]) -> ParlerConfig:
        """`generation_config.json` overrules the decoder's special ids where it names them."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        named = {name: generation[name] for name in names if generation.get(name) is not None}
        return replace(self, decoder=replace(self.decoder, **named))


def _or(value: T | None, default: T) -> T:
    return default if value is None else value


def _codec(saved: Mapping[str, Any]) -> DacConfig:
    kind = saved.get("model_type")
    if kind not in DAC_TYPES:
        raise ArchitectureError(f"the audio codec is {kind!r}, not DAC")
    if "n_codebooks" in saved:  # transformers' own form
        return DacConfig(**{name: value for name, value in saved.items() if name != "model_type"})
    # The wrapper around Descript's package names but these; the rest is its 44.1 kHz model.
    return DacConfig(
        n_codebooks=saved.get("num_codebooks", 9),
        codebook_size=saved.get("codebook_size", 1024),
        sampling_rate=saved.get("sampling_rate", 44_100),
    )
