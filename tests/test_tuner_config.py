"""What a configuration accepts, refuses with a message, and keeps from training to loading."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES, build, every_family, locations, logits, randomize, same_bits

from peft_locft import LocFTConfig

DOWN = "model.layers.1.mlp.down_proj"


# ---------------------------------------------------------------- fields


def test_the_defaults_leave_the_location_open() -> None:
    config = LocFTConfig()
    assert (config.target_modules, config.target_parameters, config.layers_to_transform) == (None, None, None)
    assert (config.scale, config.delta_dtype, config.init_weights, config.train_bias) == (1.0, None, True, False)


def test_a_layer_number_stays_a_number_and_names_are_a_set() -> None:
    config = LocFTConfig(target_modules=["down_proj", "up_proj"], exclude_modules=["x"], layers_to_transform=0)
    assert config.layers_to_transform == 0
    assert config.target_modules == {"down_proj", "up_proj"}
    assert config.exclude_modules == {"x"}


def test_a_torch_dtype_is_its_name() -> None:
    assert LocFTConfig(delta_dtype=torch.bfloat16).delta_dtype == "bfloat16"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_modules": ".*down_proj", "layers_to_transform": [1]},
            r"^`layers_to_transform` cannot be used when `target_modules` is a str\. "
            r"LocFTConfig\.layers_to_transform=\[1\] has no effect with the regular expression .*'\.\*down_proj'",
        ),
        (
            {"target_modules": ".*down_proj", "layers_pattern": "h"},
            r"^`layers_pattern` cannot .* is a str\. LocFTConfig\.layers_pattern='h' has no effect with the regular",
        ),
        (
            {"target_modules": ["down_proj"], "layers_pattern": "h"},
            r"^When `layers_pattern` is specified, `layers_to_transform` must also be specified\. "
            r"LocFTConfig\.layers_pattern='h' has no effect without layers_to_transform\. Add layers_to",
        ),
        ({"target_modules": "entire-layer"}, r"'entire-layer' needs a layer: add layers_to_transform=\[23\]"),
        ({"layers_to_transform": []}, r"layers_to_transform=\[\]: expected one or more layer numbers"),
        ({"layers_to_transform": [-1]}, r"layers_to_transform=\[-1\]: expected .* 0 or above"),
        ({"layers_to_transform": -1}, r"layers_to_transform=-1: expected .* 0 or above"),
        ({"layers_to_transform": ["1"]}, r"layers_to_transform=\['1'\]: expected"),
        ({"layers_to_transform": True}, "layers_to_transform=True: expected"),
        ({"layers_to_transform": [True]}, r"layers_to_transform=\[True\]: expected"),
        ({"layers_to_transform": "1"}, r"layers_to_transform='1': expected"),
        ({"layers_to_transform": [1.0]}, r"layers_to_transform=\[1\.0\]: expected"),
        ({"delta_dtype": "int8"}, "delta_dtype='int8': expected one of float32, bfloat16, float16"),
        ({"delta_dtype": torch.float64}, "delta_dtype='float64': expected one of float32, bfloat16, float16"),
        ({"scale": float("nan")}, "scale=nan: expected a finite number"),
        ({"scale": float("-inf")}, "scale=-inf: expected a finite number"),
        ({"scale": "2"}, "scale='2': expected a finite number"),
        ({"scale": True}, "scale=True: expected a finite number"),
        ({"scale": None}, "scale=None: expected a finite number"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocFTConfig(**fields)


@pytest.mark.parametrize("word", ["all-linear", "ALL-LINEAR", "Entire-Layer"])
def test_the_words_are_no_regular_expressions(word: str) -> None:
    assert LocFTConfig(target_modules=word, layers_to_transform=[1]).target_modules == word.lower()


# ---------------------------------------------------------------- on disk and in copies


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    config = LocFTConfig(
        target_modules=["down_proj"],
        exclude_modules=["layers.0.mlp.down_proj"],
        layers_to_transform=[0, 1],
        layers_pattern="layers",
        target_parameters=["experts.down_proj"],
        modules_to_save=["lm_head"],
        train_bias=True,
        delta_dtype="float16",
        scale=0.5,
        init_weights=False,
        base_sha256={"a": "b"},
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LocFTConfig)
    assert loaded == config


def test_what_hot_swap_asks_for_is_not_saved(tmp_path: Path) -> None:
    config = LocFTConfig(scale=0.5)
    assert (config.lora_alpha / config.r, config.rank_pattern, config.alpha_pattern) == (0.5, {}, {})
    assert not config.use_rslora
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LOCFT"
    assert not {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"} & saved.keys()


def test_copies_are_equal() -> None:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1], scale=0.5)
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


@every_family
def test_the_saved_location_is_resolved(family: str, tmp_path: Path) -> None:
    model = get_peft_model(build(family), LocFTConfig())
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    names = set(saved["target_modules"]) | set(saved["target_parameters"] or [])
    assert names == {name.removesuffix(".weight") for name in locations(model)}
    assert saved["layers_to_transform"] is None


def test_the_callers_configuration_of_the_model_is_not_changed() -> None:
    for family in FAMILIES:
        model = build(family)
        before = model.config.to_dict()
        get_peft_model(model, LocFTConfig())
        assert model.config.to_dict() == before


# ---------------------------------------------------------------- delta_dtype


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("delta_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_the_deltas_dtype_is_kept_everywhere(
    delta_dtype: str,
    base_dtype: torch.dtype,
    autocast_adapter_dtype: bool,
    low_cpu_mem_usage: bool,
    tmp_path: Path,
) -> None:
    dtype = getattr(torch, delta_dtype)
    config = LocFTConfig(delta_dtype=delta_dtype)
    model = get_peft_model(
        build("llama", base_dtype),
        config,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    if low_cpu_mem_usage:
        ((delta, _),) = locations(model).values()
        assert delta.is_meta
        return
    randomize(model)
    unmerged = logits(model)
    model.save_pretrained(tmp_path)
    for loaded_with in (True, False):
        loaded = PeftModel.from_pretrained(
            build("llama", base_dtype),
            tmp_path,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=loaded_with,
        )
        ((delta, _),) = locations(loaded).values()
        assert delta.dtype == dtype
        assert same_bits(logits(loaded), unmerged)


# ---------------------------------------------------------------- scale


def test_scale_is_the_strength_of_the_delta() -> None:
    base = logits(build("llama"))
    full = get_peft_model(build("llama"), LocFTConfig())
    randomize(full)
    ((delta, scale),) = locations(full).values()
    assert scale == 1.0
    half = get_peft_model(build("llama"), LocFTConfig(scale=0.5))
    randomize(half)
    none = get_peft_model(build("llama"), LocFTConfig(scale=0))
    randomize(none)
    assert same_bits(logits(none), base)
    assert not same_bits(logits(half), logits(full))
    delta.data.mul_(0.5)
    assert same_bits(logits(half), logits(full))


def test_set_scale_is_as_if_configured_and_is_saved(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), LocFTConfig(scale=0.25))
    randomize(model)
    expected = logits(model)
    model.base_model.set_scale("default", 3)
    assert not same_bits(logits(model), expected)
    model.base_model.set_scale("default", 0.25)
    assert same_bits(logits(model), expected)
    model.base_model.set_scale("default", 3.0)
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))


def test_set_scale_refuses_what_would_have_no_effect() -> None:
    model = get_peft_model(build("llama"), LocFTConfig())
    with pytest.raises(ValueError, match=r"No adapter 'other': expected one of \['default'\]"):
        model.base_model.set_scale("other", 1.0)
    with pytest.raises(ValueError, match="scale=inf: expected a finite number"):
        model.base_model.set_scale("default", float("inf"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot set the scale of adapter 'default' while it is merged"):
        model.base_model.set_scale("default", 2.0)
    layer = model.base_model.model.get_submodule(DOWN)
    with pytest.raises(ValueError, match="Cannot set the scale of adapter 'default' while it is merged"):
        layer.set_scale("default", 2.0)
    assert layer.scaling == {"default": 1.0}


# ---------------------------------------------------------------- init_weights


def test_random_deltas_are_not_the_identity() -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LocFTConfig(init_weights=False))
    ((delta, _),) = locations(model).values()
    assert 0.05 < delta.std() < 0.2
    assert not same_bits(logits(model), logits(build("llama")))
