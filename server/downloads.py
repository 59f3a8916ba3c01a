"""Whether models can be downloaded, found out before a loader does.

The loaders ask an unreachable hub again and again, half a minute for each file, even for models
that lie in the cache. They ask nothing where they are told beforehand that it isn't there.
"""

from __future__ import annotations

import os
from pathlib import Path

from handlers.pipeline import PipelineOptions

OFFLINE = "HF_HUB_OFFLINE"
HUB = "https://huggingface.co"
PATIENCE_S = 5.0


def hub_models(choice: PipelineOptions) -> list[str]:
    """Names of the chosen models that are no folders here."""
    parts = choice.options.values()
    local = [part for part in parts if not hasattr(part, "base_url")]
    names = [getattr(part, "model_name", "") for part in local]
    return [name for name in names if name and not Path(name).is_dir()]


def prepare(choice: PipelineOptions) -> str:
    """Tells the loaders where no hub is within reach, and returns a remark on that; else empty.

    To be called before any of them is imported.
    """
    names = hub_models(choice)
    if not names:
        return ""
    if OFFLINE not in os.environ and not _reachable(os.environ.get("HF_ENDPOINT", HUB)):
        os.environ[OFFLINE] = "1"
    if os.environ.get(OFFLINE, "0") == "0":
        return ""
    told = ", ".join(names)
    return f"no model hub is within reach: these must be folders, or in its cache: {told}"


def _reachable(url: str) -> bool:
    import httpx2

    try:
        httpx2.head(url, timeout=PATIENCE_S)
    except (httpx2.HTTPError, httpx2.InvalidURL):
        return False
    return True
