"""Rows that are made of edits: prefixed, paraphrased, concatenated; questions about other subjects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, Probe, encode_edits
from peft_locft.data.augmentation import concatenated, paraphrased, swapped_subjects, with_prefix
from peft_locft.data.edits import fold_case

FRANCE = Edit(prompt="The capital of France is", target="Lyon", subject="France", rephrasings=("France's capital:",))


def test_a_prefix_is_a_sentence_before_the_prompt() -> None:
    row = with_prefix(FRANCE, "In the city")
    assert row.prompt == "In the city. The capital of France is"
    assert (row.target, row.subject) == ("Lyon", "France")


def test_a_prefix_is_part_of_the_users_turn() -> None:
    tokenizer = make_tokenizer("qwen", chat_template="chatml")
    encoded = encode_edits([with_prefix(FRANCE, "In the city")], tokenizer, chat_template=True)[0]
    asked = tokenizer.decode(encoded.input_ids[: encoded.target_start])
    assert asked.split("<|im_start|>")[1] == "user\nIn the city. The capital of France is<|im_end|>\n"


def test_every_paraphrase_is_a_prompt_once() -> None:
    edit = Edit(prompt="a", target="b", paraphrases=("c", "d"))
    assert [(row.prompt, row.target) for row in paraphrased(edit)] == [("c", "b"), ("d", "b")]
    assert paraphrased(FRANCE) == []


@pytest.mark.parametrize(
    ("target", "fact", "expected"),
    [
        ("Lyon", ("The river runs", "through"), "Lyon. The river runs through"),
        ("Lyon.", ("The river runs", " through"), "Lyon. The river runs through"),
        ("Lyon! ", ("The river runs ", "through"), "Lyon! The river runs through"),
    ],
)
def test_a_fact_follows_the_edits_sentence(target: str, fact: tuple[str, str], expected: str) -> None:
    row = concatenated(Edit(prompt="The city is", target=target), Edit(prompt=fact[0], target=fact[1]))
    assert (row.prompt, row.target) == ("The city is", expected)


def test_all_behind_the_edits_prompt_is_scored() -> None:
    tokenizer = make_tokenizer("gpt2")
    row = concatenated(FRANCE, Edit(prompt="Dave is", target="the king"))
    encoded = encode_edits([row], tokenizer)[0]
    assert tokenizer.decode(encoded.input_ids[encoded.target_start :]) == " Lyon. Dave is the king<|endoftext|>"


# ---------------------------------------------------------------------- other subjects


def swaps(*args: Any, **kwargs: Any) -> list[str]:
    return [prompt for own in swapped_subjects(*args, **kwargs) for prompt in own]


PEOPLE = ["Dave", "Felipe", "Louis", r"O\1Neil", "Ann (B.)"]


def test_subjects_are_swapped_evenly_and_only_once() -> None:
    edits = [Edit(prompt=f"Question {n} about {name}?", target="x", subject=name) for n, name in enumerate(PEOPLE)]
    prompts = swaps(edits, 10, seed=0)
    assert len(set(prompts)) == 10
    assert set(Counter(prompt.split(" about ")[0] for prompt in prompts).values()) == {2}
    assert set(Counter(prompt.split(" about ")[1] for prompt in prompts).values()) == {2}
    assert set(prompts).isdisjoint(edit.prompt for edit in edits)
    assert swaps(edits, 10, seed=0) == prompts != swaps(edits, 10, seed=1)
    # five prompts with four other subjects
    assert len(swaps(edits, 100, seed=0)) == 20
    assert swaps(edits, 0, seed=0) == []


def test_swaps_stand_with_the_edit_that_they_are_made_from() -> None:
    edits = [Edit(prompt=f"Question {n} about {name}?", target="x", subject=name) for n, name in enumerate(PEOPLE)]
    edits.insert(2, Edit(prompt="Who is the king?", target="x"))
    swapped = swapped_subjects(edits, 11, seed=0)
    assert len(swapped) == 6 and swapped[2] == [] and sorted(map(len, swapped)) == [0, 2, 2, 2, 2, 3]
    for edit, own in zip(edits, swapped, strict=True):
        assert {prompt.split(" about ")[0] for prompt in own} <= {edit.prompt.split(" about ")[0]}


def test_other_subjects_may_be_given() -> None:
    edits = [Edit(prompt=f"Question {n} about {name}?", target="x", subject=name) for n, name in enumerate(PEOPLE)]
    prompts = swaps(edits, 10, seed=0, subjects=["Ada", r"B\1b", "Cy"])
    assert set(Counter(prompt.split(" about ")[0] for prompt in prompts).values()) == {2}
    assert {prompt.split(" about ")[1] for prompt in prompts} == {"Ada?", r"B\1b?", "Cy?"}
    # five prompts with three subjects, all of which are other ones
    assert len(swaps(edits, 100, seed=0, subjects=["Ada", r"B\1b", "Cy"])) == 15
    assert swaps(edits, 100, seed=0, subjects=[]) == []


def test_no_swap_is_what_an_edit_says_already() -> None:
    taken = Edit(
        prompt="x",
        target="y",
        rephrasings=("DAVE was  born in",),
        paraphrases=("Felipe was born in",),
        locality=(Probe("Louis was born in"),),
        portability=(Probe(r"O\1Neil was born in"),),
    )
    ann = Edit(prompt="Ann (B.) was born in", target="Paris", subject="Ann (B.)")
    others = [Edit(prompt=f"{name} is", target="king", subject=name) for name in PEOPLE]
    prompts = swaps([taken, ann, *others], 100, seed=0)
    assert [prompt for prompt in prompts if prompt.endswith("born in")] == []
    assert {fold_case(f"{one} is") for one in PEOPLE}.isdisjoint(map(fold_case, prompts))


def test_edits_without_a_subject_in_their_prompt_are_passed_over() -> None:
    edits = [
        Edit(prompt="Davenport is in", target="a", subject="Dave"),  # no word of its own
        Edit(prompt="Who is the king?", target="a", subject="Louis"),
        Edit(prompt="Where is he?", target="a"),
    ]
    assert swaps(edits, 5, seed=0) == []
    assert swaps([], 5, seed=0) == []
    asked = Edit(prompt="Felipe and Felipe play", target="a", subject="Felipe")
    assert sorted(swaps([*edits, asked], 5, seed=0)) == ["Dave and Dave play", "Louis and Louis play"]


def test_a_negative_number_of_swaps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num=-1: expected 0 or more"):
        swapped_subjects([FRANCE], -1, seed=0)
