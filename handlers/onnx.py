"""Small networks by ONNX Runtime, and their weights in packages of which nothing else is wanted."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def packaged(package: str, weights: str) -> Path | None:
    """Where these are, a file or a folder; None without the package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / weights


def session(path: Path, threads: int = 1) -> Any:
    """An `InferenceSession` on the CPU. Raises onnxruntime's own where the file is no model."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
