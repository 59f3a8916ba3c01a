"""The shape of the tree: which way imports point, and what start-up may not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["models", "handlers", "server", "client", "benchmarks"]
"""Each may import itself and what stands before it."""


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"tests"}
    for path in (ROOT / layer).rglob("*.py"):
        assert not imports(path) & above, path


def test_starting_the_embedded_server_loads_no_torch() -> None:
    """Nor any other library that only real models need."""
    code = (
        "import sys; from server.__main__ import main; from server.options import parse; "
        "parse([]); heavy = {'torch', 'transformers', 'matplotlib', 'onnxruntime', 'pocketsphinx'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
