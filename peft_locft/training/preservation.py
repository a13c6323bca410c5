"""What keeps the rest of a model while a weight of it is trained: tensors in, tensors out. No model needed.

- the null-space projector: AlphaEdit's, applied to every change that training makes to a delta; and a soft form of it;
- the L-infinity bound of FT-L;
- RECT's sparsification of a trained delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..adapters.shrinking import prune_relatively

# of the largest eigenvalue: what a second moment from products in float32 has below it is rounding
ROUNDING = 10 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class NullSpaceProjector:
    """Keeps the outputs for preserved inputs: takes directions of the input out of every change of a weight.

    With `U` the (d_in, r) matrix of the dropped directions, `P = I - U Uᵀ` and a weight that computes `W k`, a change
    `D` becomes `D P`: for an input `k` in the span of `U` the output stays what it was, `(W + D P) k = W k`. This is
    the projector of AlphaEdit (Fang et al., arXiv 2410.02355), which applies it to a solution in closed form; here it
    is applied to each step of an optimizer.

    **It is enough to project what training has changed so far.** Let `O` be the delta that training began from, and
    `D_t` the delta after step t with each step's change projected: `D_0 = O`, `D_t = D_(t-1) + C_t P`, where `C_t` is
    whatever change the optimizer made, such as Adam's. Then `D_(t-1) - O = (C_1 + … + C_(t-1)) P`, and since `P P = P`
    it is its own projection. So with `X = D_(t-1) + C_t`, what the optimizer leaves:
    `O + (X - O) P = O + (D_(t-1) - O) P + C_t P = D_(t-1) + C_t P = D_t`. The delta before the step need not be kept,
    nothing drifts with the number of steps, and the cost is two thin products, 4 d_out d_in r operations.

    Args:
        basis: (d_in, r) dropped directions, orthonormal columns.
        input_dim: the dimension of the weight along which its inputs lie: 1 for a Linear (d_out, d_in), 0 for
            transformers' Conv1D (d_in, d_out).

    Example:
        >>> projector = NullSpaceProjector.from_second_moment(statistics.second_moment, energy_share=0.5)
        >>> optimizer.step()
        >>> projector.project_(delta)  # training began from a delta of zero
    """

    basis: torch.Tensor
    input_dim: int = 1

    @classmethod
    def from_second_moment(
        cls, second_moment: torch.Tensor, energy_share: float, input_dim: int = 1
    ) -> NullSpaceProjector:
        """Drop the fewest eigenvectors of a second moment that hold a share of its energy, the sum of its eigenvalues.

        Args:
            second_moment: (d_in, d_in) `E[k kᵀ]` of the inputs to preserve.
            energy_share: in (0, 1]; 1 drops every direction in which there is any input, beyond
                rounding.
            input_dim: see the class.

        Raises:
            ValueError: if the share is out of range, if the second moment is not a square matrix of finite values or
                is zero, or if no direction would be left to train in.
        """
        check_share("energy_share", energy_share)
        _check_second_moment(second_moment)
        values, vectors = torch.linalg.eigh(second_moment.double())
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
        held = values.cumsum(0) / values.sum()
        rank = int((values > ROUNDING * values[0]).sum())
        dropped = min(int((held < energy_share).sum()) + 1, rank)
        if dropped == len(values):
            raise ValueError(
                f"energy_share={energy_share}: the preserved text has input in all {dropped} directions, so that none "
                "would be left to train in. Give less, such as 0.5, or a shorter text."
            )
        return cls(vectors[:, :dropped].float().contiguous(), input_dim)

    def project_(self, delta: torch.Tensor, origin: torch.Tensor | None = None) -> None:
        """Project, in place, all that training has changed so far.

        Args:
            delta: as the optimizer left it; (d_out, d_in), or (d_in, d_out) with `input_dim` 0. A delta of less than
                float32 is projected in float32, and rounded.
            origin: the delta that training began from; `None`: zeros.
        """
        with torch.no_grad():
            wide = delta.float()
            change = wide if origin is None else wide - origin.float()
            basis = self.basis.to(wide.device)
            if self.input_dim == 1:
                wide.addmm_(change @ basis, basis.T, alpha=-1)
            else:
                wide.addmm_(basis, basis.T @ change, alpha=-1)
            if wide is not delta:
                delta.copy_(wide)

    def project_change(self, delta: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return `before + (delta - before) P`: the delta with one step's change projected, however it began.

        Args:
            delta: after the step.
            before: the delta before it.
        """
        projected = delta.detach().clone()
        self.project_(projected, before)
        return projected


@dataclass(frozen=True)
class SoftProjector:
    """Damps every change of a weight in the directions of preserved inputs, the more, the more energy they hold.

    A change `D` becomes `c D (I + strength * C / m)⁻¹`, where `m = trace(C) / d_in` is the mean eigenvalue of `C`:
    with a strength of 1, a direction of mean energy is trained half as fast as one without any. `c` makes the mean
    eigenvalue of what `D` is multiplied with 1: what is lost where there is input is gained where there is little, and
    a learning rate keeps its meaning. Nothing is closed, so that doing it twice is not doing it once, and it is for
    the change of one step: the delta before the step has to be kept.

    Args:
        matrix: (d_in, d_in), symmetric. In bfloat16 changes are multiplied with it in bfloat16, and what is left of
            them is added in float32.
        input_dim: as in `NullSpaceProjector`.
    """

    matrix: torch.Tensor
    input_dim: int = 1

    @classmethod
    def from_second_moment(cls, second_moment: torch.Tensor, strength: float, input_dim: int = 1) -> SoftProjector:
        """Compute the matrix from (d_in, d_in) `E[k kᵀ]` of the inputs to preserve.

        Raises:
            ValueError: if the strength is no finite number above 0; if the second moment is not a square matrix of
                finite values or is zero.
        """
        check_positive("soft_strength", strength)
        _check_second_moment(second_moment)
        wide = second_moment.double()
        damping = torch.eye(len(wide), dtype=wide.dtype) + strength * wide / wide.diagonal().mean()
        matrix = torch.linalg.inv(damping)
        return cls((matrix / matrix.diagonal().mean()).float(), input_dim)

    def project_change(self, delta: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return `before + c (delta - before) (I + strength * C / m)⁻¹`, as `NullSpaceProjector.project_change`."""
        with torch.no_grad():
            start = before.float()
            change = delta.float() - start
            matrix = self.matrix.to(start.device)
            change = change.to(matrix.dtype)
            return (start + (change @ matrix if self.input_dim == 1 else matrix @ change)).to(delta.dtype)


def _check_second_moment(second_moment: torch.Tensor) -> None:
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ValueError(
            f"second_moment: found the shape {tuple(second_moment.shape)}; expected (d_in, d_in), E[k kᵀ] of the "
            "inputs k."
        )
    if not bool(torch.isfinite(second_moment).all()) or not bool(second_moment.any()):
        raise ValueError("second_moment: found values that are not finite, or none but zeros. Compute it anew.")


def bound_(delta: torch.Tensor, limit: float, origin: torch.Tensor | None = None) -> None:
    """Clip a delta to [-limit, limit], in place: `W ← clip(W, W0 ± ε)` after every step, the L-infinity bound of FT-L.

    Args:
        delta: of any shape.
        limit: ε, above 0; 5e-4 and 5e-5 are used (Zhu et al., "Modifying Memories in Transformer Models", arXiv
            2012.00363, and its successors).
        origin: what the bound is around, for a weight that is trained itself; `None`: zeros, which for a delta is the
            base weight.
    """
    with torch.no_grad():
        if origin is None:
            delta.clamp_(-limit, limit)
        else:
            delta.copy_(torch.clamp(delta, origin - limit, origin + limit))


def sparsify_(delta: torch.Tensor, weight: torch.Tensor, density: float, origin: torch.Tensor | None = None) -> None:
    """Undo, in place, all of a trained change but what changes its weight the most, relatively: RECT.

    See `peft_locft.adapters.shrinking.prune_relatively`, also for weights of zero.

    Args:
        delta: of any shape.
        weight: the base weight.
        density: of the values to keep, in (0, 1]; RECT's authors keep 0.2.
        origin: for a weight that is trained itself, what it began from; `None`: zeros.

    Raises:
        ValueError: if the share is out of range.
    """
    check_share("density", density)
    with torch.no_grad():
        if origin is None:
            delta.copy_(prune_relatively(delta, weight, density))
        else:
            kept = prune_relatively(delta.float() - origin.float(), weight, density)
            delta.copy_(torch.where(kept != 0, delta, origin))


def check_share(name: str, share: float) -> None:
    """Raise a ValueError if this is no share: a number in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{name}={share!r}: expected a share, a number above 0 and up to 1.")


def check_positive(name: str, number: float) -> None:
    """Raise a ValueError if this is no finite number above 0."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ValueError(f"{name}={number!r}: expected a finite number above 0.")
