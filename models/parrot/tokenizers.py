"""The tokenizer that a name or a checkpoint folder stands for."""

from __future__ import annotations

import os
from pathlib import Path

from models.common.errors import ArchitectureError
from models.common.tokens import SpeechTokenizer
from models.parrot.codec import CONFIG, TinyCodec

SHIPPED = Path(__file__).parent / "tiny"


def load_tokenizer(
    name_or_folder: str | os.PathLike[str] = SHIPPED, device: str = "cpu"
) -> SpeechTokenizer:
    """A folder with a codec in it, or `tiny` for the shipped one. Raises `ArchitectureError`."""
    folder = SHIPPED if str(name_or_folder) == "tiny" else Path(name_or_folder)
    if not (folder / CONFIG).is_file():
        raise ArchitectureError(f"{name_or_folder}: no {CONFIG} there")
    codec: SpeechTokenizer = TinyCodec.load(folder).to(device).requires_grad_(False)
    return codec
