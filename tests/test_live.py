"""Adapters pushed into a running server: on plain torch models with the call signatures of vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoints import edit, save_base, stored
from tiny_models import logits
from torch import nn
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig
from peft_locft.workflows import (
    LiveEdit,
    LocFTWorkerExtension,
    push_to_sglang,
    push_to_vllm,
    withdraw_from_sglang,
    withdraw_from_vllm,
)

ENTIRE_LAYER = LocFTConfig(target_modules="entire-layer", layers_to_transform=[1])
Pairs = Iterable[tuple[str, torch.Tensor]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", dtype=torch.bfloat16)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    edit(base, tmp_path / "adapter", ENTIRE_LAYER)
    return tmp_path / "adapter"


@pytest.fixture
def other(base: Path, tmp_path: Path) -> Path:
    edit(base, tmp_path / "other", LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2]), seed=1)
    return tmp_path / "other"


def served(base: Path) -> Any:
    """Return a model that loads weights by their names in the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")

    def load_weights(pairs: Pairs) -> set[str]:
        weights = dict(pairs)
        return set(weights) - set(model.load_state_dict(weights, strict=False).unexpected_keys)

    model.load_weights = load_weights
    return model


class Worker(LocFTWorkerExtension):
    """A worker of vLLM, as far as the extension sees it."""

    def __init__(self, model: nn.Module) -> None:
        self.model_runner = SimpleNamespace(get_model=lambda: model)


class Engine:
    """`vllm.LLM` and `sglang.Engine`, as far as they are called."""

    def __init__(self, *models: Any) -> None:
        self.models, self.workers, self.num_emptied = models, list(map(Worker, models)), 0

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, method)(*args) for worker in self.workers]

    def reset_prefix_cache(self) -> bool:
        self.num_emptied += 1
        return True

    def update_weights_from_tensor(
        self, named_tensors: list[tuple[str, torch.Tensor]], load_format: str | None = None, flush_cache: bool = True
    ) -> tuple[bool, str]:
        self.num_emptied += flush_cache
        for model in self.models:
            if not model.load_weights(iter(named_tensors)):
                return False, "no such weights"
        return True, "Success"


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_vllm_answers_as_merged_and_then_as_before(base: Path, adapter: Path, other: Path) -> None:
    models = [served(base), served(base)]
    engine, before, first = Engine(*models), bits(models[0]), logits(models[0])
    merged = edit(base, adapter, ENTIRE_LAYER).merge_and_unload()
    changed = push_to_vllm(engine, adapter)
    assert len(changed) == 2 and len(changed[0]) == 9
    assert engine.num_emptied == 1
    for model in models:
        assert torch.equal(logits(model), logits(merged)) and not torch.equal(logits(model), first)
    assert (
        engine.collective_rpc("locft_status")
        == [{"pushed": str(adapter), "changed": changed[0], "dtype": "bfloat16"}] * 2
    )
    # another one takes its place, and nothing of the first stays
    push_to_vllm(engine, other)
    assert all(same(bits(model), stored_with(base, other)) for model in models)
    restored = withdraw_from_vllm(engine)
    assert restored[0] == ["model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    assert engine.num_emptied == 3
    assert all(same(bits(model), before) for model in models)
    assert torch.equal(logits(models[1]), first)
    assert engine.collective_rpc("locft_status") == [{"pushed": None, "changed": [], "dtype": "bfloat16"}] * 2
    assert withdraw_from_vllm(engine) == [[], []]


def test_a_checkpoint_in_float32_that_is_served_in_bfloat16(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    loaded = edit(base, tmp_path / "adapter", ENTIRE_LAYER, dtype=torch.bfloat16)
    model = served(base).to(torch.bfloat16)
    engine, before = Engine(model), bits(model)
    merged = loaded.merge_and_unload()
    push_to_vllm(engine, tmp_path / "adapter")
    assert same(bits(model), bits(merged))
    withdraw_from_vllm(engine)
    assert same(bits(model), before)
    with pytest.raises(ValueError, match="it is after rounding to bfloat16"):
        push_to_sglang(engine, tmp_path / "adapter")
    push_to_sglang(engine, tmp_path / "adapter", dtype="bfloat16")
    assert same(bits(model), bits(merged))
    # another base's tensors are not loaded in place of the originals
    with pytest.raises(ValueError, match="is not the weight that"):
        withdraw_from_sglang(engine, tmp_path / "adapter", save_base(tmp_path / "other", seed=1), dtype="bfloat16")
    assert same(bits(model), bits(merged))
    withdraw_from_sglang(engine, tmp_path / "adapter", dtype="bfloat16")
    assert same(bits(model), before)


class PackedRunner:
    """The runner of an engine that packs the weights of its linears and frees them, as vLLM's for CPUs."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        linears: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for linear in linears:
            linear.output_size, linear.input_size = linear.weight.shape
            self.pack(linear, linear.weight.data)

    def pack(self, module: Any, weight: torch.Tensor) -> None:
        module.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        packed = weight.T.contiguous()
        module.forward = lambda x: x @ packed

    def get_model(self) -> nn.Module:
        return self.model

    def reload_weights(self, weights_iterator: Pairs) -> None:
        modules = dict(self.model.named_modules())
        for name, weight in weights_iterator:
            self.pack(modules[name.removesuffix(".weight")], weight)


def test_an_engine_that_packs_its_weights(base: Path, other: Path, adapter: Path) -> None:
    model = served(base)
    engine = Engine(model)
    worker: Any = engine.workers[0]
    worker.model_runner = PackedRunner(model)
    first = logits(model)
    changed = push_to_vllm(engine, other)
    assert changed == [["model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]]
    pushed = logits(model)
    assert not torch.equal(pushed, first)
    # the same again: the originals are those of the checkpoint, not the edited ones
    push_to_vllm(engine, other)
    assert torch.equal(logits(model), pushed)
    assert withdraw_from_vllm(engine) == changed and torch.equal(logits(model), first)
    # norms are not packed, and a linear with a bias is more than its weight
    with pytest.raises(ValueError, match="has packed its weights and can only load a whole linear of this name"):
        push_to_vllm(engine, adapter)
    model.model.layers[2].mlp.down_proj.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(ValueError, match=r"layers.2.mlp.down_proj.weight: the server has packed .* without a bias"):
        push_to_vllm(engine, other)
    assert torch.equal(logits(model), first) and engine.collective_rpc("locft_status")[0]["pushed"] is None


def stored_with(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    config = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[0, 2])
    return bits(edit(base, adapter.with_name("again"), config, seed=1).merge_and_unload())


def test_sglang(base: Path, adapter: Path) -> None:
    model = served(base)
    engine, before = Engine(model), bits(model)
    merged = edit(base, adapter, ENTIRE_LAYER).merge_and_unload()
    names = push_to_sglang(engine, adapter)
    assert len(names) == 9 and engine.num_emptied == 1
    assert torch.equal(logits(model), logits(merged))
    assert withdraw_from_sglang(engine, adapter) == names
    assert same(bits(model), before) and engine.num_emptied == 2
    model.load_weights = lambda pairs: set()
    with pytest.raises(RuntimeError, match="SGLang refused the weights: no such weights"):
        push_to_sglang(engine, adapter)


class Fused(nn.Module):
    """One layer as vLLM holds it: gate and up in one parameter, and of each only this process' half of the rows."""

    def __init__(self, weights: dict[str, torch.Tensor], rank: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.rank = rank
        rows, columns = weights["model.layers.1.mlp.gate_proj.weight"].shape
        layer = nn.Module()
        layer.gate_up_proj = nn.Parameter(torch.zeros(rows, columns).to(dtype), requires_grad=False)
        layer.untouched = nn.Parameter(torch.randn(5), requires_grad=False)
        self.layers = nn.ModuleList([nn.Module(), layer])
        self.load_weights(iter(weights.items()))

    def load_weights(self, pairs: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, weight in pairs:
            for place, part in enumerate(("gate_proj", "up_proj")):
                if f"layers.1.mlp.{part}" in name:
                    half = weight.chunk(2)[self.rank]
                    self.layers[1].gate_up_proj[len(half) * place :][: len(half)].copy_(half)  # type: ignore[index]
                    loaded.add("layers.1.gate_up_proj")
        return loaded


@pytest.mark.parametrize("rank", [0, 1])
def test_fused_and_split_parameters(rank: int, base: Path, tmp_path: Path) -> None:
    edited = edit(base, tmp_path / "up", LocFTConfig(target_modules=["up_proj"], layers_to_transform=[1]))
    name = "model.layers.1.mlp.up_proj.weight"
    weights, new = stored(base), edited.merge_and_unload().get_parameter(name).detach()
    live = LiveEdit(Fused(weights, rank))
    before = bits(live.model)
    assert live.push({name: new}, "up") == ["layers.1.gate_up_proj"]
    expected = torch.cat([weights[name.replace("up", "gate")].chunk(2)[rank], new.chunk(2)[rank]])
    assert torch.equal(live.model.layers[1].gate_up_proj, expected)
    assert live.originals.keys() == {"layers.1.gate_up_proj"}
    assert live.withdraw() == ["layers.1.gate_up_proj"]
    assert same(bits(live.model), before)


def test_what_a_server_does_not_take_changes_nothing(base: Path, adapter: Path) -> None:
    weights = stored(base)
    live = LiveEdit(Fused(weights, 0))
    before = bits(live.model)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"took none of model.layers.1.mlp.down_proj.weight: it is another model"):
        live.push({"model.layers.1.mlp.down_proj.weight": weights[name]}, "down")
    failing = {name: weights[name] + 1, name.replace("up", "gate"): torch.zeros(3, 3)}
    with pytest.raises(RuntimeError):
        live.push(failing, "torn")
    assert same(bits(live.model), before)
    quantized = LiveEdit(Fused(weights, 0, torch.int8))
    before = bits(quantized.model)
    with pytest.raises(ValueError, match="is quantized or rearranged in the server"):
        quantized.push({name: weights[name] + 5}, "up")
    assert same(bits(quantized.model), before)
    assert quantized.label is None
