"""Laws 8 and 9: a base weight that is elsewhere (offloaded, sharded) is edited all the same, without a silent drop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from test_tuner_modules import KINDS, answer, toy
from tiny_models import (
    assert_same_tensors,
    base_state,
    build,
    every_dtype,
    every_family,
    locations,
    logits,
    randomize,
    same_bits,
    token_ids,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import AutoModelForCausalLM

from peft_locft import LocFTConfig

# ---------------------------------------------------------------- offloaded by accelerate


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # merging a base on the disk, PEFT writes to the path of its file without the leading slash: into this folder
    monkeypatch.chdir(tmp_path)


def offload(model: nn.Module, where: str, folder: Path) -> None:
    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, folder, execution_device=torch.device("cpu"))


def is_offloaded(module: nn.Module) -> bool:
    return next(module.parameters()).is_meta


# linear in their weight; fused experts and norms are not, see below
LINEAR_AT_HEART = {"mixtral": ["self_attn.o_proj"], "mistral": ["down_proj"]}


@every_dtype
@every_family
def test_the_forward_of_an_offloaded_base_is_that_of_one_in_memory(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config = LocFTConfig(target_modules=LINEAR_AT_HEART.get(family), train_bias=True, scale=0.7)
    in_memory = get_peft_model(build(family, dtype), config)
    randomize(in_memory)
    in_memory.save_pretrained(tmp_path / "adapter")
    base = build(family, dtype)
    before = logits(base)
    offload(base, "cpu", tmp_path / "offload")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert all(is_offloaded(layer.base_layer) for layer in model.modules() if hasattr(layer, "locft_delta"))
    assert not same_bits(logits(model), before)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(model), logits(in_memory), atol=tolerance, rtol=tolerance)
    # nothing to hash: PEFT would otherwise save what the meta device gives
    assert model.peft_config["default"].base_sha256 is not None


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("when", ["before the adapter", "after it"])
def test_an_offloaded_base_is_merged_and_restored_exactly(where: str, when: str, tmp_path: Path) -> None:
    config = LocFTConfig(target_modules=["down_proj", "embed_tokens"], layers_to_transform=None)
    in_memory = get_peft_model(build("llama"), config)
    randomize(in_memory)
    before, unmerged = logits(build("llama")), logits(in_memory)
    model = build("llama")
    if when == "before the adapter":
        offload(model, where, tmp_path)
    model = get_peft_model(model, config)
    randomize(model)
    if when == "after it":
        offload(model, where, tmp_path)
    for _ in range(2):
        model.merge_adapter()
        assert same_bits(logits(model), unmerged)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), unmerged)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges on the way
        assert same_bits(logits(model), before)
    torch.testing.assert_close(logits(model), unmerged)
    assert same_bits(logits(model.merge_and_unload()), unmerged)


def test_a_failed_merge_of_an_offloaded_base_changes_nothing(tmp_path: Path) -> None:
    model = build("llama")
    before = logits(model)
    offload(model, "disk", tmp_path)
    model = get_peft_model(model, LocFTConfig(target_modules=["down_proj"]))
    randomize(model)
    unmerged = logits(model)
    *_, (delta, _) = locations(model).values()
    kept, delta.data = delta.data, torch.full_like(delta, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    delta.data = kept
    torch.testing.assert_close(logits(model), unmerged)
    with model.disable_adapter():
        assert same_bits(logits(model), before)


def test_layers_that_transformers_put_on_disk(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    in_memory = get_peft_model(build("llama"), LocFTConfig(target_modules=["down_proj"]))
    randomize(in_memory)
    unmerged = logits(in_memory)
    in_memory.save_pretrained(tmp_path / "adapter")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert is_offloaded(base.model.layers[2].mlp.down_proj)
    # PEFT dispatches anew, by the wrapped names
    wrapped_map = {f"base_model.model.{name}": device for name, device in device_map.items()}
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=wrapped_map, offload_dir=tmp_path / "offload again"
    )
    torch.testing.assert_close(logits(model), unmerged)
    assert is_offloaded(model.base_model.model.model.layers[2].mlp.down_proj.base_layer)
    model.merge_adapter()
    assert same_bits(logits(model), unmerged)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), unmerged)


LINEAR_KINDS = ("embed", "conv1d", "linear", "tf_conv1d", "conv2d")


@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module_offloaded(kind: str, train_bias: bool) -> None:
    config = LocFTConfig(target_modules=[kind], train_bias=train_bias)
    in_memory = get_peft_model(toy(), config)
    randomize(in_memory)
    model = get_peft_model(toy(), config)
    randomize(model)
    (layer,) = (module for module in model.modules() if hasattr(module, "locft_delta"))
    cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.base_layer.weight.is_meta
    if kind in LINEAR_KINDS:
        torch.testing.assert_close(answer(model), answer(in_memory))
    elif kind == "out_proj":
        # its weight is read by the attention, which offloading knows nothing of: loud, with or without an adapter
        with pytest.raises((RuntimeError, NotImplementedError)):
            answer(model)
    else:
        with pytest.raises(NotImplementedError, match=r"weight.* of .*Norm is quantized, offloaded or sharded\. This"):
            answer(model)


def test_an_offloaded_embedding_is_scaled_as_the_base_scales_it() -> None:
    models = []
    for _ in range(2):
        base = build("gemma3", tie_word_embeddings=False)
        model = get_peft_model(base, LocFTConfig(target_modules=["embed_tokens"]))
        randomize(model)
        models.append(model)
    in_memory, offloaded = models
    cpu_offload(offloaded.base_model.model.model.embed_tokens, execution_device=torch.device("cpu"))
    assert offloaded.base_model.model.model.embed_tokens.base_layer.weight.is_meta
    torch.testing.assert_close(logits(offloaded), logits(in_memory))


def test_offloaded_experts_are_refused_by_name() -> None:
    model = get_peft_model(build("mixtral"), LocFTConfig())
    randomize(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(
        NotImplementedError, match="The down_proj of MixtralExperts is quantized, offloaded or sharded"
    ):
        logits(model)
    # but merged they can be
    in_memory = get_peft_model(build("mixtral"), LocFTConfig())
    randomize(in_memory)
    model.merge_adapter()
    assert same_bits(logits(model), logits(in_memory))


def test_a_base_on_the_meta_device_is_not_merged() -> None:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(build("llama").config)
    model = get_peft_model(base, LocFTConfig())
    with pytest.raises(ValueError, match=r"Cannot merge into Linear: its weight is offloaded or sharded\. Load"):
        model.merge_adapter()


def test_offloaded_tensors_are_not_hashed(tmp_path: Path) -> None:
    model = build("llama")
    offload(model, "cpu", tmp_path)
    model = get_peft_model(model, LocFTConfig())
    model.save_pretrained(tmp_path / "adapter")
    assert model.peft_config["default"].base_sha256 is None


# ---------------------------------------------------------------- sharded by FSDP


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def by_policy(model: PeftModel, use_orig_params: bool) -> Any:
    """As transformers' Trainer wraps a PEFT model: every delta a unit of its own."""
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=fsdp_auto_wrap_policy(model),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def whole(model: PeftModel) -> Any:
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def by_layer(model: PeftModel) -> Any:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def by_base_layer(model: PeftModel) -> Any:
    """The edited module is a unit of its own: its weight is never here in full outside of its own forward."""
    for module in model.modules():
        if hasattr(module, "locft_delta"):
            fully_shard(module.base_layer)
    return fully_shard(model)


WRAPS: dict[str, Callable[[PeftModel], Any]] = {
    "FSDP1, whole": whole,
    "FSDP1, by policy, original parameters": lambda model: by_policy(model, True),
    "FSDP1, by policy, flat parameters": lambda model: by_policy(model, False),
    "FSDP2, by layer": by_layer,
}
TARGETS = ["down_proj", "model.norm", "input_layernorm", "embed_tokens"]


def sharded(wrap: Callable[[PeftModel], Any], targets: list[str]) -> tuple[Any, Any]:
    """Return the same model twice, the second one wrapped."""
    models = []
    for _ in range(2):
        model = get_peft_model(build("llama"), LocFTConfig(target_modules=targets))
        randomize(model)
        models.append(model)
    return models[0], wrap(models[1])


def gradient_norms(model: Any) -> list[float]:
    model(token_ids()).logits.square().mean().backward()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return sorted(float(p.grad.norm()) for p in parameters if p.grad is not None and p.grad.numel())


# a single process has nothing to shard, says FSDP
alone = pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")


@alone
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", WRAPS)
def test_fsdp_drops_no_delta(wrap: str) -> None:
    plain, wrapped = sharded(WRAPS[wrap], TARGETS)
    assert same_bits(logits(wrapped), logits(plain))
    expected = gradient_norms(plain)
    assert len(expected) == 8 and all(expected)
    assert gradient_norms(wrapped) == pytest.approx(expected)


@alone
@pytest.mark.usefixtures("one_process")
def test_fsdp_of_the_edited_module_alone() -> None:
    plain, wrapped = sharded(by_base_layer, ["down_proj", "embed_tokens"])
    torch.testing.assert_close(logits(wrapped), logits(plain))
    assert gradient_norms(wrapped) == pytest.approx(gradient_norms(plain))
    _, wrapped = sharded(by_base_layer, ["model.norm"])
    with pytest.raises(NotImplementedError, match="The weight of FSDPLlamaRMSNorm is quantized, offloaded or sharded"):
        logits(wrapped)


IN_TWO_PROCESSES = """
import os, sys
import conftest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_tuner_elsewhere import TARGETS, WRAPS, logits, same_bits, sharded, token_ids


def run(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name, wrap in WRAPS.items():
        plain, wrapped = sharded(wrap, TARGETS)
        # before the first forward: after one, FSDP2 has the root's weights in full, and others in their place
        optimizers = [
            torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
            for model in (plain, wrapped)
        ]
        everywhere = sum(parameter.numel() for parameter in plain.parameters())
        here = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in wrapped.parameters())
        assert here < 0.6 * everywhere, name
        before = logits(plain)
        assert same_bits(logits(wrapped), before), name
        for _ in range(2):
            for model, optimizer in zip((plain, wrapped), optimizers):
                model(token_ids()).logits.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        assert not torch.allclose(logits(plain), before)
        torch.testing.assert_close(logits(wrapped), logits(plain))
    dist.destroy_process_group()


if __name__ == "__main__":
    # forked, so that all the imports are done once
    torch.multiprocessing.start_processes(run, (sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_fsdp_in_two_processes(tmp_path: Path) -> None:
    """Here the weights really are in parts."""
    script = tmp_path / "script.py"
    paths = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    script.write_text(paths + IN_TWO_PROCESSES)
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@alone
@pytest.mark.usefixtures("one_process")
def test_the_hash_under_fsdp_is_of_whole_tensors_or_none(tmp_path: Path) -> None:
    plain, wrapped = sharded(by_layer, ["down_proj"])
    plain.save_pretrained(tmp_path / "plain")
    state = {name: tensor.full_tensor() for name, tensor in wrapped.state_dict().items()}
    wrapped.save_pretrained(tmp_path / "wrapped", state_dict=state)
    assert plain.peft_config["default"].base_sha256
    assert wrapped.peft_config["default"].base_sha256 is None
    reloaded = PeftModel.from_pretrained(build("llama"), tmp_path / "wrapped")
    assert same_bits(logits(reloaded), logits(plain))
    assert_same_tensors(base_state(reloaded), base_state(build("llama")))
