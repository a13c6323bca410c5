"""Facts that stay: which prompts are taken, and that a row is what the base says, token by token."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted_model import ScriptedModel
from tiny_models import randomize
from tiny_training import EDITS, base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, Probe, encode_edits, encode_prompts
from peft_locft.data.encoding import join_encoded
from peft_locft.data.retained_facts import base_answers, choose_retained_facts

EDIT = Edit(
    prompt="Spain is",
    target="a river",
    rephrasings=("Spain, it is",),
    paraphrases=("What is Spain?",),
    locality=(Probe("France is"),),
    portability=(Probe("The city of Spain is"),),
)
OTHER = Edit(prompt="Dave plays", target="Louis", locality=(Probe("Felipe plays"), Probe("france  IS")))
SAID = ["SPAIN is", "Spain, it is", "What is Spain?", "France is", "The city of Spain is"]


def test_prompts_come_from_a_file_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "facts.txt"
    file.write_text("\n".join([*SAID, "", " Dave is ", "dave IS", "Felipe is"]), encoding="utf-8")
    assert sorted(choose_retained_facts(file, [EDIT])) == ["Felipe is", "dave IS"]
    with pytest.raises(FileNotFoundError, match=r"none\.txt: found no such file; expected a text file"):
        choose_retained_facts(tmp_path / "none.txt", [EDIT])


def test_prompts_come_from_records_and_texts(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "n": 1}) for prompt in [*SAID, "Dave is"]))
    assert choose_retained_facts(file, [EDIT]) == ["Dave is"]
    assert choose_retained_facts([*SAID, "Dave is"], [EDIT]) == ["Dave is"]
    for broken, message in (
        ({"n": 1}, "row 1: field 'prompt': found nothing"),
        (3, r"row 1: field 'prompt': found 3"),
    ):
        with pytest.raises(ValueError, match=message):
            choose_retained_facts([{"prompt": "Dave is"}, broken], [EDIT])
    file.write_text('{"prompt": "Dave is"}\n{"prompt"')
    with pytest.raises(ValueError, match=r"facts\.jsonl:2: found broken JSON"):
        choose_retained_facts(file, [EDIT])


def test_of_other_edits_the_probes_are_taken_or_else_the_prompts(tmp_path: Path) -> None:
    assert choose_retained_facts([EDIT, OTHER], [EDIT]) == ["Felipe plays"]
    file = tmp_path / "edits.json"
    file.write_text(
        json.dumps(
            [{"prompt": "Spain is", "target": "x"}, {"prompt": "a", "target": "b"}, {"prompt": "a", "target": "c"}]
        )
    )
    assert choose_retained_facts(file, [EDIT]) == ["a"]


def test_without_a_source_the_edits_own_probes_are_kept() -> None:
    assert choose_retained_facts(None, [EDIT, OTHER]) == ["france  IS", "Felipe plays"]
    with pytest.raises(ValueError, match="found 0 prompts in the edits, all of them prompts or probes of the edits"):
        choose_retained_facts(None, EDITS)


def test_as_many_are_drawn_as_were_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    many = [f"Number {n} is" for n in range(50)]
    chosen = choose_retained_facts(many, EDITS, 20, seed=1)
    assert len(set(chosen)) == 20 and set(chosen) < set(many)
    assert chosen == choose_retained_facts(many, EDITS, 20, seed=1) != choose_retained_facts(many, EDITS, 20, seed=2)
    with caplog.at_level(logging.WARNING, "peft_locft.data.retained_facts"):
        assert choose_retained_facts(many, EDITS, 50) == choose_retained_facts(many, EDITS) == many
        assert caplog.messages == []
        choose_retained_facts(many, EDITS, 51)
    assert caplog.messages == ["Found only 50 of 51 retained facts."]


def test_the_nearest_are_those_like_an_edit() -> None:
    many = ["Louis and Dave", "The river runs through the city", "The capital of Spain is Paris", "They play"]
    edit = Edit(prompt="The capital of Spain is", target="x")
    chosen = choose_retained_facts(
        many, [edit], 1, how="nearest", model=peft_model(), tokenizer=make_tokenizer("llama2")
    )
    assert chosen == ["The capital of Spain is Paris"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "far"}, "how='far': expected one of random, nearest"),
        ({"how": "nearest"}, "how='nearest' embeds the prompts: give model and tokenizer"),
        ({"num": 0}, "num=0: expected 1 or more retained facts"),
    ],
)
def test_choices_that_cannot_be_made(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_retained_facts(["Dave is"], EDITS, **arguments)


# ---------------------------------------------------------------------- the base's answers


@pytest.mark.parametrize("chat_template", [False, True])
def test_rows_are_the_tokens_that_the_base_generates(chat_template: bool) -> None:
    tokenizer = make_tokenizer("qwen", chat_template="chatml")
    edited = peft_model()
    randomize(edited, std=2.0)
    prompts = [edit.prompt for edit in EDITS] + ["The city of "]
    answers = base_answers(edited, tokenizer, prompts, max_new_tokens=6, chat_template=chat_template)
    base = base_model()
    asked = encode_prompts(prompts, tokenizer, chat_template=chat_template)
    assert len(answers.encoded) == len(prompts) == len(answers.texts)
    for number, ids in enumerate(asked):
        row = answers.encoded[number]
        (generated,) = base.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),  # the first token is one that could be padding
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        assert row.input_ids.tolist() == generated.tolist()
        assert row.target_start == len(ids)
    assert answers.prompts == tuple(prompts)


def test_an_answer_ends_where_the_base_ends_it() -> None:
    tokenizer = make_tokenizer("gpt2")
    script = {
        "Dave is": {" the king. They": 9.0},
        "Spain is": {"": 9.0},
        "France is": {" the capital of the country and the city in the river and Louis": 9.0},
    }
    model = ScriptedModel(script, tokenizer)
    answers = base_answers(model, tokenizer, list(script), max_new_tokens=5)
    rows = [answers.encoded[number] for number in range(3)]
    ends = [row.input_ids.tolist().count(tokenizer.eos_token_id) for row in rows]
    # a full stop is no end; EOS at once is the whole answer; what was cut off has no end
    assert answers.texts == (" the king. They", "", " the capital of the country")
    assert ends == [1, 1, 0]
    assert [len(row.input_ids) - row.target_start for row in rows] == [5, 1, 5]
    assert [(fact.prompt, fact.target) for fact in answers.edits] == [
        ("Dave is", "the king. They"),
        ("France is", "the capital of the country"),
    ]


def test_rows_are_joined_to_those_of_edits() -> None:
    tokenizer = make_tokenizer("llama2")
    edits = encode_edits(EDITS, tokenizer)
    answers = base_answers(base_model(), tokenizer, ["Dave is", "The river runs"])
    joined = join_encoded([edits, answers.encoded])
    assert len(joined) == len(EDITS) + 2
    for number in range(len(joined)):
        part = edits[number] if number < len(EDITS) else answers.encoded[number - len(EDITS)]
        assert torch.equal(joined[number].input_ids, part.input_ids)
        assert joined[number].target_start == part.target_start
    assert joined.token_ids.dtype == torch.int32 and joined.offsets.dtype == torch.int64


def test_answers_that_cannot_be() -> None:
    tokenizer = make_tokenizer("llama2")
    with pytest.raises(ValueError, match="base_answers: found 0 prompts and max_new_tokens=8; expected 1 or more"):
        base_answers(base_model(), tokenizer, [])
    with pytest.raises(ValueError, match="base_answers: found 1 prompts and max_new_tokens=0"):
        base_answers(base_model(), tokenizer, ["Dave is"], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"and its answer need .* positions; the model has 64"):
        base_answers(base_model(), tokenizer, ["the city " * 60])
