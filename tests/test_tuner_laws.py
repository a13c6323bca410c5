"""The laws of the tuner (docs: design), each on every model family and dtype; equal means the same bits."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    DTYPES,
    FAMILIES,
    TIED_FAMILIES,
    assert_same_tensors,
    base_state,
    build,
    changed,
    every_dtype,
    every_family,
    locations,
    logits,
    randomize,
    same_bits,
    token_ids,
)
from torch import nn

from peft_locft import LocFTConfig

# an adapter that is added or switched on while another is merged: PEFT unmerges it first, and says so
unmerges_first = pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
# PEFT's own, where `a` is merged and `b` is merged on top of it
merges_more = pytest.mark.filterwarnings("ignore:Already following adapters were merged")
# PEFT's general warning, before our refusal
tied_too = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

# PEFT's merge methods, where a test asks for everything
keeps_all = pytest.mark.filterwarnings("ignore:The density 1.0 is greater than or equal to 1")

every_location = pytest.mark.parametrize(
    "location",
    [{}, {"target_modules": "entire-layer", "layers_to_transform": [0], "train_bias": True}],
    ids=["default location", "entire layer with biases"],
)


def edited(family: str, dtype: torch.dtype, **config: Any) -> PeftModel:
    """Return a model with one adapter, filled as training would."""
    model = get_peft_model(build(family, dtype), LocFTConfig(**config))
    randomize(model)
    return model


# ---------------------------------------------------------------- 1: a fresh adapter changes nothing


@every_dtype
@every_family
@every_location
def test_a_fresh_adapter_is_the_base_model(family: str, dtype: torch.dtype, location: dict[str, Any]) -> None:
    base = build(family, dtype)
    before = logits(base)
    model = get_peft_model(base, LocFTConfig(**location))
    assert same_bits(logits(model), before)
    # and it is the same base: not a frozen copy beside the model
    randomize(model)
    assert not same_bits(logits(model), before)


# ---------------------------------------------------------------- 2: one arithmetic, one rounding, everywhere


@every_dtype
@every_family
@every_location
def test_unmerged_merged_unloaded_and_reloaded_are_one(
    family: str, dtype: torch.dtype, location: dict[str, Any], tmp_path: Path
) -> None:
    model = edited(family, dtype, scale=0.7, **location)
    unmerged = logits(model)
    model.merge_adapter()
    assert same_bits(logits(model), unmerged)
    model.unmerge_adapter()
    assert same_bits(logits(model), unmerged)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(family, dtype), tmp_path)
    assert same_bits(logits(reloaded), unmerged)
    assert same_bits(logits(model.merge_and_unload()), unmerged)


@every_dtype
@every_family
@every_location
def test_the_merged_weight_is_the_formula(family: str, dtype: torch.dtype, location: dict[str, Any]) -> None:
    model = edited(family, dtype, scale=0.7, **location)
    before = base_state(model)
    expected = {
        name: (before[name].float() + scale * delta.detach().float()).to(dtype)
        for name, (delta, scale) in locations(model).items()
    }
    model.merge_adapter()
    merged = base_state(model)
    assert {name: same_bits(merged[name], weight) for name, weight in expected.items()} == dict.fromkeys(
        expected, True
    )
    assert changed(merged, before) == set(expected)


# ---------------------------------------------------------------- 3: a merge is undone exactly, and never half done


def three_adapters(family: str, dtype: torch.dtype) -> PeftModel:
    """`a` and `b` share a location; `d` is elsewhere."""
    model = get_peft_model(build(family, dtype), LocFTConfig(), adapter_name="a")
    model.add_adapter("b", LocFTConfig())
    model.add_adapter("d", LocFTConfig(target_modules="entire-layer", layers_to_transform=0, train_bias=True))
    for seed, name in enumerate("abd"):
        randomize(model, name, seed)
    return model


@merges_more
@every_dtype
@every_family
def test_unmerge_restores_the_bits_after_many_merges_in_any_order(family: str, dtype: torch.dtype) -> None:
    model = three_adapters(family, dtype)
    before = base_state(model)
    choose = random.Random(0)
    for _ in range(10):
        for name in choose.sample("abd", k=choose.randint(1, 3)):
            model.merge_adapter([name])
        assert changed(base_state(model), before)
        model.unmerge_adapter()
        assert_same_tensors(base_state(model), before)


@merges_more
def test_merging_in_turn_is_merging_at_once() -> None:
    model = three_adapters("llama", torch.bfloat16)
    model.merge_adapter(["a", "b", "d"])
    at_once = base_state(model)
    model.unmerge_adapter()
    for name in "dab":
        model.merge_adapter([name])
    assert_same_tensors(base_state(model), at_once)


def poison(model: PeftModel, adapter_name: str) -> None:
    """Make the last of several locations of an adapter unmergeable: not a number."""
    *_, (delta, _) = locations(model, adapter_name).values()
    delta.data.view(-1)[3] = float("nan")


@merges_more
@every_dtype
@every_family
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_merge_that_fails_at_one_location_is_a_merge_nowhere(family: str, dtype: torch.dtype, method: str) -> None:
    model = three_adapters(family, dtype)
    poison(model, "d")
    before = base_state(model)
    # PEFT's own words, then ours
    broken = r"^NaNs detected in the merged weights\. The adapter d seems to be broken: .*Nothing was merged"
    with pytest.raises(ValueError, match=broken):
        getattr(model, method)(adapter_names=["d"], safe_merge=True)
    assert_same_tensors(base_state(model), before)
    assert model.get_model_status().merged_adapters == []
    # what was merged before stays merged
    model.merge_adapter(["a"])
    merged = base_state(model)
    with pytest.raises(ValueError, match=broken):
        getattr(model, method)(adapter_names=["d"], safe_merge=True)
    assert_same_tensors(base_state(model), merged)
    assert model.get_model_status().merged_adapters == ["a"]
    model.unmerge_adapter()
    assert_same_tensors(base_state(model), before)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_refused_location_is_a_merge_nowhere(method: str) -> None:
    model = edited("llama", torch.float32, target_modules=["down_proj"])
    before = base_state(model)
    last = model.base_model.model.model.layers[2].mlp.down_proj.base_layer
    own, last.weight = last.weight, nn.Parameter(last.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match="Cannot merge into Linear: its weight is offloaded or sharded"):
        getattr(model, method)()
    last.weight = own
    assert_same_tensors(base_state(model), before)


def test_an_interrupt_is_a_merge_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model = edited("llama", torch.float32, target_modules=["down_proj"])
    before = base_state(model)
    last = model.base_model.model.model.layers[2].mlp.down_proj

    def interrupted(**kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter()
    assert_same_tensors(base_state(model), before)


# ---------------------------------------------------------------- 4: while merged, nothing starts from edited weights


@unmerges_first
@every_dtype
@every_family
def test_an_adapter_added_while_merged_starts_from_the_base(family: str, dtype: torch.dtype) -> None:
    base = build(family, dtype)
    before, before_state = logits(base), base_state(base)
    model = get_peft_model(base, LocFTConfig())
    randomize(model)
    unmerged = logits(model)
    model.merge_adapter()
    model.add_adapter("second", LocFTConfig())
    model.set_adapter("second")
    assert same_bits(logits(model), before)
    assert_same_tensors(base_state(model), before_state)
    model.set_adapter("default")
    assert same_bits(logits(model), unmerged)


@unmerges_first
@every_dtype
@every_family
def test_an_adapter_copied_while_merged_is_the_adapter(family: str, dtype: torch.dtype) -> None:
    model = edited(family, dtype)
    unmerged = logits(model)
    model.merge_adapter()
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    assert same_bits(logits(model), unmerged)


@every_dtype
@every_family
def test_a_copy_of_a_merged_model_is_detached_on_its_own(family: str, dtype: torch.dtype) -> None:
    base = build(family, dtype)
    before, before_state = logits(base), base_state(base)
    model = get_peft_model(base, LocFTConfig())
    randomize(model)
    model.merge_adapter()
    merged = logits(model)
    duplicate = copy.deepcopy(model)
    assert same_bits(logits(duplicate), merged)
    duplicate.unmerge_adapter()
    assert_same_tensors(base_state(duplicate), before_state)
    with duplicate.disable_adapter():
        assert same_bits(logits(duplicate), before)
    # the original is still merged
    assert same_bits(logits(model.unload()), before)


# ---------------------------------------------------------------- 5: on disk: the deltas only, and the same bits after

LOAD_AND_ANSWER = """
import sys
import torch
torch.set_num_threads(1)
import peft_locft
from peft import PeftModel
from transformers import AutoModelForCausalLM

for folder in sys.argv[1:]:
    ids = torch.load(f"{folder}/ids.pt")
    dtype = getattr(torch, folder.rpartition("-")[2])
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=dtype)
    with torch.no_grad():
        answers = {"base": base(ids).logits}
        model = PeftModel.from_pretrained(base, f"{folder}/adapter")
        answers["adapter"] = model(ids).logits
        answers["merged"] = model.merge_and_unload()(ids).logits
    torch.save(answers, f"{folder}/answers.pt")
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path) -> None:
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for family in ("gemma3", "gpt2", "llama", "mixtral"):
        for dtype in DTYPES:
            folder = tmp_path / f"{family}-{str(dtype).removeprefix('torch.')}"
            base = build(family, dtype)
            before = logits(base)
            base.save_pretrained(folder / "base")
            model = get_peft_model(base, LocFTConfig())
            randomize(model)
            model.save_pretrained(folder / "adapter")
            torch.save(token_ids(), folder / "ids.pt")
            expected[str(folder)] = {"base": before, "adapter": logits(model), "merged": logits(model)}
    subprocess.run([sys.executable, "-c", LOAD_AND_ANSWER, *expected], check=True, capture_output=True)
    for folder_name, answers in expected.items():
        assert_same_tensors(torch.load(f"{folder_name}/answers.pt"), answers)


@every_family
@every_location
def test_the_file_holds_the_deltas_only(family: str, location: dict[str, Any], tmp_path: Path) -> None:
    model = edited(family, torch.bfloat16, **location)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        name.replace(".locft_delta.default.", ".locft_delta."): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert_same_tensors(saved, expected)
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())


def test_keys_are_the_modules_names(tmp_path: Path) -> None:
    model = edited("llama", torch.float32, target_modules=["down_proj"], layers_to_transform=[2])
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert list(saved) == ["base_model.model.model.layers.2.mlp.down_proj.locft_delta.weight"]


# PEFT announces that it saves the base's embedding beside the adapter; the tuner takes it out again
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("merged", [False, True])
def test_an_edited_embedding_or_head_is_saved_as_its_delta_only(target: str, merged: bool, tmp_path: Path) -> None:
    base = build("llama")
    before = base_state(base)
    model = get_peft_model(base, LocFTConfig(target_modules=[target]))
    randomize(model)
    unmerged = logits(model)
    if merged:
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 1
    reloaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert_same_tensors(base_state(reloaded), before)
    assert same_bits(logits(reloaded), unmerged)


# ---------------------------------------------------------------- 6: only the location ever changes


@every_dtype
@every_family
@every_location
def test_training_and_merging_change_the_location_only(
    family: str, dtype: torch.dtype, location: dict[str, Any]
) -> None:
    model = get_peft_model(build(family, dtype), LocFTConfig(**location))
    before = base_state(model)
    targets = locations(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert len(optimizer.param_groups[0]["params"]) == len(targets)
    ids = token_ids()
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_same_tensors(base_state(model), before)
    merged = model.merge_and_unload()
    # every location can move but biases: shifting all keys of an attention by one vector changes nothing
    moved = changed(dict(merged.state_dict()), before)
    assert moved <= set(targets)
    assert {name for name in targets if name.endswith("weight") or "experts" in name} <= moved


@tied_too
@pytest.mark.parametrize("family", TIED_FAMILIES)
def test_tied_weights_are_refused(family: str) -> None:
    model = build(family)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    before = base_state(model)
    message = rf"{embedding}\.weight is tied to lm_head\.weight: .*untie them first.*tie_word_embeddings=False"
    for config in (
        LocFTConfig(target_modules=[embedding.rpartition(".")[2]]),
        LocFTConfig(target_parameters=[f"{embedding}.weight"]),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            get_peft_model(model, config)
    with pytest.raises(ValueError, match=rf"lm_head\.weight is tied to {embedding}\.weight"):
        get_peft_model(model, LocFTConfig(target_modules=["lm_head"]))
    # refused before anything was replaced
    assert_same_tensors(base_state(model), before)
    assert not any("locft" in name for name, _ in model.named_modules())


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize("family", TIED_FAMILIES)
def test_untied_weights_are_edited_alone(family: str) -> None:
    model = build(family, tie_word_embeddings=False)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    before = base_state(model)
    model = get_peft_model(model, LocFTConfig(target_modules=[embedding]))
    randomize(model)
    assert changed(dict(model.merge_and_unload().state_dict()), before) == {f"{embedding}.weight"}


# ---------------------------------------------------------------- 7: several adapters add up


@every_dtype
@every_family
def test_active_adapters_add_up_in_any_order(family: str, dtype: torch.dtype) -> None:
    model = three_adapters(family, dtype)
    before = base_state(model)
    model.base_model.set_adapter(["a", "b", "d"])
    together = logits(model)
    model.base_model.set_adapter(["d", "b", "a"])
    assert same_bits(logits(model), together)
    model.merge_adapter()
    assert same_bits(logits(model), together)
    merged = base_state(model)
    for name, weight in before.items():
        total = weight.float()
        for adapter in "abd":
            if name in locations(model, adapter):
                total = total + locations(model, adapter)[name][0].detach().float()
        assert same_bits(merged[name], total.to(weight.dtype)), name


@every_family
def test_a_linear_combination_is_the_exact_sum(family: str) -> None:
    model = three_adapters(family, torch.bfloat16)
    model.base_model.set_scale("b", 3.0)
    model.add_weighted_adapter(["a", "b", "d"], [0.5, -2.0, 1.0], "sum")
    found = locations(model, "sum")
    assert found.keys() >= locations(model, "a").keys() | locations(model, "d").keys()
    for name, (delta, scale) in found.items():
        terms = [
            weight * locations(model, adapter)[name][0].detach()
            for adapter, weight in (("a", 0.5), ("b", -6.0), ("d", 1.0))
            if name in locations(model, adapter)
        ]
        assert scale == 1.0
        # `d` alone trains biases, so that the sum has one at the others' location too: zero
        expected = torch.stack(terms).sum(0) if terms else torch.zeros_like(delta)
        torch.testing.assert_close(delta.detach(), expected)


def test_a_combination_is_saved_and_loaded_as_any_adapter(tmp_path: Path) -> None:
    model = three_adapters("mixtral", torch.bfloat16)
    model.add_weighted_adapter(["a", "d"], [1.0, 0.5], "sum")
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    reloaded = PeftModel.from_pretrained(build("mixtral", torch.bfloat16), tmp_path / "sum")
    assert same_bits(logits(reloaded), logits(model))


@keeps_all
@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_other_combinations_keep_the_asked_share(kind: str) -> None:
    model = three_adapters("llama", torch.float32)
    torch.manual_seed(0)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "all", combination_type=kind, density=1.0)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "few", combination_type=kind, density=0.2)
    ((all_of_it, _),) = locations(model, "all").values()
    ((few, _),) = locations(model, "few").values()
    assert all_of_it.count_nonzero() == all_of_it.numel()
    # of each of the two a fifth
    assert 0.15 < few.count_nonzero() / few.numel() <= 0.4
    if kind in ("dare_linear", "magnitude_prune"):
        ((a, _),), ((b, _),) = locations(model, "a").values(), locations(model, "b").values()
        torch.testing.assert_close(all_of_it, a + b)


@keeps_all
def test_ties_elects_signs_by_frequency_when_asked() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(), adapter_name="a")
    for name in "bd":
        model.add_adapter(name, LocFTConfig())
    for name, value in (("a", 1.0), ("b", 1.0), ("d", -5.0)):
        ((delta, _),) = locations(model, name).values()
        delta.data.fill_(value)
    results = {}
    for method in ("total", "frequency"):
        model.add_weighted_adapter(
            ["a", "b", "d"],
            [1.0, 1.0, 1.0],
            method,
            combination_type="ties",
            density=1.0,
            majority_sign_method=method,
        )
        ((delta, _),) = locations(model, method).values()
        results[method] = delta.unique().tolist()
    # in total the negative sign outweighs; by frequency it is outvoted
    assert results == {"total": [-5.0], "frequency": [1.0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapters": ["a", "x"]}, r"adapters=\['a', 'x'\]: expected names from \['a', 'b', 'd'\]"),
        ({"adapters": [], "weights": []}, r"adapters=\[\]: expected names from"),
        ({"adapter_name": "b"}, "Adapter 'b' exists already"),
        ({"weights": [1.0]}, "2 adapters but 1 weights"),
        ({"combination_type": "svd"}, "combination_type='svd': expected one of linear, ties"),
        ({"combination_type": "ties"}, "density=None: ties needs the share of values to keep"),
        ({"combination_type": "dare_ties", "density": 1.5}, r"density=1.5: dare_ties needs .* in \(0, 1\]"),
    ],
)
def test_a_wrong_combination_is_refused(change: dict[str, Any], message: str) -> None:
    model = three_adapters("llama", torch.float32)
    arguments: dict[str, Any] = {"adapters": ["a", "b"], "weights": [1.0, 1.0], "adapter_name": "new"}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**(arguments | change))
    assert list(model.peft_config) == ["a", "b", "d"]


def test_what_is_not_a_delta_is_not_combined() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(modules_to_save=["lm_head"]), adapter_name="a")
    with pytest.raises(ValueError, match=r"'a' has modules_to_save or trainable_token_indices.*cannot be combined"):
        model.add_weighted_adapter(["a"], [1.0], "b")


def test_families_are_the_nine_of_the_design() -> None:
    assert len(FAMILIES) == 9
