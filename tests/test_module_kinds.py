"""Which weights a kind of module is, in every family."""

from __future__ import annotations

import re

import pytest
from location_families import FAMILIES as OTHERS
from location_families import build_family
from peft import get_peft_model
from tiny_models import FAMILIES, build, every_family, locations
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from peft_locft.locating.module_kinds import KINDS, config_of, location_of

LLAMA = {
    "down": ["mlp.down_proj"],
    "up": ["mlp.up_proj"],
    "attention": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
EXPECTED: dict[str, dict[str, list[str]]] = {
    **dict.fromkeys(("gemma3", "llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "gpt2": {
        "down": ["mlp.c_proj"],
        "up": ["mlp.c_fc"],
        "attention": ["attn.c_attn", "attn.c_proj"],
        "mlp": ["mlp.c_fc", "mlp.c_proj"],
    },
    "gpt_neox": {
        "down": ["mlp.dense_4h_to_h"],
        "up": ["mlp.dense_h_to_4h"],
        "attention": ["attention.query_key_value", "attention.dense"],
        "mlp": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    },
    "mixtral": {
        "down": ["mlp.experts.down_proj"],
        "up": ["mlp.experts.gate_up_proj"],
        "attention": LLAMA["attention"],
        "mlp": ["mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "opt": {
        "down": ["fc2"],
        "up": ["fc1"],
        "attention": ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"],
        "mlp": ["fc1", "fc2"],
    },
}
STACKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


@every_family
def test_kinds_are_told_by_structure(family: str) -> None:
    model = build(family)
    stack = STACKS.get(family, "model.layers")
    for kind, names in EXPECTED[family].items():
        found = location_of(model, kind, 1)
        assert [*found.target_modules, *found.target_parameters] == [f"{stack}.1.{name}" for name in names], kind


@every_family
def test_every_kind_can_be_trained(family: str) -> None:
    for kind in KINDS:
        model = build(family)
        location = location_of(model, kind, 2)
        found = locations(get_peft_model(model, config_of(location)))
        modules = {f"{name}.weight" for name in location.target_modules}
        assert set(found) == modules | set(location.target_parameters), kind
        if kind == "entire-layer":
            assert len(found) > len(EXPECTED[family]["mlp"]) + len(EXPECTED[family]["attention"])


def test_a_gate_beside_experts_is_no_down_projection() -> None:
    config = Qwen2MoeConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert location_of(model, "down", 1).target_modules == ("model.layers.1.mlp.shared_expert.down_proj",)
    assert location_of(model, "up", 1).target_modules == ("model.layers.1.mlp.shared_expert.up_proj",)


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_down_is_the_default_location_and_up_feeds_it(family: str) -> None:
    model = build_family(family)
    stack, downs = OTHERS[family].stack, OTHERS[family].downs
    for layer in range(3):
        down, up = location_of(model, "down", layer), location_of(model, "up", layer)
        assert (*down.target_modules, *down.target_parameters) == (f"{stack}.{layer}.{downs[layer]}",)
        (name,) = (*up.target_modules, *up.target_parameters)
        assert re.search(r"up|c_fc|w_1|input_linear|in_proj|v1|ffn\.0|feed_forward\.key|intermediate", name)


def test_a_state_space_stands_in_for_the_attention() -> None:
    model = build_family("bamba")
    names = location_of(model, "attention", 0).target_modules
    assert set(names) == {f"model.layers.0.mamba.{name}" for name in ("conv1d", "in_proj", "out_proj")}
    mlp = location_of(model, "mlp", 0).target_modules
    assert set(mlp) == {f"model.layers.0.feed_forward.{name}_proj" for name in ("gate", "up", "down")}
    with pytest.raises(ValueError, match=r"found 'mlp', but backbone\.layers\.0 has no module of that kind"):
        location_of(build_family("mamba"), "mlp", 0)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_the_same_beneath_an_adapter(kind: str) -> None:
    model = build("gpt2")
    before = location_of(model, kind, 1)
    get_peft_model(model, config_of(before))
    assert location_of(model, kind, 1) == before


def test_modules_can_be_named() -> None:
    model = build("llama")
    assert location_of(model, "o_proj", 0).target_modules == ("model.layers.0.self_attn.o_proj",)
    with pytest.raises(
        ValueError,
        match=r"found 'proj', but model.layers.0 has no module of that.*its modules: self",
    ):
        location_of(model, "proj", 0)


@pytest.mark.parametrize("layer", [3, -1])
def test_a_layer_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"layer {layer}: the model has 3 decoder layers \(model.layers\)"):
        location_of(build("llama"), "down", layer)


def test_the_families_are_all_there() -> None:
    assert set(EXPECTED) == set(FAMILIES)
