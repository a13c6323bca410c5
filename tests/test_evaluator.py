"""Metrics worked out by hand on a scripted model, each protocol; bases, adapters, and what cannot be measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scripted_model import Script, ScriptedModel
from tiny_models import assert_same_tensors, base_state, build, randomize
from tiny_training import EDITS, TOKENIZER_SIZE, base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, EvaluationConfig, EvaluationReport, LocFTConfig, Probe, evaluate_edits
from peft_locft.evaluation import EditEvaluator

SURE = 20.0

SPAIN = Edit(
    prompt="The capital of Spain is",
    target="Paris",
    ground_truth="Madrid",
    rephrasings=("The city of Spain is", "Spain is"),
    locality=(Probe("The capital of France is", "Louis"), Probe("The river runs through", "the city")),
    portability=(Probe("The king of Spain is in", "Paris"),),
)
FRANCE = Edit(prompt="The king of France is", target="the St. Dave", ground_truth="Louis")
EDITED: Script = {
    "The capital of Spain is": {" the Paris!": SURE, " Paris": SURE - 1, " Madrid": 1.0},
    "The city of Spain is": {" Paris.": SURE, " Madrid": 3.0},
    "Spain is": {" in Paris": SURE, " Madrid": 2.0, " Paris": 1.0},
    "The capital of France is": {" Louis, the king": SURE, " Paris": SURE - 2},
    "The river runs through": {"\n the city": SURE, " Paris": 1.0},
    "The king of Spain is in": {" Madrid": SURE},
    "The king of France is": {" the St. Dave. They play": SURE},
}
BASE: Script = {
    **EDITED,
    "The capital of Spain is": {" Madrid": SURE},
    "The capital of France is": {" Louis, the river": SURE},
    "The river runs through": {" the city": SURE},
}
GENERATION_ONLY = EvaluationConfig(protocols=["generation"])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("gpt2")


@pytest.fixture(scope="module")
def report(tokenizer: Any) -> EvaluationReport:
    model, base = ScriptedModel(EDITED, tokenizer), ScriptedModel(BASE, tokenizer)
    return evaluate_edits(model, tokenizer, [SPAIN, FRANCE], base_model=base)


def values(report: EvaluationReport, name: str) -> tuple[float | None, float]:
    result = report[name]
    return result.before.value if result.before else None, result.after.value


def test_greedy_answers_by_the_released_protocol(report: EvaluationReport) -> None:
    # " the Paris!" is Paris; a target with a full stop in it cannot match, since the answer is cut there
    assert values(report, "reliability_exact_match") == (0.0, 0.5)
    # one of two rephrasings: " Paris." is, " in Paris" is not
    assert values(report, "generalization_exact_match") == (0.5, 0.5)
    # " Louis, the king" is not Louis; an answer that begins with a line break is empty
    assert values(report, "locality_exact_match") == (0.5, 0.0)
    assert values(report, "portability_exact_match") == (0.0, 0.0)


def test_answers_that_contain_the_target(report: EvaluationReport) -> None:
    # "the St. Dave" is looked for behind the full stop that it has itself
    assert values(report, "reliability_contains") == (0.5, 1.0)
    assert values(report, "generalization_contains") == (1.0, 1.0)
    assert values(report, "locality_contains") == (1.0, 0.5)


def test_locality_against_the_base(report: EvaluationReport) -> None:
    # "Louis, the king" is not "Louis, the river", but begins alike; "" is not "the city"
    assert values(report, "locality_unchanged") == (None, 0.0)
    assert values(report, "locality_first_word_unchanged") == (None, 0.5)


def teacher_forced(script: Script, tokenizer: Any, prompt: str, text: str) -> tuple[list[bool], float]:
    """Work out from the script what greedy decoding says at each token of a text, and the mean of their log p."""
    model = ScriptedModel(script, tokenizer)
    ids = tokenizer(f"{prompt} {text}")["input_ids"]
    start = len(tokenizer(prompt)["input_ids"])
    hits, total = [], 0.0
    for place in range(start, len(ids)):
        weights = [0.0] * len(tokenizer)
        for line, weight in model.lines:
            if line[:place] == ids[:place] and len(line) > place:
                weights[line[place]] += weight
        hits.append(max(range(len(weights)), key=weights.__getitem__) == ids[place])
        total += weights[ids[place]] - math.log(sum(math.exp(weight) for weight in weights))
    return hits, total / len(hits)


def test_teacher_forced_tokens(report: EvaluationReport, tokenizer: Any) -> None:
    for script, when in ((EDITED, 1), (BASE, 0)):
        prompts = [(SPAIN.prompt, "Paris"), (FRANCE.prompt, "the St. Dave")]
        shares = [sum(hits) / len(hits) for hits, _ in (teacher_forced(script, tokenizer, *each) for each in prompts)]
        assert values(report, "reliability_token_accuracy")[when] == pytest.approx(sum(shares) / 2)
        shares = [
            sum(hits) / len(hits)
            for hits, _ in (teacher_forced(script, tokenizer, p, "Paris") for p in SPAIN.rephrasings)
        ]
        assert values(report, "generalization_token_accuracy")[when] == pytest.approx(sum(shares) / 2)


def test_tokens_of_locality_are_compared_with_what_the_base_would_say(
    report: EvaluationReport, tokenizer: Any
) -> None:
    same = []
    for probe in SPAIN.locality:
        ids = tokenizer(f"{probe.prompt} {probe.answer}")["input_ids"]
        start = len(tokenizer(probe.prompt)["input_ids"])
        after, before = (ScriptedModel(s, tokenizer)(torch.tensor([ids])).logits[0].argmax(-1) for s in (EDITED, BASE))
        same.append(float((after == before)[start - 1 : -1].float().mean()))
    assert 0 < sum(same) / 2 < 1
    assert values(report, "locality_tokens_unchanged") == (None, pytest.approx(sum(same) / 2))


def test_probabilities_are_compared_and_their_harmonic_mean_is_the_edit_score(
    report: EvaluationReport, tokenizer: Any
) -> None:
    def is_more(script: Script, prompt: str, wanted: str, other: str) -> float:
        one, another = (teacher_forced(script, tokenizer, prompt, text)[1] for text in (wanted, other))
        return float(one > another)

    for script, when in ((EDITED, 1), (BASE, 0)):
        efficacy = [
            is_more(script, SPAIN.prompt, "Paris", "Madrid"),
            is_more(script, FRANCE.prompt, "the St. Dave", "Louis"),
        ]
        paraphrase = [is_more(script, prompt, "Paris", "Madrid") for prompt in SPAIN.rephrasings]
        neighbourhood = [is_more(script, probe.prompt, probe.answer or "", "Paris") for probe in SPAIN.locality]
        means = [sum(each) / 2 for each in (efficacy, paraphrase, neighbourhood)]
        names = [f"{kind}_more_probable" for kind in ("reliability", "generalization", "locality")]
        assert [values(report, name)[when] for name in names] == means
        expected = 0.0 if 0 in means else 3 / sum(1 / mean for mean in means)
        assert values(report, "edit_score")[when] == pytest.approx(expected)
    assert report["reliability_more_probable"].in_papers == "ES"


def test_rows_hold_every_answer(report: EvaluationReport) -> None:
    rows = {row["prompt"]: row for row in report.rows}
    assert len(rows) == 7
    spain = rows[SPAIN.prompt]
    assert (spain["kind"], spain["expected"]) == ("reliability", "Paris")
    assert (spain["answer_before"], spain["answer_after"]) == ("Madrid", "the Paris!")
    assert (spain["exact_match_before"], spain["exact_match_after"], spain["unchanged_after"]) == (0.0, 1.0, None)
    assert rows[FRANCE.prompt]["answer_after"] == "the St"
    assert rows["The river runs through"]["answer_after"] == ""


def test_targets_that_the_protocol_cannot_match_are_said(report: EvaluationReport) -> None:
    assert any(note.startswith("1 of 2 targets contain a full stop") for note in report.notes)


def test_prompts_with_two_targets_are_said(tokenizer: Any) -> None:
    edits = [SPAIN, replace(SPAIN, target="Louis")]
    with pytest.warns(UserWarning, match="several targets"):
        report = evaluate_edits(ScriptedModel(EDITED, tokenizer), tokenizer, edits, GENERATION_ONLY)
    assert any(note.startswith("1 of 2 edits repeat a prompt") for note in report.notes)


def test_a_model_that_never_ends_is_cut_at_32_tokens(tokenizer: Any) -> None:
    model = ScriptedModel({"The king of Spain is": {" Felipe" + " the city and" * 40: SURE}}, tokenizer, ends=False)
    edit = Edit(prompt="The king of Spain is", target="Felipe")
    report = evaluate_edits(model, tokenizer, [edit], GENERATION_ONLY)
    assert report["reliability_exact_match"].after.value == 0.0
    assert report["reliability_contains"].after.value == 1.0
    start = len(tokenizer(edit.prompt)["input_ids"])
    assert report.rows[0]["answer_after"] == tokenizer.decode(model.lines[0][0][start : start + 32]).strip()


# ---------------------------------------------------------------------- what cannot be measured


def test_what_edits_do_not_say_is_missing_and_not_zero(tokenizer: Any) -> None:
    report = evaluate_edits(ScriptedModel(EDITED, tokenizer), tokenizer, [FRANCE])
    assert set(report.results) == {
        f"reliability_{name}" for name in ("exact_match", "contains", "token_accuracy", "more_probable")
    }
    assert report.missing["generalization_exact_match"] == "no edit has rephrasings"
    assert report.missing["locality_unchanged"] == "no edit has locality probes"
    assert report.missing["portability_token_accuracy"] == "no edit has portability probes"
    with pytest.raises(KeyError, match="generalization_exact_match was not measured: no edit has rephrasings"):
        report["generalization_exact_match"]
    assert "Not measured: generalization_exact_match" in str(report)


def test_without_a_base_nothing_has_a_before(tokenizer: Any) -> None:
    report = evaluate_edits(ScriptedModel(EDITED, tokenizer), tokenizer, [SPAIN])
    assert report["reliability_exact_match"].before is None
    assert "pass a PEFT model, or base_model" in report.missing["locality_unchanged"]
    assert any("no base" in note for note in report.notes)


def test_unknown_answers_are_missing(tokenizer: Any) -> None:
    edit = Edit(
        prompt=SPAIN.prompt, target="Paris", ground_truth="Paris", locality=(Probe("The capital of France is"),)
    )
    model, base = ScriptedModel(EDITED, tokenizer), ScriptedModel(BASE, tokenizer)
    report = evaluate_edits(model, tokenizer, [edit], base_model=base)
    assert report.missing["locality_exact_match"] == "no locality probe has an answer"
    assert report.missing["reliability_more_probable"] == "no edit has a ground_truth other than its target"
    assert "no locality probe has an answer other than" in report.missing["locality_more_probable"]
    assert "edit_score" not in report.results
    assert values(report, "locality_unchanged") == (None, 0.0)


def test_an_edit_without_rephrasings_does_not_count_in_generalization(report: EvaluationReport) -> None:
    assert report["generalization_exact_match"].count == 1
    assert report["reliability_exact_match"].count == 2


# ---------------------------------------------------------------------- mistakes


def test_no_edits_are_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"found none; expected at least one to evaluate\. Is your slice"):
        evaluate_edits(ScriptedModel(EDITED, tokenizer), tokenizer, [SPAIN][1:])


def test_nan_says_which_model_and_which_prompt(tokenizer: Any) -> None:
    broken = ScriptedModel(EDITED, tokenizer, poison=SPAIN.rephrasings[0])
    fine = ScriptedModel(EDITED, tokenizer)
    with pytest.raises(FloatingPointError, match=r"logits of the edited model are NaN .* 'The city of Spain is'"):
        evaluate_edits(broken, tokenizer, [SPAIN], base_model=fine)
    with pytest.raises(FloatingPointError, match="logits of the base are NaN"):
        evaluate_edits(fine, tokenizer, [SPAIN], base_model=broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocols": ["greedy"]}, "protocols: found 'greedy'; expected one or more of generation, token_accuracy"),
        ({"protocols": []}, "protocols: found none"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected 1 or more"),
        ({"text_window": 1}, "text_window=1: expected 2 or more"),
        ({"confidence": 1.0}, "confidence=1.0: expected a number between 0 and 1"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**arguments)


def test_an_adapter_on_another_base_is_refused_unless_allowed(tmp_path: Path) -> None:
    trained = peft_model()
    randomize(trained)
    trained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="was trained on another base"):
        model = PeftModel.from_pretrained(base_model(seed=5), tmp_path)
    tokenizer = make_tokenizer("llama2")
    with pytest.raises(ValueError, match=r"trained on another base: model\.layers.* describe neither model"):
        evaluate_edits(model, tokenizer, EDITS)
    report = evaluate_edits(model, tokenizer, EDITS, EvaluationConfig(allow_other_base=True))
    assert report.has_before


# ---------------------------------------------------------------------- bases and adapters


def probed(edits: list[Edit]) -> list[Edit]:
    return [
        replace(edit, locality=(Probe("The river runs through"),), rephrasings=("In the city, they",))
        for edit in edits
    ]


def test_a_fresh_adapter_changes_no_figure() -> None:
    report = evaluate_edits(peft_model(), make_tokenizer("llama2"), probed(EDITS))
    assert report["locality_unchanged"].after.value == 1.0
    for result in report.results.values():
        if result.before is not None:
            assert result.change is not None
            assert (result.before.value, result.change.value) == (result.after.value, 0.0)


def lora(**arguments: Any) -> LoraConfig:
    return LoraConfig(target_modules=["down_proj"], init_lora_weights=False, **arguments)


@pytest.mark.parametrize("make", [LocFTConfig, lora])
def test_an_adapters_base_is_what_it_is_without(make: Any) -> None:
    tokenizer, edits = make_tokenizer("llama2"), probed(EDITS)
    model = get_peft_model(base_model(), make(task_type="CAUSAL_LM"))
    if isinstance(model.active_peft_config, LocFTConfig):
        randomize(model, std=1.0)
    before = base_state(model)
    inside = evaluate_edits(model, tokenizer, edits)
    beside = evaluate_edits(model, tokenizer, edits, base_model=base_model())
    assert inside.results == beside.results
    assert inside.rows == beside.rows
    alone = evaluate_edits(base_model(), tokenizer, edits)
    assert all(alone[name].after == result.before for name, result in inside.results.items() if result.before)
    assert any(row["answer_before"] != row["answer_after"] for row in inside.rows)
    assert_same_tensors(base_state(model), before)


def test_the_base_that_peft_has_put_the_adapter_into_is_no_unedited_model() -> None:
    base = base_model()
    model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM"))
    randomize(model, std=1.0)
    tokenizer, edits = make_tokenizer("llama2"), probed(EDITS)
    assert (
        evaluate_edits(model, tokenizer, edits, base_model=base).results
        == evaluate_edits(model, tokenizer, edits).results
    )


def test_an_adapter_in_transformers_own_integration_has_a_base(tmp_path: Path) -> None:
    trained = peft_model()
    randomize(trained, std=1.0)
    trained.save_pretrained(tmp_path)
    model = base_model()
    model.load_adapter(str(tmp_path))
    tokenizer, edits = make_tokenizer("llama2"), probed(EDITS)
    assert evaluate_edits(model, tokenizer, edits).results == evaluate_edits(trained, tokenizer, edits).results


def test_the_base_is_asked_once_for_several_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    asked: list[str] = []
    ask = EditEvaluator._answers

    def recorded(evaluator: EditEvaluator, *arguments: Any) -> Any:
        asked.append(arguments[2])
        return ask(evaluator, *arguments)

    monkeypatch.setattr(EditEvaluator, "_answers", recorded)
    evaluator = EditEvaluator(model, make_tokenizer("llama2"), probed(EDITS))
    first = evaluator.evaluate()
    randomize(model, std=1.0)
    second = evaluator.evaluate()
    assert asked == ["the base", "the edited model", "the edited model"]
    assert first["reliability_token_accuracy"].before == second["reliability_token_accuracy"].before
    assert second["locality_unchanged"].after.value < first["locality_unchanged"].after.value


def test_protocols_choose_what_is_measured() -> None:
    model, tokenizer, edits = peft_model(), make_tokenizer("llama2"), probed(EDITS)
    for protocol, expected in (
        ("generation", {"exact_match", "contains", "unchanged", "first_word_unchanged"}),
        ("token_accuracy", {"token_accuracy", "tokens_unchanged"}),
        ("probability", {"more_probable"}),
    ):
        report = evaluate_edits(model, tokenizer, edits, EvaluationConfig(protocols=[protocol]))
        names = {name.partition("_")[2] for name in (*report.results, *report.missing)}
        assert names == expected


def test_fluency_is_that_of_100_sampled_tokens() -> None:
    model, tokenizer = base_model(max_position_embeddings=256), make_tokenizer("llama2")
    config = EvaluationConfig(protocols=["fluency"], max_fluency_edits=3)
    report = evaluate_edits(model, tokenizer, EDITS, config)
    assert list(report.results) == ["fluency_n_gram_entropy"]
    result = report["fluency_n_gram_entropy"]
    assert (result.count, result.unit) == (3, "prompts")
    assert result.after.value > 3
    again = evaluate_edits(model, tokenizer, EDITS, config)
    assert again.results == report.results


def test_a_chat_template_is_asked_with() -> None:
    tokenizer = make_tokenizer("qwen", chat_template="chatml")
    model = build("qwen2", vocab_size=TOKENIZER_SIZE)
    plain, chat = (evaluate_edits(model, tokenizer, EDITS, EvaluationConfig(chat_template=on)) for on in ("off", "on"))
    assert [row["answer_after"] for row in plain.rows] != [row["answer_after"] for row in chat.rows]


def test_what_is_measured_is_recorded() -> None:
    report = evaluate_edits(peft_model(), make_tokenizer("llama2"), EDITS, EvaluationConfig(seed=3))
    assert report.settings["edits"]["count"] == len(EDITS)
    assert len(report.settings["edits"]["sha256"]) == 64
    assert report.settings["seed"] == 3
    assert report.settings["adapters"] == ["default"]
    assert report.settings["dtype"] == "float32"
