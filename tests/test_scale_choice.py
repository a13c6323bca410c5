"""The strength of a delta: which is chosen, and that it is set, saved, and put back when something fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import build, locations, logits, randomize

from peft_locft import LocFTConfig
from peft_locft.adapters import check_adapter
from peft_locft.training.scale_choice import SCALES, TradeOff, choose_scale


def edited() -> PeftModel:
    model = get_peft_model(build("llama"), LocFTConfig(target_modules=["down_proj"], task_type="CAUSAL_LM"))
    randomize(model)
    return model


def by_scale(model: PeftModel) -> Mapping[str, float]:
    scale = next(scale for _, scale in locations(model).values())
    return {"scale": scale, "reliability": 1 - (1 - scale) ** 2, "perplexity": 20 + 10 * scale**2}


@pytest.mark.parametrize(
    ("trade_off", "chosen"),
    [
        (TradeOff({"reliability": 1.0}), 1.0),
        (TradeOff({"perplexity": -1.0}), 0.0),
        (TradeOff({"perplexity": -1.0}, at_least={"reliability": 0.9}), 0.7),
        (TradeOff({"reliability": 1.0}, at_most={"perplexity": 23.7}), 0.6),
        (TradeOff({"reliability": 1.0, "perplexity": -0.05}), 0.7),
    ],
)
def test_the_best_for_the_trade_off_is_set(trade_off: TradeOff, chosen: float) -> None:
    model = edited()
    choice = choose_scale(model, by_scale, trade_off, progress=False)
    assert choice.scale == chosen
    assert [each.scale for each in choice.trials] == list(SCALES)
    assert {scale for _, scale in locations(model).values()} == {chosen}
    assert model.peft_config["default"].scale == chosen


def test_of_equal_scales_the_smallest_is_taken() -> None:
    flat = {"locality": 0.5}
    choice = choose_scale(edited(), lambda model: flat, TradeOff({"locality": 1.0}), [1.0, 0.4, 0.7], progress=False)
    assert choice.scale == 0.4


def test_limits_that_no_scale_keeps_are_said_to_be_missed() -> None:
    model = edited()
    trade_off = TradeOff({"perplexity": -1.0}, at_least={"reliability": 0.9})
    with pytest.warns(UserWarning, match="No scale is within the limits .*; using 0.5, which violates them least"):
        choice = choose_scale(model, by_scale, trade_off, [0.1, 0.5], progress=False)
    assert choice.scale == 0.5
    assert "| **0.5** | 0.5 | 0.75 | 22.5 | -22.5 | no |" in str(choice)


def test_the_choice_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = edited()
    choice = choose_scale(
        model, by_scale, TradeOff({"perplexity": -1.0}, at_least={"reliability": 0.9}), progress=False
    )
    assert str(choice).splitlines()[0] == "| scale | scale | reliability | perplexity | score | within limits |"
    assert choice.to_dict()["trials"][7]["metrics"]["reliability"] == pytest.approx(0.91)
    model.save_pretrained(tmp_path)
    config: Any = check_adapter(tmp_path).config
    assert config.scale == 0.7
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_what_fails_leaves_the_scale_as_it_was() -> None:
    model = edited()
    model.base_model.set_scale("default", 0.25)

    def broken(model: PeftModel) -> Mapping[str, float]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        choose_scale(model, broken, TradeOff({"reliability": 1.0}), progress=False)
    for measured in ({"reliability": math.nan}, {"perplexity": 1.0}):
        with pytest.raises(ValueError, match="evaluate returned no reliability, which the trade-off needs"):
            choose_scale(model, lambda model: measured, TradeOff({"reliability": 1.0}), progress=False)  # noqa: B023
    assert by_scale(model)["scale"] == model.peft_config["default"].scale == 0.25


def test_mistakes_are_refused() -> None:
    model = edited()
    trade_off = TradeOff({"reliability": 1.0})
    with pytest.raises(ValueError, match="scales: found none to try"):
        choose_scale(model, by_scale, trade_off, [])
    with pytest.raises(ValueError, match=r"the adapter 'other'. Expected one of \['default'\]"):
        choose_scale(model, by_scale, trade_off, adapter_name="other")
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(ValueError, match="choose_scale needs a PeftModel with a LocFT adapter"):
        choose_scale(lora, by_scale, trade_off)
    with pytest.raises(ValueError, match="expected a factor other than 0 for at least one metric"):
        TradeOff({"reliability": 0.0})
    with pytest.raises(ValueError, match="expected finite numbers"):
        TradeOff({"reliability": 1.0}, at_least={"locality": math.inf})
    model.merge_adapter()
    with pytest.raises(ValueError, match="while it is merged"):
        choose_scale(model, by_scale, trade_off, progress=False)
