"""What the base says from nothing: the same for a seed, nothing of the adapter in it."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_model import ScriptedModel
from tiny_models import randomize
from tiny_training import base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft.data.generated_text import base_texts, generate_prefixes, generate_subjects
from peft_locft.engine.model_state import as_base


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("llama2")


@pytest.mark.parametrize("family", ["gpt2", "llama2"])
def test_prefixes_are_short_texts_of_one_line(family: str) -> None:
    tokenizer = make_tokenizer(family)
    prefixes = generate_prefixes(base_model(), tokenizer, 5, 10)
    assert len(set(prefixes)) == len(prefixes) == 15
    for prefix in prefixes:
        assert prefix == " ".join(prefix.split()) and prefix.isprintable() and prefix and "\ufffd" not in prefix
    assert generate_prefixes(base_model(), tokenizer) == prefixes
    assert generate_prefixes(base_model(), tokenizer, seed=43) != prefixes
    assert generate_prefixes(base_model(), tokenizer, 0, 0) == ()


def test_short_prefixes_have_five_tokens_and_long_ones_ten() -> None:
    tokenizer = make_tokenizer("gpt2")
    texts = {" the": 9.0, " the king of France in the river with Dave": 9.0, " they play baseball in the city": 9.0}
    model = ScriptedModel({"<|endoftext|>": texts}, tokenizer)
    short, long = generate_prefixes(model, tokenizer, 1, 1, k=2)
    assert max(len(tokenizer(text)["input_ids"]) for text in (short, " " + short)) <= 6
    beginnings = [tokenizer.decode(line[1:][:length]).strip() for line, _ in model.lines for length in (5, 10)]
    # each is a line of the script, cut after so many tokens; behind its end, the tokens that are not written
    assert short in beginnings[::2]
    assert any(long.startswith(text) for text in beginnings)


def test_it_is_the_base_that_speaks(tokenizer: Any) -> None:
    edited = peft_model()
    randomize(edited, std=2.0)
    assert generate_prefixes(edited, tokenizer, 2, 2) == generate_prefixes(base_model(), tokenizer, 2, 2)
    assert base_texts(edited, tokenizer, 40) == base_texts(base_model(), tokenizer, 40)
    with as_base(base_model()):  # without an adapter there is nothing to disable
        pass


def test_without_bos_it_begins_at_eos(tokenizer: Any) -> None:
    without = make_tokenizer("gpt2")
    with_bos = generate_prefixes(base_model(), without, 2, 2)
    without.bos_token = None
    assert generate_prefixes(base_model(), without, 2, 2) == with_bos  # they are the same token
    without.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: found neither BOS nor EOS"):
        generate_prefixes(base_model(), without)


def test_names_are_what_the_base_lists_behind_the_subjects() -> None:
    tokenizer = make_tokenizer("gpt2")
    line = "; ".join([" Louis", "DAVE", "the king of France in the river", "", "France", "louis", "Spa"])
    model = ScriptedModel({"Dave of it;": {line: 9.0}}, tokenizer)
    # not the subject itself, nor what is longer than it; each once; and not the last, which may be cut off
    model.lines[0] = (tokenizer("Dave of it;" + line + "\nCity; of;")["input_ids"], 9.0)
    assert generate_subjects(model, tokenizer, ["Dave of it"], 9, k=1) == ("Louis", "DAVE", "France")
    assert generate_subjects(model, tokenizer, ["Dave of it"], 2, k=1) == ("Louis", "DAVE")
    assert generate_subjects(model, tokenizer, ["Dave"], 9, k=1) == ()  # it has no such list
    assert generate_subjects(model, tokenizer, [], 9) == generate_subjects(model, tokenizer, ["Dave"], 0) == ()
    with pytest.raises(ValueError, match="num=-1: expected 0 or more names"):
        generate_subjects(model, tokenizer, ["Dave"], -1)


def test_a_list_fits_into_the_model(tokenizer: Any) -> None:
    subjects = [f"the king of the river number {number}" for number in range(20)]
    names = generate_subjects(base_model(), tokenizer, subjects, 4)  # 64 positions
    assert names == generate_subjects(base_model(), tokenizer, subjects, 4)
    assert not set(names) & set(subjects)
    assert generate_subjects(base_model(), tokenizer, ["king " * 80], 4) == ()


def test_texts_have_the_tokens_that_were_asked_for(tokenizer: Any) -> None:
    texts = base_texts(base_model(), tokenizer, 200, seed=1)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(texts) and len(texts) > 3  # the model has 64 positions
    assert sum(map(len, ids)) > 150  # what random bytes decode to is read again as other tokens
    assert not any("</s>" in text for text in texts)
    assert base_texts(base_model(), tokenizer, 200, seed=1) == texts != base_texts(base_model(), tokenizer, 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_short": -1}, "num_short=-1, num_long=10: expected 0 or more"),
        ({"k": 0}, "k=0: expected 1 or more tokens"),
        ({"k": 1}, r"generated 1 different prefixes in 20 rounds; expected 15. Increase k \(it is 1\)"),
    ],
)
def test_prefixes_that_cannot_be(tokenizer: Any, arguments: dict[str, Any], message: str) -> None:
    model = base_model()
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0  # never the most probable: a text is there
    with pytest.raises(ValueError, match=message):
        generate_prefixes(model, tokenizer, **({"num_short": 5} | arguments))


def test_a_base_that_says_nothing_is_an_error() -> None:
    tokenizer = make_tokenizer("gpt2")
    silent = ScriptedModel({"<|endoftext|>": {"": 50.0}}, tokenizer)
    with pytest.raises(ValueError, match=r"generated only EOS, 20 times in a row; found 0 of 8 tokens"):
        base_texts(silent, tokenizer, 8)
    with pytest.raises(ValueError, match="num_tokens=0: expected 1 or more"):
        base_texts(silent, tokenizer, 0)
