"""The projector, the bound and the sparsification, as functions of tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import same_bits

from peft_locft.adapters.shrinking import prune_relatively
from peft_locft.training.preservation import NullSpaceProjector, SoftProjector, bound_, check_positive, sparsify_

D_OUT, D_IN = 6, 10


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def second_moment(num_inputs: int = 200, seed: int = 3) -> torch.Tensor:
    inputs = random(num_inputs, D_IN, seed=seed) * torch.arange(1, D_IN + 1)
    return inputs.T @ inputs / num_inputs


# ---------------------------------------------------------------------- which directions are dropped


@pytest.mark.parametrize(
    ("share", "dropped"), [(0.1, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (0.95, 3), (0.96, 4), (1.0, 4)]
)
def test_the_fewest_directions_that_hold_the_share_are_dropped(share: float, dropped: int) -> None:
    values = torch.tensor([15.0, 0.0, 50.0, 5.0, 30.0, 0.0])
    projector = NullSpaceProjector.from_second_moment(torch.diag(values), share)
    expected = torch.eye(6)[:, [2, 4, 0, 3][:dropped]]
    assert torch.equal(projector.basis.abs(), expected)


def test_the_basis_is_orthonormal_and_of_eigenvectors() -> None:
    moment = second_moment()
    basis = NullSpaceProjector.from_second_moment(moment, 0.9).basis
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]))
    values = torch.linalg.eigvalsh(moment).flip(0)[: basis.shape[1]]
    torch.testing.assert_close(moment @ basis, basis * values, rtol=1e-4, atol=1e-3)


def test_a_short_text_leaves_its_null_space() -> None:
    inputs = random(4, D_IN)
    projector = NullSpaceProjector.from_second_moment(inputs.T @ inputs / 4, 1.0)
    assert projector.basis.shape == (D_IN, 4)
    delta = random(D_OUT, D_IN, seed=1)
    projector.project_(delta)
    assert delta.norm() > 1
    assert (delta @ inputs.T).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("moment", "share", "message"),
    [
        (torch.eye(3), 0.0, r"energy_share=0.0: expected a share"),
        (torch.eye(3), 1.5, r"energy_share=1.5: expected a share"),
        (torch.eye(3), True, r"energy_share=True: expected a share"),
        (torch.eye(3), 1.0, r"input in all 3 directions; none is left"),
        (torch.ones(3, 2), 0.5, r"found shape \(3, 2\); expected \(d_in, d_in\)"),
        (torch.zeros(3, 3), 0.5, r"NaN, infinity or only zeros"),
        (torch.full((3, 3), math.nan), 0.5, r"NaN, infinity or only zeros"),
    ],
)
def test_a_second_moment_that_gives_no_projector_is_refused(moment: Any, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NullSpaceProjector.from_second_moment(moment, share)


# ---------------------------------------------------------------------- projecting what Adam does


@pytest.mark.parametrize("input_dim", [1, 0])
@pytest.mark.parametrize("has_origin", [False, True])
def test_projecting_the_whole_change_is_projecting_every_change_of_adam(input_dim: int, has_origin: bool) -> None:
    projector = NullSpaceProjector.from_second_moment(second_moment(), 0.7, input_dim)
    projector = NullSpaceProjector(projector.basis.double(), input_dim)
    shape = (D_OUT, D_IN) if input_dim == 1 else (D_IN, D_OUT)
    origin = random(*shape, seed=7) if has_origin else torch.zeros(shape)
    wanted = random(*shape, seed=8)
    ours, plain = (torch.nn.Parameter(origin.clone()) for _ in range(2))
    optimizers = [torch.optim.Adam([parameter], lr=0.05) for parameter in (ours, plain)]
    basis = projector.basis.float()
    complement = torch.eye(D_IN) - basis @ basis.T
    for step in range(30):
        for parameter, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            # a gradient that depends on where one is, as in training
            ((parameter - wanted).sin() * (step + 1)).sum().backward()
            before = parameter.detach().clone()
            optimizer.step()
            with torch.no_grad():
                if parameter is plain:
                    change = parameter - before
                    parameter.copy_(before + (change @ complement if input_dim == 1 else complement @ change))
                else:
                    NullSpaceProjector(basis, input_dim).project_(parameter, origin if has_origin else None)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    moved = (ours - origin).detach()
    assert moved.norm() > 0.5
    inside = moved @ basis if input_dim == 1 else basis.T @ moved
    assert inside.abs().max() < 1e-5


def test_a_change_is_projected_however_the_delta_began() -> None:
    projector = NullSpaceProjector.from_second_moment(second_moment(), 0.7)
    before, after = random(D_OUT, D_IN), random(D_OUT, D_IN, seed=1)
    kept = after.clone()
    found = projector.project_change(after, before)
    expected = before + (after - before) @ (torch.eye(D_IN) - projector.basis @ projector.basis.T)
    torch.testing.assert_close(found, expected)
    assert torch.equal(after, kept)


def test_a_narrow_delta_is_projected_in_float32() -> None:
    projector = NullSpaceProjector.from_second_moment(second_moment(), 0.7)
    delta = random(D_OUT, D_IN).bfloat16()
    wide = delta.float()
    projector.project_(wide)
    projector.project_(delta)
    assert same_bits(delta, wide.bfloat16())


# ---------------------------------------------------------------------- the soft form


def test_a_change_is_damped_by_the_energy_of_its_direction() -> None:
    moment = torch.diag(torch.tensor([6.0, 3.0, 0.0]))
    before = torch.ones(2, 3)
    for input_dim in (1, 0):
        projector = SoftProjector.from_second_moment(moment, 2.0, input_dim)
        found = projector.project_change(before + 7.0, before) if input_dim else None
        if found is None:
            found = projector.project_change(before.T + 7.0, before.T).T
        # of C the mean eigenvalue is 3, and that of the damping, (1/5 + 1/3 + 1) / 3, is made 1
        damping = torch.tensor([1 / 5, 1 / 3, 1.0]) / (23 / 45)
        torch.testing.assert_close(found, (1 + 7 * damping).expand(2, 3))
        half = SoftProjector(projector.matrix.bfloat16(), input_dim)
        if input_dim:
            close = half.project_change(before + 7.0, before)
            assert close.dtype == torch.float32
            torch.testing.assert_close(close, found, rtol=2**-7, atol=0)
    narrow = SoftProjector.from_second_moment(moment, 2.0).project_change(before.bfloat16(), before.bfloat16())
    assert narrow.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"soft_strength=-1: expected a finite number above 0"):
        SoftProjector.from_second_moment(moment, -1)
    with pytest.raises(ValueError, match="only zeros"):
        SoftProjector.from_second_moment(torch.zeros(3, 3), 1.0)


# ---------------------------------------------------------------------- the bound, and RECT


def test_the_bound_is_around_the_base_weight() -> None:
    delta = torch.tensor([-2.0, -0.1, 0.0, 0.3, 2.0])
    bound_(delta, 0.25)
    assert delta.tolist() == pytest.approx([-0.25, -0.1, 0.0, 0.25, 0.25])
    weight = torch.tensor([1.0, 1.1, 3.0])
    bound_(weight, 0.25, origin=torch.tensor([1.0, 1.0, 1.0]))
    assert weight.tolist() == pytest.approx([1.0, 1.1, 1.25])


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan, True])
def test_no_bound_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match=r"bound=.*: expected a finite number above 0"):
        check_positive("bound", limit)


def test_the_relatively_largest_changes_stay() -> None:
    delta, weight = random(D_OUT, D_IN), random(D_OUT, D_IN, seed=1)
    weight[0] = 0.0
    expected = prune_relatively(delta, weight, 0.3)
    of_a_weight = weight + delta
    sparsify_(delta, weight, 0.3)
    assert same_bits(delta, expected)
    assert (delta != 0).sum() == round(0.3 * delta.numel())
    assert bool((delta[0] != 0).all())  # a change of nothing is the largest
    sparsify_(of_a_weight, weight, 0.3, origin=weight)
    assert torch.equal(of_a_weight != weight, expected != 0)
    assert torch.equal(of_a_weight[expected != 0], (weight + expected)[expected != 0])


def test_no_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"density=2: expected a share"):
        sparsify_(torch.ones(2), torch.ones(2), 2)
