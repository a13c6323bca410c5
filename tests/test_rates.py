"""Learning rates that fit the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_training import EDITS, base_model
from tokenizers_for_tests import make_tokenizer
from torch import nn

from peft_locft import BreadthFirstConfig, BreadthFirstTrainer, LocFTConfig
from peft_locft.training.config import batch_size_for
from peft_locft.training.rates import OTHER_METHODS, _probed_size, fitting_rates


def config(**fields: Any) -> BreadthFirstConfig:
    return BreadthFirstConfig(use_cpu=True, disable_tqdm=True, report_to="none", **fields)


def root_mean_square(tensor: torch.Tensor) -> float:
    return float(tensor.detach().float().square().mean().sqrt())


def test_every_tensor_has_its_own_rate() -> None:
    model = get_peft_model(base_model(), LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    rates = fitting_rates(model, config(relative_learning_rate=0.1))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert list(rates) == trained and len(trained) == 9
    base = dict(base_model().named_parameters())
    for name, rate in rates.items():
        weight = base[name.removeprefix("base_model.model.").replace(".locft_delta.default", "")]
        assert rate == pytest.approx(0.1 * root_mean_square(weight))
    assert len({round(rate, 6) for rate in rates.values()}) > 2  # norms and matrices differ


def test_the_optimizer_has_these_rates() -> None:
    model = get_peft_model(base_model(), LocFTConfig(target_modules="entire-layer", layers_to_transform=[1]))
    trainer = BreadthFirstTrainer(model, config(), EDITS, make_tokenizer("llama2"))
    groups = trainer.create_optimizer().param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(group["params"][0])]: group["lr"] for group in groups} == trainer.rates
    assert trainer.args.learning_rate in trainer.rates.values() and trainer.relative_rate == 0.025


def test_a_weight_that_grows_has_a_rate_that_grows() -> None:
    small, large = base_model(), base_model()
    large.model.layers[1].mlp.down_proj.weight.data *= 10
    rates = [list(fitting_rates(get_peft_model(each, LocFTConfig()), config()).values()) for each in (small, large)]
    assert rates[1] == pytest.approx([10 * rate for rate in rates[0]])


def test_a_published_rate_is_for_the_very_model() -> None:
    model = base_model()
    others = list(fitting_rates(get_peft_model(model, LocFTConfig()), config()).values())
    for name, published in (
        ("meta-llama/Meta-Llama-3-8B-Instruct", True),
        ("/models/Meta-Llama-3-8B-Instruct", True),
        ("/cache/models--meta-llama--Meta-Llama-3-8B-Instruct/snapshots/1a2b", True),
        ("meta-llama/Llama-3.2-1B", False),
        ("Meta-Llama-3-8B-Instruct-abliterated", False),
    ):
        model = base_model()
        model.config.name_or_path = name
        rates = list(fitting_rates(get_peft_model(model, LocFTConfig()), config()).values())
        assert rates == ([5e-4] if published else others), name
    model = base_model()
    model.config.name_or_path = "meta-llama/Meta-Llama-3-8B-Instruct"
    elsewhere = get_peft_model(model, LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0]))
    assert list(fitting_rates(elsewhere, config()).values()) != [5e-4]


def test_other_methods_keep_their_own_rate() -> None:
    model = get_peft_model(base_model(), LoraConfig(target_modules=["down_proj"]))
    assert set(fitting_rates(model, config()).values()) == {OTHER_METHODS}


def test_an_unfrozen_weight_and_a_tensor_of_zeros() -> None:
    model = base_model().requires_grad_(False)
    first, second = (layer.mlp.down_proj.weight.requires_grad_() for layer in model.model.layers[:2])
    nn.init.zeros_(second)
    rates = fitting_rates(model, config(relative_learning_rate=1.0))
    assert list(rates.values()) == pytest.approx([root_mean_square(first)] * 2)
    nn.init.zeros_(first)
    with pytest.raises(ValueError, match=r"all zero, or not on this process\. Pass a number"):
        fitting_rates(model, config())


def test_a_weight_that_cannot_be_read_is_measured_by_its_outputs() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64)
    nn.init.normal_(linear.weight, std=0.3)
    nn.init.ones_(linear.bias)
    assert _probed_size(linear) == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize(
    ("num_edits", "batch_size"), [(1, 1), (4, 4), (5, 5), (25, 5), (78, 8), (200, 20), (1000, 100), (3000, 100)]
)
def test_a_batch_fits_the_number_of_edits(num_edits: int, batch_size: int) -> None:
    assert batch_size_for(num_edits, config()) == batch_size
    assert batch_size_for(num_edits, config(per_device_train_batch_size=7)) == 7


@pytest.mark.parametrize(("value", "means"), [("auto", "auto"), (None, "auto"), ("5e-3", 5e-3), (1e-4, 1e-4)])
def test_a_rate_is_a_number_or_auto(value: Any, means: Any) -> None:
    assert config(learning_rate=value).learning_rate == means


def test_the_caller_s_arguments_stay_as_they_are(tmp_path: Path) -> None:
    args = config(output_dir=str(tmp_path))
    BreadthFirstTrainer(get_peft_model(base_model(), LocFTConfig()), args, EDITS, make_tokenizer("llama2"))
    assert (args.learning_rate, args.per_device_train_batch_size, args.chat_template) == ("auto", None, "auto")
