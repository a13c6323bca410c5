"""Quantized bases (law 8): the delta beside them in float32, a merge that says what it costs, an exact unmerge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from safetensors.torch import load_file
from tiny_models import build, changed, locations, logits, randomize, same_bits, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import peft_locft.tuner.base_weights
from peft_locft import LocFTConfig

DOWN = "model.layers.1.mlp.down_proj"
# with biases (an OPT), and of 64 features: 4-bit blocks are of that size
SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 64},
    "opt": {"hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64},
}
COSTS = pytest.mark.filterwarnings("ignore:Merged into a (bnb|torchao)")


def bnb_8bit() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True)


def bnb_4bit() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


# the backend's own name for itself, and how far its merge may be from the unmerged answer
BACKENDS: dict[str, tuple[Callable[[], Any], str, float]] = {
    "bitsandbytes 8-bit": (bnb_8bit, "bnb 8bit", 0.1),
    "bitsandbytes 4-bit": (bnb_4bit, "bnb 4bit", 0.5),
    "torchao int8": (torchao_int8, "torchao", 0.1),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family, sizes in SIZES.items():
        build(family, **sizes).save_pretrained(folder / family)
    return folder


def quantized(bases: Path, backend: str, family: str = "llama") -> Any:
    config = BACKENDS[backend][0]()
    return AutoModelForCausalLM.from_pretrained(
        bases / family, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


def edited(base: Any, **config: Any) -> tuple[PeftModel, Any]:
    """Return the model, and its one tuner layer."""
    defaults: dict[str, Any] = {"target_modules": [DOWN], "scale": 0.5}
    model = get_peft_model(base, LocFTConfig(**(defaults | config)))
    randomize(model, std=0.4)
    (layer,) = (module for module in model.modules() if hasattr(module, "locft_delta"))
    return model, layer


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of every tensor of a quantized module; those that are made of others by their parts."""
    found = {}
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, torch.Tensor) and hasattr(tensor, "__tensor_flatten__"):
            for part in tensor.__tensor_flatten__()[0]:
                found[f"{name}.{part}"] = getattr(tensor, part).detach().clone()
        elif isinstance(tensor, torch.Tensor):
            found[name] = tensor.detach().clone()
    return found


@every_backend
def test_a_fresh_adapter_is_the_base_and_a_linear(backend: str, bases: Path) -> None:
    base = quantized(bases, backend)
    before = logits(base)
    model = get_peft_model(base, LocFTConfig())
    (layer,) = (module for module in model.modules() if hasattr(module, "locft_delta"))
    assert layer.quantization_backend.backend_name == BACKENDS[backend][1]
    assert type(layer).__name__ == "Linear" and layer.in_features == layer.out_features == 64
    assert {name: delta.shape for name, (delta, _) in locations(model).items()} == {f"{DOWN}.weight": (64, 64)}
    assert same_bits(logits(model), before)


@every_backend
def test_the_output_is_the_bases_and_the_deltas(backend: str, bases: Path) -> None:
    model, layer = edited(quantized(bases, backend))
    ((delta, scale),) = locations(model).values()
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer.base_layer(x).double() + scale * x.double() @ delta.double().T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert same_bits(logits(model), logits(quantized(bases, backend)))


@every_backend
def test_the_bias_too(backend: str, bases: Path) -> None:
    model, layer = edited(quantized(bases, backend, "opt"), target_modules=["layers.1.fc2"], train_bias=True)
    deltas = {name.rpartition(".")[2]: delta for name, (delta, _) in locations(model).items()}
    assert set(deltas) == {"weight", "bias"}
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer.base_layer(x) + 0.5 * (x @ deltas["weight"].T + deltas["bias"])
        torch.testing.assert_close(layer(x), expected)
        # and in a merge
        with pytest.warns(UserWarning, match="Merged into a"):
            model.merge_adapter()
        torch.testing.assert_close(layer(x), expected, rtol=0.1, atol=BACKENDS[backend][2])
        torch.testing.assert_close(layer.base_layer.bias, layer._quantized_originals[0].bias + 0.5 * deltas["bias"])


@every_backend
def test_training_reaches_the_delta_and_nothing_else(backend: str, bases: Path) -> None:
    model = get_peft_model(quantized(bases, backend), LocFTConfig(target_modules=[DOWN]))
    before = bits(model.base_model.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    after = bits(model.base_model.model)
    moved = {name for name in before if not same_bits(after[name], before[name])}
    assert moved == {f"{DOWN}.locft_delta.default.weight"}


@every_backend
def test_a_merge_tells_its_cost_and_is_undone_exactly(backend: str, bases: Path) -> None:
    model, layer = edited(quantized(bases, backend))
    original, before, unmerged = layer.base_layer, bits(layer.base_layer), logits(model)
    ((delta, scale),) = locations(model).values()
    weight = layer.quantization_backend.get_base_weight(original).float()
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"Merged into a {BACKENDS[backend][1]} weight: rounding.*") as record:
            model.merge_adapter()
        # the figures are those of this merge
        merged_weight = layer.quantization_backend.get_base_weight(layer.base_layer).float()
        norm = (scale * delta).norm()
        error = (merged_weight - (weight + scale * delta)).norm()
        message = str(record[0].message)
        assert f"moved it by {error:.3g}, where the delta's own norm is {norm:.3g}." in message
        assert "merge into the base model without quantization, or keep the adapter unmerged" in message
        merged = logits(model)
        assert not same_bits(merged, unmerged)
        torch.testing.assert_close(merged, unmerged, rtol=0.0, atol=BACKENDS[backend][2])
        model.unmerge_adapter()
        assert layer.base_layer is original
        assert changed(bits(original), before) == set()
        assert same_bits(logits(model), unmerged)


@COSTS
@every_backend
def test_merge_and_unload(backend: str, bases: Path) -> None:
    base = quantized(bases, backend)
    kind = type(base.get_submodule(DOWN))
    model, _ = edited(base)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    expected = logits(merged)
    plain = model.merge_and_unload()
    assert type(plain.get_submodule(DOWN)) is kind
    assert same_bits(logits(plain), expected)


@COSTS
@every_backend
def test_unload_while_merged_gives_back_the_base(backend: str, bases: Path) -> None:
    model, layer = edited(quantized(bases, backend))
    original = layer.base_layer
    model.merge_adapter()
    assert model.unload().get_submodule(DOWN) is original


@COSTS
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@every_backend
def test_several_adapters_are_merged_from_the_original(backend: str, bases: Path) -> None:
    """Not one onto the rounded other."""
    model, layer = edited(quantized(bases, backend))
    model.add_adapter("second", LocFTConfig(target_modules=[DOWN]))
    randomize(model, "second", seed=1, std=0.4)
    model.merge_adapter(["default", "second"])
    at_once = bits(layer.base_layer)
    model.unmerge_adapter()
    model.merge_adapter(["second"])
    model.merge_adapter(["default"])
    assert changed(bits(layer.base_layer), at_once) == set()


@every_backend
def test_a_broken_delta_is_not_merged(backend: str, bases: Path) -> None:
    model, layer = edited(quantized(bases, backend))
    original, before = layer.base_layer, bits(layer.base_layer)
    layer.locft_delta["default"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaNs detected .* default seems to be broken: it .* into weight\."):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer is original and not layer.merged
    assert changed(bits(original), before) == set()


@COSTS
@every_backend
def test_saved_and_loaded_merged_or_not(backend: str, bases: Path, tmp_path: Path) -> None:
    """The file holds the delta only; the same quantized base has the same sha256, another one has not."""
    model, _ = edited(quantized(bases, backend))
    unmerged = logits(model)
    key = f"base_model.model.{DOWN}.locft_delta.weight"
    hashes = []
    for folder in ("unmerged", "merged"):
        model.save_pretrained(tmp_path / folder)
        assert list(load_file(tmp_path / folder / "adapter_model.safetensors")) == [key]
        hashes.append(model.peft_config["default"].base_sha256)
        reloaded = PeftModel.from_pretrained(quantized(bases, backend), tmp_path / folder)
        assert same_bits(logits(reloaded), unmerged)
        if folder == "unmerged":
            model.merge_adapter()
    assert hashes[0] == hashes[1] and set(hashes[0]) == {f"{DOWN}.weight"}
    with pytest.warns(UserWarning, match=f"was trained on another base: {DOWN}.weight"):
        PeftModel.from_pretrained(build("llama", **SIZES["llama"]), tmp_path / "unmerged")


@every_backend
def test_a_packed_weight_is_not_named_as_a_parameter(backend: str, bases: Path) -> None:
    with pytest.raises(ValueError, match=r"target_parameters names the weight of a quantized .*Name the module in"):
        get_peft_model(quantized(bases, backend), LocFTConfig(target_parameters=[f"{DOWN}.weight"]))


@every_backend
def test_all_linear_and_a_norm_beside_it(backend: str, bases: Path) -> None:
    base = quantized(bases, backend)
    before = logits(base)
    model = get_peft_model(base, LocFTConfig(target_modules="all-linear", layers_to_transform=[1]))
    assert len(locations(model)) == 7
    model.add_adapter("norm", LocFTConfig(target_modules=["input_layernorm"]))
    assert same_bits(logits(model), before)
    # what is not quantized is merged exactly
    model.set_adapter("norm")
    randomize(model, "norm")
    unmerged = logits(model)
    model.merge_adapter()
    assert same_bits(logits(model), unmerged)


# ---------------------------------------------------------------- backends that cannot write a weight


def test_torchao_that_transformers_does_not_know_of_cannot_be_merged() -> None:
    """Quantized in place: PEFT cannot tell how to quantize it again."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    base = build("llama", **SIZES["llama"])
    quantization.quantize_(base.get_submodule("model.layers.1.mlp"), quantization.Int8WeightOnlyConfig())
    before = logits(base)
    model, layer = edited(base)
    unmerged = logits(model)
    assert not same_bits(unmerged, before)
    with pytest.raises(
        ValueError, match="Cannot merge into Linear: its backend, torchao, cannot write a changed weight"
    ):
        model.merge_adapter()
    assert not layer.merged and same_bits(logits(model), unmerged)


class Packed(nn.Module):
    """A quantized linear as GPTQ's: it has no `weight` at all."""

    qweight: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.detach().abs().max() / 127, requires_grad=False)
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight * self.scale).T


@pytest.fixture
def forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(base: nn.Module, **kwargs: Any) -> Any:
        return ForwardOnlyQuantizationBackend("packed") if isinstance(base, Packed) else None

    monkeypatch.setattr(peft_locft.tuner.base_weights, "resolve_quantization_backend", resolve)


@pytest.mark.usefixtures("forward_only")
def test_a_forward_only_backend(tmp_path: Path) -> None:
    def base() -> Any:
        model = build("llama")
        model.model.layers[1].mlp.down_proj = Packed(model.get_submodule(DOWN))
        return model

    before = logits(base())
    model, layer = edited(base(), train_bias=True)
    ((delta, scale),) = locations(model).values()
    x = torch.randn(3, 48)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * x @ delta.T)
    model(token_ids(), labels=token_ids()).loss.backward()
    assert delta.grad is not None and delta.grad.any()
    with pytest.raises(
        ValueError, match="Cannot merge into Packed: its backend, packed, cannot write a changed weight"
    ):
        model.merge_adapter()
    with pytest.raises(ValueError, match="Load the base model without quantization and merge there"):
        model.merge_and_unload()
    unmerged = logits(model)
    model.save_pretrained(tmp_path)
    # nothing there that could be hashed
    assert model.peft_config["default"].base_sha256 is None
    assert same_bits(logits(PeftModel.from_pretrained(base(), tmp_path)), unmerged)
    assert same_bits(logits(model.unload()), before)
