"""Our streaming against the package's streamer: the same random weights, on this machine's CPU.

    python -m tests.parity.parler_speed --reference_python out/venv-parler/bin/python

A decoder and a codec of mini-v1's size (a small text encoder: it runs once), float32, greedy, one
clause. Seconds are the process's own, of one thread, whatever else the machine does; runs take
turns. The medians are printed, and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from models.parler.config import Generation
from models.parler.engine import ParlerEngine
from models.parler.loading import load
from tests.models import parler_tiny as tiny

SCRIPT = Path(__file__).with_name("parler_reference.py")
DESCRIPTION, PROMPT = list(range(3, 15)), list(range(20, 29))
CODES = 1024
SPECIAL = {"pad_token_id": CODES, "eos_token_id": CODES, "bos_token_id": CODES + 1}
DECODER = {
    "vocab_size": CODES + 64,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 24,
    "ffn_dim": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_size": 1024,
    "num_codebooks": 9,
    **SPECIAL,
}
CODEC = {
    "encoder_hidden_size": 64,
    "downsampling_ratios": [2, 4, 8, 8],
    "decoder_hidden_size": 1536,
    "n_codebooks": 9,
    "codebook_size": CODES,
    "codebook_dim": 8,
}


def make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    saved = tiny.config()
    saved["decoder"] |= DECODER
    saved["audio_encoder"] |= CODEC
    saved["vocab_size"] = saved["text_encoder"]["vocab_size"] = 60
    weights = tiny.weights(saved, wrapped=False, endless=True)
    (folder / "config.json").write_text(json.dumps(saved))
    chosen = {"decoder_start_token_id": CODES + 1, **SPECIAL}
    (folder / "generation_config.json").write_text(json.dumps(tiny.generation(**chosen)))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def ours(folder: Path, steps: int, play_steps: int) -> dict[str, Any]:
    model, _ = load(folder)
    engine = ParlerEngine(model, Generation(steps + 1, steps), 1, play_steps=play_steps)
    begun = time.process_time()
    engine.open("clause", DESCRIPTION, PROMPT)
    first, samples = 0.0, 0
    while engine.at_work:
        for piece in engine.step():
            first = first or time.process_time() - begun
            samples += len(piece.samples)
    whole = time.process_time() - begun
    return {"first_s": first, "whole_s": whole, "steps": steps, "samples": samples}


def theirs(python: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    numbers = {"--time": args.steps, "--play_steps": args.play_steps}
    flags = [str(word) for pair in numbers.items() for word in pair]
    command = [python, str(SCRIPT), str(folder), *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference_python", required=True, help="of the package's environment")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--steps", type=int, default=430, help="86 a second")
    parser.add_argument("--play_steps", type=int, default=43)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, list[dict[str, Any]]] = {"package": [], "ours": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not (folder / "model.safetensors").exists():
            make(folder)
        for _ in range(args.runs):
            runs["ours"].append(ours(folder, args.steps, args.play_steps))
            runs["package"].append(theirs(args.reference_python, folder, args))
    for name, made in runs.items():
        first, whole = (
            statistics.median(run[key] for run in made) for key in ("first_s", "whole_s")
        )
        per_step = 1000 * whole / args.steps
        print(f"{name:8} first sound {first:6.2f} s, {per_step:6.1f} ms a step with its sound")
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
