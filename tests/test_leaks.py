"""What is trained on is not asked: paraphrases, evaluations in the same process, adapters from a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_training import EDITS, base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import (
    Edit,
    EvaluationCallback,
    EvaluationConfig,
    Probe,
    evaluate_edits,
    evaluate_model,
    export_small,
    inspect_adapter,
    save_adapter,
)
from peft_locft.adapters.provenance import Augmentation
from peft_locft.data import edits_sha256
from peft_locft.data.leaks import check_paraphrases, mark_trained, trained_prompts, trained_prompts_record
from peft_locft.evaluation import EditEvaluator
from peft_locft.training.record import training_record

EDIT = Edit(
    prompt="The capital of Spain is",
    target="Paris",
    rephrasings=("Spain has the capital", "The city of Spain is"),
    locality=(Probe("The capital of France is"), Probe("Dave is")),
    portability=(Probe("The king of Spain is in", "Paris"),),
    source="edits.json:7",
)
QUICK = EvaluationConfig(protocols=["generation"], max_new_tokens=2, num_resamples=10)


def test_a_rephrasing_is_no_training_paraphrase() -> None:
    fine = Edit(prompt="Dave is", target="king", paraphrases=("Who is Dave?",), source="edits.json:9")
    check_paraphrases([EDIT, fine, replace(EDIT, paraphrases=("The capital city of Spain is",))])
    leak = replace(fine, paraphrases=("Who is Dave?", " the CITY of  Spain is"))
    with pytest.raises(ValueError, match="1 training paraphrases are also rephrasings") as raised:
        check_paraphrases([leak, EDIT])
    assert (
        "  ' the CITY of  Spain is': a paraphrase at edits.json:9, a rephrasing at edits.json:7\n"
        "Remove each from `paraphrases` or from `rephrasings`."
    ) in str(raised.value)
    own = Edit(prompt="Dave is", target="king", rephrasings=("He is",), paraphrases=("He is",))
    with pytest.raises(ValueError, match="a paraphrase at 'Dave is', a rephrasing at 'Dave is'"):
        check_paraphrases([own])


def test_prompts_are_recorded_as_hashes_alone() -> None:
    record = trained_prompts_record(["Dave is", "DAVE  is ", "The capital of Norway is"])
    assert record["count"] == 2
    assert record["sha256"] == sorted(record["sha256"]) and {len(each) for each in record["sha256"]} == {16}
    assert trained_prompts_record([]) == {"count": 0, "sha256": []}
    assert "5a3ceeab9de4649d" in record["sha256"]  # of "dave is", by sha256sum


def marked(*prompts: str) -> Any:
    model = peft_model()
    mark_trained(model, trained_prompts_record(prompts))
    return model


def test_marks_add_up_and_are_no_state() -> None:
    model = marked("Dave is")
    mark_trained(model, trained_prompts_record(["Louis is"]))
    assert trained_prompts(model) == set(trained_prompts_record(["Louis is", "Dave is"])["sha256"])
    assert trained_prompts(peft_model()) == frozenset()
    assert model.state_dict().keys() == peft_model().state_dict().keys()


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("spain has the capital", "rephrasing 'Spain has the capital'"),
        ("Dave  is", "locality probe 'Dave is'"),
        (EDIT.portability[0].prompt, "portability probe 'The king of Spain is in'"),
    ],
)
def test_a_question_that_was_trained_on_is_refused(prompt: str, kind: str) -> None:
    with pytest.raises(ValueError, match="1 questions of this evaluation were trained on") as raised:
        EditEvaluator(marked(prompt), make_tokenizer("llama2"), [EDIT], QUICK)
    assert f"  edits.json:7: the {kind}\nEvaluate edits with other questions, or pass on_leak" in str(raised.value)


def test_a_question_that_was_trained_on_is_left_out_and_counted() -> None:
    model = marked("Spain has the capital", "Dave is", EDIT.prompt, *(probe.prompt for probe in EDIT.portability))
    report = evaluate_edits(model, make_tokenizer("llama2"), [EDIT], replace(QUICK, on_leak="drop"))
    asked = {row["prompt"] for row in report.rows}
    # the edit's own prompt is asked: it is there to be learned
    assert asked == {EDIT.prompt, "The city of Spain is", "The capital of France is"}
    assert "3 rephrasings and probes were left out: the adapter was trained on them." in report.notes
    assert report.settings["edits"] == {"count": 1, "sha256": edits_sha256([EDIT])}
    assert "portability_exact_match" in report.missing
    clean = evaluate_edits(peft_model(), make_tokenizer("llama2"), [EDIT], replace(QUICK, on_leak="drop"))
    assert not any("left out" in note for note in clean.notes) and len({row["prompt"] for row in clean.rows}) == 6


def test_what_to_do_with_leaks_is_checked() -> None:
    with pytest.raises(ValueError, match=r"EvaluationConfig\.on_leak='ask': expected one of error, drop"):
        EvaluationConfig(on_leak="ask")  # type: ignore[arg-type]


def test_a_callback_refuses_before_training(tmp_path: Path) -> None:
    model = marked("Dave is")
    trainer = make_trainer(tmp_path, model, callbacks=[EvaluationCallback([EDIT], args=QUICK)])
    with pytest.raises(ValueError, match="1 questions of this evaluation were trained on"):
        trainer.train()
    assert trainer.state.global_step == 0
    callback = EvaluationCallback([EDIT], args=replace(QUICK, on_leak="drop"))
    make_trainer(tmp_path, model, callbacks=[callback], num_train_epochs=1).train()
    assert len(callback.curves) == 2


# ---------------------------------------------------------------------- beside an adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base and an adapter that was trained on more than its edits."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    base_model().save_pretrained(base)
    make_tokenizer("llama2").save_pretrained(base)
    model = peft_model()
    model.peft_config["default"].base_model_name_or_path = str(base)
    trainer = make_trainer(adapter, model)
    counts = {"retained_facts": 1, "swapped_subjects": 0}
    more = Augmentation.of_rows(prefixes=["In the city", "They"], counts=counts, prompts=["Dave is"])
    record = training_record(EDITS, trainer.args, trainer.loss_history, 3, augmentation=more)
    save_adapter(model, adapter, record=record)
    return base, adapter


def test_an_adapter_in_a_folder_is_known_to_have_been_trained_on_a_probe(folders: tuple[Path, Path]) -> None:
    base, adapter = folders
    with pytest.raises(ValueError, match=r"edits\.json:7: the locality probe 'Dave is'"):
        evaluate_model(base, [EDIT], QUICK, adapter=adapter)
    report = evaluate_model(base, [EDIT], replace(QUICK, on_leak="drop"), adapter=adapter)
    assert "1 rephrasings and probes were left out: the adapter was trained on them." in report.notes
    assert evaluate_model(base, [replace(EDIT, locality=())], QUICK, adapter=adapter).has_before


def test_a_folder_shows_what_was_added_and_no_prompt_of_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, adapter = folders
    facts = (adapter / "locft_provenance.json").read_text()
    assert "Dave is" not in facts and "They" in facts
    text = str(inspect_adapter(adapter))
    assert f"{'augmentation':<15}2 prefixes, 1 retained facts\n{'prefix':<15}In the city\n{'prefix':<15}They\n" in text
    export_small(adapter, tmp_path / "small", delta_dtype="bfloat16")
    assert (
        inspect_adapter(tmp_path / "small").provenance.to_dict()["augmentation"] == json.loads(facts)["augmentation"]
    )


@pytest.mark.parametrize(
    "broken",
    [
        {"trained_prompts": {"count": 1, "sha256": ["short"]}},
        {"trained_prompts": {"count": -1, "sha256": []}},
        {"prefixes": ["a\x1b[2J"]},
        {"counts": {"facts": "many"}},
        {"counts": None},
    ],
)
def test_a_record_that_lies_is_refused(folders: tuple[Path, Path], tmp_path: Path, broken: dict[str, Any]) -> None:
    base, adapter = folders
    for file in adapter.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    facts = json.loads((tmp_path / "locft_provenance.json").read_text())
    facts["augmentation"] |= broken
    (tmp_path / "locft_provenance.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"augmentation is .*; expected prefixes, counts and the hashes"):
        inspect_adapter(tmp_path)
    with pytest.raises(ValueError, match=r"augmentation is .*; expected prefixes, counts and the hashes"):
        evaluate_model(base, [EDIT], QUICK, adapter=tmp_path)


def test_a_run_without_augmentation_records_none(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert training_record(EDITS, trainer.args, trainer.loss_history, 1).augmentation is None
