"""`make parity-parler`: our Parler against the parler-tts package, on the same random weights.

    python -m tests.parity.parler --reference_python out/venv-parler/bin/python

Fails (exit status 1) when logits differ by more than 1e-4, or any greedily chosen code, or the
sound, streamed, by more than 1e-4 of its greatest sample.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from models.parler.engine import ParlerEngine, Room
from models.parler.loading import load
from tests.models import parler_plain as plain

LOGITS_WITHIN = 1e-4
SOUND_WITHIN = 1e-4
SCRIPT = Path(__file__).with_name("parler_reference.py")


def compare(path: Path) -> bool:
    """Prints a line; False if anything differs."""
    want = load_file(path)
    model, generation = load(path.parent)
    description, prompt = want["description"][0].tolist(), want["prompt"][0].tolist()
    logits = plain.logits(model, description, prompt, want["codes"])
    apart = (logits - want["logits"]).abs().max().item()

    chosen = plain.greedy(model, generation, description, prompt)
    same = torch.equal(chosen, want["chosen"])
    frames = len(plain.frames(model, chosen))

    engine = ParlerEngine(model, generation, 2, play_steps=16, room=Room(16, 16))
    engine.open("clause", description, prompt)
    pieces = []
    while engine.at_work:
        pieces += engine.step()
    sound = torch.cat([piece.samples for piece in pieces])
    loudest = want["sound"].abs().max().item()
    off = torch.inf
    if sound.shape == want["sound"].shape:
        off = (sound - want["sound"]).abs().max().item() / max(loudest, 1e-9)
    ok = apart <= LOGITS_WITHIN and same and off <= SOUND_WITHIN and frames > 0
    print(
        f"{path.parent.name:12} logits within {apart:.1e}, {chosen.shape[1]} positions, "
        f"{frames} frames: codes {'equal' if same else 'DIFFER'}, "
        f"streamed sound within {off:.1e} of its peak {loudest:.2f}{'' if ok else '  FAILED'}"
    )
    return ok


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference_python", required=True, help="of the package's environment")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        subprocess.run([args.reference_python, str(SCRIPT), str(folder)], check=True)
        found = sorted(folder.glob("*/reference-*.safetensors"))
        equal = [compare(path) for path in found]
        return 0 if equal and all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
