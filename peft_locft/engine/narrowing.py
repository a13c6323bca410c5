"""In the last decoder layer, whatever attention does not need is computed for the scored tokens alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def narrowed(modules: Sequence[nn.Module], rows: torch.Tensor) -> Iterator[None]:
    """Let modules that treat every row by itself see some of the N rows; the others of their output are 0.

    Args:
        modules: from `find_narrowable`; they take and return (1, N, features) or (N, features).
        rows: the rows that they see.
    """
    num_rows: dict[nn.Module, int] = {}

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        num_rows[module] = args[0].shape[-2]
        return (args[0].index_select(-2, rows.to(args[0].device)),)

    def put_back(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        whole = output.new_zeros(*output.shape[:-2], num_rows[module], output.shape[-1])
        return whole.index_copy(-2, rows.to(output.device), output)

    handles = [module.register_forward_pre_hook(select) for module in modules]
    handles += [module.register_forward_hook(put_back) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe:
    """Watches the modules of a layer in one forward.

    Attributes:
        added: by module, a zero that was added to its output, if that output has a row of its own for every row.
    """

    def __init__(self, rows: torch.Tensor, tolerance: float) -> None:
        self.rows = rows
        self.tolerance = tolerance
        self.added: dict[nn.Module, torch.Tensor] = {}
        self._alone: dict[nn.Module, Any] = {}
        self._is_trying = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_trying:
            return
        fits = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].dim() > 1
        called_before = module in self._alone
        self._alone[module] = None
        self.added.pop(module, None)
        if fits and not called_before:
            self._is_trying = True
            with torch.no_grad():
                self._alone[module] = module.forward(args[0].index_select(-2, self.rows))
            self._is_trying = False

    def after(self, module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
        alone = None if self._is_trying else self._alone.get(module)
        if not (isinstance(alone, torch.Tensor) and isinstance(output, torch.Tensor)):
            return None
        difference = (output.index_select(-2, self.rows) - alone).abs().max()
        if not difference <= self.tolerance * alone.abs().max():
            return None
        self.added[module] = torch.zeros_like(output, requires_grad=True)
        return output + self.added[module]


def find_narrowable(
    layer: nn.Module, logits: Callable[[], torch.Tensor], rows: torch.Tensor, tolerance: float
) -> list[nn.Module]:
    """Find what in the last decoder layer needs the rows of scored tokens alone: its MLP, say, and not its keys.

    A module with a matrix qualifies if it treats each row by itself, and if nothing but the rows asked for reaches the
    logits: a zero is added to its output, whose gradient tells.

    Args:
        layer: the last decoder layer.
        logits: runs the model and returns its logits at `rows`.
        rows: rows of (1, N, hidden).
        tolerance: of the largest absolute value, for a module's output on `rows` alone against that on all.

    Returns:
        Modules none of which is inside of another.
    """
    probe = _Probe(rows, tolerance)
    # a norm costs less than leaving rows out
    inner = [m for m in list(layer.modules())[1:] if any(parameter.dim() > 1 for parameter in m.parameters())]
    handles = [module.register_forward_pre_hook(probe.before, with_kwargs=True) for module in inner]
    handles += [module.register_forward_hook(probe.after) for module in inner]
    # gradient checkpointing would run the layer again, with these hooks
    layer_was_training, layer.training = layer.training, False
    try:
        with torch.enable_grad():
            found = logits()
            weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)).to(found)
            zeros = list(probe.added.values())
            gradients = torch.autograd.grad((found * weights).sum(), zeros, allow_unused=True) if zeros else ()
    finally:
        layer.training = layer_was_training
        for handle in handles:
            handle.remove()
    wanted = dict(zip(probe.added, gradients, strict=True))
    good: list[nn.Module] = []
    for module in inner:  # the outer ones first
        gradient = wanted.get(module)
        if gradient is None or any(module in outer.modules() for outer in good):
            continue
        if not gradient.index_fill(-2, rows, 0).any():
            good.append(module)
    return good
