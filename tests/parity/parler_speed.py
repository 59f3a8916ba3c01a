"""Our streaming against the package's streamer: the same random weights, on this machine's CPU.

    python -m tests.parity.parler_speed --reference_python .venv-parler/bin/python

A decoder and a codec of mini-v1's size (a small text encoder: it runs once), float32, greedy, a
clause of four seconds. Seconds are the process's own, of one thread, whatever else the machine
does. `step`: the median of the steps, most of which make no sound. `streamed`: all that was done
for the clause, sound included, per step. With more `--rows` that many clauses are spoken at once,
where the package speaks one after another; the figures are for each. About two minutes.
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
CODES, RATE_HZ = 1024, 44_100
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


def ours(folder: Path, steps: int, play_steps: int, rows: int) -> dict[str, Any]:
    """Per clause, but for the first sound."""
    model, _ = load(folder)
    engine = ParlerEngine(model, Generation(steps + 1, steps), rows, play_steps=play_steps)
    begun = over = time.process_time()
    for row in range(rows):
        engine.open(row, DESCRIPTION, PROMPT)
    first, samples, each = 0.0, 0, []
    while engine.at_work:
        pieces = engine.step()
        last, over = over, time.process_time()
        each.append((over - last) / rows)
        if pieces:
            first = first or over - begun
            samples += sum(len(piece.samples) for piece in pieces)
    whole = (over - begun) / rows
    return {"first_s": first, "whole_s": whole, "samples": samples // rows, "each_s": each[1:]}


def theirs(python: str, folder: Path, steps: int, play_steps: int) -> dict[str, Any]:
    numbers = {"--time": steps, "--play_steps": play_steps}
    flags = [str(word) for pair in numbers.items() for word in pair]
    command = [python, str(SCRIPT), str(folder), *flags]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(name: str, run: dict[str, Any], package: dict[str, Any], steps: int) -> dict[str, Any]:
    """Prints a line; the package's times over ours."""
    step_s, streamed_s = statistics.median(run["each_s"]), run["whole_s"] / steps
    step = statistics.median(package["each_s"]) / step_s
    streamed = package["whole_s"] / run["whole_s"]
    print(
        f"{name:14} step {1000 * step_s:6.1f} ms ({step:.2f} x), "
        f"streamed {1000 * streamed_s:6.1f} ms ({streamed:.2f} x), "
        f"CPU s per s of sound {run['whole_s'] * RATE_HZ / run['samples']:5.2f}, "
        f"first sound after {run['first_s']:5.2f} s",
        flush=True,
    )
    return {
        "name": name,
        "step_ms": 1000 * step_s,
        "streamed_ms": 1000 * streamed_s,
        "first_s": run["first_s"],
        "samples": run["samples"],
        "step_ratio": step,
        "streamed_ratio": streamed,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference_python", required=True, help="of the package's environment")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--steps", type=int, default=344, help="86 a second")
    parser.add_argument("--play_steps", type=int, default=43)
    parser.add_argument("--rows", default="1", help="clauses at once; several counts: 1,4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    what = (args.steps, args.play_steps)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        if not (folder / "model.safetensors").exists():
            make(folder)
        package = theirs(args.reference_python, folder, *what)
        found = [report("package", package, package, args.steps)]
        for rows in map(int, args.rows.split(",")):
            run = ours(folder, *what, rows)
            found.append(report(f"ours, {rows} at once", run, package, args.steps))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
