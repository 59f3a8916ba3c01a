# mypy: ignore-errors
"""Hugging Face speech-to-speech behind stub models. Runs in that package's own environment.

`python speech_to_speech_server.py --host HOST --port PORT --models URL --data FOLDER [FLAGS]`. It
offers the Realtime protocol itself. What it would fetch from the network at its start is put in its
place: Silero VAD as the `silero-vad` package has it, where torch.hub looks for it; for NLTK's
sentence splitter a model without abbreviations, which is enough for the stub's text. Its language
detector, which the first reply would load while everything else in the process stood still for ten
seconds, is loaded before the port opens.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

HUBCONF = """dependencies = ["torch"]


def silero_vad():
    from silero_vad import load_silero_vad

    return load_silero_vad(), None
"""
PUNKT_FILES = ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab")


def prepare(data: Path) -> None:
    hub = data / "torch" / "hub" / "snakers4_silero-vad_master"
    hub.mkdir(parents=True, exist_ok=True)
    (hub / "hubconf.py").write_text(HUBCONF)
    punkt = data / "nltk" / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True, exist_ok=True)
    for name in PUNKT_FILES:
        (punkt / name).touch()
    (data / "nltk" / "taggers" / "averaged_perceptron_tagger_eng").mkdir(
        parents=True, exist_ok=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True)
    parser.add_argument("--models", required=True, help="the stubs' base URL, /v1 included")
    parser.add_argument("--data", type=Path, required=True)
    options, flags = parser.parse_known_args()
    prepare(options.data.resolve())
    os.environ |= {
        "TORCH_HOME": str(options.data.resolve() / "torch"),
        "NLTK_DATA": str(options.data.resolve() / "nltk"),
        "HF_HUB_OFFLINE": "1",
    }
    from speech_to_speech.cli import main as serve
    from speech_to_speech.pipeline.language_detection import warm_language_detector

    warm_language_detector()
    sys.argv[1:] = [
        *("serve", "--host", options.host, "--port", options.port),
        *("--stt", "openai", "--openai_stt_base_url", options.models, "--openai_stt_model", "stub"),
        *("--llm_backend", "chat-completions", "--responses_api_base_url", options.models),
        *("--responses_api_api_key", "stub", "--model_name", "stub"),
        *("--responses_api_stream", "True"),
        *("--tts", "openai", "--openai_tts_base_url", options.models, "--openai_tts_model", "stub"),
        *("--openai_tts_stream", "True"),
        *flags,
    ]
    serve()


if __name__ == "__main__":
    main()
