"""UltraEdit in closed form: one ridge regression on inputs and normalized gradients, without target values."""

from __future__ import annotations

import torch

from .memit import check_rows, solve_symmetric

EPSILON = 1e-8  # beside a standard deviation


class LifelongNormalizer:
    """Mean and variance of features over all turns of editing, and features normalized by them.

    Each turn's features are merged into the running statistics (Chan et al.'s exact formula for two samples), and
    normalized by them afterwards: the "lifelong normalization" of arXiv 2505.14679.

    Example:
        >>> normalizer = LifelongNormalizer()
        >>> normalized = normalizer(torch.randn(100, 8) * 3 + 1)  # mean 0, variance 1
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)  # summed squared distances from the mean

    @property
    def variance(self) -> torch.Tensor:
        """(d,): the variance of all features so far."""
        return self._squares / max(self.count, 1)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Add a turn's features, (n, d), to the statistics, and return them normalized, float64.

        A feature that never varied becomes 0.
        """
        wide = features.double()
        mean, squares = wide.mean(dim=0), wide.var(dim=0, unbiased=False) * len(wide)
        if not self.count:
            self.mean, self._squares = mean, squares
        else:
            total, shift = self.count + len(wide), mean - self.mean
            self.mean = self.mean + shift * len(wide) / total
            self._squares = self._squares + squares + shift**2 * self.count * len(wide) / total
        self.count += len(wide)
        return (wide - self.mean) / (self.variance.sqrt() + EPSILON)


def ultraedit_delta(
    inputs: torch.Tensor, gradients: torch.Tensor, normalizer: LifelongNormalizer, *, rate: float, ridge: float = 1.0
) -> torch.Tensor:
    """Return the change of a weight for one turn of edits, (d_out, d_in).

    Inputs h and gradients g are normalized together, `ĥ, ĝ = normalizer([h, g])`. The output of the layer shall move
    by `v = -rate |ĥ|² ĝ`, and the change is the ridge regression of v on h, `D = Vᵀ H (Hᵀ H + ridge I)⁻¹` (Gu et al.,
    "UltraEdit", arXiv 2505.14679, compared with the authors' code in EasyEdit; the values are those of one step on
    normalized features).

    Args:
        inputs: (n, d_in), inputs of the layer at the positions that predict the targets' tokens.
        gradients: (n, d_out), gradients of the loss by the layer's outputs there.
        normalizer: the statistics of all turns; this turn is added to them.
        rate: size of the step; the authors use 1e-6 for layers of 14,336 inputs.
        ridge: above 0; 1 in the paper.

    Raises:
        ValueError: if the shapes do not fit, or rate or ridge is not above 0.
    """
    check_rows(inputs, gradients, torch.eye(inputs.shape[-1]))
    if not rate > 0 or not ridge > 0:
        raise ValueError(f"rate={rate}, ridge={ridge}: expected numbers above 0.")
    width = inputs.shape[1]
    normalized = normalizer(torch.cat([inputs.double(), gradients.double()], dim=1))
    sizes = normalized[:, :width].square().sum(dim=1, keepdim=True)
    values = -rate * sizes * normalized[:, width:]
    wide = inputs.double()
    matrix = wide.T @ wide + ridge * torch.eye(width, dtype=wide.dtype, device=wide.device)
    return solve_symmetric(matrix, wide.T @ values).T.float()
