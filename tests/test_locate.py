"""The search for a location: its winner, what it shares, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_same_tensors, base_state
from tiny_searches import PLAN, PROBED, RELIABILITY, recipe, search, without_seconds
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

import peft_locft.engine.activation_cache as cache
import peft_locft.workflows.location_trials as module
from peft_locft import BreadthFirstConfig, EvaluationConfig
from peft_locft.engine.model_state import TrainingDivergedError
from peft_locft.evaluation.evaluator import EditEvaluator
from peft_locft.locating.plan import Candidate
from peft_locft.locating.preset import LocationPreset
from peft_locft.locating.results import LocationSearchResult
from peft_locft.workflows.locate import SearchPlan, run_location_search, search_locations
from peft_locft.workflows.location_trials import LocationTrials

TEXT = ["The capital of France is Paris. " * 20]


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LocationSearchResult]:
    folder = tmp_path_factory.mktemp("halved")
    return folder, search(folder)


def test_halving_has_the_winner_of_the_full_search(halved: tuple[Path, LocationSearchResult], tmp_path: Path) -> None:
    model = base_model(sharp=True)
    before = base_state(model)
    full = search(tmp_path, model, plan=replace(PLAN, num_rungs=1))
    assert_same_tensors(base_state(model), before)
    _, found = halved
    assert found.best.module == full.best.module == "mlp"
    assert found.best.layer == full.best.layer
    assert [len(found.first_rung()), len(found.trials), len(full.trials)] == [6, 8, 6]
    assert [trial.num_edits for trial in found.ranking] == [8, 8, 3, 3, 3, 3]
    # the last rung is the full search's trial of the same location, bit for bit
    [same] = [trial for trial in full.trials if trial.candidate == found.best.candidate]
    assert (found.best.metrics, found.best.epochs) == (same.metrics, same.epochs)
    assert found.best.score > max(trial.score for trial in full.trials if trial.module != "mlp")


def test_what_it_writes(halved: tuple[Path, LocationSearchResult]) -> None:
    folder, found = halved
    assert {path.name for path in folder.iterdir()} == {
        "best.json", "locations.json", "locations.md", "locations.png", "search.json", "trials"
    }  # fmt: skip
    assert all(path.suffix == ".json" for path in (folder / "trials").iterdir())
    table = (folder / "locations.md").read_text()
    assert table == f"{found}\n"
    lines = table.splitlines()
    assert lines[0].startswith("| location | edits | score | reliability_token_accuracy | generalization_token")
    assert lines[2].startswith("| base | 8 | | 0.") and lines[3].startswith(f"| {found.best.candidate} | 8 | 0.")
    assert len(lines) == 3 + 6 + 2
    assert "Score: weighted harmonic mean of reliability_token_accuracy. 8 trials, " in lines[-1]
    content = json.loads((folder / "locations.json").read_text())
    assert len(content["trials"]) == 8 and content["setting"]["rungs"] == [[3, 2], [8, 4]]
    assert LocationPreset.load(folder / "best.json") == found.preset
    assert found.preset.learning_rate == 5e-2


def test_the_trunk_runs_once_a_rung_and_the_base_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    run: list[list[int]] = []
    ask_base, run_trunk = EditEvaluator._base_answers, cache._run_trunk

    def asking(evaluator: EditEvaluator, *arguments: Any) -> Any:
        asked.append(len(evaluator.edits))
        return ask_base(evaluator, *arguments)

    def running(*arguments: Any) -> Any:
        run.append([arguments[1].tail.first, *arguments[5]])
        return run_trunk(*arguments)

    monkeypatch.setattr(EditEvaluator, "_base_answers", asking)
    monkeypatch.setattr(cache, "_run_trunk", running)
    caplog.set_level(logging.INFO, "peft_locft")
    model = base_model(sharp=True)
    found = search(tmp_path, model, text=TEXT, evaluation=EvaluationConfig(max_text_tokens=64, text_window=32))
    assert asked == [3, 8]
    # in the last layer's trial; what enters the one before is kept on the way
    assert run == [[2, 1], [2, 1]]
    assert caplog.text.count("Using the activations") == len(found.trials) - 2
    assert not (tmp_path / "states").exists()
    assert {"perplexity", "kl_from_base"} <= found.best.metrics.keys()


def test_shared_activations_are_those_of_a_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = search(tmp_path / "shared", plan=SearchPlan(modules=["mlp"], layers=[0, 1, 2], num_rungs=1))
    monkeypatch.setattr("peft_locft.workflows.locate.SharedActivations", lambda folder, layers: None)
    alone = search(tmp_path / "alone", plan=SearchPlan(modules=["mlp"], layers=[0, 1, 2], num_rungs=1))
    assert without_seconds(shared) == without_seconds(alone)


def test_coarse_to_fine_comes_to_the_best_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fake_measure(monkeypatch, lambda candidate, edits: 1 / (1 + abs(candidate.layer - 5)))
    plan = SearchPlan(modules=["down"], stride=4, num_rungs=1)
    found = search(tmp_path, base_model(num_hidden_layers=9), plan=plan)
    assert found.best.layer == 5
    # 8, 4 and 0; those between the best two of these and beside them, and those beside the best two of all
    assert [candidate.layer for candidate in tried] == [8, 4, 0, 6, 2, 7, 5, 3]


def fake_measure(monkeypatch: pytest.MonkeyPatch, score: Any) -> list[Candidate]:
    """Have trials scored by a function of candidate and edits; return those that were made."""
    tried: list[Candidate] = []

    def measure(self: LocationTrials, rung: int, candidate: Candidate, place: Path) -> Any:
        tried.append(candidate)
        edits = self.ladder[rung].num_edits
        return module.LocationTrial(
            candidate.module,
            candidate.layer,
            rung,
            edits,
            1e-3,
            score(candidate, edits),
            {},
            {},
            None,
            1,
            ("a",),
            (),
            1,
            1,
            candidate.num_layers,
            candidate.gradient_tokens,
        )

    monkeypatch.setattr(LocationTrials, "_measure", measure)
    return tried


def test_a_search_that_was_interrupted_goes_on(
    halved: tuple[Path, LocationSearchResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, measured = LocationTrials._measure, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal measured
        measured += 1
        if measured in (3, 8):
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(LocationTrials, "_measure", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path)
    found = search(tmp_path)
    assert measured == 8 + 2
    assert without_seconds(found) == without_seconds(halved[1])
    assert search(tmp_path).trials == found.trials
    assert measured == 10


def test_another_configuration_in_the_same_folder_is_refused(halved: tuple[Path, LocationSearchResult]) -> None:
    folder, _ = halved
    written = (folder / "best.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"holds a search with other settings \(recipe\): found recipe=.* Use another output_dir"
    ):
        search(folder, recipe={"learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"other settings \(keep, rungs, score\): found keep=3, expected 2"):
        search(folder, plan=replace(PLAN, keep=2, num_rungs=2), score={"locality_tokens_unchanged": 1.0})
    assert (folder / "best.json").read_bytes() == written


def test_a_location_that_diverges_is_the_last(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rates = {"mlp": 1e30}
    found = search(tmp_path, plan=SearchPlan(modules=["mlp", "down"], layers=[1], num_rungs=1, learning_rates=rates))
    worst = found.ranking[-1]
    assert (found.best.module, worst.module, worst.score, worst.metrics) == ("down", "mlp", 0, {})
    assert worst.failed and "at step 2" in worst.failed and f"mlp, layer 1: {worst.failed}" in caplog.text
    assert "| mlp, layer 1 | 8 | diverged | - |" in str(found)


def test_a_search_in_which_all_diverge_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise TrainingDivergedError("The loss became nan")

    monkeypatch.setattr(module, "try_adapter", fail)
    with pytest.raises(
        ValueError, match=r"diverged at every location \(The loss became nan\). Lower the learning rate"
    ):
        search(tmp_path)


def test_the_default_score_has_what_the_edits_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measure(monkeypatch, lambda candidate, edits: 0.5)
    default = ["reliability_token_accuracy", "generalization_token_accuracy", "locality_tokens_unchanged"]
    assert list(search(tmp_path / "all", score=None).setting["score"]) == default
    found = search(tmp_path / "few", score=None, edits=EDITS, text=TEXT, evaluation=EvaluationConfig(text_window=32))
    assert list(found.setting["score"]) == [default[0], "kl_from_base"]
    assert found.setting["text"] is not None


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measure(monkeypatch, lambda candidate, edits: 0.5)
    samples = [
        search(tmp_path / f"{number}", num_edits=3, plan=PLAN, recipe={"seed": seed}).setting["edits"]
        for number, seed in enumerate((1, 1, 2))
    ]
    assert samples[0] == samples[1] != samples[2]


def test_bands_and_tokens_are_tried_at_each_location(tmp_path: Path) -> None:
    plan = SearchPlan(
        modules=["down"], layers=[0, 1, 2], num_rungs=1, widths=(1, 2), gradient_tokens=("all", "subject")
    )
    found = search(tmp_path, plan=plan)
    own = {trial.candidate: trial for trial in found.trials}
    assert len(own) == len(found.trials) == 2 * 3 + 2 * 2
    band = own[Candidate("down", 1, 2, "subject")]
    assert band.target_modules == ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
    # each of the two changes what is trained
    for other in (Candidate("down", 1, 1, "subject"), Candidate("down", 1, 2, "all")):
        assert band.metrics != own[other].metrics
    assert (found.preset.num_layers, found.preset.gradient_tokens) == (found.best.num_layers, "all")
    assert found.preset.target_modules == found.best.target_modules
    assert search(tmp_path, plan=plan).trials == found.trials
    # the same as a search with that width and those tokens in its recipe
    alone = replace(plan, layers=[1], widths=[2], gradient_tokens=None)
    [same] = search(tmp_path / "alone", plan=alone, recipe={"gradient_tokens": "subject"}).trials
    assert (same.metrics, same.epochs) == (band.metrics, band.epochs)
    with pytest.raises(ValueError, match=r"\(gradient_tokens, widths\): found gradient_tokens=\['all', 'subject'\]"):
        search(tmp_path, plan=replace(plan, widths=(1,), gradient_tokens=None))


def test_bands_are_approached_within_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = fake_measure(monkeypatch, lambda candidate, edits: candidate.layer / 9 + candidate.num_layers / 99)
    plan = SearchPlan(modules=["down"], stride=4, num_rungs=1, widths=[3])
    found = search(tmp_path, base_model(num_hidden_layers=9), plan=plan)
    # 6 and 2; then those between and beside them, none behind layer 6
    assert [candidate.layer for candidate in tried] == [6, 2, 4, 0, 5, 3]
    assert {candidate.num_layers for candidate in tried} == {3} and str(found.best.candidate) == "down, layers 6 to 8"


def test_a_search_from_before_there_were_bands_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(tmp_path)
    for path in (tmp_path / "search.json", *(tmp_path / "trials").iterdir()):
        content = json.loads(path.read_text())
        names = ("widths", "gradient_tokens") if path.name == "search.json" else ("num_layers", "gradient_tokens")
        assert [content.pop(name) for name in names] in ([[1], None], [1, None])
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"\(widths\): found widths=\[1\], expected \[2\]"):
        search(tmp_path, plan=replace(PLAN, num_rungs=2, widths=[2]))
    tried = fake_measure(monkeypatch, lambda candidate, edits: 0.5)
    assert search(tmp_path).trials == found.trials
    assert tried == []


def test_a_module_in_which_tokens_cannot_be_chosen_is_the_last(tmp_path: Path) -> None:
    # the router of a mixture of experts returns a tuple
    plan = SearchPlan(modules=["mlp"], layers=[1], num_rungs=1, gradient_tokens=["subject", "all"])
    found = search(tmp_path / "one", base_model("mixtral"), plan=plan)
    assert [trial.gradient_tokens for trial in found.ranking] == ["all", "subject"]
    worst = found.ranking[-1]
    assert worst.failed and worst.failed.startswith("gradient_tokens cannot choose tokens in MixtralTopKRouter: ")
    assert (worst.score, worst.diverged) == (0, False) and "| mlp, layer 1, subject | 8 | failed | - |" in str(found)
    only = replace(plan, gradient_tokens=["subject"])
    with pytest.raises(ValueError, match=r"Training failed at every location \(gradient_tokens cannot .*try .*'all'"):
        search(tmp_path / "none", base_model("mixtral"), plan=only)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": []}, r"widths: found \[\]; expected numbers of neighbouring layers, 1 or more, no repeats"),
        ({"widths": [2, 2]}, r"widths: found \[2, 2\]"),
        ({"widths": [1, 0]}, r"widths: found \[1, 0\]"),
        ({"gradient_tokens": []}, r"gradient_tokens: found \[\]; expected a list of some of auto, all, prompt"),
        ({"gradient_tokens": ["all", "all"]}, r"gradient_tokens: found \['all', 'all'\]"),
        ({"gradient_tokens": ["all", "object"]}, r"gradient_tokens: found \['all', 'object'\]"),
        ({"gradient_tokens": "subject"}, "gradient_tokens: found 'subject'; expected a list"),
    ],
)
def test_a_plan_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchPlan(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"plan": SearchPlan(modules=["middle"])},
            "modules: found 'middle', but model.layers.0 has no module of that kind",
        ),
        ({"plan": SearchPlan(layers=[3])}, "layer 3: the model has 3 decoder layers"),
        ({"plan": SearchPlan(layers=[])}, r"plan: found .*layers=\[\]; expected one or more of each"),
        ({"plan": SearchPlan(modules=["up", "up"])}, r"plan: found modules=\['up', 'up'\]"),
        ({"plan": SearchPlan(stride=4)}, "stride=4: expected 1 to 3"),
        ({"plan": SearchPlan(widths=[1, 4])}, "widths: found 4, but the model has 3 decoder layers"),
        ({"plan": SearchPlan(layers=[2], widths=[2])}, "widths: found 2, .* no band of 2 fits from layer 2 on"),
        (
            {"plan": SearchPlan(learning_rates={"updown": 1e-3})},
            "learning_rates: found updown; expected rates above 0",
        ),
        ({"plan": SearchPlan(learning_rates={"up": 0.0})}, "learning_rates: found up=0.0; expected rates above 0 for"),
        ({"score": {"portability_exact_match": 1.0}}, "score: portability_exact_match cannot be measured"),
        ({"score": {"kl_from_base": 1.0}}, "score: perplexity and KL cannot be measured.* there is no text"),
        ({"num_edits": 0}, "num_edits=0: expected 1 or more"),
    ],
)
def test_mistakes_are_found_before_any_work(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        search(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_a_group_of_processes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = recipe(tmp_path)
    monkeypatch.setattr(BreadthFirstConfig, "world_size", property(lambda self: 2))
    with pytest.raises(
        ValueError, match=r"found a group of 2 processes.*Call peft_locft.engine.distributed.leave_group"
    ):
        search_locations(base_model(), make_tokenizer("llama2"), PROBED, args)


def test_it_runs_from_a_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measure(monkeypatch, lambda candidate, edits: candidate.layer / 4)
    base_model().save_pretrained(tmp_path / "base")
    make_tokenizer("llama2").save_pretrained(tmp_path / "base")
    found = run_location_search(
        tmp_path / "base", PROBED, recipe(tmp_path / "out"), dtype="bfloat16", plan=PLAN, score=RELIABILITY
    )
    assert (found.best.layer, found.setting["dtype"]) == (2, "bfloat16")
    assert found.preset.found["model"] == str(tmp_path / "base")
    assert torch.get_num_threads() == 1
