"""What PEFT's and transformers' own common tests ask of LoRA, on every model family."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny_models import (
    assert_same_tensors,
    base_state,
    build,
    changed,
    every_family,
    locations,
    logits,
    randomize,
    same_bits,
    save_and_reload,
    token_ids,
)
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig

DOWN = ["layers.0.mlp.down_proj"]

was_merged = pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
# transformers' add_adapter and load_adapter make a tuner anew each time
second_in_transformers = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
merges_more = pytest.mark.filterwarnings("ignore:Already following adapters were merged")


def edited(family: str, **config: Any) -> PeftModel:
    model = get_peft_model(build(family), LocFTConfig(**config))
    randomize(model)
    return model


def with_two(family: str) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Return a model with `a` at the default location and `b` elsewhere, and what it answers with each."""
    model = get_peft_model(build(family), LocFTConfig(), adapter_name="a")
    model.add_adapter("b", LocFTConfig(target_modules="entire-layer", layers_to_transform=0))
    answers = {"base": logits(build(family))}
    for seed, name in enumerate("ab"):
        randomize(model, name, seed)
        model.set_adapter(name)
        answers[name] = logits(model)
    assert len({answer.sum().item() for answer in answers.values()}) == 3
    return model, answers


# ---------------------------------------------------------------- several adapters


@every_family
def test_adapters_are_switched(family: str) -> None:
    model, answers = with_two(family)
    for name in "abba":
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert same_bits(logits(model), answers[name])
        trained = {parameter for parameter, tensor in model.named_parameters() if tensor.requires_grad}
        assert trained and all(f".locft_delta.{name}." in parameter for parameter in trained)
    with pytest.raises(ValueError, match="Adapter x not found"):
        model.set_adapter("x")


@every_family
def test_adapters_are_disabled_and_enabled(family: str) -> None:
    model, answers = with_two(family)
    with model.disable_adapter():
        assert same_bits(logits(model), answers["base"])
    assert same_bits(logits(model), answers["b"])
    model.base_model.disable_adapter_layers()
    assert same_bits(logits(model), answers["base"])
    model.base_model.enable_adapter_layers()
    assert same_bits(logits(model), answers["b"])


@every_family
def test_disabling_unmerges(family: str) -> None:
    model, answers = with_two(family)
    model.merge_adapter()
    with model.disable_adapter():
        assert same_bits(logits(model), answers["base"])
    assert same_bits(logits(model), answers["b"])
    assert model.get_model_status().merged_adapters == []


@was_merged
@every_family
def test_switching_unmerges(family: str) -> None:
    model, answers = with_two(family)
    model.merge_adapter()
    model.set_adapter("a")
    assert same_bits(logits(model), answers["a"])
    assert_same_tensors(base_state(model), base_state(build(family)))


@every_family
def test_an_adapter_is_deleted(family: str) -> None:
    model, answers = with_two(family)
    model.delete_adapter("a")  # the inactive one
    assert model.active_adapters == ["b"]
    assert same_bits(logits(model), answers["b"])
    assert list(model.peft_config) == ["b"]
    assert not any(".locft_delta.a." in name for name in model.state_dict())
    with pytest.raises(ValueError, match="Adapter a does not exist"):
        model.delete_adapter("a")


@every_family
def test_when_the_active_adapter_is_deleted_another_becomes_active_everywhere(family: str) -> None:
    """Also where the two have no location in common."""
    model, answers = with_two(family)
    with pytest.warns(UserWarning, match="Deleted the active adapter b; a is active now"):
        model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert model.get_model_status().active_adapters == ["a"]
    assert same_bits(logits(model), answers["a"])
    model.delete_adapter("a")
    assert model.active_adapters == []
    # PeftModel itself needs an adapter to run
    assert same_bits(logits(model.base_model), answers["base"])


def test_one_of_several_active_adapters_is_deleted() -> None:
    model, answers = with_two("llama")
    model.base_model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert same_bits(logits(model), answers["b"])


@every_family
def test_a_merged_adapter_is_not_deleted(family: str) -> None:
    model, answers = with_two(family)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['b'\] while they are merged"):
        model.delete_adapter("b")
    assert same_bits(logits(model), answers["b"])


def test_deleting_beside_a_merged_adapter_leaves_it_merged() -> None:
    model, answers = with_two("llama")
    model.merge_adapter(["a"])
    with pytest.warns(UserWarning, match="Deleted the active adapter b; a is active now"):
        model.delete_adapter("b")
    assert model.get_model_status().merged_adapters == ["a"]
    assert same_bits(logits(model), answers["a"])
    model.unmerge_adapter()
    assert_same_tensors(base_state(model), base_state(build("llama")))


@second_in_transformers
@pytest.mark.filterwarnings("ignore:Adapter a was active which is now deleted")
def test_transformers_own_deletion() -> None:
    model = build("llama")
    before = logits(model)
    model.add_adapter(LocFTConfig(), "a")
    model.add_adapter(LocFTConfig(), "b")
    randomize(model, "b")
    model.delete_adapter("a")
    after = logits(model)
    assert not same_bits(after, before)
    model.delete_adapter("b")
    assert same_bits(logits(model), before)


# ---------------------------------------------------------------- merging


@merges_more
@every_family
def test_a_subset_is_merged(family: str) -> None:
    model, answers = with_two(family)
    model.base_model.set_adapter(["a", "b"])
    both = logits(model)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["a"])
    assert same_bits(logits(merged), answers["a"])
    model.merge_adapter(["b"])
    assert model.get_model_status().merged_adapters == ["b"]
    model.merge_adapter()
    assert same_bits(logits(model), both)


def test_an_unknown_adapter_is_not_merged() -> None:
    model, _ = with_two("llama")
    with pytest.raises(ValueError, match=r"No adapter \['x'\] to merge: expected names from \['a', 'b'\]"):
        model.merge_adapter(["a", "x"])
    with pytest.raises(TypeError, match="adapter_names should be a list of strings, got 'a'"):
        model.merge_adapter("a")
    assert model.get_model_status().merged_adapters == []


@every_family
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_leaves_a_plain_model(family: str, safe_merge: bool) -> None:
    base = build(family)
    types = {name: type(module) for name, module in base.named_modules()}
    before = base_state(base)
    model = get_peft_model(base, LocFTConfig())
    randomize(model)
    expected, targets = logits(model), set(locations(model))
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert {name: type(module) for name, module in merged.named_modules()} == types
    assert changed(dict(merged.state_dict()), before) == targets
    assert same_bits(logits(merged), expected)
    assert not hasattr(merged, "peft_config")


@every_family
@pytest.mark.parametrize("merged", [False, True])
def test_unload_gives_back_the_base(family: str, merged: bool) -> None:
    model = edited(family)
    if merged:
        model.merge_adapter()
    assert_same_tensors(dict(model.unload().state_dict()), base_state(build(family)))


def test_unmerging_what_is_not_merged_says_so() -> None:
    model = edited("llama")
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.base_model.model.model.layers[1].mlp.down_proj.unmerge()


def test_merging_twice_says_so() -> None:
    model = edited("llama")
    model.merge_adapter()
    merged = base_state(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert_same_tensors(base_state(model), merged)


# ---------------------------------------------------------------- saving and loading


@every_family
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded(family: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = edited(family)
    reloaded = save_and_reload(model, build(family), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert same_bits(logits(reloaded), logits(model))
    assert not any(parameter.requires_grad for parameter in reloaded.parameters())
    assert not any(parameter.is_meta for parameter in reloaded.parameters())


@every_family
def test_selected_adapters_are_saved(family: str, tmp_path: Path) -> None:
    model, answers = with_two(family)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "b"]
    reloaded = PeftModel.from_pretrained(build(family), tmp_path / "b", adapter_name="renamed")
    assert same_bits(logits(reloaded), answers["b"])
    model.save_pretrained(tmp_path)
    reloaded.load_adapter(tmp_path / "a", adapter_name="a")
    reloaded.set_adapter("a")
    assert same_bits(logits(reloaded), answers["a"])


@every_family
def test_training_goes_on_after_a_reload(family: str, tmp_path: Path) -> None:
    """Interrupted and reloaded with its optimizer, it ends with the same bits as without."""

    def steps(model: PeftModel, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = model(token_ids(), labels=token_ids()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def adam(model: PeftModel) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    through = get_peft_model(build(family), LocFTConfig())
    losses = steps(through, adam(through), 4)
    assert losses[-1] < losses[0]
    first = get_peft_model(build(family), LocFTConfig())
    optimizer = adam(first)
    steps(first, optimizer, 2)
    second = save_and_reload(first, build(family), tmp_path, is_trainable=True)
    resumed = adam(second)
    resumed.load_state_dict(optimizer.state_dict())
    assert steps(second, resumed, 2) == losses[2:]
    assert same_bits(logits(second), logits(through))


@every_family
def test_auto_peft_model_finds_its_base(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LocFTConfig(task_type="CAUSAL_LM"))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same_bits(logits(loaded), logits(model))
    # transformers' own loader knows the adapter's folder, too
    injected = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same_bits(logits(injected), logits(model))


@second_in_transformers
@every_family
def test_transformers_integration(family: str, tmp_path: Path) -> None:
    model = build(family)
    before = logits(model)
    model.add_adapter(LocFTConfig(), "a")
    model.add_adapter(LocFTConfig(target_modules="entire-layer", layers_to_transform=0), "b")
    answers = {}
    for seed, name in enumerate("ab"):
        randomize(model, name, seed)
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        answers[name] = logits(model)
        model.save_pretrained(tmp_path / name)
    model.disable_adapters()
    assert same_bits(logits(model), before)
    model.enable_adapters()
    assert same_bits(logits(model), answers["b"])
    loaded = build(family)
    for name in "ab":
        loaded.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in "ab":
        loaded.set_adapter(name)
        assert same_bits(logits(loaded), answers[name])
        # what transformers saves, PEFT loads
        assert same_bits(logits(PeftModel.from_pretrained(build(family), tmp_path / name)), answers[name])


@every_family
def test_injected_without_a_wrapper(family: str) -> None:
    first = inject_adapter_in_model(LocFTConfig(), build(family))
    randomize(first)
    state = get_peft_model_state_dict(first)
    assert state and all(".locft_delta." in name for name in state)
    for low_cpu_mem_usage in (False, True):
        second = inject_adapter_in_model(LocFTConfig(), build(family), low_cpu_mem_usage=low_cpu_mem_usage)
        result = set_peft_model_state_dict(second, state, low_cpu_mem_usage=low_cpu_mem_usage)
        assert result.unexpected_keys == []
        assert same_bits(logits(second), logits(first))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_injected_by_the_names_in_a_state_dict(family: str) -> None:
    first = inject_adapter_in_model(LocFTConfig(), build(family))
    randomize(first)
    state = get_peft_model_state_dict(first)
    second = inject_adapter_in_model(LocFTConfig(), build(family), state_dict=state)
    set_peft_model_state_dict(second, state)
    assert same_bits(logits(second), logits(first))


@every_family
def test_hot_swapped(family: str, tmp_path: Path) -> None:
    other = edited(family, scale=0.5)
    randomize(other, seed=5)
    expected = logits(other)
    other.save_pretrained(tmp_path)
    model = edited(family)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    assert same_bits(logits(model), expected)
    model.merge_adapter()
    with pytest.raises(ValueError, match="Cannot hot-swap adapter 'default' because it is currently merged"):
        hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")


def test_hot_swapping_another_location_is_refused(tmp_path: Path) -> None:
    edited("llama", target_modules=DOWN).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        hotswap_adapter(edited("llama"), tmp_path, adapter_name="default", torch_device="cpu")


# ---------------------------------------------------------------- as LoRA


def linear_config(family: str) -> LocFTConfig:
    # fused experts are no linear: LoRA's conversion knows linears only
    return LocFTConfig(target_modules=["self_attn.o_proj"]) if family == "mixtral" else LocFTConfig()


# Mistral's default is an entire layer, with its norms
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "gpt_neox", "llama", "mixtral", "opt", "qwen2", "qwen3"])
def test_converted_to_lora_of_full_rank(family: str, tmp_path: Path) -> None:
    model = get_peft_model(build(family), linear_config(family))
    randomize(model)
    model.base_model.set_scale("default", 0.5)
    expected = logits(model)
    assert model.supports_lora_conversion()
    peft.save_as_lora(tmp_path, model, rank=32)
    lora = PeftModel.from_pretrained(build(family), tmp_path)
    assert lora.peft_config["default"].peft_type == peft.PeftType.LORA
    torch.testing.assert_close(logits(lora), expected)
    config, _ = peft.convert_to_lora(model, rank=4)
    assert config.r == 4


@pytest.mark.parametrize(
    "config",
    [
        LocFTConfig(train_bias=True),
        LocFTConfig(target_modules=["ln_f"]),
        LocFTConfig(target_modules=["wpe"]),
        LocFTConfig(target_parameters=["mlp.c_fc.weight"]),
    ],
    ids=["bias", "norm", "embedding", "parameter"],
)
def test_what_lora_cannot_hold_is_not_converted(config: LocFTConfig) -> None:
    model = get_peft_model(build("gpt2"), config)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(model, rank=4)


def test_an_adapter_elsewhere_does_not_matter_to_a_conversion(tmp_path: Path) -> None:
    model = get_peft_model(build("llama"), LocFTConfig(), adapter_name="a")
    model.add_adapter("b", LocFTConfig(target_modules=DOWN))
    randomize(model, "a")
    randomize(model, "b")
    expected = logits(model)
    peft.save_as_lora(tmp_path, model, rank=32, adapter_name="a")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), expected)


# ---------------------------------------------------------------- in use


@every_family
def test_generation(family: str) -> None:
    model = edited(family)
    randomize(model, std=0.5)
    ids = token_ids(batch_size=1)
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    arguments |= {"min_new_tokens": 6, "max_new_tokens": 6}
    adapter = model.generate(**arguments)
    with model.disable_adapter():
        base = model.generate(**arguments)
    assert adapter.shape == (1, ids.shape[1] + 6)
    assert not torch.equal(adapter, base)
    assert torch.equal(model.merge_and_unload().generate(**arguments), adapter)


@every_family
def test_a_copy_is_on_its_own(family: str) -> None:
    model = edited(family)
    expected = logits(model)
    duplicate = copy.deepcopy(model)
    assert same_bits(logits(duplicate), expected)
    randomize(duplicate, seed=9)
    assert same_bits(logits(model), expected)
    assert not same_bits(logits(duplicate), expected)


@every_family
def test_it_can_be_printed_and_asked_for_its_status(family: str) -> None:
    model, _ = with_two(family)
    assert "locft." in str(model) and "Delta" in str(model)
    status = model.get_model_status()
    assert (status.peft_types, status.available_adapters) == ({"a": "LOCFT", "b": "LOCFT"}, ["a", "b"])
    trainable, total = model.get_nb_trainable_parameters()
    deltas = {name: sum(delta.numel() for delta, _ in locations(model, name).values()) for name in "ab"}
    assert trainable == deltas["b"]
    assert total == sum(deltas.values()) + sum(tensor.numel() for tensor in build(family).parameters())


@every_family
def test_dropout_is_that_of_the_base(family: str) -> None:
    """GPT-2 and OPT drop some in training: with the same random numbers, the same; the tuner draws none."""
    base = build(family).train()
    torch.manual_seed(0)
    expected = logits(base)
    model = get_peft_model(base, LocFTConfig())
    torch.manual_seed(0)
    assert same_bits(logits(model), expected)
    if family in ("gpt2", "opt"):
        assert not same_bits(logits(base.eval()), expected)


def test_an_adapter_for_one_row_of_a_batch_is_not_silently_ignored() -> None:
    """Mixed batches are LoRA's; PEFT swallows the argument of any other."""
    model, _ = with_two("llama")
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match="adapter_names: the rows of one batch cannot have different LocFT adapters"
        ):
            call(input_ids=token_ids(), adapter_names=["a", "b"])
