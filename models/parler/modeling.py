"""Parler's decoder: nine codebooks of audio, conditioned on a description and on a text.

As `parler-tts` 0.2.3 computes it (huggingface/parler-tts, modeling_parler_tts.py; the model of
arXiv 2402.01912). Projections that take the same input stand together in one matrix, as `loading`
puts them.

R rows, T tokens (one per frame, all codebooks together), S keys, K codebooks, V ids of a codebook,
H hidden, N heads, E width of a head, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import DacModel, T5EncoderModel
from transformers.activations import ACT2FN

from models.parler.config import DecoderConfig, ParlerConfig

Rotary = tuple[Tensor, Tensor]
"""Cosine and sine of each token's angles, [R, 1, T, E] each."""


class KeyValues(Protocol):
    """Where a layer leaves its new keys and values, and finds all of them."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """[R, N, T, E] -> [R, N, S, E]"""


class SelfAttention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width = config.head_width
        self.heads, self.key_heads = config.num_attention_heads, config.key_heads
        together = (self.heads + 2 * self.key_heads) * self.width
        self.qkv_proj = nn.Linear(config.hidden_size, together, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """[R, T, H] -> query [R, N, T, E], key and value [R, N', T, E]"""
        projected = _by_head(self.qkv_proj(x), self.width)
        query, key, value = projected.split((self.heads, self.key_heads, self.key_heads), dim=1)
        if rotary is not None:
            query, key = _rotate(query, rotary), _rotate(key, rotary)
        return query, key, value

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[R, N, T, E], [R, N', S, E] twice, mask [R, 1, T, S] -> [R, T, H]"""
        out: Tensor = self.out_proj(_attend(query, keys, values, mask))
        return out


class CrossAttention(nn.Module):
    """With rotary positions the query is turned, the keys are not: so were the models trained."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width, self.key_heads = config.head_width, config.cross_key_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        together = 2 * self.key_heads * self.width
        self.kv_proj = nn.Linear(config.hidden_size, together, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def keys_values(self, states: Tensor) -> Tensor:
        """[R, S, H] -> [2, R, N, S, E]"""
        both = _by_head(self.kv_proj(states), self.width)
        return torch.stack(both.split(self.key_heads, dim=1))

    def forward(self, x: Tensor, mask: Tensor, rotary: Rotary | None, seen: Tensor) -> Tensor:
        query = _by_head(self.q_proj(x), self.width)
        if rotary is not None:
            query = _rotate(query, rotary)
        out: Tensor = self.out_proj(_attend(query, seen[0], seen[1], mask))
        return out


class DecoderLayer(nn.Module):
    """In two parts, before and after the cache: each takes and gives tensors alone, so that what is
    compiled of one layer serves all of them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.encoder_attn = CrossAttention(config)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation_function]
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_dim, bias=False)
        self.fc2 = nn.Linear(config.ffn_dim, config.hidden_size, bias=False)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def before(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """[R, T, H] -> query, key and value of the new tokens"""
        return self.self_attn.project(self.self_attn_layer_norm(x), rotary)

    def after(
        self,
        x: Tensor,
        query: Tensor,
        past: tuple[Tensor, Tensor],
        mask: Tensor,
        rotary: Rotary | None,
        seen: Tensor,
        seen_mask: Tensor,
    ) -> Tensor:
        """[R, T, H] -> [R, T, H]"""
        x = x + self.self_attn(query, *past, mask)
        x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), seen_mask, rotary, seen)
        added: Tensor = self.fc2(self.activation(self.fc1(self.final_layer_norm(x))))
        return x + added


class Positions(nn.Module):
    """Sinusoids, cosines first."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(sinusoids(positions, width), requires_grad=False)

    def forward(self, positions: Tensor) -> Tensor:
        return embedding(positions, self.weights)


def sinusoids(positions: int, width: int) -> Tensor:
    """[positions, width], as a checkpoint holds them."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half).float() * (-math.log(10_000) / (half - 1)))
    angles = torch.arange(positions).float()[:, None] * frequencies
    padding = torch.zeros(positions, width % 2)
    return torch.cat((angles.cos(), angles.sin(), padding), dim=1)


class Decoder(nn.Module):
    """`decoder.model.decoder` of a checkpoint."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        ids = config.num_codebooks * (config.vocab_size + 1)
        self.embed_tokens = nn.Embedding(ids, config.hidden_size)
        self.embed_positions = None
        if not config.rope_embeddings:
            self.embed_positions = Positions(config.max_position_embeddings, config.hidden_size)
        count = config.num_hidden_layers
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(count))
        self.layer_norm = nn.LayerNorm(config.hidden_size)


class _Under(nn.Module):
    """A name on the way to a weight."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ParlerModel(nn.Module):
    """All of a Parler-TTS checkpoint but the codec's encoder. See `loading.load`."""

    def __init__(self, config: ParlerConfig) -> None:
        super().__init__()
        self.config = config
        decoder = config.decoder
        self.text_encoder = T5EncoderModel(config.text_encoder)
        self.audio_encoder = DacModel(config.codec)
        del self.audio_encoder.encoder
        heads = decoder.vocab_size * decoder.num_codebooks
        self.decoder = _Under(
            model=_Under(decoder=Decoder(decoder)),
            lm_heads=nn.Linear(decoder.hidden_size, heads, bias=False),
        )
        self.embed_prompts = nn.Embedding(config.vocab_size, decoder.hidden_size)
        self.enc_to_dec_proj = None
        if config.projects_description:
            width = config.text_encoder.hidden_size
            self.enc_to_dec_proj = nn.Linear(width, decoder.hidden_size)
        self.embed_positions = None
        if config.prompt_cross_attention:
            positions = decoder.max_position_embeddings
            self.embed_positions = Positions(positions, decoder.hidden_size)

    @property
    def layers(self) -> Decoder:
        found: Decoder = self.decoder.model.decoder
        return found

    @property
    def device(self) -> torch.device:
        return self.embed_prompts.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_prompts.weight.dtype

    def describe(self, description: Tensor) -> Tensor:
        """A description's keys and values for every layer. [R, S] -> [L, 2, R, N, S, E]"""
        states = self.text_encoder(input_ids=description).last_hidden_state
        if self.enc_to_dec_proj is not None:
            states = self.enc_to_dec_proj(states)
        return self._seen(states)

    def read(self, prompt: Tensor) -> tuple[Tensor, Tensor | None]:
        """What stands before the codes, and what is attended to beside the description, of a text.

        [R, T] -> [R, T, H] and None, or with `prompt_cross_attention` [R, 0, H] and
        [L, 2, R, N, T, E].
        """
        text: Tensor = self.embed_prompts(prompt)
        if self.embed_positions is None:
            return text, None
        index = torch.arange(text.shape[1], device=text.device)
        return text[:, :0], self._seen(text + self.embed_positions(index))

    def _seen(self, states: Tensor) -> Tensor:
        """[R, S, H] -> [L, 2, R, N, S, E]"""
        layers = self.layers.layers
        return torch.stack([layer.encoder_attn.keys_values(states) for layer in layers])

    def embed(self, ids: Tensor) -> Tensor:
        """A token of all codebooks. [R, T, K] -> [R, T, H]"""
        books = torch.arange(ids.shape[2], device=ids.device) * (self.config.decoder.vocab_size + 1)
        embedded: Tensor = self.layers.embed_tokens(ids + books)
        return embedded.sum(2)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: KeyValues,
        seen: Tensor,
        seen_mask: Tensor,
    ) -> Tensor:
        """Embedded tokens at `positions` [R, T] to hidden states, [R, T, H] -> [R, T, H].

        `mask` [R, 1, T, S] and `seen_mask` [R, 1, 1 or T, S'] are True where there is something.
        """
        decoder = self.layers
        rotary = None
        if decoder.embed_positions is None:
            rotary = self._angles(positions, x.dtype)
        else:
            x = x + decoder.embed_positions(positions)
        masks = _added(mask, x.dtype), _added(seen_mask, x.dtype)
        for index, (layer, layer_seen) in enumerate(zip(decoder.layers, seen, strict=True)):
            assert isinstance(layer, DecoderLayer)
            query, key, value = layer.before(x, rotary)
            found = past.update(key, value, index)
            x = layer.after(x, query, found, masks[0], rotary, layer_seen, masks[1])
        out: Tensor = decoder.layer_norm(x)
        return out

    def predict(self, hidden: Tensor) -> Tensor:
        """[R, T, H] -> logits [R, T, K, V]"""
        config = self.config.decoder
        logits: Tensor = self.decoder.lm_heads(hidden)
        return logits.unflatten(-1, (config.num_codebooks, config.vocab_size))

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        config = self.config.decoder
        exponent = torch.arange(0, config.head_width, 2, device=positions.device).float()
        frequencies = torch.exp(exponent * (-math.log(config.rope_theta) / config.head_width))
        angles = positions[:, None, :, None].float() * frequencies  # [R, 1, T, E / 2]
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _by_head(x: Tensor, width: int) -> Tensor:
    """[R, T, N * E] -> [R, N, T, E]"""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = rotary
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-two, one), dim=-1) * sin


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True and False as what is added to scores, once rather than in every layer."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """[R, N, T, E], [R, N', S, E] twice -> [R, T, N * E]"""
    mixed = scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
    return mixed.transpose(1, 2).flatten(2)
