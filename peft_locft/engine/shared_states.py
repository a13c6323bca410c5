"""States of many locations from one run of the model: what the trials of a search share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True)
class SharedStates:
    """Where the states of a base are kept that nothing changes meanwhile.

    Args:
        folder: a file for each location and list of edits.
        layers: decoder layers before which states will be wanted: whoever runs past one of them keeps its states, too.
    """

    folder: Path
    layers: tuple[int, ...]
    _hashes: dict[int, tuple[torch.Tensor, str]] = field(default_factory=dict)

    def sha256(self, tensor: torch.Tensor, of: Callable[[torch.Tensor], str]) -> str:
        """Return the hash of a frozen tensor, computed once."""
        if tensor.requires_grad:
            return of(tensor)
        if id(tensor) not in self._hashes:
            # with the tensor itself, so that no other can come by its id
            self._hashes[id(tensor)] = (tensor, of(tensor))
        return self._hashes[id(tensor)][1]


_shared: ContextVar[SharedStates | None] = ContextVar("shared_states", default=None)


def shared_states() -> SharedStates | None:
    """Return where states are shared at the moment; `None`: nowhere."""
    return _shared.get()


@contextmanager
def sharing_states(folder: Path, layers: Sequence[int]) -> Iterator[None]:
    """Let all training inside share the states that leave the frozen layers.

    Args:
        folder: made if it is not there. Whoever opens this context may delete it afterwards.
        layers: the decoder layers that are to be trained, one after the other, counted from 0.
    """
    token = _shared.set(SharedStates(folder, tuple(sorted(set(layers)))))
    try:
        yield
    finally:
        _shared.reset(token)
