"""Protects the rest of a model while one weight is trained: pure functions of tensors.

- the null-space projector of AlphaEdit, applied to every change of a delta in training, and a soft form of it;
- the L-infinity bound of FT-L;
- RECT's sparsification of a trained delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..adapters.shrinking import prune_relatively

# share of the largest eigenvalue: smaller ones of a float32 second moment are rounding errors
ROUNDING = 10 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class NullSpaceProjector:
    """Keeps the outputs for preserved inputs: removes directions of the input from every change of a weight.

    With `U` the (d_in, r) matrix of the dropped directions, `P = I - U Uᵀ` and a weight that computes `W k`, a change
    `D` becomes `D P`: for an input `k` in the span of `U` the output does not change, `(W + D P) k = W k`. AlphaEdit
    (Fang et al., arXiv 2410.02355) applies this projector to a solution in closed form; here it is applied to each
    step of an optimizer.

    **Projecting the sum of all changes is enough.** Let `O` be the delta at the start of training, and `D_t` the delta
    after step t with each change projected: `D_0 = O`, `D_t = D_(t-1) + C_t P`, where `C_t` is the change that the
    optimizer made. Then `D_(t-1) - O = (C_1 + … + C_(t-1)) P`, which is its own projection, since `P P = P`. So with
    `X = D_(t-1) + C_t`, the delta as the optimizer left it:
    `O + (X - O) P = O + (D_(t-1) - O) P + C_t P = D_(t-1) + C_t P = D_t`. The delta before the step is not needed,
    nothing drifts, and the cost is two thin products, 4 d_out d_in r operations.

    Args:
        basis: (d_in, r) dropped directions, orthonormal columns.
        input_dim: the dimension of the weight along which its inputs lie: 1 for a Linear (d_out, d_in), 0 for
            transformers' Conv1D (d_in, d_out).

    Example:
        >>> projector = NullSpaceProjector.from_second_moment(statistics.second_moment, energy_share=0.5)
        >>> optimizer.step()
        >>> projector.project_(delta)  # the delta was zero at the start
    """

    basis: torch.Tensor
    input_dim: int = 1

    @classmethod
    def from_second_moment(
        cls, second_moment: torch.Tensor, energy_share: float, input_dim: int = 1
    ) -> NullSpaceProjector:
        """Drop the fewest eigenvectors of a second moment that hold a share of its energy, the sum of eigenvalues.

        Args:
            second_moment: (d_in, d_in) `E[k kᵀ]` of the inputs to preserve.
            energy_share: in (0, 1]; 1 drops every direction with input, beyond rounding.
            input_dim: see the class.

        Raises:
            ValueError: if the share is out of range, the second moment is zero or not a square matrix of finite
                values, or no direction would be left to train in.
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
                f"energy_share={energy_share}: the preserved text has input in all {dropped} directions; none is "
                "left to train in. Use a smaller share, such as 0.5, or a shorter text."
            )
        return cls(vectors[:, :dropped].float().contiguous(), input_dim)

    def project_(self, delta: torch.Tensor, origin: torch.Tensor | None = None) -> None:
        """Project, in place, everything that training has changed so far.

        Args:
            delta: as the optimizer left it; (d_out, d_in), or (d_in, d_out) with `input_dim` 0. Half precision is
                projected in float32, and rounded.
            origin: the delta at the start of training; `None`: zeros.
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
        """Return `before + (delta - before) P`: the delta with the change of one step projected.

        Args:
            delta: after the step.
            before: the delta before it.
        """
        projected = delta.detach().clone()
        self.project_(projected, before)
        return projected


@dataclass(frozen=True)
class SoftProjector:
    """Damps every change of a weight along directions of preserved inputs, more where they hold more energy.

    A change `D` becomes `c D (I + strength * C / m)⁻¹`, where `m = trace(C) / d_in` is the mean eigenvalue of `C`.
    With a strength of 1, a direction of mean energy is trained half as fast as one without energy. `c` makes the mean
    eigenvalue of the factor 1, so that a learning rate keeps its meaning. The factor is no projection (applied twice
    it damps twice), so it takes the change of one step and needs the delta before that step.

    Args:
        matrix: (d_in, d_in), symmetric. A bfloat16 matrix multiplies changes in bfloat16; the sum is in float32.
        input_dim: as in `NullSpaceProjector`.
    """

    matrix: torch.Tensor
    input_dim: int = 1

    @classmethod
    def from_second_moment(cls, second_moment: torch.Tensor, strength: float, input_dim: int = 1) -> SoftProjector:
        """Compute the matrix from (d_in, d_in) `E[k kᵀ]` of the inputs to preserve.

        Raises:
            ValueError: if the strength is no finite number above 0, or the second moment is zero or not a square
                matrix of finite values.
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
            f"second_moment: found shape {tuple(second_moment.shape)}; expected (d_in, d_in), E[k kᵀ] of the inputs."
        )
    if not bool(torch.isfinite(second_moment).all()) or not bool(second_moment.any()):
        raise ValueError("second_moment: found NaN, infinity or only zeros. Compute it again.")


def bound_(delta: torch.Tensor, limit: float, origin: torch.Tensor | None = None) -> None:
    """Clip a delta to [-limit, limit], in place: the L-infinity bound of FT-L, `W ← clip(W, W0 ± ε)` after each step.

    Args:
        delta: of any shape.
        limit: ε, above 0; 5e-4 and 5e-5 are used (Zhu et al., "Modifying Memories in Transformer Models", arXiv
            2012.00363, and its successors).
        origin: the centre of the bound, for a weight that is trained itself; `None`: zeros, as for a delta.
    """
    with torch.no_grad():
        if origin is None:
            delta.clamp_(-limit, limit)
        else:
            delta.copy_(torch.clamp(delta, origin - limit, origin + limit))


def sparsify_(delta: torch.Tensor, weight: torch.Tensor, density: float, origin: torch.Tensor | None = None) -> None:
    """Set to zero, in place, all of a trained change but the values largest relative to their weight (RECT).

    See `peft_locft.adapters.shrinking.prune_relatively`, also for weights of zero.

    Args:
        delta: of any shape.
        weight: the base weight.
        density: share of values that stay, in (0, 1]; the authors of RECT use 0.2.
        origin: for a weight that is trained itself, its value before training; `None`: zeros.

    Raises:
        ValueError: if the share is out of range.
    """
    check_share("density", density)
    with torch.no_grad():
        if origin is None:
            delta.copy_(prune_relatively(delta, weight, density))
        else:
            change = prune_relatively(delta.float() - origin.float(), weight, density)
            delta.copy_(torch.where(change != 0, delta, origin))


def check_share(name: str, share: float) -> None:
    """Raise a ValueError unless this is a share, in (0, 1]."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{name}={share!r}: expected a share above 0, at most 1.")


def check_positive(name: str, number: float) -> None:
    """Raise a ValueError unless this is a finite number above 0."""
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
        raise ValueError(f"{name}={number!r}: expected a finite number above 0.")
