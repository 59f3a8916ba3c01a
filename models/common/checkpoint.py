"""Looking into a checkpoint before it is loaded."""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig

from models.common.errors import ArchitectureError


def saved_config(path: str | os.PathLike[str], **hub: Any) -> dict[str, Any]:
    """The checkpoint's `config.json` as written.

    `hub` may hold `revision`, `subfolder` and the like. Raises `ArchitectureError` where the
    configuration doesn't name its architecture, `OSError` where there is none.
    """
    config, _ = PreTrainedConfig.get_config_dict(path, **hub)
    if not config.get("model_type"):
        raise ArchitectureError(f"{path}: config.json names no model_type")
    return dict(config)
