import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_locft.training.batches import EditBatches
from peft_locft.training.loss_history import LossHistory

sizes = {"num_edits": st.integers(1, 60), "batch_size": st.integers(1, 70), "seed": st.integers(0, 2**31)}


def epochs(batches: EditBatches, num_epochs: int) -> list[list[list[int]]]:
    orders = []
    for epoch in range(num_epochs):
        batches.epoch = epoch
        orders.append(list(batches))
    return orders


@given(**sizes, epoch=st.integers(0, 1000))
def test_every_edit_is_in_an_epoch_exactly_once(num_edits: int, batch_size: int, seed: int, epoch: int) -> None:
    batches = EditBatches(num_edits, batch_size, seed)
    batches.epoch = epoch
    order = list(batches)
    assert sorted(index for batch in order for index in batch) == list(range(num_edits))
    assert [len(batch) for batch in order[:-1]] == [batch_size] * (len(order) - 1)
    assert 1 <= len(order[-1]) <= batch_size
    assert len(batches) == len(order)


@given(**sizes)
def test_the_order_follows_from_seed_and_epoch(num_edits: int, batch_size: int, seed: int) -> None:
    one, other = EditBatches(num_edits, batch_size, seed), EditBatches(num_edits, batch_size, seed)
    assert epochs(one, 3) == epochs(other, 3)
    # a run that is resumed goes through no earlier epoch
    other.epoch = 2
    assert list(other) == epochs(one, 3)[2]


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = [epochs(EditBatches(50, 8, seed), 5) for seed in (0, 100)]
    assert len({json.dumps(order) for run in orders for order in run}) == 10


@pytest.mark.parametrize("num_edits", [1, 2, 5])
@pytest.mark.parametrize("steps_per_edit", [1, 2, 3, 7])
def test_depth_first_is_one_edit_after_the_other(num_edits: int, steps_per_edit: int) -> None:
    batches = EditBatches(num_edits, batch_size=1, seed=3, steps_per_edit=steps_per_edit)
    run = epochs(batches, num_epochs=steps_per_edit)
    assert all(len(epoch) == len(batches) for epoch in run)
    steps = [index for epoch in run for batch in epoch for index in batch]
    assert steps == [edit for edit in range(num_edits) for _ in range(steps_per_edit)]


def record_of(*steps: list[tuple[float, int]]) -> LossHistory:
    record = LossHistory()
    for batches in steps:
        for share, num_edits in batches:
            record.add_batch(share, num_edits, num_unlearned=1)
        record.end_step()
    return record


def test_an_epochs_loss_is_the_mean_over_its_batches_by_their_size() -> None:
    record = record_of([(2.0, 4)], [(5.0, 1)])
    assert record.end_epoch() == (2.0 * 4 + 5.0 * 1) / 5
    record.add_batch(1.0, 4)
    record.end_step()
    assert record.end_epoch() == 1.0
    assert record.epoch_losses == [2.6, 1.0]
    assert record.unlearned == [2, 0]
    assert record.edits_seen == 9


def test_accumulated_batches_are_one_step() -> None:
    # each batch brings its share of the step's loss
    record = record_of([(0.5, 2), (0.25, 2)])
    assert record.step_loss == 0.75
    assert record.end_epoch() == record_of([(0.75, 4)]).end_epoch()


def test_a_depth_first_edit_counts_with_its_last_loss() -> None:
    record = record_of([(3.0, 1)], [(2.0, 1)])
    record.end_edit()
    assert record.epoch_losses == [2.0]
    assert math.isinf(record.step_loss), "the next edit must not pass for done"


@pytest.mark.parametrize(
    "record",
    [
        LossHistory(),
        record_of([(3.0, 1)]),
        record_of([(1 / 3, 2), (0.1, 2)], [(0.7, 3)]),
        LossHistory(epoch_losses=[0.1, 1e-9], step_loss=2.5, epoch_sum=0.3, epoch_edits=7, edits_seen=11),
    ],
)
def test_a_record_survives_json(record: LossHistory) -> None:
    restored = LossHistory(epoch_losses=[9.0], step_loss=9.0, open_loss=9.0, open_edits=9, edits_seen=9)
    restored.restore(json.loads(json.dumps(record.state(), allow_nan=False)))
    assert restored == record


def test_restoring_leaves_what_an_earlier_run_returned() -> None:
    record = record_of([(3.0, 1)])
    record.end_epoch()
    returned, state = record.epoch_losses, LossHistory().state()
    record.restore(state)
    record.add_batch(1.0, 1)
    record.end_step()
    record.end_epoch()
    assert (returned, record.epoch_losses, state["epoch_losses"]) == ([3.0], [1.0], [])
