"""Where a model runs, its memory, and CUDA graphs of its step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Graphs = dict[tuple[int, int], torch.cuda.CUDAGraph]


def chosen_device(name: str) -> str:
    """`auto`: the best there is."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def is_out_of_memory(error: BaseException) -> bool:
    """On any device; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def row_counts(rows: int) -> list[int]:
    """Numbers of rows that a graph, or a traced step, is made for: powers of two, and all."""
    return [2**power for power in range((rows - 1).bit_length())] + [rows]


def captured(
    advance: Callable[[slice, int], object], rows: int, extents: Iterable[int], device: torch.device
) -> Graphs:
    """A graph of `advance(rows, slots)` for every number of rows and of slots.

    No row may be active while they are made.
    """
    graphs: Graphs = {}
    pool = torch.cuda.graph_pool_handle()
    largest_first = sorted(extents, reverse=True)
    with torch.cuda.device(device), torch.no_grad():
        for count in reversed(row_counts(rows)):
            for slots in largest_first:
                some, graph = slice(0, count), torch.cuda.CUDAGraph()
                aside = torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    advance(some, slots)  # libraries take their workspaces now
                torch.cuda.current_stream().wait_stream(aside)
                with torch.cuda.graph(graph, pool=pool):
                    advance(some, slots)
                graphs[count, slots] = graph
    return graphs
