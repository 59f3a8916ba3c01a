"""Second stage: both channels of conversations, on paired shards."""

from __future__ import annotations

from models.parrot.training import main

if __name__ == "__main__":
    main("finetune", "tiny", "Train a dual-channel model on conversations.")
