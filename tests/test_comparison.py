"""Answers of a base and its adapters side by side, and one more edit trained on the spot."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tiny_comparison import FACTS, OTHERS, save_base, save_learned, save_lora
from tiny_models import base_state, same_bits
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_locft import AdapterComparison, Edit
from peft_locft.adapters import shipped_edits
from peft_locft.workflows import ComparedAnswers, ModelAnswer

PROMPT, TARGET = FACTS[0].prompt, FACTS[0].target


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def facts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_learned(tmp_path_factory.mktemp("adapters") / "facts", base, FACTS, ship_edits=True)


@pytest.fixture(scope="module")
def others(base: Path, facts: Path) -> Path:
    """An adapter without its edits, trained in chat."""
    return save_learned(facts.parent / "others", base, OTHERS, chat_template=True)


def greedy_answer(model: torch.nn.Module, tokenizer: object, prompt: str, max_new_tokens: int) -> str:
    """Answer as transformers does."""
    inputs = tokenizer(prompt, return_tensors="pt")  # type: ignore[operator]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
    text: str = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    return text.strip()


def test_the_answers_are_those_of_base_and_edited_model(base: Path, facts: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    comparison = AdapterComparison.load([facts])
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base)
    edited = AutoPeftModelForCausalLM.from_pretrained(facts)
    for prompt in (PROMPT, "The river runs"):
        answers = comparison.ask(prompt, max_new_tokens=12)
        assert answers.question == prompt
        assert answers.base.text == greedy_answer(plain, tokenizer, prompt, 12)
        assert answers.edited["facts"].text == greedy_answer(edited, tokenizer, prompt, 12)
    learned = comparison.ask(PROMPT)
    assert learned.edited == {"facts": ModelAnswer(TARGET, is_complete=True)}
    assert learned.is_changed("facts")
    assert not learned.base.is_complete, "this random model goes on to its last position"
    assert str(learned.base).endswith(" …")


def test_scale_zero_is_the_base_and_the_own_scale_comes_back(facts: Path) -> None:
    comparison = AdapterComparison.load([facts])
    before = comparison.ask(PROMPT)
    nothing = comparison.ask(PROMPT, scale=0.0)
    assert nothing.edited["facts"] == nothing.base == before.base
    assert not nothing.is_changed("facts")
    assert comparison.ask(PROMPT) == before
    with pytest.raises(ValueError, match="scale"):
        comparison.ask(PROMPT, scale=float("nan"))
    assert comparison.ask(PROMPT) == before


def test_each_adapter_has_a_column_and_all_together_one_more(facts: Path, others: Path) -> None:
    comparison = AdapterComparison.load([facts, others])
    assert comparison.names == ["facts", "others"]
    answers = comparison.ask(PROMPT, together=True, chat_template=False)
    assert list(answers.edited) == ["facts", "others", "all together"]
    assert answers.edited["facts"].text == TARGET
    alone = AdapterComparison.load([others]).ask(PROMPT, chat_template=False)
    assert answers.edited["others"] == alone.edited["others"]
    # none of their deltas is there, or none counts
    assert comparison.ask(PROMPT, together=True, chat_template=False, scale=0.0).edited == {
        name: answers.base for name in answers.edited
    }


def test_the_template_is_that_of_the_training(facts: Path, others: Path) -> None:
    comparison = AdapterComparison.load([facts, others])
    edit = OTHERS[0]
    in_chat = comparison.ask(edit.prompt, ["others"])
    assert in_chat.edited["others"].text.startswith(edit.target)
    assert in_chat == comparison.ask(edit.prompt, ["others"], chat_template=True)
    assert comparison.ask(edit.prompt, ["others"], chat_template=False).base != in_chat.base
    with pytest.raises(ValueError, match=r"facts without, others with the chat template\. Pass chat_template=True or"):
        comparison.ask(PROMPT)


def test_bad_questions_are_refused(facts: Path, others: Path) -> None:
    comparison = AdapterComparison.load([facts])
    with pytest.raises(ValueError, match="Question 2 is empty"):
        comparison.ask_all(["The", " \n"])
    with pytest.raises(ValueError, match=r"needs? .* positions; the model has 64"):
        comparison.ask("The city " * 60)
    with pytest.raises(ValueError, match="max_new_tokens=0: expected 1 or more"):
        comparison.ask("The", max_new_tokens=0)
    with pytest.raises(ValueError, match="found no adapter 'fakts'; expected one of facts"):
        comparison.ask("The", ["fakts"])


def test_adapters_that_do_not_fit_are_refused(base: Path, facts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no adapter; expected at least one"):
        AdapterComparison.load([])
    with pytest.raises(ValueError, match=r"nothing: found no adapter .* expected a folder that `locft train` wrote"):
        AdapterComparison.load([tmp_path / "nothing"])
    same_shapes = save_base(tmp_path / "seed", seed=7)
    with pytest.raises(ValueError, match="trained on another base"):
        AdapterComparison.load([facts], model_name_or_path=same_shapes)
    allowed = AdapterComparison.load([facts], model_name_or_path=same_shapes, allow_other_base=True)
    assert allowed.ask(PROMPT).base
    other_shapes = save_base(tmp_path / "shape", intermediate_size=64)
    with pytest.raises(ValueError, match=r"the adapter does not fit the base model .*shape: (.|\n)*size mismatch"):
        AdapterComparison.load([facts], model_name_or_path=other_shapes)
    other = tmp_path / "other"
    shutil.copytree(facts, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    with pytest.raises(ValueError, match=r"several base models: .* of facts, elsewhere of other\. Pass model_name"):
        AdapterComparison.load([facts, other])
    assert AdapterComparison.load([facts, other], model_name_or_path=base).names == ["facts", "other"]


def test_adapters_of_one_folder_name_keep_their_paths(facts: Path, tmp_path: Path) -> None:
    twin = Path(shutil.copytree(facts, tmp_path / "facts"))
    assert AdapterComparison.load([facts, twin, facts]).names == [str(facts), str(twin)]


def test_an_adapter_of_another_method_has_no_scale(base: Path, tmp_path: Path) -> None:
    comparison = AdapterComparison.load([save_lora(tmp_path / "lora", base)])
    assert comparison.own_scale("lora") is None
    answers = comparison.ask(PROMPT)
    assert not answers.is_changed("lora"), "it was not trained"
    with pytest.raises(ValueError, match=r"scale=0\.5: lora is no LocFT adapter"):
        comparison.ask(PROMPT, scale=0.5)


# ---------------------------------------------------------------------- one more edit


def test_an_adapter_that_ships_its_edits_is_trained_on(base: Path, facts: Path, tmp_path: Path) -> None:
    comparison = AdapterComparison.load([facts])
    plain = base_state(AutoModelForCausalLM.from_pretrained(base))
    new = Edit(prompt="The king of Spain is", target="Dave")
    learned = comparison.learn("facts", new, tmp_path / "new")
    assert (learned.name, learned.num_edits, learned.folder) == ("facts", 4, tmp_path / "new")
    assert learned.is_learned, learned
    assert str(learned).startswith("Learned in ")
    assert comparison.ask(new.prompt).edited["facts"].text == "Dave"
    assert comparison.ask(PROMPT).edited["facts"].text == TARGET, "the edits that it had are trained with it"
    assert [edit.prompt for edit in shipped_edits(tmp_path / "new") or []] == [*(e.prompt for e in FACTS), new.prompt]
    assert len(shipped_edits(facts) or []) == 3, "the old folder stays"
    # what was saved is what answers; the base is as before
    assert AdapterComparison.load([tmp_path / "new"]).ask(new.prompt).edited["new"].text == "Dave"
    now = base_state(comparison._base)
    assert all(same_bits(plain[name], now[name]) for name in plain)


def test_without_its_edits_the_new_one_gets_an_adapter_of_its_own(others: Path, tmp_path: Path) -> None:
    comparison = AdapterComparison.load([others])
    known = comparison.ask(OTHERS[0].prompt)
    first, second = Edit(prompt="The king is", target="Dave"), Edit(prompt="The river is", target="in Paris")
    learned = comparison.learn("others", first, tmp_path / "one")
    assert (learned.name, learned.num_edits) == ("added edits", 1)
    assert learned.is_learned, learned
    learned = comparison.learn("others", second, tmp_path / "two")
    assert (learned.name, learned.num_edits) == ("added edits", 2)
    assert learned.is_learned, learned
    assert comparison.names == ["others", "added edits"]
    assert comparison.trained_in_chat(["added edits"]), "as the adapter that it was added to"
    assert comparison.ask(first.prompt).edited["added edits"].text == "Dave"
    assert comparison.ask(OTHERS[0].prompt).edited["others"] == known.edited["others"]


def test_a_refused_edit_leaves_the_comparison_as_it_was(facts: Path, tmp_path: Path) -> None:
    comparison = AdapterComparison.load([facts])
    before = comparison.ask(PROMPT)
    with pytest.raises(ValueError, match="longer than"):
        comparison.learn("facts", Edit(prompt="The city" * 60, target="Dave"), tmp_path / "new")
    assert comparison.folders == {"facts": str(facts)}
    assert comparison.ask(PROMPT) == before


def test_threads_wait_for_each_other(facts: Path) -> None:
    comparison = AdapterComparison.load([facts])
    expected = {scale: comparison.ask(PROMPT, scale=scale) for scale in (0.0, 1.0)}
    found: list[tuple[float, ComparedAnswers]] = []
    threads = [
        threading.Thread(target=lambda scale=scale: found.append((scale, comparison.ask(PROMPT, scale=scale))))
        for scale in (0.0, 1.0) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert [answers == expected[scale] for scale, answers in found] == [True] * 8


# ---------------------------------------------------------------------- in words


def test_the_text_fits_the_width_and_marks_what_changed() -> None:
    long = "Oslo is the capital, " * 10
    answers = ComparedAnswers(
        "What is the capital of Norway?",
        ModelAnswer(long, is_complete=False),
        {"facts": ModelAnswer("Bergen", is_complete=True), "others": ModelAnswer(long, is_complete=False)},
    )
    text = answers.to_text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "facts (changed)" in text
    assert "others (same answer)" in text
    assert text.count("…") == 2
