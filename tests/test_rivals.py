"""Closed-form edits of a model, the choice of their settings, and the comparison with them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from test_baselines import PROBED, QUICK, recipe
from tiny_models import assert_same_tensors, base_state
from tiny_training import EDITS, base_model, peft_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import Edit, EvaluationConfig, LocFTConfig
from peft_locft.engine.memory import measured_usage
from peft_locft.training.closed_form import ClosedFormSettings, SharedWork, check_location, edit_in_closed_form
from peft_locft.training.edit_positions import PlacedRow, control_rows, placed_rows
from peft_locft.training.target_values import LayersBehind, ValueSearch, target_values
from peft_locft.tuner.presets import find_decoder_layers
from peft_locft.workflows import rivals as rivals_module
from peft_locft.workflows.baselines import compare_baselines
from peft_locft.workflows.rival_settings import (
    OPTIONS,
    PUBLISHED,
    RivalSettings,
    choose_settings,
    described,
    early_layers,
    from_description,
)

SUBJECTS = ("France", "Spain", "Spain", "France", None, "Dave", "city", "the city")
WITH_SUBJECTS = [replace(edit, subject=subject) for edit, subject in zip(PROBED, SUBJECTS, strict=True)]
SEARCH = ValueSearch(rate=0.5, steps=30, clamp=50.0, decay=0.0)


# ---------------------------------------------------------------------- where a fact is read


def test_a_fact_is_read_at_the_last_token_of_its_subject() -> None:
    tokenizer = make_tokenizer("llama2")
    placed = placed_rows(WITH_SUBJECTS[:5], tokenizer, prefixes=["In the city"])
    assert placed.num_without_subject == 1
    assert placed.firsts == [0, 2, 4, 6, 8]
    for row in placed.rows[:8]:
        # "Spain?" is one token of this tokenizer
        before = tokenizer.decode(row.input_ids[: row.position + 1]).rstrip("?")
        assert before.endswith(str(WITH_SUBJECTS[row.edit].subject))
        assert tokenizer.decode(row.input_ids[row.target_start : -1]).strip() == EDITS[row.edit].target
    # without a subject: the last token of the prompt
    assert [row.position for row in placed.rows[8:]] == [row.target_start - 1 for row in placed.rows[8:]]


def test_the_position_is_found_in_a_chat_template_too() -> None:
    tokenizer = make_tokenizer("llama2")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    rows = placed_rows(WITH_SUBJECTS[:2], tokenizer, chat_template="both").rows
    assert [row.edit for row in rows] == [0, 0, 1, 1]
    assert all(
        tokenizer.decode(row.input_ids[: row.position + 1]).endswith(str(WITH_SUBJECTS[row.edit].subject))
        for row in rows
    )


# ---------------------------------------------------------------------- target values


def values_of(model: Any, edits: list[Edit], layer: int, search: ValueSearch = SEARCH) -> Any:
    tokenizer = make_tokenizer("llama2")
    _, layers = find_decoder_layers(model)
    rows = placed_rows(edits, tokenizer)
    return target_values(model, layers, layer, rows, control_rows(edits, tokenizer), search, progress=False)


@pytest.mark.parametrize("layer", [0, 1])
def test_with_its_target_value_a_model_gives_the_target(layer: int) -> None:
    model = base_model(sharp=True)
    before = base_state(model)
    found = values_of(model, WITH_SUBJECTS[:3], layer)
    start = values_of(model, WITH_SUBJECTS[:3], layer, replace(SEARCH, steps=0))
    assert (found.losses < start.losses - 3).all()  # of 14 to 19 nats
    assert_same_tensors(base_state(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_edit_has_the_value_that_it_has_alone() -> None:
    model = base_model(sharp=True)
    search = replace(SEARCH, steps=8)
    together = values_of(model, WITH_SUBJECTS[:3], 1, search)
    alone = [values_of(model, [edit], 1, search).values[0] for edit in WITH_SUBJECTS[:3]]
    torch.testing.assert_close(together.values, torch.stack(alone), rtol=1e-2, atol=1e-3)


def test_a_value_stays_within_the_clamp() -> None:
    model = base_model(sharp=True)
    start, found = (values_of(model, WITH_SUBJECTS[:3], 1, replace(SEARCH, steps=n, clamp=0.5)) for n in (0, 30))
    sizes = (found.values - start.values).norm(dim=1) / start.values.norm(dim=1)
    assert (sizes <= 0.5001).all() and (sizes > 0.1).all()


def test_a_heavy_control_keeps_the_value_near() -> None:
    model = base_model(sharp=True)
    start, light, heavy = (
        values_of(model, WITH_SUBJECTS[:2], 1, replace(SEARCH, steps=n, kl_weight=weight))
        for n, weight in ((0, 0.0), (20, 0.0), (20, 100.0))
    )
    assert (heavy.losses > light.losses).all()
    assert (light.losses < start.losses).all()


def test_the_layers_behind_alone_give_the_logits_of_the_whole_model() -> None:
    model = base_model()
    _, layers = find_decoder_layers(model)
    parts = LayersBehind(model, layers, 1)
    ids = torch.tensor([[1, 5, 9, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    states = parts.states(inputs)
    place = torch.tensor([0]), torch.tensor([3])
    with torch.no_grad():
        torch.testing.assert_close(parts.logits(inputs, states, *place), model(ids).logits[:, 3])
    assert parts._cuts
    # a model whose last layer takes the first one's output too cannot be cut, and is not
    seen: dict[str, torch.Tensor] = {}
    layers[0].register_forward_hook(lambda module, args, output: seen.update(first=output))
    layers[2].register_forward_hook(lambda module, args, output: output + 9 * seen["first"])
    parts = LayersBehind(model, layers, 1)
    with torch.no_grad():
        torch.testing.assert_close(parts.logits(inputs, parts.states(inputs), *place), model(ids).logits[:, 3])
    assert parts._cuts is False


# ---------------------------------------------------------------------- edits in closed form


def args_for(folder: Path, **arguments: Any) -> Any:
    return recipe(folder, chat_template="off", preserve_tokens=256, preserve_cache_dir="off", **arguments)


def written(model: Any, edits: list[Edit], method: Any, settings: Any, folder: Path, shared: Any = None) -> Any:
    tokenizer = make_tokenizer("llama2")
    return edit_in_closed_form(model, tokenizer, edits, method, settings, args_for(folder), shared=shared)


STRONG = ClosedFormSettings(damping=1e-6, energy_share=0.1, num_prefixes=0, search=SEARCH)


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_without_damping_a_closed_form_writes_the_target_values(method: Any, tmp_path: Path) -> None:
    edits = [WITH_SUBJECTS[number] for number in (0, 1, 5)]  # other subjects, so other keys
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    base = base_model(sharp=True)
    before = base_state(base)
    model = get_peft_model(base, config)
    shared = SharedWork()
    record = written(model, edits, method, STRONG, tmp_path, shared)
    assert record.notes == [] and record.reused is None
    ((values, _),) = shared.values.values()
    rows = placed_rows(edits, make_tokenizer("llama2"))
    _, layers = find_decoder_layers(model)
    for row in rows.rows:
        with torch.no_grad():
            states = LayersBehind(model, layers, 1).states(
                {"input_ids": row.input_ids[None], "attention_mask": None, "use_cache": False}
            )
        torch.testing.assert_close(states[0, row.position], values.values[row.edit], rtol=1e-2, atol=1e-2)
    again = written(peft_model(sharp=True, config=config), edits, method, STRONG, tmp_path, shared)
    assert again.reused is not None
    model.unload()
    assert_same_tensors(base_state(base), before)


def test_an_edit_can_be_written_into_a_conv1d(tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=["mlp.c_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    model = peft_model("gpt2", sharp=True, config=config)
    shared = SharedWork()
    edit = [WITH_SUBJECTS[0]]
    written(model, edit, "MEMIT", STRONG, tmp_path, shared)
    ((values, _),) = shared.values.values()
    (row,) = placed_rows(edit, make_tokenizer("llama2")).rows
    inputs = {"input_ids": row.input_ids[None], "attention_mask": None, "use_cache": False}
    states = LayersBehind(model, find_decoder_layers(model)[1], 1).states(inputs)
    torch.testing.assert_close(states[0, row.position], values.values[0], rtol=1e-2, atol=1e-2)


def test_a_band_of_layers_shares_the_work(tmp_path: Path) -> None:
    edits = [WITH_SUBJECTS[number] for number in (0, 1, 5)]
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 1], task_type="CAUSAL_LM")
    model, shared = peft_model(sharp=True, config=config), SharedWork()
    written(model, edits, "MEMIT", STRONG, tmp_path, shared)
    located = check_location(model, "MEMIT")
    assert [each.number for each in located] == [0, 1]
    assert all(each.delta.tensors()["weight"].any() for each in located)
    ((values, _),) = shared.values.values()
    row = placed_rows(edits, make_tokenizer("llama2")).rows[0]
    _, layers = find_decoder_layers(model)
    inputs = {"input_ids": row.input_ids[None], "attention_mask": None, "use_cache": False}
    with torch.no_grad():
        states = LayersBehind(model, layers, 1).states(inputs)
    torch.testing.assert_close(states[0, row.position], values.values[0], rtol=2e-2, atol=2e-2)


def test_ultraedit_moves_the_outputs_against_the_gradient(tmp_path: Path) -> None:
    model, tokenizer = peft_model(sharp=True), make_tokenizer("llama2")
    losses = []
    for rate in (1e-6, 1e-3):
        model = peft_model(sharp=True)
        settings = ClosedFormSettings(damping=1.0, rate=rate, edits_per_turn=4)
        written(model, WITH_SUBJECTS, "UltraEdit", settings, tmp_path)
        losses.append(loss_of(model, tokenizer))
    assert losses[1] < losses[0] < 1.001 * loss_of(peft_model(sharp=True), tokenizer)
    assert all(parameter.grad is None for parameter in model.parameters())


def loss_of(model: Any, tokenizer: Any) -> float:
    total = 0.0
    for row in placed_rows(WITH_SUBJECTS, tokenizer).rows:
        labels = row.input_ids.clone()
        labels[: row.target_start] = -100
        with torch.no_grad():
            total += float(model(input_ids=row.input_ids[None], labels=labels[None]).loss)
    return total


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("MEMIT", {"target_modules": ["up_proj"]}, "needs one module in each edited layer whose 32 outputs"),
        ("AlphaEdit", {"target_modules": ["down_proj", "o_proj"], "layers_to_transform": [1]}, "one module in each"),
        ("UltraEdit", {"target_modules": ["input_layernorm"]}, "weight of a Linear or Conv1D; found model.layers"),
    ],
)
def test_a_location_that_does_not_suit_is_refused(method: Any, config: dict[str, Any], message: str) -> None:
    model = peft_model(config=LocFTConfig(task_type="CAUSAL_LM", **config))
    with pytest.raises(ValueError, match=message):
        check_location(model, method)


# ---------------------------------------------------------------------- settings


def test_the_rule_keeps_what_is_better_option_by_option() -> None:
    seen: list[RivalSettings] = []

    def score(settings: RivalSettings) -> float:
        seen.append(settings)
        best = {150.0: 0.4, 15.0: 0.3}.get(settings.method.damping, 0.1)
        return best + (0.2 if settings.layers == "early" else 0) - (0.1 if settings.method.search.clamp > 1 else 0)

    chosen, trials = choose_settings("MEMIT", score)
    assert (chosen.layers, chosen.method.damping, chosen.method.search.clamp) == ("early", 150.0, 0.75)
    assert seen[0] == RivalSettings("given", PUBLISHED["MEMIT"])
    assert len(seen) == len(set(seen)) == len(trials)  # none is tried twice
    assert max(trial["score"] for trial in trials) == pytest.approx(0.6)


@pytest.mark.parametrize("method", list(OPTIONS))
def test_settings_are_restored_from_their_description(method: Any) -> None:
    settings = RivalSettings("early", PUBLISHED[method]).with_option("damping", 7.0).with_option("clamp", 2.0)
    if method == "UltraEdit":
        settings = RivalSettings("early", PUBLISHED[method]).with_option("rate", 0.5)
    assert from_description(method, described(method, settings)) == settings


def test_early_layers_end_at_a_quarter_of_the_depth() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    assert early_layers(base_model(num_hidden_layers=32, **sizes)) == [4, 5, 6, 7, 8]
    assert early_layers(base_model()) == [0]


# ---------------------------------------------------------------------- the comparison


def few_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals_module, "SMALLEST_TUNING", 2)
    options: dict[Any, Any] = OPTIONS
    for method, name, values in (("MEMIT", "damping", (1.0,)), ("UltraEdit", "rate", (1e-3,))):
        monkeypatch.setitem(options, method, ((name, values),))


def test_rivals_are_compared_on_the_same_base_and_chosen_on_other_edits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_options(monkeypatch)
    model, tokenizer = base_model(max_position_embeddings=256), make_tokenizer("llama2")
    before = base_state(model)
    methods = ["retrieval", "retrieval-gated", "MEMIT", "UltraEdit", "LocFT-balanced"]
    arguments: dict[str, Any] = {
        "methods": methods,
        "tuning_edits": WITH_SUBJECTS[4:],
        "num_seeds": 2,
        "evaluation": QUICK,
    }
    args = args_for(tmp_path)
    results = compare_baselines(model, tokenizer, WITH_SUBJECTS[:5], args, **arguments)
    assert_same_tensors(base_state(model), before)
    assert [(each.baseline.method, each.setting["seed"]) for each in results] == [
        (method, seed) for method in methods for seed in (42, 43)
    ]
    memit = results[4]
    assert list(memit.chosen) == ["damping", "layers"]
    assert memit.notes[0] == "MEMIT: settings chosen on 3 other edits (2 trials)."  # the fifth edit is a reported one
    assert all(each.peak_bytes > 1e6 and each.processor_seconds > 0 for each in results)
    assert results[0].metrics == results[1].metrics  # no seed in retrieval
    table = (tmp_path / "baselines.md").read_text()
    assert "± 0.000" in table and memit.notes[0] in table
    assert (tmp_path / "baselines.tex").read_text().startswith("% \\usepackage{booktabs}\n\\begin{tabular}{ll")
    assert "2210.07229" in (tmp_path / "baselines.bib").read_text()
    assert "2410.02355" not in (tmp_path / "baselines.bib").read_text()  # it was not compared
    rows = (tmp_path / "baselines.csv").read_text().splitlines()
    assert rows[0] == "method,setting,seed,metric,value,low,high"
    assert sum(row.startswith("MEMIT,") and ",43,peak_bytes," in row for row in rows) == 1
    assert (tmp_path / "baselines.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(rivals_module.Rivals, "measure", None)  # all results are there
    assert compare_baselines(model, tokenizer, WITH_SUBJECTS[:5], args, **arguments) == results


def test_any_metric_of_the_report_can_be_a_column(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"methods": ["retrieval"], "evaluation": QUICK}
    model, tokenizer = base_model(max_position_embeddings=256), make_tokenizer("llama2")
    compare_baselines(
        model, tokenizer, WITH_SUBJECTS, args_for(tmp_path), columns=["locality_first_word_unchanged"], **arguments
    )
    first = (tmp_path / "baselines.md").read_text().splitlines()[0]
    assert first == "| method | setting | locality_first_word_unchanged | processor s | peak MB |"
    with pytest.raises(ValueError, match="columns: found belief; these were measured: reliability_exact_match"):
        compare_baselines(model, tokenizer, WITH_SUBJECTS, args_for(tmp_path), columns=["belief"], **arguments)


def test_methods_that_do_not_suit_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = base_model(max_position_embeddings=256), make_tokenizer("llama2")
    location = LocFTConfig(target_modules=["up_proj"], layers_to_transform=[1])
    with pytest.raises(ValueError, match="methods: MEMIT writes hidden states"):
        compare_baselines(model, tokenizer, PROBED, args_for(tmp_path), location=location, methods=["MEMIT"])
    rivals = rivals_module.Rivals(model, tokenizer, PROBED, (), location, args_for(tmp_path), tmp_path)
    from peft_locft.workflows.baselines import ALL_METHODS, _suited

    with caplog.at_level(logging.WARNING):
        assert set(ALL_METHODS) - set(_suited(rivals, None)) == {"MEMIT", "AlphaEdit", "retrieval-gated"}
    assert "Left out: retrieval-gated: no edit has a subject" in caplog.text


def test_without_other_edits_the_published_settings_are_used_and_the_table_says_so(tmp_path: Path) -> None:
    model, tokenizer = base_model(), make_tokenizer("llama2")
    evaluation = EvaluationConfig(protocols=["token_accuracy"])
    (result,) = compare_baselines(
        model, tokenizer, PROBED, args_for(tmp_path), methods=["UltraEdit"], evaluation=evaluation
    )
    assert result.chosen["rate"] == 1e-6
    assert result.notes == ["UltraEdit: published settings, as there are no other edits to choose them on."]


def test_usage_has_the_largest_memory_at_one_time() -> None:
    with measured_usage(torch.device("cpu")) as small:
        pass
    with measured_usage(torch.device("cpu")) as large:
        torch.ones(50_000_000).sum()  # 200 MB
        torch.ones(50_000_000).sum()
    assert large.peak_bytes - small.peak_bytes > 1e8
    assert large.processor_seconds > 0 and large.seconds > 0


def test_a_control_has_no_target() -> None:
    assert PlacedRow(0, torch.tensor([1, 2]), 0, 2).is_control
    assert set(control_rows(WITH_SUBJECTS[3:6], make_tokenizer("llama2"))) == {0, 2}
