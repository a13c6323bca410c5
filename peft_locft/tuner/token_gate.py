"""A gate that lets the deltas act at some tokens of a forward and leaves all other tokens to the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftConfig
from torch import nn

UNGATED = "has modules_to_save or trainable_token_indices, which act on every text, so the model cannot have a scope"


def has_ungated_parts(config: PeftConfig) -> bool:
    """Whether an adapter has parts that PEFT's own modules compute, which know of no gate."""
    return bool(getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None))


class TokenGate:
    """Tells the layers of a model at which tokens of the present forward their deltas act.

    Layers with a gate work only inside `open_at`: a forward that has not said which tokens it has would be edited at
    none, or at all.
    """

    def __init__(self) -> None:
        self._tokens: torch.Tensor | None = None  # (B, T) bool
        self._acts = self._acts_everywhere = False

    @contextmanager
    def open_at(self, firsts: Sequence[int], length: int, device: torch.device) -> Iterator[None]:
        """Let the deltas act, in the forward inside, from a token on.

        Args:
            firsts: for each sequence of the batch, the first such token; `length` or more: none.
            length: tokens of a sequence, T.
            device: of the model's inputs.
        """
        before = dict(vars(self))
        self._acts = any(first < length for first in firsts)
        self._acts_everywhere = all(first <= 0 for first in firsts)
        starts = torch.tensor(firsts).unsqueeze(1)
        self._tokens = (torch.arange(length).unsqueeze(0) >= starts).to(device)
        try:
            yield
        finally:
            vars(self).update(before)

    def output(
        self, module: nn.Module, edited: Callable[[], torch.Tensor], base: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return the edited output of a module where its deltas act, and the base's own bits elsewhere.

        Args:
            module: the base module, for errors.
            edited: computes its edited output.
            base: computes its output in the base.

        Raises:
            ValueError: outside `open_at`, or if the output has no one entry for each token.
        """
        if self._tokens is None:
            raise ValueError(
                f"{type(module).__name__} runs outside of the forward of a model whose adapter has a scope, so it "
                "cannot tell which tokens are in scope. Call the model itself, or take the scope off with remove(); "
                "gradient checkpointing cannot be used with a scope."
            )
        if not self._acts:
            return base()
        found = edited()
        if self._acts_everywhere:
            return found
        return torch.where(self._rows(module, found), found, base())

    def _rows(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        """Return the gate in the shape of an output, (B, T, …) or (B · T, …)."""
        tokens = self._tokens
        assert tokens is not None
        # channels of a convolution may be as many as the tokens
        is_tensor = isinstance(output, torch.Tensor) and not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if is_tensor and output.ndim == 3 and output.shape[:2] == tokens.shape:
            return tokens.unsqueeze(-1).to(output.device)
        if is_tensor and output.ndim == 2 and len(output) == tokens.numel():
            return tokens.reshape(-1, 1).to(output.device)
        found = f"an output of {tuple(getattr(output, 'shape', ()))}"
        raise ValueError(
            f"{type(module).__name__} cannot have a scope: found {found} for tokens of {tuple(tokens.shape)}; "
            "expected one row for each token. Edit modules that work token by token, such as the linears of an MLP."
        )
