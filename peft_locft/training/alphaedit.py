"""AlphaEdit in closed form: as MEMIT, but inside the directions that preserved inputs do not use."""

from __future__ import annotations

import torch

from .memit import check_rows, solve_symmetric


def alphaedit_delta(
    keys: torch.Tensor,
    residuals: torch.Tensor,
    projector: torch.Tensor,
    *,
    earlier: torch.Tensor | None = None,
    damping: float = 1.0,
) -> torch.Tensor:
    """Return the change of a weight that writes values for keys inside a null space, (d_out, d_in).

    `D = Rᵀ K P (Kₚᵀ Kₚ P + Kᵀ K P + λ I)⁻¹` (Fang et al., "AlphaEdit", arXiv 2410.02355, equation 14, with keys and
    residuals as rows; there λ is 1, and 10 in the released settings for Llama 3). Since `D P = D`, inputs whose
    directions P removes get the outputs they had. Among all such changes, D minimizes
    `|K Dᵀ - R|² + |Kₚ Dᵀ|² + λ |D|²`.

    Args:
        keys: (n, d_in), inputs of the layer where it shall answer differently.
        residuals: (n, d_out), what its output there lacks.
        projector: (d_in, d_in), P: symmetric, and its own square. `null_space` makes one.
        earlier: (d_in, d_in), `Kₚᵀ Kₚ` of the keys of earlier edits; `None`: there were none.
        damping: λ, above 0.

    Raises:
        ValueError: if the shapes do not fit, or the damping is not above 0.

    Example:
        >>> alphaedit_delta(torch.eye(2), torch.ones(2, 3), torch.diag(torch.tensor([1.0, 0.0])))
        tensor([[0.5000, 0.0000], [0.5000, 0.0000], [0.5000, 0.0000]])
    """
    check_rows(keys, residuals, projector)
    if not damping > 0:
        raise ValueError(f"damping={damping}: expected a number above 0.")
    wide, lacking, inside = keys.double(), residuals.double(), projector.double().to(keys.device)
    curvature = wide.T @ wide
    if earlier is not None:
        curvature += earlier.double().to(curvature.device)
    # P (G P + λ I)⁻¹ = (P G P + λ I)⁻¹ P, whose matrix is symmetric
    matrix = inside @ curvature @ inside + damping * torch.eye(len(inside), dtype=inside.dtype, device=inside.device)
    return solve_symmetric(matrix, inside @ (wide.T @ lacking)).T.float()


def null_space(basis: torch.Tensor) -> torch.Tensor:
    """Return the projector `I - U Uᵀ`, (d_in, d_in), that removes the directions U.

    Args:
        basis: (d_in, r), orthonormal columns, such as `NullSpaceProjector.basis`.
    """
    wide = basis.double()
    return torch.eye(len(wide), dtype=wide.dtype, device=wide.device) - wide @ wide.T
