"""The file between a search and training: what it holds, and whom it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from tiny_models import build, every_family, locations
from tiny_searches import preset_for
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer

from peft_locft import BreadthFirstConfig, LocationPreset, train_edits


@every_family
def test_it_comes_back_as_it_was_and_names_the_same_weights(family: str, tmp_path: Path) -> None:
    model = build(family)
    for module, layer, num_layers in (("down", 2, 1), ("entire-layer", 2, 1), ("down", 1, 2)):
        preset = preset_for(model, module, layer, num_layers)
        preset.save(tmp_path / "best.json")
        loaded = LocationPreset.load(tmp_path / "best.json")
        assert loaded == preset
        found = locations(get_peft_model(build(family), loaded.config_for(model.config)))
        named = {f"{name}.weight" for name in preset.target_modules} | set(preset.target_parameters)
        assert set(found) == named


def test_a_band_has_the_weights_of_all_its_layers(tmp_path: Path) -> None:
    preset = preset_for(base_model(), "down", 1, 2, "subject")
    assert preset.target_modules == ("model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj")
    preset.save(tmp_path / "best.json")
    assert LocationPreset.load(tmp_path / "best.json") == preset


def test_a_file_from_before_there_were_bands_is_one_layer(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    preset_for(base_model()).save(path)
    content = json.loads(path.read_text())
    assert (content.pop("num_layers"), content.pop("gradient_tokens")) == (1, None)
    path.write_text(json.dumps(content))
    assert LocationPreset.load(path) == preset_for(base_model())


def test_training_takes_it(tmp_path: Path) -> None:
    base_model().save_pretrained(tmp_path / "base")
    make_tokenizer("llama2").save_pretrained(tmp_path / "base")
    args = BreadthFirstConfig(output_dir=str(tmp_path / "out"), num_train_epochs=1, use_cpu=True, disable_tqdm=True)
    summary = train_edits(tmp_path / "base", EDITS[:2], preset_for(base_model()), args)
    assert set(summary.config.target_modules) == {"model.layers.1.mlp.up_proj"}
    assert summary.config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (build("qwen2"), "a qwen2 model with 3 layers of width 32"),
        (build("llama", num_hidden_layers=4), "a llama model with 4 layers of width 32"),
    ],
)
def test_another_model_is_refused(model: Any, found: str, tmp_path: Path) -> None:
    preset = preset_for(build("llama"))
    with pytest.raises(
        ValueError, match=f"location: expected a llama model with 3 layers of width 32; found {found}. Run `locft"
    ):
        preset.config_for(model.config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"found {found}"):
        train_edits(tmp_path, EDITS, preset)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    with pytest.raises(ValueError, match=r"best.json: cannot read a location: .*No such file"):
        LocationPreset.load(path)
    preset_for(build("llama")).save(path)
    whole = json.loads(path.read_text())
    wrong: list[Any] = [
        [],
        {"peft_type": "LOCFT"},
        whole | {"version": 2},
        whole | {"target_modules": "down_proj"},
        whole | {"target_modules": [], "target_parameters": []},
        whole | {"learning_rate": 0.0},
        whole | {"learning_rate": "1e-3"},
        whole | {"model": "llama"},
        whole | {"gradient_tokens": "object"},
        whole | {"unknown": 1},
    ]
    for content in wrong:
        path.write_text(json.dumps(content))
        with pytest.raises(
            ValueError, match=r"best.json: found no location \(.*expected a best.json of `locft locate`"
        ):
            LocationPreset.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot read a location"):
        LocationPreset.load(path)
