"""A gradient that is made of the inputs of some tokens alone, in a forward that is the same at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

# tensors by name, then the arguments of a module
Compute: TypeAlias = Callable[..., Any]

CANNOT_CHOOSE = "gradient_tokens cannot choose tokens in"


class TokenChoiceError(ValueError):
    """A module computes its output in a way that does not let single tokens write into its delta."""


def with_gradient_of(
    writers: torch.Tensor,
    compute: Compute,
    tensors: Mapping[Any, torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    by_rows: bool,
) -> torch.Tensor:
    """Return `compute(tensors, *args, **kwargs)`, with a gradient for `tensors` from the writing tokens alone.

    The gradient for the inputs is that of all tokens.

    Args:
        writers: bool, of the shape of the tokens in the output: (B, T), or flattened.
        compute: what a module computes with some tensors in place of its parameters.
        tensors: these tensors.
        args: the module's arguments.
        kwargs: the same.
        by_rows: the output at a token depends on the only argument at that token alone.

    Raises:
        ValueError: if the output is not one tensor with an entry for each token.
    """
    output = compute({name: tensor.detach() for name, tensor in tensors.items()}, *args, **kwargs)
    if not isinstance(output, torch.Tensor):
        raise ValueError(f"it returns a {type(output).__name__}, not one tensor")
    shape = writers.shape if output.shape[: writers.ndim] == writers.shape else writers.flatten().shape
    if output.shape[: len(shape)] != shape:
        raise ValueError(f"found an output of {tuple(output.shape)} for tokens of {tuple(writers.shape)}")
    writers = writers.to(output.device).view(shape)
    if by_rows and not kwargs and len(args) == 1 and args[0].shape[:-1] == shape:
        own = compute(tensors, args[0].detach()[writers])
        return output + torch.zeros_like(output).masked_scatter(writers.unsqueeze(-1), own - own.detach())
    own = compute(tensors, *_detached(args), **_detached(kwargs))
    return output + (own - own.detach()) * writers.view(*shape, *[1] * (output.ndim - len(shape)))


def _detached(values: Any) -> Any:
    """Return arguments with their tensors detached."""
    if isinstance(values, dict):
        return {name: _detached(value) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_detached(value) for value in values)
    return values.detach() if isinstance(values, torch.Tensor) else values


@contextmanager
def explained_choice(module: nn.Module) -> Iterator[None]:
    """Say in a TokenChoiceError which module cannot choose among tokens, and what to do."""
    try:
        yield
    except ValueError as error:
        advice = "Set gradient_tokens to 'all', or train Linear modules."
        raise TokenChoiceError(f"{CANNOT_CHOOSE} {type(module).__name__}: {error}. {advice}") from None
