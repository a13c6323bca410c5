"""Rows of several kinds: which go into a batch, and what their losses count."""

from __future__ import annotations

import math

import pytest
import torch

from peft_locft.training.batches import EditBatches
from peft_locft.training.objectives import log_probabilities
from peft_locft.training.row_losses import BaseDistributions
from peft_locft.training.training_rows import TrainingRows


def test_a_batch_has_its_edits_first_then_their_variants_then_what_is_kept() -> None:
    rows = TrainingRows(num_edits=4, num_variants=[2, 0, 3, 1], num_retained=5, retained_per_edit=1)
    own = {0: [4, 5], 1: [], 2: [6, 7, 8], 3: [9]}
    for epoch in range(3):
        batches = EditBatches(4, batch_size=2, seed=1, rows=rows)
        batches.epoch = epoch
        seen = []
        for batch in batches:
            edits = batch[:2]
            variants = [row for row in batch if rows.num_edits <= row < rows.first_retained]
            assert sorted(variants) == sorted(row for edit in edits for row in own[edit])
            kept = batch[2 + len(variants) :]
            assert len(kept) == 2
            seen += kept
        assert len(set(seen)) == 4 and set(seen) <= set(range(10, 15))


def test_variants_are_drawn_anew_every_epoch_and_no_kept_row_comes_twice_before_all_others() -> None:
    rows = TrainingRows(num_edits=6, num_variants=[4] * 6, num_retained=3, variants_per_epoch=1, retained_per_edit=1.5)
    drawn = []
    for epoch in range(12):
        batches = EditBatches(6, batch_size=4, seed=0, rows=rows)
        batches.epoch = epoch
        whole = [row for batch in batches for row in batch]
        variants = [row for row in whole if 6 <= row < 30]
        assert sorted((row - 6) // 4 for row in variants) == list(range(6))
        kept = [row for row in whole if row >= 30]
        assert sorted(kept) == sorted([30, 31, 32] * 3)
        drawn.append(tuple(sorted(variants)))
    assert len(set(drawn)) > 6


def test_half_a_variant_is_one_of_every_second_edit() -> None:
    rows = TrainingRows(num_edits=400, num_variants=[3] * 400, variants_per_epoch=0.5)
    (batch,) = EditBatches(400, 400, 0, rows=rows)
    assert batch[:400] == next(iter(EditBatches(400, 400, 0)))
    owners = [(row - 400) // 3 for row in batch[400:]]
    assert len(set(owners)) == len(owners)
    assert 160 < len(owners) < 240


@pytest.mark.parametrize(("retained_per_edit", "expected"), [(0.5, [2, 2, 1]), (0.1, [0, 1, 0]), (2.0, [8, 8, 4])])
def test_a_fraction_of_kept_rows_comes_out_over_an_epoch(retained_per_edit: float, expected: list[int]) -> None:
    rows = TrainingRows(num_edits=10, num_retained=50, retained_per_edit=retained_per_edit)
    batches = list(EditBatches(10, batch_size=4, seed=0, rows=rows))
    assert [sum(row >= 10 for row in batch) for batch in batches] == expected


def kept_by_batch(rows: TrainingRows, batch_size: int, epoch: int = 0) -> list[tuple[list[int], list[int]]]:
    batches = EditBatches(rows.num_edits, batch_size, seed=0, rows=rows)
    batches.epoch = epoch
    return [
        ([row for row in batch if row < rows.num_edits], [row for row in batch if row >= rows.first_retained])
        for batch in batches
    ]


@pytest.mark.parametrize("retained_per_edit", [0.5, 1.0, 1.5, 3.0])
def test_what_was_made_of_an_edit_is_kept_in_its_batch(retained_per_edit: float) -> None:
    """Each edit's once before any a second time, and other ones every epoch."""
    rows = TrainingRows(
        12, num_variants=[1] * 12, num_retained=48, retained_per_edit=retained_per_edit, num_own_retained=[4] * 12
    )
    seen = set()
    for epoch in range(6):
        for edits, kept in kept_by_batch(rows, 4, epoch):
            assert len(kept) == len(set(kept)) == 4 * retained_per_edit
            owners = [(row - 24) // 4 for row in kept]
            assert set(owners) <= set(edits)
            most = math.ceil(retained_per_edit)
            assert {owners.count(edit) for edit in edits} <= {most - 1, most}
            seen |= set(kept)
    assert len(seen) > 40 * min(retained_per_edit, 1)


def test_edits_own_and_other_kept_rows_are_mixed_by_their_numbers() -> None:
    rows = TrainingRows(10, num_retained=40, retained_per_edit=2, num_own_retained=[3] * 10)
    seen = []
    for edits, kept in kept_by_batch(rows, 5):
        own = [row for row in kept if row < 40]
        assert len(own) in (7, 8) and {(row - 10) // 3 for row in own} <= set(edits)
        assert len(kept) == 10
        seen += [row for row in kept if row >= 40]
    assert len(seen) == len(set(seen)) == 5


def test_others_are_kept_where_the_edits_of_a_batch_have_too_few_of_their_own() -> None:
    rows = TrainingRows(8, num_retained=12, retained_per_edit=1, num_own_retained=[0] * 6 + [6, 6])
    for edits, kept in kept_by_batch(rows, 2):
        assert len(kept) == 2
        if 6 in edits:
            assert any(8 <= row < 14 for row in kept)


def test_edits_alone_are_batched_as_without_rows() -> None:
    assert list(EditBatches(9, 4, 3, rows=TrainingRows(9))) == list(EditBatches(9, 4, 3))


def random_logits(positions: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def divergences(base: BaseDistributions, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
    numbers = torch.tensor(rows)
    return base.divergences(numbers, log_probabilities(logits, base.tokens(numbers)))


def whole_kl(base: torch.Tensor, edited: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(
        edited.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)


def test_the_loss_is_the_kl_from_the_base_and_its_gradient_the_kls() -> None:
    base = BaseDistributions(torch.tensor([3, 5]), torch.tensor([2, 1]), k=9)
    base.store(torch.tensor([5]), random_logits(1, 10, 0))
    base.store(torch.tensor([3]), random_logits(2, 10, 1))
    said = torch.cat([random_logits(1, 10, 0), random_logits(2, 10, 1)])
    edited = random_logits(3, 10, 2).requires_grad_()
    same = edited.detach().clone().requires_grad_()
    found = divergences(base, [5, 3], edited)
    torch.testing.assert_close(found, whole_kl(said, same))  # 9 of 10 tokens, and one for all the others
    (gradient,) = torch.autograd.grad(found.sum(), edited)
    (expected,) = torch.autograd.grad(whole_kl(said, same).sum(), same)
    torch.testing.assert_close(gradient, expected)


def test_fewer_outcomes_are_a_lower_bound_and_the_base_itself_has_none() -> None:
    said, edited = random_logits(4, 50, 0), random_logits(4, 50, 1)
    base = BaseDistributions(torch.tensor([0]), torch.tensor([4]), k=5)
    base.store(torch.tensor([0]), said)
    assert bool((divergences(base, [0], edited) < whole_kl(said, edited)).all())
    assert bool((divergences(base, [0], edited) > 0.1).all())
    torch.testing.assert_close(divergences(base, [0], said), torch.zeros(4), atol=1e-6, rtol=0)
