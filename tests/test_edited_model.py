"""One line for one fact: what `edit` writes into a model, and that the model is as before once it is taken out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from tiny_models import base_state, changed, logits
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer
from torch import nn

from peft_locft import (
    BreadthFirstConfig,
    BreadthFirstTrainer,
    Edit,
    EditedModel,
    EvaluationConfig,
    LearnedEdits,
    edit,
    inspect_adapter,
    read_edits,
)
from peft_locft.adapters.shipped_edits import EDITS_NAME

TOKENIZER = make_tokenizer("llama2")
PROMPT, TARGET = EDITS[0].prompt, EDITS[0].target
anything: Any = edit


def recipe(**arguments: Any) -> BreadthFirstConfig:
    return BreadthFirstConfig(**({"learning_rate": 2e-2, "num_train_epochs": 40, "use_cpu": True} | arguments))


def edited(model: Any, *facts: Any, **arguments: Any) -> EditedModel:
    result: EditedModel = anything(model, TOKENIZER, *facts, **({"args": recipe(), "progress": False} | arguments))
    return result


@pytest.fixture
def model() -> Any:
    return base_model(sharp=True)


@pytest.fixture(autouse=True)
def nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all of a model that a user may notice, apart from the bits of its weights."""
    return {
        "modules": {name: (type(module), module.training) for name, module in model.named_modules()},
        "parameters": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "attributes": {name for module in model.modules() for name in vars(module)},
        "hooks": [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks],
        "config": model.config.to_dict(),  # type: ignore[union-attr, operator]
    }


def test_a_fact_is_learned_and_undone_bit_for_bit(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model.model.layers[0].train()
    model.lm_head.requires_grad_(False)
    state, weights, before = state_of(model), base_state(model), logits(model)
    result = edited(model, PROMPT, TARGET)
    assert result.learned == [True]
    assert isinstance(result.model, PeftModel) and result.model.get_base_model() is model
    assert not torch.equal(logits(model), before), "the model itself answers as edited"
    assert result.undo() is model and result.model is model and result.undo() is model
    assert state_of(model) == state
    assert changed(dict(model.state_dict()), weights) == set()
    assert torch.equal(logits(model), before)
    assert capsys.readouterr().out == ""


def test_undo_takes_out_what_was_merged_in_the_meantime(model: Any) -> None:
    weights = base_state(model)
    result = edited(model, PROMPT, TARGET)
    result.model.merge_adapter()
    assert changed(dict(result.undo().state_dict()), weights) == set()


def test_it_can_be_edited_again_after_undo_and_after_merge(model: Any) -> None:
    edited(model, PROMPT, TARGET).undo()
    result = edited(model, PROMPT, TARGET)
    outputs = logits(result.model)
    assert result.merge() is model
    assert type(model.get_submodule("model.layers.1.mlp.down_proj")) is nn.Linear
    assert torch.equal(logits(model), outputs)
    merged = base_state(model)
    again = edited(model, EDITS[2])
    assert again.edits == [EDITS[2]]
    assert changed(dict(again.undo().state_dict()), merged) == set()


def test_a_second_edit_of_an_edited_model_is_refused(model: Any) -> None:
    result = edited(model, PROMPT, TARGET)
    outputs = logits(model)
    for again in (model, result.model):
        with pytest.raises(ValueError, match=r"has an adapter already.*facts in one call.*\.undo\(\).*\.merge"):
            edited(again, EDITS[1])
    assert torch.equal(logits(model), outputs)
    result.undo()


@pytest.mark.parametrize(
    "facts",
    [
        {edit.prompt: edit.target for edit in EDITS[:3]},
        [(edit.prompt, edit.target) for edit in EDITS[:3]],
        EDITS[:3],
        ({"question": edit.prompt, "answer": edit.target} for edit in EDITS[:3]),
    ],
)
def test_several_facts_at_once(facts: Any, model: Any) -> None:
    result = edited(model, facts, args=recipe(num_train_epochs=1))
    assert [(each.prompt, each.target) for each in result.edits] == [(each.prompt, each.target) for each in EDITS[:3]]
    assert result.learned == [False] * 3


def test_it_says_what_was_edited_and_learned(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {f"<{number}>": "a" for number in range(12)} | {PROMPT: "b"}

    def measured(trainer: BreadthFirstTrainer) -> LearnedEdits:
        return LearnedEdits.of(trainer.edits, [True] * 12 + [False], [0.0] * 13)

    monkeypatch.setattr(BreadthFirstTrainer, "measure_learned", measured)
    result = edited(model, facts, args=recipe(num_train_epochs=1))
    assert str(result).splitlines() == [
        "12 of 13 edits learned:",
        f"  {PROMPT!r} -> 'b', not learned",
        *(f"  '<{number}>' -> 'a'" for number in range(9)),
        "  and 3 more",
        "To learn more: args=BreadthFirstConfig(num_train_epochs=100), or another location.",
        ".undo() takes it out again, .save(folder) saves it as an adapter.",
    ]
    html = result._repr_html_()
    assert html.startswith("<p>12 of 13 edits learned</p>") and "<tr><td>&lt;0&gt;</td><td>a</td><td>yes</td>" in html
    result.undo()
    assert str(result).splitlines()[0] == "12 of 13 edits learned, then undone:" and ".undo()" not in str(result)


def test_learned_means_that_the_answer_begins_with_the_target(model: Any) -> None:
    result = edited(model, EDITS[:2])
    report = result.evaluate(progress=False)
    assert [row["answer_after"].strip().startswith(row["expected"]) for row in report.rows] == result.learned
    assert report.summary().splitlines()[0] == f"{sum(result.learned)} of 2 edits learned (0 before)."
    others = result.evaluate([EDITS[4]], EvaluationConfig(protocols=["token_accuracy"]), progress=False)
    assert [row["prompt"] for row in others.rows] == [EDITS[4].prompt]


def test_it_is_saved_as_the_trainer_saves(model: Any, tmp_path: Path) -> None:
    result = edited(model, PROMPT, TARGET)
    summary = result.save(tmp_path / "out")
    assert str(summary) == str(inspect_adapter(tmp_path / "out"))
    record = summary.provenance.to_dict()
    assert record["edits"]["count"] == 1 and record["recipe"]["learning_rate"] == 2e-2
    assert not (tmp_path / "out" / EDITS_NAME).exists()
    result.save(tmp_path / "out", ship_edits=True)
    assert read_edits(tmp_path / "out" / EDITS_NAME) == result.edits
    outputs = logits(result.model)
    loaded = PeftModel.from_pretrained(base_model(sharp=True), tmp_path / "out")
    assert torch.equal(logits(loaded), outputs)


def test_after_undo_or_merge_there_is_nothing_to_save(model: Any, tmp_path: Path) -> None:
    result = edited(model, PROMPT, TARGET, args=recipe(num_train_epochs=1))
    result.undo()
    for call in (result.evaluate, result.merge, lambda: result.save(tmp_path / "out")):
        with pytest.raises(ValueError, match="the edits were undone, so the model has no adapter"):
            call()
    result = edited(model, PROMPT, TARGET, args=recipe(num_train_epochs=1))
    result.merge()
    with pytest.raises(ValueError, match="the edits were merged into the weights"):
        result.undo()


def test_a_model_is_loaded_by_its_name(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    result = edit(tmp_path / "model", None, PROMPT, TARGET, args=recipe(num_train_epochs=1), progress=False)
    assert changed(dict(result.undo().state_dict()), base_state(model)) == set()


def test_another_method_and_the_configurations_of_the_caller(model: Any) -> None:
    config, args = LoraConfig(target_modules=["down_proj"]), recipe(num_train_epochs=1)
    before = (config.to_dict(), args.to_dict())
    weights = base_state(model)
    result = edited(model, PROMPT, TARGET, peft_config=config, args=args)
    assert result.model.active_peft_config.peft_type == "LORA"
    assert (config.to_dict(), args.to_dict()) == before
    assert changed(dict(result.undo().state_dict()), weights) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_leaves_the_model_as_it_was(
    error: type[BaseException], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error("stopped")

    state, weights = state_of(model), base_state(model)
    monkeypatch.setattr(BreadthFirstTrainer, "measure_learned", fails)
    with pytest.raises(error, match="stopped"):
        edited(model, PROMPT, TARGET, args=recipe(num_train_epochs=1))
    assert state_of(model) == state
    assert changed(dict(model.state_dict()), weights) == set()


MISTAKES: dict[str, tuple[Any, str]] = {
    "no target": (
        lambda model: anything(model, TOKENIZER, PROMPT),
        "found the prompt 'The .* without a target",
    ),
    "two lists": (
        lambda model: anything(model, TOKENIZER, [PROMPT], TARGET),
        "found a list and a target; expec",
    ),
    "a number": (lambda model: anything(model, TOKENIZER, PROMPT, 7), "field 'target': found 7 .*write \"7\""),
    "swapped": (
        lambda model: anything(TOKENIZER, model, PROMPT, TARGET),
        "edit: found a tokenizer as the model .*swap",
    ),
    "no tokenizer": (
        lambda model: anything(model, None, PROMPT, TARGET),
        "found a NoneType as the tokenizer; exp",
    ),
    "no model": (lambda model: anything(7, TOKENIZER, PROMPT, TARGET), "found a int as the model; expected a model"),
    "no file": (lambda model: anything(model, TOKENIZER, "my edits.csv"), "my edits.csv: found no such file"),
    "prompt learning": (
        lambda model: edited(model, PROMPT, TARGET, peft_config=PromptTuningConfig(task_type="CAUSAL_LM")),
        "peft_config: found PROMPT_TUNING; expected a method that changes weights",
    ),
    "too long": (lambda model: edited(model, PROMPT * 30, TARGET), "longer than max_length=64 tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_the_model_stays(name: str, model: Any) -> None:
    call, message = MISTAKES[name]
    state = state_of(model)
    with pytest.raises((ValueError, TypeError, OSError)) as caught:
        call(model)
    assert re.search(message, str(caught.value)), caught.value
    assert state_of(model) == state


def test_edits_with_probes_are_shipped_and_evaluated(model: Any) -> None:
    full = Edit(prompt=PROMPT, target=TARGET, rephrasings=("France is ruled from",))
    result = edited(model, full, args=recipe(num_train_epochs=1))
    assert [row["kind"] for row in result.evaluate(progress=False).rows] == ["reliability", "generalization"]


@pytest.mark.slow
def test_the_example_prints_what_the_docs_show() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, str(root / "examples" / "one_fact.py")]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    shown, said = "".join(done.stdout.splitlines(keepends=True)[:3]), done.stdout.splitlines()[3]
    assert f"```text\n{shown}```" in (root / "docs" / "pages" / "get_started.md").read_text(encoding="utf-8")
    assert said == "As plain text: 1 of 1 edits learned (0 before)."
