"""PEFT's own conventions, where a user of other PEFT methods relies on them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import assert_same_tensors, base_state, build, every_family, locations, logits, randomize, same_bits
from torch import nn

from peft_locft import LocFTConfig

# PEFT's own warning before it unmerges
was_merged = pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
NARROW = (torch.bfloat16, torch.float16)
HEAD: dict[str, Any] = {"modules_to_save": ["lm_head"]}
TOKENS: dict[str, Any] = {"trainable_token_indices": [1, 2]}


def delta_dtypes(model: Any, adapter_name: str = "default") -> set[torch.dtype]:
    return {delta.dtype for delta, _ in locations(model, adapter_name).values()}


# ---------------------------------------------------------------- autocast_adapter_dtype


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
def test_without_autocast_a_delta_has_the_dtype_of_its_base(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = LocFTConfig(train_bias=True)
    model = get_peft_model(build(family, dtype), config, autocast_adapter_dtype=False)
    model.add_adapter("wide", LocFTConfig())
    model.add_adapter("narrow", LocFTConfig(), autocast_adapter_dtype=False)
    assert (delta_dtypes(model), delta_dtypes(model, "wide")) == ({dtype}, {torch.float32})
    assert delta_dtypes(model, "narrow") == {dtype}
    randomize(model)
    unmerged = logits(model)
    model.merge_adapter()
    assert same_bits(logits(model), unmerged)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["delta_dtype"] is None
    for autocast in (True, False):
        for low_cpu_mem_usage in (True, False):
            loading = {"autocast_adapter_dtype": autocast, "low_cpu_mem_usage": low_cpu_mem_usage}
            loaded = PeftModel.from_pretrained(build(family, dtype), tmp_path, **loading)
            loaded.load_adapter(tmp_path, "again", **loading)
            expected = {torch.float32 if autocast else dtype}
            assert (delta_dtypes(loaded), delta_dtypes(loaded, "again")) == (expected, expected)
            assert same_bits(logits(loaded), unmerged), "the wider dtype holds the same values"


def test_each_delta_has_the_dtype_of_its_own_base_tensor() -> None:
    base = build("llama", torch.bfloat16)
    base.model.norm.float()
    config = LocFTConfig(target_modules=["model.norm", "down_proj"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    found = {name: delta.dtype for name, (delta, _) in locations(model).items()}
    assert found.pop("model.norm.weight") == torch.float32
    assert set(found.values()) == {torch.bfloat16}


def test_a_base_of_float64_has_a_delta_of_float32() -> None:
    """An adapter holds no float64."""
    model = get_peft_model(build("llama", torch.float64), LocFTConfig(), autocast_adapter_dtype=False)
    assert delta_dtypes(model) == {torch.float32}


@pytest.mark.parametrize("dtype", NARROW)
def test_a_float32_adapter_is_rounded_only_on_request(dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(build("llama", dtype), LocFTConfig())
    randomize(model)
    model.save_pretrained(tmp_path)
    ((trained, _),) = locations(model).values()
    for autocast, expected in [(True, trained), (False, trained.to(dtype))]:
        loaded = PeftModel.from_pretrained(build("llama", dtype), tmp_path, autocast_adapter_dtype=autocast)
        ((delta, _),) = locations(loaded).values()
        assert same_bits(delta, expected)


def test_nobody_asked_for_another_dtype(tmp_path: Path) -> None:
    """Injection, and transformers' own adapters, know no autocast: the delta is float32."""
    injected = inject_adapter_in_model(LocFTConfig(), build("llama", torch.bfloat16))
    assert delta_dtypes(injected) == {torch.float32}
    model = build("llama", torch.bfloat16)
    model.add_adapter(LocFTConfig())
    randomize(model)
    assert delta_dtypes(model) == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = build("llama", torch.bfloat16)
    loaded.load_adapter(str(tmp_path))
    assert delta_dtypes(loaded) == {torch.float32}
    assert same_bits(logits(loaded), logits(model))


# ---------------------------------------------------------------- layers_to_transform


@pytest.mark.parametrize("layers", [0, 1, [0], [0, 1]])
def test_layers_stay_as_the_caller_wrote_them(layers: int | list[int], tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=layers, layers_pattern="layers")
    model = get_peft_model(build("llama"), config)
    assert model.peft_config["default"].layers_to_transform == layers
    wanted = {layers} if isinstance(layers, int) else set(layers)
    assert {int(name.split(".")[2]) for name in locations(model)} == wanted
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == layers
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert locations(loaded).keys() == locations(model).keys()


def test_a_refused_layer_stays_as_the_caller_wrote_it() -> None:
    config = LocFTConfig(layers_to_transform=7)
    with pytest.raises(ValueError, match=r"the model has 3 decoder layers"):
        get_peft_model(build("llama"), config)
    assert config.layers_to_transform == 7


# ---------------------------------------------------------------- deletion beside modules_to_save


@pytest.mark.parametrize("fields", [{}, HEAD, TOKENS, {**HEAD, **TOKENS}], ids=["deltas", "head", "tokens", "both"])
def test_the_only_adapter_is_deleted(fields: dict[str, Any]) -> None:
    model = get_peft_model(build("llama"), LocFTConfig(init_weights=False, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.delete_adapter("default")
    assert (model.active_adapters, dict(model.peft_config)) == ([], {})
    assert same_bits(logits(model.base_model), logits(build("llama")))
    model.add_adapter("default", LocFTConfig(**fields))
    model.set_adapter("default")
    assert same_bits(logits(model), logits(build("llama")))


def with_tokens() -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Return a model with the adapters `x` and `y`, whose token rows overlap, and `z` without any; their logits."""
    model = get_peft_model(build("llama"), LocFTConfig(**TOKENS), adapter_name="x")
    model.add_adapter("y", LocFTConfig(trainable_token_indices=[2, 3]))
    model.add_adapter("z", LocFTConfig())
    answers = {}
    for seed, name in enumerate("xyz"):
        randomize(model, name, seed=seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(f"trainable_tokens_delta.{name}"):
                    parameter.add_(0.5)
        model.set_adapter(name)
        answers[name] = logits(model)
    model.set_adapter("x")
    return model, answers


def assert_unmerged(model: PeftModel) -> None:
    assert model.get_model_status().merged_adapters == []
    found = {name.replace("token_adapter.", ""): tensor for name, tensor in base_state(model).items()}
    rows = {name for name in found if "trainable_tokens_" in name}
    assert_same_tensors({name: found[name] for name in found.keys() - rows}, base_state(build("llama")))


def test_token_rows_are_merged_and_unmerged_with_the_deltas() -> None:
    model, answers = with_tokens()
    for names in (None, ["x"], ["y"], ["z"]):
        model.merge_adapter(names)
        assert same_bits(logits(model), answers[names[0] if names else "x"])
        model.unmerge_adapter()
        assert_unmerged(model)
    for name in "xyz":
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[name])
        assert same_bits(logits(merged), answers[name])
    model.merge_adapter()
    assert same_bits(logits(model.unload()), logits(build("llama")))


def test_what_is_active_in_the_layers_is_merged() -> None:
    """PEFT's own tests activate several adapters layer by layer, without the model's set_adapter."""
    model = get_peft_model(build("llama"), LocFTConfig(), adapter_name="x")
    model.add_adapter("y", LocFTConfig())
    for seed, name in enumerate("xy"):
        randomize(model, name, seed=seed)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(["x", "y"])
    together = logits(model)
    model.merge_adapter()
    assert same_bits(logits(model), together)


@was_merged
def test_switching_and_adding_unmerges_token_rows() -> None:
    model, answers = with_tokens()
    for name in "yzx":
        model.merge_adapter()
        model.set_adapter(name)
        assert same_bits(logits(model), answers[name])
        assert_unmerged(model)
    model.merge_adapter()
    model.add_adapter("w", LocFTConfig(**TOKENS))
    assert_unmerged(model)
    model.set_adapter("w")
    assert same_bits(logits(model), logits(build("llama"))), "a fresh adapter changes nothing"


def test_a_merge_that_fails_merges_no_token_row() -> None:
    model, _ = with_tokens()
    ((delta, _),) = locations(model, "x").values()
    delta.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="The adapter x seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert_unmerged(model)


def test_a_merged_adapter_with_tokens_is_deleted_after_unmerging() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(init_weights=False, **TOKENS))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default"]
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert not model.peft_config


@pytest.mark.parametrize("fields", [HEAD, TOKENS], ids=["head", "tokens"])
@pytest.mark.parametrize("deleted", ["x", "y", "z"])
def test_one_of_three_active_adapters_is_deleted(fields: dict[str, Any], deleted: str) -> None:
    """Only `x` has more than deltas. PEFT's own deletion raises after half of it."""
    model = get_peft_model(build("llama"), LocFTConfig(**fields), adapter_name="x")
    for seed, name in enumerate(["y", "z"]):
        model.add_adapter(name, LocFTConfig())
        randomize(model, name, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save.x." in name or name.endswith("trainable_tokens_delta.x"):
                parameter.add_(0.5)
    left = [name for name in "xyz" if name != deleted]
    model.base_model.set_adapter(left)
    expected = logits(model)
    model.base_model.set_adapter(["x", "y", "z"])
    model.delete_adapter(deleted)
    assert (model.active_adapters, sorted(model.peft_config)) == (left, left)
    # PeftModel's own forward looks up the first adapter, even after its deletion
    assert same_bits(logits(model.base_model), expected)
    model.set_adapter(left[0])
    model.base_model.set_adapter(left[::-1])
    assert same_bits(logits(model), expected)


@pytest.mark.parametrize("fields", [HEAD, TOKENS], ids=["head", "tokens"])
def test_deleting_an_inactive_adapter_changes_no_other(fields: dict[str, Any]) -> None:
    model = get_peft_model(build("llama"), LocFTConfig(**fields), adapter_name="x")
    model.add_adapter("y", LocFTConfig(**fields))
    model.add_adapter("z", LocFTConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    before = logits(model)
    for name in ("y", "z"):
        model.delete_adapter(name)
        assert model.active_adapters == ["x"]
        assert same_bits(logits(model), before)


def test_the_next_adapter_brings_its_own_modules() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(), adapter_name="y")
    model.add_adapter("x", LocFTConfig(**HEAD))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["x"].weight.add_(0.5)
    model.set_adapter("x")
    expected = logits(model)
    model.set_adapter("y")
    with pytest.warns(UserWarning, match="Deleted the active adapter y; x is active now"):
        model.delete_adapter("y")
    assert same_bits(logits(model), expected)


# ---------------------------------------------------------------- a broken adapter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_of_nan_is_announced_in_pefts_words(method: str, value: float) -> None:
    model = get_peft_model(build("llama"), LocFTConfig(), adapter_name="good")
    model.add_adapter("bad", LocFTConfig())
    ((delta, _),) = locations(model, "bad").values()
    delta.data[0, 0] = value
    expected = (
        "^NaNs detected in the merged weights. The adapter bad seems to be broken: .* Nothing was merged. Run `loc"
    )
    with pytest.raises(ValueError, match=expected):
        getattr(model, method)(safe_merge=True, adapter_names=["good", "bad"])
    assert model.get_model_status().merged_adapters == []


def test_a_merge_that_only_together_overflows_names_all() -> None:
    base = build("llama", torch.float16)
    model = get_peft_model(base, LocFTConfig(), adapter_name="a")
    model.add_adapter("b", LocFTConfig())
    for name in ("a", "b"):
        ((delta, _),) = locations(model, name).values()
        delta.data[0, 0] = 5e4
    with pytest.raises(ValueError, match="The adapter a, b seems to be broken: it would put NaN or infinite values"):
        model.merge_adapter(safe_merge=True, adapter_names=["a", "b"])


# ---------------------------------------------------------------- a weight that another module reads


def test_disabling_unmerges_a_weight_that_another_module_reads() -> None:
    """torch's attention reads the weight of `out_proj` and never calls it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)).eval()

    def answer(model: Any) -> torch.Tensor:
        linear, attention = model.base_model.model
        with torch.no_grad():
            x = linear(torch.ones(3, 8))
            return attention(x, x, x)[0]

    config = LocFTConfig(target_modules=["out_proj"], init_weights=False, train_bias=True)
    model = get_peft_model(base, config)
    edited = answer(model)
    with model.disable_adapter():
        plain = answer(model)
    assert not same_bits(edited, plain)
    model.merge_adapter()
    assert same_bits(answer(model), edited)
    with model.disable_adapter():
        assert same_bits(answer(model), plain)
    assert same_bits(answer(model), edited)
    assert model.get_model_status().merged_adapters == []
