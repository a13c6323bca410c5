"""Where `LocFTConfig()` puts the delta: the published locations, their siblings, and any other decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import FAMILIES, LLAMA_LIKE, build, every_family, locations
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Qwen2MoeConfig

from peft_locft import LocFTConfig
from peft_locft.tuner import default_location, find_decoder_layers
from peft_locft.tuner.presets import PublishedLocation, entire_layers


def on_meta(family: str, num_layers: int) -> Any:
    """Return a model of real depth that has no weights."""
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    more = {"layer_types": ["full_attention"] * num_layers} if family == "gemma3" else {}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(FAMILIES[family](**{key: num_layers}, **more))


def qwen2_moe(num_layers: int) -> Any:
    config = Qwen2MoeConfig(
        **(LLAMA_LIKE | {"num_hidden_layers": num_layers}),
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


MISTRAL_LAYER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


@pytest.mark.parametrize(
    ("family", "num_layers", "name"),
    [
        ("llama", 32, "model.layers.22.mlp.down_proj"),  # Meta-Llama-3-8B-Instruct, published
        ("llama", 80, "model.layers.57.mlp.down_proj"),  # 70B: the 57.5th of 80
        ("llama", 16, "model.layers.11.mlp.down_proj"),
        ("qwen2", 28, "model.layers.6.mlp.down_proj"),  # Qwen2.5-7B-Instruct, published
        ("qwen2", 80, "model.layers.19.mlp.down_proj"),
        ("qwen2", 1, "model.layers.0.mlp.down_proj"),
        # any other: two thirds of the depth
        ("gemma3", 26, "model.layers.18.mlp.down_proj"),
        ("gpt2", 12, "transformer.h.8.mlp.c_proj"),
        ("gpt_neox", 32, "gpt_neox.layers.22.mlp.dense_4h_to_h"),
        ("opt", 24, "model.decoder.layers.16.fc2"),
        ("qwen3", 36, "model.layers.25.mlp.down_proj"),
    ],
)
def test_the_default_location(family: str, num_layers: int, name: str) -> None:
    location = default_location(on_meta(family, num_layers))
    assert (location.target_modules, location.target_parameters) == ((name,), ())
    assert location.learning_rate == (5e-4 if family in ("llama", "qwen2") else None)


def test_mistral_is_edited_in_an_entire_layer() -> None:
    location = default_location(on_meta("mistral", 32))
    assert location.target_modules == tuple(f"model.layers.23.{name}" for name in MISTRAL_LAYER)
    assert location.learning_rate == 5e-5


def test_qwen_moe_is_edited_in_the_shared_expert() -> None:
    location = default_location(qwen2_moe(24))
    assert location.target_modules == ("model.layers.20.mlp.shared_expert.down_proj",)


def test_fused_experts_are_a_parameter() -> None:
    location = default_location(on_meta("mixtral", 32))
    assert (location.target_modules, location.target_parameters) == (
        (),
        ("model.layers.22.mlp.experts.down_proj",),
    )


@pytest.mark.parametrize("num_layers", range(1, 130))
def test_a_sibling_of_any_depth_has_its_layer(num_layers: int) -> None:
    published = PublishedLocation(layer=22, num_layers=32, module="")
    layer = published.layer_of(num_layers)
    assert 0 <= layer < num_layers
    # the same relative depth, to half a layer
    assert abs((layer + 1) / num_layers - 23 / 32) <= 0.5 / num_layers or layer == 0


@every_family
def test_the_layer_can_be_chosen(family: str) -> None:
    model = get_peft_model(build(family), LocFTConfig(layers_to_transform=0))
    stack, _ = find_decoder_layers(build(family))
    assert {name.startswith(f"{stack}.0.") for name in locations(model)} == {True}


def test_several_layers_can_be_chosen() -> None:
    model = get_peft_model(build("mixtral"), LocFTConfig(layers_to_transform=[0, 2]))
    assert set(locations(model)) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 2)}


@every_family
def test_the_decoder_layers_are_found_by_structure(family: str) -> None:
    model = build(family)
    name, stack = find_decoder_layers(model)
    assert len(stack) == 3
    assert model.get_submodule(name) is stack
    # also in the model without its head, and in a wrapped one
    without_head = AutoModel.from_config(FAMILIES[family]())
    assert name.endswith(find_decoder_layers(without_head)[0])
    wrapped = get_peft_model(model, LocFTConfig())
    assert find_decoder_layers(wrapped.base_model.model)[0] == name


@every_family
def test_an_entire_layer_is_all_of_its_parameters(family: str) -> None:
    """Once with its biases, in a model that has them; nothing outside of it."""
    config = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1], train_bias=True)
    base = build(family)
    stack, _ = find_decoder_layers(base)
    expected = {name for name, _ in base.named_parameters() if name.startswith(f"{stack}.1.")}
    model = get_peft_model(base, config)
    assert set(locations(model)) == expected


def test_an_entire_layer_is_found_again_beneath_an_adapter() -> None:
    base = build("mixtral")
    first = entire_layers(base, [1])
    model = get_peft_model(base, LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    assert entire_layers(model.base_model.model, [1]) == first
    model.add_adapter("more", LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    assert locations(model, "more").keys() == locations(model).keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("target_modules", [None, "entire-layer", "all-linear"])
def test_a_layer_that_is_not_there_is_refused(family: str, target_modules: str | None) -> None:
    config = LocFTConfig(target_modules=target_modules, layers_to_transform=[1, 3])
    with pytest.raises(ValueError, match=r"layers_to_transform=\[3\]: the model has 3 decoder layers .* up to 2"):
        get_peft_model(build(family), config)


def test_a_model_without_decoder_layers_needs_a_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Sequential has no list of decoder layers.*target_modules=\["):
        get_peft_model(model, LocFTConfig())


def test_layers_without_a_down_projection_need_a_name() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.LayerNorm(4))])

    with pytest.raises(ValueError, match=r"No down-projection was found in layers\.0\. Name the location"):
        default_location(Toy())
