"""`recipe="balanced"` from its one word: the location it takes, and the call and command that run it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from location_families import FAMILIES as OTHERS
from location_families import build_family
from tiny_models import build
from tiny_training import EDITS, base_model, make_trainer, peft_model
from tokenizers_for_tests import make_tokenizer
from transformers import HfArgumentParser

from peft_locft import BreadthFirstConfig, Edit, LocFTConfig, balanced_config, train_edits
from peft_locft.cli.commands import main

BALANCED: dict[str, Any] = {
    "recipe": "balanced",
    "num_prefixes": 2,
    "preserve_tokens": 400,
    "learning_rate": 1e-2,
}
EXPECTED = {
    "llama": [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 2)],
    "gpt2": [f"transformer.h.{layer}.mlp.c_proj" for layer in (0, 1, 2)],
    "gpt_neox": [f"gpt_neox.layers.{layer}.mlp.dense_4h_to_h" for layer in (0, 1, 2)],
    "mistral": [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1, 2)],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    base_model(sharp=True).save_pretrained(folder)
    make_tokenizer("llama2").save_pretrained(folder)
    return folder


def recipe(folder: Path, **fields: object) -> BreadthFirstConfig:
    given = {"recipe": "balanced", "num_prefixes": 3, "preserve_tokens": 400, "num_train_epochs": 2} | fields
    return BreadthFirstConfig(
        output_dir=str(folder),
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        **given,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("family", EXPECTED)
def test_the_location_is_down_projections_whatever_is_published(family: str) -> None:
    found = balanced_config(build(family), scale=0.5)
    assert sorted(found.target_modules or ()) == EXPECTED[family]
    assert found.scale == 0.5


def test_it_is_as_deep_in_a_deep_model() -> None:
    found = balanced_config(build("llama", num_hidden_layers=30))
    assert sorted(found.target_modules or ()) == [f"model.layers.{layer}.mlp.down_proj" for layer in range(22, 25)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "dbrx", "jetmoe"])
def test_experts_in_one_parameter_have_no_projector(family: str) -> None:
    model = build(family) if family == "mixtral" else build_family(family)
    with pytest.raises(ValueError, match=r"\.0\.\S+ holds all experts in one parameter.* Name Linear modules"):
        balanced_config(model)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "deepseek_v3", "llama4_text", "gemma3n_text", "mamba"])
def test_the_location_is_the_one_rule_in_each_layer(family: str) -> None:
    expected = [f"{OTHERS[family].stack}.{layer}.{down}" for layer, down in enumerate(OTHERS[family].downs)]
    assert sorted(balanced_config(build_family(family)).target_modules or ()) == expected


def test_one_word_trains_it(saved: Path, tmp_path: Path) -> None:
    train_edits(saved, EDITS, args=recipe(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == EXPECTED["llama"]
    assert "| Recipe | balanced, breadth-first, objective" in (tmp_path / "out" / "README.md").read_text()


def test_a_location_that_is_given_goes_before_it(saved: Path, tmp_path: Path) -> None:
    train_edits(saved, EDITS, LocFTConfig(layers_to_transform=[1]), args=recipe(tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["model.layers.1.mlp.down_proj"]


def test_the_command_takes_the_recipe_and_the_weakest_delta(saved: Path, tmp_path: Path) -> None:
    edits = tmp_path / "edits.jsonl"
    edits.write_text("".join(json.dumps({"prompt": e.prompt, "target": e.target}) + "\n" for e in EDITS))
    words = f"train --model_name_or_path {saved} --edits {edits} --output_dir {tmp_path / 'out'} --use_cpu true"
    words += " --recipe balanced --num_prefixes 2 --preserve_tokens 400 --learning_rate 3e-2 --loss_floor 1e-3"
    words += " --num_train_epochs 40"  # enough for half a delta to answer something
    assert main([*words.split(), "--keep_reliability", "0.1", "--layers_to_transform", "1"]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert 0.5 <= config["scale"] < 1.0


@pytest.mark.parametrize("reliability", [0.0, 1.5])
def test_a_reliability_is_a_share(reliability: float, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_reliability=.* expected a number above 0, at most 1"):
        train_edits(saved, EDITS, args=recipe(tmp_path / "out"), keep_reliability=reliability)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"retained_facts": "nothing.txt"}, FileNotFoundError, r"nothing\.txt: found no such file"),
        ({"retained_facts": "locality"}, ValueError, "found 0 prompts in the edits"),
        (
            {"preserve_text": "nothing.txt"},
            ValueError,
            r"neither a file nor a dataset on the Hub named 'nothing\.txt'",
        ),
    ],
)
def test_what_it_names_is_read_before_the_model(
    fields: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    plain = [Edit(prompt=edit.prompt, target=edit.target) for edit in EDITS]
    with pytest.raises(error, match=message):
        train_edits("no/such-model", plain, args=recipe(tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()


def test_a_text_that_nothing_reads_is_not_looked_for(saved: Path, tmp_path: Path) -> None:
    args = recipe(tmp_path / "out", recipe="published", num_prefixes=0, preserve_text="nothing.txt")
    train_edits(saved, EDITS, args=args)


@pytest.mark.parametrize(("rate", "batch_size", "steps"), [(1e-4, 4, 2), (5e-3, 4, 2), (5e-3, 1, 8)])
def test_an_epoch_takes_the_same_share_off_the_delta(rate: float, batch_size: int, steps: int, tmp_path: Path) -> None:
    own: dict[str, Any] = {"learning_rate": rate, "per_device_train_batch_size": batch_size, "num_train_epochs": 1}
    trainer = make_trainer(tmp_path, peft_model(), delta_decay=0.5, **own)
    trainer.train()
    assert trainer.state.global_step == steps
    assert [group["weight_decay"] * rate * steps for group in trainer.optimizer.param_groups] == pytest.approx(
        [0.5] * 2
    )


def test_a_recipe_is_open_to_what_is_given(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--recipe", "balanced", "--delta_decay", "0.25", "--num_train_epochs", "3"]
    (args,) = HfArgumentParser(BreadthFirstConfig).parse_args_into_dataclasses(words)
    assert (args.delta_decay, args.num_train_epochs, args.lr_scheduler_type) == (0.25, 3, "linear")
    assert recipe(tmp_path, delta_decay=0.0).delta_decay == 0.0
    published = BreadthFirstConfig(output_dir=str(tmp_path))
    assert (published.delta_decay, published.adam_epsilon, published.weight_decay) == (0.0, 1e-8, 0.0)
    assert (published.learning_rate, args.learning_rate) == ("auto", "auto")
    assert (published.relative_learning_rate, args.relative_learning_rate) == (0.025, 0.06)
    assert (published.num_train_epochs, published.lr_scheduler_type) == (50, "constant")
    seeded: dict[str, Any] = {"seed": 1}
    assert replace(args, **seeded).delta_decay == 0.25


def test_a_weight_of_the_model_itself_is_not_drawn_to_zero(tmp_path: Path) -> None:
    plain = base_model().requires_grad_(False)
    plain.model.layers[1].mlp.down_proj.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"delta_decay=0\.05 .*, and model\.layers\.1\.\S*weight is a weight of the"):
        make_trainer(tmp_path, plain, **BALANCED).train()
    make_trainer(tmp_path, plain, **BALANCED, delta_decay=0.0).train()
    saved_too = LocFTConfig(layers_to_transform=[1], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"and \S*lm_head\S* is a weight of the model itself"):
        make_trainer(tmp_path, peft_model("llama", saved_too), **BALANCED, preserve_soft_strength=0.0).train()
