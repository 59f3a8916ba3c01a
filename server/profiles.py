"""What `--profile` chooses: a part for each stage, and options of these parts.

Every choice is a default: a flag that says otherwise wins. An option holds for its part alone: with
`--profile cpu --tts espeak`, nothing is left of what the profile says about its own TTS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from handlers.pipeline import PipelineOptions

WHISPER_TURBO = "openai/whisper-large-v3-turbo"
HOSTED = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Part:
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of the backend's `Options`


@dataclass(frozen=True)
class Profile:
    about: str
    parts: Mapping[str, Part] = field(default_factory=dict)  # the embedded part where it says none

    def backends(self) -> dict[str, str]:
        """stage → backend"""
        chosen = {stage: part.backend for stage, part in self.parts.items()}
        return {**PipelineOptions().backends, **chosen}

    def options(self, stage: str, backend: str) -> Mapping[str, Any]:
        """What it says about this part; nothing, where another one serves the stage."""
        part = self.parts.get(stage)
        return part.options if part is not None and part.backend == backend else {}


PROFILES: Mapping[str, Profile] = {
    "embedded": Profile("everything from Python packages: no model to download, no torch"),
    "cpu": Profile(
        "real models on a machine without a GPU",
        {
            "stt": Part(
                "faster-whisper", {"model_name": "base", "device": "cpu", "compute_type": "int8"}
            ),
            "lm": Part(
                "transformers",
                {
                    "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
                    "device": "cpu",
                    "torch_dtype": "bfloat16",
                },
            ),
            "tts": Part("vits", {"model_name": "facebook/mms-tts-eng", "device": "cpu"}),
        },
    ),
    "cuda": Profile(
        "an NVIDIA GPU of 24 GB or more",
        {
            # Not faster-whisper: CTranslate2 wants CUDA 12, torch brings CUDA 13.
            "stt": Part(
                "whisper",
                {"model_name": WHISPER_TURBO, "device": "cuda", "torch_dtype": "float16"},
            ),
            "lm": Part(
                "transformers",
                {
                    "model_name": "Qwen/Qwen2.5-7B-Instruct",
                    "device": "cuda",
                    "torch_dtype": "bfloat16",
                },
            ),
            # T5, which reads the description, overflows in float16.
            "tts": Part(
                "parler",
                {
                    "model_name": "parler-tts/parler-tts-mini-v1",
                    "device": "cuda",
                    "torch_dtype": "bfloat16",
                },
            ),
        },
    ),
    "mps": Profile(
        "a Mac with an M-series chip",
        {
            "stt": Part(
                "whisper", {"model_name": WHISPER_TURBO, "device": "mps", "torch_dtype": "float16"}
            ),
            "lm": Part(
                "transformers",
                {
                    "model_name": "Qwen/Qwen2.5-1.5B-Instruct",
                    "device": "mps",
                    "torch_dtype": "float16",
                },
            ),
            "tts": Part("vits", {"model_name": "facebook/mms-tts-eng", "device": "cpu"}),
        },
    ),
    "remote": Profile(
        "OpenAI's endpoints, or compatible ones by --stt_base_url, --lm_base_url, --tts_base_url",
        {
            "stt": Part("openai", {"base_url": HOSTED, "model_name": "gpt-4o-mini-transcribe"}),
            "lm": Part("openai", {"base_url": HOSTED, "model_name": "gpt-4.1-mini"}),
            "tts": Part("openai", {"base_url": HOSTED, "model_name": "gpt-4o-mini-tts"}),
        },
    ),
}
