"""Letting a module compute with another tensor than its own parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def substituted(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let `module` read `tensors` where it reads the parameters of those names.

    An instance attribute is found before a registered parameter, so the module's own forward, with its hooks, computes
    with the given tensor. (`torch.func.functional_call` swaps the registered parameter instead, which FSDP swaps back
    in its own pre-forward: the edit would be dropped without a word.)

    Raises:
        RuntimeError: if something in the module's forward put another tensor in the place of one of `tensors`.
    """
    own = module.__dict__
    before = {name: own[name] for name in tensors if name in own}
    own.update(tensors)
    try:
        yield
        overwritten = [name for name, tensor in tensors.items() if own.get(name) is not tensor]
    finally:
        for name in tensors:
            own.pop(name, None)
        own.update(before)
    if overwritten:
        raise RuntimeError(
            f"{type(module).__name__} computes its {', '.join(overwritten)} anew in every forward (a hook such as "
            "torch.nn.utils.weight_norm?), so a delta beside it has no effect. Remove that hook first."
        )
