"""The trainer's laws, where it trains on more than edits: variants, kept facts, projectors."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import assert_same_tensors
from tiny_training import EDITS, make_trainer, peft_model, trained
from tokenizers_for_tests import make_tokenizer
from transformers import TrainerCallback

from peft_locft import BreadthFirstTrainer, Edit, LocFTConfig
from peft_locft.data.encoding import encode_prompts
from peft_locft.data.relations import answered_otherwise
from peft_locft.training import training_data
from peft_locft.training.recipes import RECIPES

SUBJECTS = ["France", "Spain", "Spain", "France", "river", "Dave", "city", "city"]
FACTS = [replace(edit, subject=subject) for edit, subject in zip(EDITS, SUBJECTS, strict=True)]
WORDS = [f"{verb} {noun}" for verb in ("is", "was", "has", "said") for noun in ("the", "in", "of")]
ALL: dict[str, Any] = {
    "recipe": "balanced",
    "num_prefixes": 3,
    "num_concatenated": 1,
    "retained_answer_tokens": 3,
    "retained_subjects": 2,
    "retained_per_edit": 1.0,
    "preserve_tokens": 600,
}
LIKELIHOOD = ALL | {"retained_loss": "likelihood", "preserve_soft_strength": 0.0, "preserve_energy_share": 0.3}


def trainer(folder: Path, edits: list[Edit] = FACTS, family: str = "llama", **arguments: Any) -> BreadthFirstTrainer:
    # the experts of a mixture are one parameter, which has no projector
    config = LocFTConfig(target_modules=["o_proj"], layers_to_transform=[1]) if family == "mixtral" else None
    return make_trainer(folder, peft_model(family, config), edits, **(ALL | arguments))


def run(folder: Path, **arguments: Any) -> BreadthFirstTrainer:
    made = trainer(folder, **arguments)
    made.train()
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox", "mixtral"])
def test_all_of_it_trains_in_any_family_and_nothing_but_the_delta(family: str, tmp_path: Path) -> None:
    made = trainer(tmp_path, family=family)
    frozen = {name: p.detach().clone() for name, p in made.model.named_parameters() if not p.requires_grad}
    before = trained(made.model)
    made.train()
    assert_same_tensors({name: p for name, p in made.model.named_parameters() if not p.requires_grad}, frozen)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained(made.model).items())
    assert made.loss_history.retained_losses[-1] > 0
    assert len(made.epoch_losses) == 3


def test_other_facts_about_an_edits_subject_go_with_the_edit(tmp_path: Path) -> None:
    made = trainer(tmp_path, recipe="published", num_concatenated=0, retained_subjects=0, retained_relations=2)
    counts, prompts = made.data.rows.num_own_retained, iter(made.data.prompts)
    assert sum(counts) == made.data.rows.num_retained == len(set(made.data.prompts))  # some edits share a subject
    for fact, count in zip(FACTS, counts, strict=True):
        own = list(islice(prompts, count))
        assert count <= 2 and all((fact.subject or "") in prompt for prompt in own)
    assert not {edit.prompt for edit in FACTS} & set(made.data.prompts)


def test_what_the_base_answers_like_the_edit_is_no_other_fact() -> None:
    model, tokenizer = peft_model(sharp=True), make_tokenizer("llama2")
    edits = FACTS[:3]
    # those that end as the prompt does are mostly answered alike
    candidates = [
        [f"{each} {fact.prompt}" for each in WORDS[:6]] + [f"{fact.subject} {each}" for each in WORDS]
        for fact in edits
    ]

    def begins(prompt: str) -> int:
        ids = torch.tensor(encode_prompts([prompt], tokenizer))
        return int(model.get_base_model()(ids).logits[0, -1].argmax())

    expected = [
        [text for text in own if begins(text) != begins(edit.prompt)]
        for edit, own in zip(edits, candidates, strict=True)
    ]
    assert 0 < sum(map(len, expected)) < sum(map(len, candidates))
    assert answered_otherwise(model, tokenizer, edits, candidates, 99) == expected
    assert answered_otherwise(model, tokenizer, edits, candidates, 1) == [own[:1] for own in expected]
    assert answered_otherwise(model, tokenizer, edits, [[], [], []], 2) == [[], [], []]


@pytest.mark.parametrize("recipe", [ALL, LIKELIHOOD], ids=["kl", "likelihood"])
def test_the_same_seed_gives_the_same_weights_and_another_others(recipe: dict[str, Any], tmp_path: Path) -> None:
    one, same, other = (run(tmp_path, **(recipe | {"seed": seed})) for seed in (1, 1, 2))
    assert_same_tensors(trained(same.model), trained(one.model))
    assert same.epoch_losses == one.epoch_losses
    assert other.data.prefixes != one.data.prefixes
    assert other.epoch_losses != one.epoch_losses


@pytest.mark.parametrize("recipe", [ALL, LIKELIHOOD], ids=["kl", "likelihood"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    arguments = recipe | {"save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path / "whole", **arguments)
    cut = trainer(tmp_path / "cut", **arguments, callbacks=[Stop()])
    cut.train()
    resumed = trainer(tmp_path / "cut", **arguments)
    resumed.train(resume_from_checkpoint=True)
    assert_same_tensors(trained(resumed.model), trained(whole.model))
    assert resumed.loss_history == whole.loss_history


@pytest.mark.parametrize("change", [{"activation_cache": "off"}, {"max_tokens_per_micro_batch": 24}])
def test_cache_and_micro_batches_change_nothing_but_speed(change: dict[str, Any], tmp_path: Path) -> None:
    fast = {"preserve_soft_strength": 0.0, "learning_rate": 2e-2}  # or what is kept is hardly moved at all
    plain, other = run(tmp_path, **fast), run(tmp_path, **fast, **change)
    assert other.epoch_losses == pytest.approx(plain.epoch_losses, rel=1e-5)
    assert other.loss_history.retained_losses == pytest.approx(plain.loss_history.retained_losses, rel=1e-4)


def test_what_is_kept_is_held(tmp_path: Path) -> None:
    """With a large weight on it, the kept prompts' distributions move less than without."""
    loose = run(tmp_path, retained_weight=1e-6, preserve_soft_strength=0.0, learning_rate=2e-2, num_train_epochs=8)
    held = run(tmp_path, retained_weight=1e3, preserve_soft_strength=0.0, learning_rate=2e-2, num_train_epochs=8)
    assert held.loss_history.retained_losses[-1] / 1e3 < 0.2 * loose.loss_history.retained_losses[-1] / 1e-6


def test_the_floor_is_held_against_the_edits_alone(tmp_path: Path) -> None:
    model = peft_model(sharp=True)
    made = make_trainer(
        tmp_path, model, FACTS, **(ALL | {"retained_weight": 1e6, "loss_floor": 0.5, "num_train_epochs": 2})
    )
    made.train()
    assert made.loss_history.retained_losses[0] > 0.5
    assert made.epoch_losses[0] == made.loss_history.state()["epoch_losses"][0] < 100


def test_what_is_asked_about_other_subjects_is_about_names_of_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompts() -> list[str]:
        return list(trainer(tmp_path).data.prompts)

    known = {edit.subject for edit in FACTS if edit.subject}
    monkeypatch.setattr(training_data, "generate_subjects", lambda *args, **kwargs: ("Ada of Wessex",))
    assert prompts() and all("Ada of Wessex" in prompt for prompt in prompts())
    # a base that makes up none
    monkeypatch.setattr(training_data, "generate_subjects", lambda *args, **kwargs: ())
    assert prompts() and all(any(name in prompt for name in known) for prompt in prompts())


def test_training_paraphrases_are_trained_and_are_no_edits(tmp_path: Path) -> None:
    edits = [replace(EDITS[0], paraphrases=("France has the capital", "The capital city is")), *EDITS[1:]]
    made = trainer(tmp_path, edits, recipe="published", num_prefixes=0, num_concatenated=0, retained_subjects=0)
    assert made.data.counts == {"paraphrases": 2}
    assert made.losses.rows.num_variants == [2] + [0] * 7
    made.train()
    assert len(made.epoch_losses) == 3


def test_what_a_run_was_trained_on_is_recorded(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.save_model()
    recorded = json.loads((tmp_path / "locft_provenance.json").read_text())
    assert recorded["augmentation"]["prefixes"] == list(made.data.prefixes)
    counts = recorded["augmentation"]["counts"]
    assert counts["prefixed"] == 16 and counts["concatenated"] == 8
    assert recorded["recipe"]["recipe"] == "balanced"
    assert recorded["recipe"]["preserve_soft_strength"] == RECIPES["balanced"]["preserve_soft_strength"]


@pytest.mark.parametrize(("per_edit", "count"), [(1, 8), (2, 16), (9, 24)])
def test_an_edit_stands_behind_some_of_the_prefixes(per_edit: int, count: int, tmp_path: Path) -> None:
    data = trainer(tmp_path, prefixes_per_edit=per_edit, num_concatenated=0).data
    assert data.counts["prefixed"] == count == sum(data.rows.num_variants)
    with_all = trainer(tmp_path, recipe="published", num_concatenated=0, retained_subjects=0).data
    assert with_all.counts["prefixed"] == 24


def test_depth_first_trains_edits_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trains one edit and nothing else"):
        trainer(tmp_path, edit_order="depth_first", per_device_train_batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "best"}, "recipe='best': expected one of published, balanced"),
        ({"retained_loss": "mse"}, "retained_loss='mse': expected one of kl, likelihood"),
        ({"num_prefixes": -1}, "num_prefixes=-1: expected 0 or more"),
        ({"prefixes_per_edit": 0}, "prefixes_per_edit=0: expected 1 or more"),
        ({"variants_per_epoch": 0}, "variants_per_epoch=0: expected a number above 0"),
        ({"preserve_tokens": 0}, "preserve_tokens=0: expected 1 or more"),
        ({"retained_weight": float("nan")}, "retained_weight=nan: expected 0 or more"),
        ({"preserve_soft_strength": -1.0}, "preserve_soft_strength=-1.0: expected 0 or more"),
        ({"preserve_energy_share": 1.5}, "preserve_energy_share=1.5: expected 0 to 1"),
        ({"objective": "prompt_last"}, "objective='prompt_last' scores"),
    ],
)
def test_fields_out_of_range_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **arguments)


def test_a_paraphrase_that_is_evaluated_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    edits = [replace(EDITS[0], paraphrases=("the CAPITAL  of France",), rephrasings=("The capital of France",))]
    with pytest.raises(ValueError, match="paraphrase"):
        trainer(tmp_path, edits)


def test_edits_to_continue_with_need_facts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_concatenated=1 needs retained facts with answers"):
        trainer(tmp_path, EDITS)
