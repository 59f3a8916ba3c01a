"""What the parler-tts package makes of small random checkpoints; runs in the package's environment.

Writes checkpoints with `save_pretrained` and beside each `reference-N.safetensors`: ids, logits of
a whole pass, the codes that greedy generation chose, and their sound. With `--time STEPS` instead:
the package's streamer on one checkpoint, as JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from parler_tts import (  # type: ignore[import-not-found]
    DACConfig,
    ParlerTTSConfig,
    ParlerTTSDecoderConfig,
    ParlerTTSForConditionalGeneration,
    ParlerTTSStreamer,
)
from safetensors.torch import save_file
from transformers import DacConfig, T5Config

WORDS, POSITIONS = 60, 70
DESCRIPTION = list(range(3, 15))
PROMPTS = [list(range(begin, begin + 9)) for begin in (20, 30, 40)]

VARIANTS: dict[str, dict[str, Any]] = {
    "sinusoidal": {},
    "grouped": {"num_key_value_heads": 2, "num_cross_attention_key_value_heads": 1},
    "rope": {"rope_embeddings": True, "num_key_value_heads": 2},
    "fused": {"use_fused_lm_heads": True},
    "cross": {"prompt_cross_attention": True},
    "projected": {"hidden_size": 48, "num_attention_heads": 6},
    "descript": {"descript": True},
}
"""Both positions, grouped keys, both kinds of heads, both places of the text, the projection, and
Descript's own codec (full size, as released)."""


def checkpoint(settings: dict[str, Any], seed: int) -> Any:
    settings = dict(settings)
    descript = settings.pop("descript", False)
    beside = settings.pop("prompt_cross_attention", False)
    books, codes = (9, 1024) if descript else (4, 16)
    special = {"pad_token_id": codes, "eos_token_id": codes, "bos_token_id": codes + 1}
    text = T5Config(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    codec = DACConfig() if descript else _small_codec(books, codes)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 64}
    decoder = ParlerTTSDecoderConfig(
        vocab_size=codes + (64 if descript else 1),
        max_position_embeddings=256,
        num_codebooks=books,
        dropout=0.0,
        **special,
        **{**sizes, **settings},
    )
    config = ParlerTTSConfig.from_sub_models_config(
        text, codec, decoder, vocab_size=WORDS, prompt_cross_attention=beside
    )
    torch.manual_seed(seed)
    model = ParlerTTSForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and not name.startswith("audio_encoder") and "weights" not in name:
            torch.nn.init.normal_(weight, std=0.9 if "embed" in name else 0.3)
    heads = model.decoder.lm_heads
    for weight in [heads.weight] if decoder.use_fused_lm_heads else [h.weight for h in heads]:
        by_id = weight.data.view(-1, decoder.vocab_size, decoder.hidden_size)
        by_id[:, codes] *= 2  # some clauses end before the greatest length
        by_id[:, codes + 1 :] = by_id[:, :1] / 2  # ids that mean nothing are never the likeliest
    chosen = {"max_length": POSITIONS, "min_new_tokens": 12, "do_sample": False}
    model.generation_config.update(decoder_start_token_id=codes + 1, **special, **chosen)
    return model


def _small_codec(books: int, codes: int) -> DacConfig:
    return DacConfig(
        encoder_hidden_size=4,
        downsampling_ratios=[2, 4],
        decoder_hidden_size=32,
        n_codebooks=books,
        codebook_size=codes,
        sampling_rate=44_100,
    )


class Listener:
    """A streamer that keeps what was chosen, position by position."""

    def __init__(self) -> None:
        self.positions: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.positions.append(value.reshape(value.shape[0], -1)[:, -1])

    def end(self) -> None: ...


@torch.no_grad()  # type: ignore[untyped-decorator]
def reference(model: Any, prompt_ids: list[int]) -> dict[str, torch.Tensor]:
    description, prompt = torch.tensor([DESCRIPTION]), torch.tensor([prompt_ids])
    given = {
        "input_ids": description,
        "attention_mask": torch.ones_like(description),
        "prompt_input_ids": prompt,
        "prompt_attention_mask": torch.ones_like(prompt),
    }
    config = model.config.decoder
    codes = torch.randint(0, config.vocab_size + 1, (config.num_codebooks, 20))
    logits = model(**given, decoder_input_ids=codes, use_cache=False).logits
    listener = Listener()
    sound = model.generate(**given, streamer=listener)
    return {
        "description": description,
        "prompt": prompt,
        "codes": codes,
        "logits": logits.contiguous(),  # [K, P + T, V]
        "chosen": torch.stack(listener.positions, dim=1).contiguous(),  # [K, 1 + positions]
        "sound": sound.flatten().contiguous(),
    }


class Timed(ParlerTTSStreamer):  # type: ignore[misc]
    """The package's own, with the CPU time at which each step is over, its sound included."""

    def __init__(self, model: Any, play_steps: int) -> None:
        super().__init__(model, play_steps=play_steps)
        self.over_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.over_s.append(time.process_time())


def timed(folder: Path, steps: int, play_steps: int) -> dict[str, Any]:
    """One clause, in a thread, as the package's documentation has it; CPU seconds."""
    model = ParlerTTSForConditionalGeneration.from_pretrained(folder).eval()
    given = {
        "input_ids": torch.tensor([DESCRIPTION]),
        "prompt_input_ids": torch.tensor([PROMPTS[0]]),
    }
    streamer = Timed(model, play_steps)
    wanted = {"max_length": steps + 1, "min_new_tokens": steps, "do_sample": False}
    begun = time.process_time()
    thread = Thread(target=model.generate, kwargs={**given, **wanted, "streamer": streamer})
    thread.start()
    first, samples = 0.0, 0
    for piece in streamer:
        first = first or time.process_time() - begun
        samples += len(piece)
    thread.join()
    whole = time.process_time() - begun
    over = streamer.over_s[1:]  # before it, the text was read
    each = [after - before for before, after in pairwise(over)]
    return {"first_s": first, "whole_s": whole, "samples": samples, "each_s": each}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--time", type=int, metavar="STEPS")
    parser.add_argument("--play_steps", type=int, default=43)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.time:
        print(json.dumps(timed(args.folder, args.time, args.play_steps)))
        return
    for seed, (name, settings) in enumerate(VARIANTS.items()):
        folder = args.folder / name
        model = checkpoint(settings, seed)
        model.save_pretrained(folder)
        for number, prompt in enumerate(PROMPTS):
            save_file(reference(model, prompt), folder / f"reference-{number}.safetensors")


if __name__ == "__main__":
    main()
