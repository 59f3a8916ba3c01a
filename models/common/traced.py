"""A step on a CPU as one call, by TorchScript, instead of hundreds from Python.

Each operation that Python calls gives the interpreter's lock up and takes it back. Where several
threads compute, that is most of a small step's time, and beyond some load all of it: they wait for
each other's lock and not for the processor. A traced step holds no lock from its beginning to its
end, and does the same operations in half of the time.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

SETTLING_CALLS = 2
"""In these TorchScript looks at the shapes and fits the step to them."""


def can_trace(device: torch.device | str) -> bool:
    """TorchScript is not for Python 3.14 and later."""
    return torch.device(device).type == "cpu" and sys.version_info < (3, 14)


class TracedStep:
    """`run(*inputs)`, which gives one tensor and changes tensors in `holders` in place.

    `run` must not look at what is in a tensor, nor put other tensors into the holders. It is called
    once, with these inputs. The holders' tensors are the step's for good: whoever changes them
    between its calls does so in place, too.
    """

    def __init__(
        self, run: Callable[..., Tensor], holders: Iterable[dict[Any, Any]], *inputs: Tensor
    ) -> None:
        places = [
            (holder, name)
            for holder in holders
            for name, value in holder.items()
            if isinstance(value, Tensor)
        ]
        self._kept = [holder[name] for holder, name in places]

        # As inputs, so that nothing that changes from outside is taken for a constant.
        def whole(*tensors: Tensor) -> Tensor:
            for (holder, name), tensor in zip(places, tensors, strict=False):
                holder[name] = tensor
            return run(*tensors[len(places) :])

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # checks of shapes, which stay as they are
            try:
                self._step = torch.jit.trace(whole, (*self._kept, *inputs), check_trace=False)
            finally:
                for (holder, name), tensor in zip(places, self._kept, strict=True):
                    holder[name] = tensor

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = self._step(*self._kept, *inputs)
        return made
