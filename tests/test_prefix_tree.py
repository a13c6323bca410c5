"""Every distinct prefix once, and every edit complete."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_locft.engine.packed_attention import attend_within
from peft_locft.engine.prefix_tree import PrefixTree
from peft_locft.training.batches import micro_batches

# few tokens, so that many edits begin alike
some_edits = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=6), min_size=1, max_size=8)


def tree_of(edits: list[list[int]], indices: list[int] | None = None) -> PrefixTree:
    offsets = torch.tensor([0, *(len(edit) for edit in edits)]).cumsum(0)
    tokens = torch.tensor([token for edit in edits for token in edit])
    return PrefixTree.of(tokens, offsets, torch.tensor(range(len(edits)) if indices is None else indices))


def prefixes(edits: list[list[int]]) -> set[tuple[int, ...]]:
    """The last token of an edit predicts nothing."""
    return {tuple(edit[:end]) for edit in edits for end in range(1, len(edit))}


@given(some_edits, st.data())
def test_a_pack_holds_each_prefix_once_and_all_of_every_edit(edits: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(edits))), min_size=1, unique=True))
    tree = tree_of(edits)
    pack = tree.pack(torch.tensor(chosen))
    assert len(tree) == len(prefixes(edits))
    assert len(pack.nodes) == len(prefixes([edits[index] for index in chosen]))
    longest = max(len(edits[index]) for index in chosen) - 1
    assert pack.slots.shape == (len(chosen), longest)
    for row, index in enumerate(chosen):
        seen = edits[index][:-1]
        padded = seen + seen[-1:] * (longest - len(seen))
        assert pack.token_ids[pack.slots[row]].tolist() == padded
        assert pack.positions[pack.slots[row, : len(seen)]].tolist() == list(range(len(seen)))
    tokens = {(row, column) for row, index in enumerate(chosen) for column in range(len(edits[index]) - 1)}
    # a node is found where it stands, and never on padding
    assert torch.equal(pack.slots.flatten()[pack.whole.places], torch.arange(len(pack.nodes)))
    assert {divmod(place, longest) for place in pack.whole.places.tolist()} <= tokens


@given(some_edits)
def test_bands_hold_every_edit_once_and_pad_less(edits: list[list[int]]) -> None:
    pack = tree_of(edits).pack(torch.arange(len(edits)))
    slots, places = pack.bands
    rows = [[pack.nodes[slot].item() for slot in dict.fromkeys(row)] for band in slots for row in band.tolist()]
    own = zip(pack.slots, pack.lengths, strict=True)
    assert sorted(rows) == sorted(pack.nodes[row[:length]].tolist() for row, length in own)
    assert torch.equal(torch.cat([band.flatten() for band in slots])[places], torch.arange(len(pack.nodes)))
    assert [band.shape[1] for band in slots] == sorted(band.shape[1] for band in slots)
    padded = sum(band.numel() for band in slots)
    assert padded <= pack.slots.numel() * (1 if len(slots) == 1 else 0.75)


@given(some_edits)
def test_rank_is_the_order_of_a_dictionary(edits: list[list[int]]) -> None:
    rank = tree_of(edits).rank.tolist()
    assert sorted(rank) == list(range(len(edits)))
    in_order = [edits[index][:-1] for index in sorted(range(len(edits)), key=rank.__getitem__)]
    assert in_order == sorted(in_order)


def test_a_tree_of_some_edits_is_that_of_those_alone() -> None:
    edits = [[1, 2, 3], [9, 9, 9], [1, 2, 4, 5], [8, 8]]
    tree = tree_of(edits, [0, 2])
    assert len(tree) == len(prefixes([edits[0], edits[2]]))
    assert tree.pack(torch.tensor([2])).token_ids.tolist() == [1, 2, 4]


def test_edits_that_begin_alike_are_cut_into_the_same_micro_batch() -> None:
    edits = [[1, 2, 3], [7, 8, 9], [1, 2, 4], [7, 8, 8]]
    lengths = torch.tensor([3, 3, 3, 3])
    pieces = micro_batches(torch.arange(4), lengths, 6, tree_of(edits).rank)
    assert [sorted(piece.tolist()) for piece in pieces] == [[0, 2], [1, 3]]


def test_half_precision_is_trained_through_single_on_a_processor() -> None:
    pack = tree_of([[1, 2, 3], [9, 9, 9], [1, 2, 4, 5]]).pack(torch.arange(3))
    states = torch.randn(3, 1, 2, len(pack.nodes), 8, generator=torch.Generator().manual_seed(0))
    halves = [part.bfloat16().requires_grad_() for part in states]
    wholes = [half.detach().float().requires_grad_() for half in halves]
    half, whole = (attend_within(pack, torch.nn.Module(), *parts) for parts in (halves, wholes))
    assert half.dtype == torch.bfloat16 and torch.equal(half, whole.bfloat16())
    half.sum().backward()
    whole.sum().backward()
    for own, other in zip(halves, wholes, strict=True):
        # a token's gradient is the sum over the edits that share it, which half precision rounds
        torch.testing.assert_close(own.grad.float(), other.grad, rtol=2**-6, atol=2**-8)
    doubles = [half.detach().double().requires_grad_() for half in halves]
    double = attend_within(pack, torch.nn.Module(), *doubles)
    assert double.dtype == torch.float64 and not torch.equal(double, double.float().double())


@pytest.mark.parametrize("window", [None, 3])
def test_edits_in_bands_attend_as_each_does_alone(window: int | None) -> None:
    edits = [[1, 2, 3], [9, 9, 9], [1, 2, 4, 5], [1, 2, *range(10, 30)], [1, *range(30, 50)]]
    tree = tree_of(edits)
    pack = tree.pack(torch.arange(len(edits)))
    assert len(pack.bands.slots) > 1
    query, key, value = torch.randn(3, 1, 2, len(pack.nodes), 8, generator=torch.Generator().manual_seed(0))
    together = attend_within(pack, torch.nn.Module(), query, key, value, sliding_window=window)
    for row, edit in enumerate(edits):
        slots = pack.slots[row, : len(edit) - 1]
        scores = query[0][:, slots] @ key[0][:, slots].transpose(1, 2) / 8**0.5
        seen = torch.ones(len(slots), len(slots), dtype=torch.bool).tril().triu(1 - (window or len(slots)))
        alone = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[0][:, slots]
        torch.testing.assert_close(together[0, slots], alone.transpose(0, 1))
