"""Rows of different lengths in batches: each once, and no batch larger than allowed."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_locft.engine.padding import batches_by_length, pad_right


@given(st.lists(st.integers(1, 12), max_size=12), st.integers(1, 30))
def test_every_row_is_in_one_batch_that_fits(lengths: list[int], max_tokens: int) -> None:
    batches = batches_by_length(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens


def test_rows_are_padded_on_the_right() -> None:
    input_ids, mask = pad_right([torch.tensor([5, 6]), torch.tensor([7])], torch.device("cpu"))
    assert input_ids.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]
