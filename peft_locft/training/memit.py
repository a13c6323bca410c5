"""MEMIT in closed form: the change of a linear layer that writes values for keys and keeps what it does on a text."""

from __future__ import annotations

import torch


def memit_delta(
    keys: torch.Tensor, residuals: torch.Tensor, second_moment: torch.Tensor, damping: float
) -> torch.Tensor:
    """Return the change of a weight that writes values for keys, (d_out, d_in).

    `D = Rᵀ K (λ C + Kᵀ K)⁻¹` (Meng et al., "Mass-Editing Memory in a Transformer", arXiv 2210.07229, equation 14, with
    keys and residuals as rows). It minimizes `|K Dᵀ - R|² + λ tr(D C Dᵀ)`: the error of the written values plus λ
    times the mean squared change of the layer's output on the text.

    Args:
        keys: (n, d_in), inputs of the layer where it shall answer differently.
        residuals: (n, d_out), what its output there lacks.
        second_moment: (d_in, d_in), `C = E[k kᵀ]` of the layer's inputs on a text.
        damping: λ, above 0; how many inputs of the text an edit stands against. The authors use 15,000 to 20,000.

    Raises:
        ValueError: if the shapes do not fit, or the damping is not above 0.

    Example:
        >>> memit_delta(torch.eye(2), torch.ones(2, 3), torch.eye(2), damping=1.0)  # halfway
        tensor([[0.5000, 0.5000], [0.5000, 0.5000], [0.5000, 0.5000]])
    """
    check_rows(keys, residuals, second_moment)
    if not damping > 0:
        raise ValueError(f"damping={damping}: expected a number above 0.")
    wide, lacking = keys.double(), residuals.double()
    curvature = damping * second_moment.double().to(wide.device) + wide.T @ wide
    return solve_symmetric(curvature, wide.T @ lacking).T.float()


def check_rows(keys: torch.Tensor, residuals: torch.Tensor, matrix: torch.Tensor) -> None:
    """Raise a ValueError unless there is a residual for each key, and the matrix is one of inputs."""
    if keys.ndim != 2 or residuals.ndim != 2 or len(keys) != len(residuals) or not len(keys):
        raise ValueError(
            f"keys, residuals: found shapes {tuple(keys.shape)} and {tuple(residuals.shape)}; expected (n, d_in) and "
            "(n, d_out), n at least 1."
        )
    if tuple(matrix.shape) != (keys.shape[1], keys.shape[1]):
        raise ValueError(f"found a matrix of shape {tuple(matrix.shape)}; expected (d_in, d_in) of {keys.shape[1]}.")


def solve_symmetric(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `matrix⁻¹ right` for a symmetric matrix of non-negative eigenvalues; the least one if singular.

    Args:
        matrix: (d, d), float64.
        right: (d, m).
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed):
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(matrix, hermitian=True) @ right
