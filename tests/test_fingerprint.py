"""The sha256 of a model's configuration and weights, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import base_model, peft_model

from peft_locft import LocFTConfig
from peft_locft.engine.fingerprint import layer_digests
from peft_locft.engine.offload import trunk_offloaded
from peft_locft.tuner.presets import find_decoder_layers


def digests(model: Any, **arguments: Any) -> list[str]:
    layers = list(find_decoder_layers(model)[1])
    return layer_digests(model, layers, len(layers), "the_option", **arguments)


def adapted(layer: int = 2) -> Any:
    return peft_model("llama", LocFTConfig(task_type="CAUSAL_LM", layers_to_transform=[layer]))


def test_a_weight_counts_from_its_layer_on() -> None:
    before = digests(base_model("llama"))
    changed = base_model("llama")
    changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert [a == b for a, b in zip(before, digests(changed), strict=True)] == [True, True, False, False]
    changed = base_model("llama")
    changed.model.embed_tokens.weight.data[0, 0] += 1
    assert not set(before) & set(digests(changed))


def test_adapters_count_only_if_asked() -> None:
    base, model = digests(base_model("llama")), adapted()
    assert digests(model) == base
    assert [a == b for a, b in zip(base, digests(model, with_adapters=True), strict=True)] == [True, True, True, False]


def test_the_dtype_and_the_configuration_count_and_the_folder_does_not() -> None:
    before, moved, other = digests(base_model("llama")), base_model("llama"), base_model("llama")
    moved.config._name_or_path = "elsewhere"
    assert digests(moved) == before
    other.config.rope_theta = 1.0
    assert not set(before) & set(digests(other))
    assert not set(before) & set(digests(base_model("llama").to(torch.bfloat16)))


def test_an_offloaded_trunk_has_the_same_digests() -> None:
    model = adapted()
    before = digests(model, with_adapters=True)
    with trunk_offloaded(model, torch.device("cpu")):
        assert digests(model, with_adapters=True) == before


def test_a_weight_on_the_meta_device_is_an_error() -> None:
    model = adapted()
    model.get_base_model().model.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"the_option: .* \S+ is offloaded .* Unset the_option"):
        digests(model)
