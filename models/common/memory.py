"""When the memory of a device does not suffice."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """On any device; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
