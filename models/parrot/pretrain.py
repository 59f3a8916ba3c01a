"""First stage: ordinary next-unit training on recordings of one speaker, on single-channel shards.

The published recipe trains the backbone as an ordinary language model before it ever sees two
channels. Our models always have two: the recording stands in one of them, drawn at random for
each recording and epoch, and the other one holds `start_id` and doesn't count. Every prediction
is then p(s_t | s_<t) of one stream; both channels' embeddings and heads learn from it.
"""

from __future__ import annotations

from models.parrot.training import main

if __name__ == "__main__":
    main("pretrain", "ntpp-8b", "Train a dual-channel model on one channel at a time.")
