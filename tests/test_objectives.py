import math
from typing import get_args

import pytest
import torch

from peft_locft.training.objectives import IGNORED, LossAveraging, Objective, labels_for, row_counts, scored_positions
from peft_locft.training.objectives import token_losses as losses_at_scored

VOCABULARY = 7
ROWS = [([1, 5, 2, 6, 3], 2), ([4, 1, 2], 1), ([2, 2, 2, 2], 3), ([6, 0, 3, 1, 5, 4], 1)]  # token ids, target start

every_objective = pytest.mark.parametrize("objective", get_args(Objective))
every_averaging = pytest.mark.parametrize("averaging", get_args(LossAveraging))


def batch(padding: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in ROWS) + padding
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in ROWS])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in ROWS])
    return input_ids, attention_mask, torch.tensor([start for _, start in ROWS])


def random_logits(length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(ROWS), length, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_()


def minus_log_p(logits: torch.Tensor, token: int) -> torch.Tensor:
    """-log softmax, spelled out."""
    return torch.log(sum(torch.exp(value) for value in logits)) - logits[token]  # type: ignore[arg-type]


def by_hand(logits: torch.Tensor, objective: Objective) -> list[list[torch.Tensor]]:
    """The losses of every row, from the definitions: no padding, no labels, one token after the other."""
    losses: list[list[torch.Tensor]] = []
    for row, (ids, start) in enumerate(ROWS):
        first = 1 if objective == "full" else start
        source = {t: start - 1 if objective == "prompt_last" else t - 1 for t in range(first, len(ids))}
        losses.append([minus_log_p(logits[row, source[t]], ids[t]) for t in source])
    return losses


def mean_by_hand(losses: list[list[torch.Tensor]], averaging: LossAveraging) -> torch.Tensor:
    if averaging == "edit":
        return torch.stack([torch.stack(row).mean() for row in losses]).mean()
    return torch.stack([loss for row in losses for loss in row]).mean()


def token_losses(logits: torch.Tensor, labels: torch.Tensor, objective: Objective) -> torch.Tensor:
    """The losses from the logits of all positions."""
    scored = scored_positions(labels, objective)
    return losses_at_scored(logits[scored.rows, scored.sources], labels, scored)


def loss_of(logits: torch.Tensor, objective: Objective, averaging: LossAveraging, padding: int = 0) -> torch.Tensor:
    labels = labels_for(objective, *batch(padding))
    num_scored = (labels != IGNORED).sum(dim=1)
    counts = row_counts(num_scored, averaging)
    return (token_losses(logits, labels, objective).sum(dim=1) / num_scored * counts).sum() / counts.sum()


@every_objective
@every_averaging
def test_loss_and_gradient_are_those_of_the_definition(objective: Objective, averaging: LossAveraging) -> None:
    logits, same_logits = random_logits(length=6), random_logits(length=6)
    loss, expected = loss_of(logits, objective, averaging), mean_by_hand(by_hand(same_logits, objective), averaging)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, same_logits.grad, rtol=1e-5, atol=1e-8)


@every_objective
def test_every_token_loss_is_where_its_token_is(objective: Objective) -> None:
    logits = random_logits(length=6)
    losses = token_losses(logits, labels_for(objective, *batch()), objective)
    expected = torch.zeros(losses.shape)
    for row, ((ids, _), own) in enumerate(zip(ROWS, by_hand(logits, objective), strict=True)):
        expected[row, len(ids) - len(own) : len(ids)] = torch.stack(own).detach().float()
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-6, atol=0)


def test_prompt_last_reads_the_logits_of_the_last_prompt_token_alone() -> None:
    logits = random_logits(length=6)
    loss_of(logits, "prompt_last", "edit").backward()
    assert logits.grad is not None
    read = {(row, t) for row, t in logits.grad.abs().sum(dim=2).nonzero().tolist()}
    assert read == {(row, start - 1) for row, (_, start) in enumerate(ROWS)}


def test_prompt_last_and_target_new_agree_on_targets_of_one_token_alone() -> None:
    logits = random_logits(length=6)
    one, other = (token_losses(logits, labels_for(name, *batch()), name) for name in ("prompt_last", "target_new"))
    same = (one == other).all(dim=1).tolist()
    assert same == [len(ids) - start == 1 for ids, start in ROWS]


@every_objective
def test_padding_changes_nothing(objective: Objective) -> None:
    logits = random_logits(length=9)
    padded = token_losses(logits, labels_for(objective, *batch(padding=3)), objective)
    assert torch.equal(padded[:, :6], token_losses(logits[:, :6], labels_for(objective, *batch()), objective))
    assert not padded[:, 6:].any()


def test_full_scores_everything_but_the_first_token_and_padding() -> None:
    input_ids, attention_mask, target_start = batch()
    labels = labels_for("full", input_ids, attention_mask, target_start)
    assert [[token for token in row if token != IGNORED] for row in labels.tolist()] == [ids[1:] for ids, _ in ROWS]


@pytest.mark.parametrize("objective", ["target_new", "prompt_last"])
def test_the_others_score_the_target_alone(objective: Objective) -> None:
    labels = labels_for(objective, *batch())
    assert [[token for token in row if token != IGNORED] for row in labels.tolist()] == [
        ids[start:] for ids, start in ROWS
    ]


def test_averaging_by_edit_and_by_token_weigh_differently() -> None:
    num_scored, weights = torch.tensor([3, 1, 4]), torch.tensor([1.0, 0.5, 1.0])
    assert row_counts(num_scored, "edit").tolist() == [1, 1, 1]
    assert row_counts(num_scored, "token").tolist() == [3, 1, 4]
    assert row_counts(num_scored, "edit", weights).tolist() == [1, 0.5, 1]
    assert row_counts(num_scored, "token", weights).tolist() == [3, 0.5, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    labels = labels_for("target_new", *batch())
    half = random_logits(length=6, dtype=dtype)
    losses = token_losses(half, labels, "target_new")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, token_losses(half.float(), labels, "target_new"), rtol=0, atol=0)


def test_logits_too_large_for_exp_give_a_finite_loss() -> None:
    loss = loss_of(1000 * random_logits(length=6), "target_new", "edit")
    assert math.isfinite(loss.item())
