"""In the last decoder layer, compute for the scored tokens only what other tokens do not attend to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def narrowed(modules: Sequence[nn.Module], rows: torch.Tensor) -> Iterator[None]:
    """Run modules on some of their N rows only; their output is 0 in the other rows.

    Args:
        modules: from `find_narrowable`; they take and return (1, N, features) or (N, features).
        rows: the rows to compute.
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


class _RowwiseCheck:
    """Checks in one forward which modules of a layer work on every row by itself.

    Attributes:
        added: for each module that does, the zero that was added to its output.
    """

    def __init__(self, rows: torch.Tensor, tolerance: float) -> None:
        self.rows = rows
        self.tolerance = tolerance
        self.added: dict[nn.Module, torch.Tensor] = {}
        self._some_rows: dict[nn.Module, Any] = {}
        self._is_checking = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_checking:
            return
        fits = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].dim() > 1
        called_before = module in self._some_rows
        self._some_rows[module] = None
        self.added.pop(module, None)
        if fits and not called_before:
            self._is_checking = True
            with torch.no_grad():
                self._some_rows[module] = module.forward(args[0].index_select(-2, self.rows))
            self._is_checking = False

    def after(self, module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
        some_rows = None if self._is_checking else self._some_rows.get(module)
        if not (isinstance(some_rows, torch.Tensor) and isinstance(output, torch.Tensor)):
            return None
        difference = (output.index_select(-2, self.rows) - some_rows).abs().max()
        if not difference <= self.tolerance * some_rows.abs().max():
            return None
        self.added[module] = torch.zeros_like(output, requires_grad=True)
        return output + self.added[module]


def find_narrowable(
    layer: nn.Module, logits: Callable[[], torch.Tensor], rows: torch.Tensor, tolerance: float
) -> list[nn.Module]:
    """Find the modules of the last decoder layer that the scored tokens' rows are enough for: the MLP, not the keys.

    A module with a matrix qualifies if it works on each row by itself, and if only `rows` of its output reach the
    logits. The gradient of a zero that is added to the output shows this.

    Args:
        layer: the last decoder layer.
        logits: runs the model and returns its logits at `rows`.
        rows: rows of (1, N, hidden).
        tolerance: between a module's output for `rows` alone and for all rows, relative to the largest value.

    Returns:
        Modules, none inside of another.
    """
    check = _RowwiseCheck(rows, tolerance)
    # a norm costs less than selecting rows
    inner = [m for m in list(layer.modules())[1:] if any(parameter.dim() > 1 for parameter in m.parameters())]
    handles = [module.register_forward_pre_hook(check.before, with_kwargs=True) for module in inner]
    handles += [module.register_forward_hook(check.after) for module in inner]
    # gradient checkpointing would run the layer again, with these hooks
    layer_was_training, layer.training = layer.training, False
    try:
        with torch.enable_grad():
            found = logits()
            weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(0)).to(found)
            zeros = list(check.added.values())
            gradients = torch.autograd.grad((found * weights).sum(), zeros, allow_unused=True) if zeros else ()
    finally:
        layer.training = layer_was_training
        for handle in handles:
            handle.remove()
    by_module = dict(zip(check.added, gradients, strict=True))
    good: list[nn.Module] = []
    for module in inner:  # outer modules come first
        gradient = by_module.get(module)
        if gradient is None or any(module in outer.modules() for outer in good):
            continue
        if not gradient.index_fill(-2, rows, 0).any():
            good.append(module)
    return good
