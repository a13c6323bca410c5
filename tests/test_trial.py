"""The made-up sequences that short cuts are compared on, and the float32 that they are compared in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB_SIZE, build, every_dtype, every_family, randomize, token_ids
from torch import nn

from peft_locft import LocFTConfig
from peft_locft.engine.full_precision import in_float32
from peft_locft.engine.trial import Trial, deviation, made_up_rows, make_trial, trial_length

CPU = torch.device("cpu")


def trial_of(model: Any, length: int = 16) -> Trial:
    return make_trial(model, CPU, made_up_rows(model, length))


def test_the_sequences_differ_in_length_and_beginning() -> None:
    rows = made_up_rows(build("llama"), 16)
    assert [len(row) for row in rows] == [16, 13, 10, 4]
    long, sibling, cut, short = rows
    assert long[: len(cut)] == cut and long[:8] == sibling[:8] and long[8] != sibling[8]
    assert long[0] != short[0] and long[1 : len(short)] == short[1:]


def test_special_tokens_are_left_out() -> None:
    model = build("llama", bos_token_id=7, eos_token_id=[8, 9], pad_token_id=10)
    assert not {7, 8, 9, 10} & {token for row in made_up_rows(model, 16) for token in row}


@pytest.mark.parametrize("num_positions", [1, 2, 5])
def test_short_models_have_short_sequences(num_positions: int) -> None:
    rows = made_up_rows(build("gpt2", n_positions=num_positions), 16)
    assert max(map(len, rows)) == num_positions and min(map(len, rows)) >= 1
    assert trial_of(build("gpt2", n_positions=num_positions)).is_finite


def test_the_trial_needs_no_more_than_the_smallest_vocabulary() -> None:
    assert {token for row in made_up_rows(build("llama", vocab_size=4), 16) for token in row} <= {0, 1, 2, 3}


@every_family
@every_dtype
def test_a_causal_model_does_not_see_ahead(family: str, dtype: torch.dtype) -> None:
    trial = trial_of(build(family, dtype))
    assert trial.is_float32 and trial.is_consistent and not trial.sees_ahead
    assert trial.bound <= 1e-4
    assert trial.why_not(trial.expected) is None


@pytest.mark.parametrize(("longest", "length"), [(1, 16), (16, 16), (17, 32), (64, 64), (10**5, 64)])
def test_the_sequences_are_about_as_long_as_the_edits(longest: int, length: int) -> None:
    assert trial_length(longest) == length


def test_a_fault_at_one_position_is_found() -> None:
    trial = trial_of(build("llama"))
    found = [logits.clone() for logits in trial.expected]
    found[2][3, 5] += 1e-2
    assert "its logits change by" in str(trial.why_not(found))


def test_nan_is_not_taken_for_equal() -> None:
    trial = trial_of(build("llama"))
    found = [torch.full_like(logits, float("nan")) for logits in trial.expected]
    assert trial.why_not(found) is not None
    assert not replace(trial, expected=found).is_finite


def test_deviation_is_relative_to_the_spread_at_each_position() -> None:
    expected = torch.tensor([[1.0, -1.0], [100.0, -100.0]])
    assert deviation(expected + torch.tensor([[0.0, 0.0], [1.0, 1.0]]), expected) == pytest.approx(0.01)
    assert deviation(expected + torch.tensor([[0.1, 0.1], [0.0, 0.0]]), expected) == pytest.approx(0.1)
    assert deviation(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert deviation(torch.zeros(1, 2), torch.zeros(2, 2)) == float("inf")


# ---------------------------------------------------------------------- float32


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_half_precision_model_computes_in_float32(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    before = state(model)
    with torch.no_grad(), in_float32(model, CPU):
        found = model(token_ids()).logits
    with torch.no_grad():
        expected = build(family, dtype).float()(token_ids()).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any(name in vars(module) for module in model.modules() for name in module._parameters)


@pytest.mark.parametrize("config", [LocFTConfig(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)])
def test_the_adapter_counts(config: Any) -> None:
    model = get_peft_model(build("llama", torch.bfloat16), config)
    if isinstance(config, LocFTConfig):
        randomize(model)
    with torch.no_grad():
        plain = model(token_ids()).logits.float()
        with in_float32(model, CPU):
            found = model(token_ids()).logits
        with model.disable_adapter(), in_float32(model, CPU):
            base = model(token_ids()).logits
    assert (found - plain).norm() < 0.2 * (base - plain).norm()


def test_an_error_leaves_nothing_behind() -> None:
    model = build("llama", torch.bfloat16)
    with pytest.raises(IndexError), in_float32(model, CPU):
        model(torch.tensor([[VOCAB_SIZE + 1]]))
    assert not any(name in vars(module) for module in model.modules() for name in module._parameters)
    assert model(token_ids()).logits.dtype == torch.bfloat16


def test_a_model_that_insists_on_its_dtype_is_compared_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.bfloat16)

    def insist(module: Any, args: Any) -> None:
        if args[0].dtype == torch.float32:
            raise TypeError("bfloat16 only")

    model.model.layers[1].mlp.register_forward_pre_hook(insist)
    trial: Trial = trial_of(model)
    assert not trial.is_float32 and trial.is_consistent and not trial.sees_ahead
    assert 3e-2 <= trial.bound < 0.1
