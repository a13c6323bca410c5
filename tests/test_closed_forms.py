"""The closed forms of MEMIT, AlphaEdit and UltraEdit, against what their formulas promise."""

from __future__ import annotations

import pytest
import torch

from peft_locft.training.alphaedit import alphaedit_delta, null_space
from peft_locft.training.memit import memit_delta, solve_symmetric
from peft_locft.training.ultraedit import LifelongNormalizer, ultraedit_delta

NUM_KEYS, WIDTH, OUT = 5, 12, 7


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


KEYS, RESIDUALS = drawn(NUM_KEYS, WIDTH), drawn(NUM_KEYS, OUT, seed=1)
TEXT = drawn(200, WIDTH, seed=2) * torch.linspace(0.2, 3, WIDTH)
SECOND_MOMENT = TEXT.T @ TEXT / len(TEXT)


def gradient_of(objective: object, delta: torch.Tensor) -> torch.Tensor:
    at = delta.double().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(at), at)  # type: ignore[operator]
    return gradient


def memit_objective(delta: torch.Tensor, damping: float) -> torch.Tensor:
    written = (KEYS.double() @ delta.T - RESIDUALS.double()).square().sum()
    return written + damping * torch.einsum("oi,ij,oj->", delta, SECOND_MOMENT.double(), delta)


# ---------------------------------------------------------------------- MEMIT


def test_memit_without_damping_writes_the_values_exactly() -> None:
    delta = memit_delta(KEYS, RESIDUALS, SECOND_MOMENT, 1e-9)
    assert delta.shape == (OUT, WIDTH)
    torch.testing.assert_close(KEYS @ delta.T, RESIDUALS, rtol=1e-4, atol=1e-4)


def test_memit_is_the_minimum_of_its_objective() -> None:
    delta = memit_delta(KEYS, RESIDUALS, SECOND_MOMENT, 3.0)
    at_minimum = gradient_of(lambda each: memit_objective(each, 3.0), delta).abs().max()
    elsewhere = gradient_of(lambda each: memit_objective(each, 3.0), 1.01 * delta).abs().max()
    assert at_minimum < 1e-4 < 1e-2 < elsewhere


def test_of_all_exact_solutions_memit_changes_the_text_least() -> None:
    delta = memit_delta(KEYS, RESIDUALS, SECOND_MOMENT, 1e-9)
    least = torch.linalg.lstsq(KEYS, RESIDUALS, driver="gelsd").solution.T  # the smallest, but not on this text
    torch.testing.assert_close(KEYS @ least.T, RESIDUALS, rtol=1e-3, atol=1e-3)
    assert (TEXT @ delta.T).square().sum() < 0.9 * (TEXT @ least.T).square().sum()


def test_more_damping_changes_the_text_less() -> None:
    changes = [(TEXT @ memit_delta(KEYS, RESIDUALS, SECOND_MOMENT, damping).T).norm() for damping in (0.1, 1.0, 10.0)]
    assert changes[0] > changes[1] > changes[2]


# ---------------------------------------------------------------------- AlphaEdit


def preserved(num: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs to preserve, and the projector that removes their directions."""
    inputs = drawn(num, WIDTH, seed=3)
    return inputs, null_space(torch.linalg.qr(inputs.T)[0])


def test_alphaedit_leaves_preserved_inputs_alone() -> None:
    inputs, projector = preserved()
    delta = alphaedit_delta(KEYS, RESIDUALS, projector, damping=1e-6)
    assert (inputs @ delta.T).abs().max() < 1e-5 * delta.norm()
    torch.testing.assert_close(delta @ projector.float(), delta, rtol=1e-4, atol=1e-5)
    # 5 keys have independent directions in the 8 that are left, so they are still written
    torch.testing.assert_close(KEYS @ delta.T, RESIDUALS, rtol=1e-3, atol=1e-3)
    free = alphaedit_delta(KEYS, RESIDUALS, torch.eye(WIDTH), damping=1e-6)
    assert (inputs @ free.T).abs().max() > 0.1


def test_alphaedit_is_the_formula_of_the_paper() -> None:
    _, projector = preserved()
    earlier = drawn(3, WIDTH, seed=4)
    gram = KEYS.double().T @ KEYS.double() + earlier.double().T @ earlier.double()
    inner = torch.linalg.inv(gram @ projector + 2.0 * torch.eye(WIDTH, dtype=torch.float64))
    expected = RESIDUALS.double().T @ KEYS.double() @ projector @ inner
    delta = alphaedit_delta(KEYS, RESIDUALS, projector, earlier=earlier.T @ earlier, damping=2.0)
    torch.testing.assert_close(delta.double(), expected, rtol=1e-4, atol=1e-5)


def test_alphaedit_keeps_earlier_edits_better_if_it_knows_their_keys() -> None:
    _, projector = preserved()
    earlier = drawn(3, WIDTH, seed=4)
    knowing, ignorant = (
        alphaedit_delta(KEYS, RESIDUALS, projector, earlier=each, damping=0.1)
        for each in (100 * earlier.T @ earlier, None)
    )
    assert (earlier @ knowing.T).norm() < 0.2 * (earlier @ ignorant.T).norm()


# ---------------------------------------------------------------------- UltraEdit


def test_lifelong_statistics_are_those_of_all_turns() -> None:
    turns = [drawn(10, WIDTH, seed=5) * 3 + 1, drawn(25, WIDTH, seed=6) - 2, drawn(3, WIDTH, seed=7)]
    normalizer = LifelongNormalizer()
    for number, turn in enumerate(turns):
        normalized = normalizer(turn)
        so_far = torch.cat(turns[: number + 1]).double()
        torch.testing.assert_close(normalizer.mean, so_far.mean(dim=0))
        torch.testing.assert_close(normalizer.variance, so_far.var(dim=0, unbiased=False))
        expected = (turn.double() - so_far.mean(dim=0)) / so_far.std(dim=0, unbiased=False)
        torch.testing.assert_close(normalized, expected)


def test_the_first_turn_is_normalized_to_mean_0_and_variance_1_and_a_constant_to_0() -> None:
    features = drawn(20, WIDTH) * 5 + 3
    features[:, 0] = 4.0
    normalized = LifelongNormalizer()(features)
    torch.testing.assert_close(normalized.mean(dim=0), torch.zeros(WIDTH, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(normalized[:, 1:].var(dim=0, unbiased=False), torch.ones(WIDTH - 1).double())
    assert not normalized[:, 0].any()


def test_ultraedit_is_ridge_regression_on_its_values() -> None:
    inputs, gradients = drawn(30, WIDTH, seed=8), drawn(30, OUT, seed=9)
    delta = ultraedit_delta(inputs, gradients, LifelongNormalizer(), rate=0.5, ridge=2.0)
    normalized = LifelongNormalizer()(torch.cat([inputs, gradients], dim=1))
    values = -0.5 * normalized[:, :WIDTH].square().sum(dim=1, keepdim=True) * normalized[:, WIDTH:]

    def objective(each: torch.Tensor) -> torch.Tensor:
        return (inputs.double() @ each.T - values).square().sum() + 2.0 * each.square().sum()

    assert gradient_of(objective, delta).abs().max() < 1e-3
    assert gradient_of(objective, 1.01 * delta).abs().max() > 1e-2
    torch.testing.assert_close(
        ultraedit_delta(inputs, gradients, LifelongNormalizer(), rate=1.0, ridge=2.0), 2 * delta
    )


# ---------------------------------------------------------------------- what they refuse


def test_a_singular_matrix_has_the_least_solution() -> None:
    matrix = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        solve_symmetric(matrix, torch.tensor([[4.0], [0.0]]).double()), torch.tensor([[2.0], [0.0]]).double()
    )


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_a_damping_is_above_0(damping: float) -> None:
    with pytest.raises(ValueError, match=r"damping=.*: expected a number above 0"):
        memit_delta(KEYS, RESIDUALS, SECOND_MOMENT, damping)
    with pytest.raises(ValueError, match=r"damping=.*: expected a number above 0"):
        alphaedit_delta(KEYS, RESIDUALS, torch.eye(WIDTH), damping=damping)
    with pytest.raises(ValueError, match=r"rate=.*: expected numbers above 0"):
        ultraedit_delta(KEYS, RESIDUALS, LifelongNormalizer(), rate=damping)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shapes \(5, 12\) and \(4, 7\); expected"):
        memit_delta(KEYS, RESIDUALS[:-1], SECOND_MOMENT, 1.0)
    with pytest.raises(ValueError, match=r"matrix of shape \(11, 11\); expected \(d_in, d_in\) of 12"):
        memit_delta(KEYS, RESIDUALS, SECOND_MOMENT[1:, 1:], 1.0)
