"""Composing `W + delta` once for several forwards changes no bit of what is trained."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import build, every_family, logits, randomize, same_bits, token_ids

from peft_locft import LocFTConfig
from peft_locft.io import arithmetic
from peft_locft.tuner import layer


def gradients(model: Any, *, once: bool) -> list[torch.Tensor]:
    model.zero_grad()
    with model.composed_once() if once else nullcontext():
        for length in (7, 5, 3):
            model(token_ids(length=length)).logits.float().square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_are_the_same_bits(family: str, dtype: torch.dtype) -> None:
    model = get_peft_model(build(family, dtype), LocFTConfig(scale=0.5))
    randomize(model)
    assert all(map(torch.equal, gradients(model, once=True), gradients(model, once=False)))


def test_it_is_composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return arithmetic.compose_weight(*arguments)

    monkeypatch.setattr(layer, "compose_weight", counted)
    model = get_peft_model(build("llama"), LocFTConfig())
    gradients(model, once=True)
    assert len(calls) == 1
    gradients(model, once=False)
    assert len(calls) == 4


def test_the_sum_of_two_adapters_and_a_frozen_one() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(train_bias=True))
    model.add_adapter("other", LocFTConfig(scale=2.0))
    for name in ("default", "other"):
        randomize(model, name, seed=len(name))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".locft_delta.other." in name)
    assert all(map(torch.equal, gradients(model, once=True), gradients(model, once=False)))


def test_afterwards_the_delta_counts_again() -> None:
    model = get_peft_model(build("llama"), LocFTConfig())
    with pytest.raises(KeyboardInterrupt), model.composed_once():
        before = logits(model)
        randomize(model)
        assert same_bits(logits(model), before)
        raise KeyboardInterrupt
    assert not same_bits(logits(model), before)


def test_merged_and_disabled_models_are_left_alone() -> None:
    model = get_peft_model(build("llama"), LocFTConfig())
    randomize(model)
    edited = logits(model)
    with model.disable_adapter(), model.composed_once():
        assert not same_bits(logits(model), edited)
    model.merge_adapter()
    with model.composed_once():
        assert same_bits(logits(model), edited)
