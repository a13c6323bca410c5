"""Every kind of module and parameter that can be a location, and every way of naming one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    assert_same_tensors,
    base_state,
    build,
    changed,
    every_dtype,
    every_family,
    locations,
    logits,
    randomize,
    same_bits,
    token_ids,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_locft import LocFTConfig

# an embedding or head as the location: PEFT announces that it saves the base's beside it; the tuner takes it out
announces = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")


class Toy(nn.Module):
    """One module of every kind, in a forward that uses all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv1d = nn.Conv1d(8, 8, 3, padding="same", padding_mode="circular", groups=2)
        self.linear = nn.Linear(8, 8)
        self.tf_conv1d = Conv1D(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.rms_norm = nn.RMSNorm(8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv2d = nn.Conv2d(1, 2, (3, 3), stride=2)
        self.table = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.conv1d(x.transpose(1, 2)).transpose(1, 2)
        x = self.layer_norm(x + self.tf_conv1d(self.linear(x)))
        x = self.group_norm(self.rms_norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        return self.conv2d(x.unsqueeze(1)).flatten(1)


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    model = Toy().to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    return model


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10).reshape(2, 5))


def edited_toy(config: LocFTConfig, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(toy(dtype), config)
    randomize(model)
    return model


KINDS = {
    "embed": {"embed.weight"},
    "conv1d": {"conv1d.weight", "conv1d.bias"},
    "linear": {"linear.weight", "linear.bias"},
    "tf_conv1d": {"tf_conv1d.weight", "tf_conv1d.bias"},
    "layer_norm": {"layer_norm.weight", "layer_norm.bias"},
    "rms_norm": {"rms_norm.weight"},
    "group_norm": {"group_norm.weight", "group_norm.bias"},
    # its forward is never called: the attention reads its weight
    "out_proj": {"attention.out_proj.weight", "attention.out_proj.bias"},
    "conv2d": {"conv2d.weight", "conv2d.bias"},
}


@every_dtype
@pytest.mark.parametrize("train_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module(kind: str, train_bias: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = toy(dtype)
    before, before_state = answer(base), base_state(base)
    model = get_peft_model(base, LocFTConfig(target_modules=[kind], train_bias=train_bias))
    assert same_bits(answer(model), before)
    randomize(model)
    unmerged = answer(model)
    assert not same_bits(unmerged, before)
    expected = {name for name in KINDS[kind] if train_bias or not name.endswith("bias")}
    assert set(locations(model)) == expected
    model.merge_adapter()
    assert same_bits(answer(model), unmerged)
    assert changed(base_state(model), before_state) == expected
    model.unmerge_adapter()
    assert_same_tensors(base_state(model), before_state)
    with model.disable_adapter():
        assert same_bits(answer(model), before)
    model.save_pretrained(tmp_path)
    assert same_bits(answer(PeftModel.from_pretrained(toy(dtype), tmp_path)), unmerged)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_weight(kind: str) -> None:
    model = get_peft_model(toy(), LocFTConfig(target_modules=[kind], train_bias=True))
    unwrapped = toy()
    for trained in (model, unwrapped):
        trained(torch.arange(10).reshape(2, 5)).square().sum().backward()
    for name, (delta, _) in locations(model).items():
        expected = unwrapped.get_parameter(name).grad
        assert delta.grad is not None and expected is not None
        torch.testing.assert_close(delta.grad, expected)


@pytest.mark.parametrize("names", [["weight"], ["bias"], ["weight", "bias"]])
def test_any_parameter_can_be_named(names: list[str], tmp_path: Path) -> None:
    base = toy()
    before = base_state(base)
    targets = {f"linear.{name}" for name in names} | {"attention.in_proj_weight"}
    model = get_peft_model(base, LocFTConfig(target_parameters=sorted(targets)))
    randomize(model)
    unmerged = answer(model)
    assert set(locations(model)) == targets
    model.merge_adapter()
    assert same_bits(answer(model), unmerged)
    assert changed(base_state(model), before) == targets
    model.unmerge_adapter()
    assert_same_tensors(base_state(model), before)
    model.save_pretrained(tmp_path)
    assert same_bits(answer(PeftModel.from_pretrained(toy(), tmp_path)), unmerged)
    assert same_bits(answer(model.merge_and_unload()), unmerged)


def test_a_module_named_over_its_bias_gets_its_own_delta() -> None:
    """The bias is wrapped as a parameter already: the delta of the weight is not put onto that."""
    model = get_peft_model(toy(), LocFTConfig(target_parameters=["linear.bias"]), adapter_name="a")
    model.add_adapter("b", LocFTConfig(target_modules=["linear"]))
    assert (set(locations(model, "a")), set(locations(model, "b"))) == ({"linear.bias"}, {"linear.weight"})
    randomize(model, "a")
    randomize(model, "b")
    model.base_model.set_adapter(["a", "b"])
    together = answer(model)
    model.merge_adapter()
    assert same_bits(answer(model), together)
    assert same_bits(answer(model.merge_and_unload()), together)


def test_what_has_no_weight_of_its_own_is_refused() -> None:
    for target, kind in (("attention", "MultiheadAttention"), ("mlp", "LlamaMLP")):
        base: Any = toy() if target == "attention" else build("llama")
        with pytest.raises(ValueError, match=rf"target_modules matches .*{target}, a {kind}, which has no weight"):
            get_peft_model(base, LocFTConfig(target_modules=[target]))
        assert not any("locft" in name for name, _ in base.named_modules())


def parametrized() -> Toy:
    model = toy()
    torch.nn.utils.parametrizations.weight_norm(model.linear)
    return model


def weight_normed() -> Toy:
    model = toy()
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.linear)
    return model


@pytest.mark.parametrize("make", [parametrized, weight_normed])
@pytest.mark.parametrize("target", [["linear"], "all-linear", r"linear"])
def test_a_weight_that_is_computed_is_refused(make: Callable[[], Toy], target: Any) -> None:
    base = make()
    with pytest.raises(
        ValueError, match=r"target_modules matches linear, a \w*Linear, which has no weight of its own"
    ):
        get_peft_model(base, LocFTConfig(target_modules=target))
    assert not any("locft" in name for name, _ in base.named_modules())


def test_a_parameter_that_is_computed_is_refused() -> None:
    with pytest.raises(ValueError, match="ParametrizedLinear has no parameter weight of a float dtype"):
        get_peft_model(parametrized(), LocFTConfig(target_parameters=["linear.weight"]))


def test_a_weight_that_is_not_of_floats_is_refused() -> None:
    base = toy()
    base.linear.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"Linear has no parameter weight of a float dtype.*in a way that PEFT does"):
        get_peft_model(base, LocFTConfig(target_modules=["linear"]))


def test_a_hook_that_puts_back_the_weight_is_not_silent() -> None:
    model = edited_toy(LocFTConfig(target_modules=["linear"]))
    with pytest.warns(FutureWarning, match="weight_norm"):
        torch.nn.utils.weight_norm(model.base_model.model.linear.base_layer)
    with pytest.raises(RuntimeError, match=r"Linear computes its weight anew in every forward.*Remove that hook"):
        answer(model)
    # and nothing is left behind
    base = model.base_model.model.linear.base_layer
    torch.nn.utils.remove_weight_norm(base)
    assert "weight" not in base.__dict__
    assert same_bits(model.base_model.model.linear.weight, base.weight + locations(model)["linear.weight"][0])


def test_a_parametrization_added_later_is_used() -> None:
    model = edited_toy(LocFTConfig(target_modules=["linear"]))
    before = answer(model)
    torch.nn.utils.parametrizations.weight_norm(model.base_model.model.linear.base_layer)
    torch.testing.assert_close(answer(model), before)
    with pytest.raises(ValueError, match="Cannot merge into ParametrizedLinear"):
        model.merge_adapter()


# ---------------------------------------------------------------- embeddings, norms, routers of real models


@announces
@every_dtype
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "gpt2"])
def test_embeddings(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Gemma's scales what it looks up; OPT and GPT-2 have one of positions too, with an offset in OPT's."""
    base = build(family, dtype, tie_word_embeddings=False)
    before = logits(base)
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Embedding)]
    assert len(names) == (2 if family in ("opt", "gpt2") else 1)
    model = get_peft_model(base, LocFTConfig(target_modules=names))
    assert same_bits(logits(model), before)
    randomize(model)
    unmerged = logits(model)
    assert not same_bits(unmerged, before)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(build(family, dtype, tie_word_embeddings=False), tmp_path)
    assert same_bits(logits(reloaded), unmerged)
    assert same_bits(logits(model.merge_and_unload()), unmerged)


def test_the_gradient_of_an_embedding_is_in_its_rows() -> None:
    model = get_peft_model(build("gemma3", tie_word_embeddings=False), LocFTConfig(target_modules=["embed_tokens"]))
    ids = token_ids()
    model(ids).logits.square().sum().backward()
    ((delta, _),) = locations(model).values()
    assert delta.grad is not None
    assert set(delta.grad.abs().sum(1).nonzero().flatten().tolist()) == set(ids.flatten().tolist())


@every_dtype
@every_family
def test_norms(family: str, dtype: torch.dtype) -> None:
    base = build(family, dtype)
    names = [name for name, module in base.named_modules() if "Norm" in type(module).__name__]
    biased = hasattr(base.get_submodule(names[0]), "bias")
    model = get_peft_model(base, LocFTConfig(target_modules=names, train_bias=True))
    before = base_state(model)
    randomize(model)
    assert len(locations(model)) == len(names) * (2 if biased else 1)
    unmerged = logits(model)
    model.merge_adapter()
    assert same_bits(logits(model), unmerged)
    assert changed(base_state(model), before) == set(locations(model))


@every_dtype
def test_a_router(dtype: torch.dtype) -> None:
    base = build("mixtral", dtype)
    before = logits(base)
    model = get_peft_model(base, LocFTConfig(target_modules=["mlp.gate"], layers_to_transform=[1]))
    assert set(locations(model)) == {"model.layers.1.mlp.gate.weight"}
    randomize(model, std=1.0)
    unmerged = logits(model)
    assert not same_bits(unmerged, before)
    assert same_bits(logits(model.merge_and_unload()), unmerged)


# ---------------------------------------------------------------- fused experts


@every_dtype
def test_several_adapters_on_nested_parameters(dtype: torch.dtype, tmp_path: Path) -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    base = build("mixtral", dtype)
    before, before_state = logits(base), base_state(base)
    model = get_peft_model(base, LocFTConfig(target_parameters=both, layers_to_transform=[1]), adapter_name="a")
    model.add_adapter("b", LocFTConfig(target_parameters=["layers.1.mlp.experts.down_proj"]))
    # a bare name, which the tuner's own parameters end with, too
    model.add_adapter("x", LocFTConfig(target_parameters=["gate_up_proj"], layers_to_transform=1))
    assert same_bits(logits(model), before)
    for seed, name in enumerate("abx"):
        randomize(model, name, seed)
    outputs = {}
    for active in ("a", "b", "x", "abx"):
        model.base_model.set_adapter(list(active))
        outputs[active] = logits(model)
        model.merge_adapter()
        assert same_bits(logits(model), outputs[active])
        model.unmerge_adapter()
    assert len({output.sum().item() for output in outputs.values()}) == 4
    assert_same_tensors(base_state(model), before_state)
    model.save_pretrained(tmp_path)
    for name in "abx":
        reloaded = PeftModel.from_pretrained(build("mixtral", dtype), tmp_path / name)
        assert same_bits(logits(reloaded), outputs[name])
    model.delete_adapter("b")
    model.base_model.set_adapter(["a"])
    assert same_bits(logits(model), outputs["a"])
    assert same_bits(logits(model.merge_and_unload()), outputs["a"])


def test_the_keys_of_parameters_are_their_names_whoever_came_first(tmp_path: Path) -> None:
    model = get_peft_model(build("mixtral"), LocFTConfig(target_parameters=["1.mlp.experts.down_proj"]), "a")
    model.add_adapter("b", LocFTConfig(target_parameters=["1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]))
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.model.layers.1.mlp.experts.locft_delta"
    assert set(load_file(tmp_path / "a" / "adapter_model.safetensors")) == {f"{prefix}.down_proj"}
    assert set(load_file(tmp_path / "b" / "adapter_model.safetensors")) == {
        f"{prefix}.down_proj",
        f"{prefix}.gate_up_proj",
    }


def test_parameters_in_layers() -> None:
    config = LocFTConfig(target_parameters=["experts.down_proj"], layers_to_transform=[0, 2])
    model = get_peft_model(build("mixtral"), config)
    assert set(locations(model)) == {f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 2)}
    with pytest.raises(
        ValueError, match=r"target_parameters=\['experts.x'\]: no parameter has that .* layers_to_transform=0"
    ):
        get_peft_model(build("mixtral"), LocFTConfig(target_parameters=["experts.x"], layers_to_transform=0))


def test_the_router_and_the_experts_together() -> None:
    model = get_peft_model(
        build("mixtral"), LocFTConfig(target_modules=["mlp.gate"], target_parameters=["experts.down_proj"])
    )
    layers = range(3)
    expected = {f"model.layers.{i}.mlp.{name}" for i in layers for name in ("gate.weight", "experts.down_proj")}
    assert set(locations(model)) == expected


# ---------------------------------------------------------------- ways of naming


def targets(family: str = "llama", **config: Any) -> set[str]:
    """Return the names of the modules that get a delta, without the common part."""
    model = get_peft_model(build(family), LocFTConfig(**config))
    return {name.removesuffix(".weight").removeprefix("model.layers.") for name in locations(model)}


def test_names_and_layers() -> None:
    assert targets(target_modules=["down_proj"]) == {f"{i}.mlp.down_proj" for i in range(3)}
    assert targets(target_modules=["down_proj"], layers_to_transform=0) == {"0.mlp.down_proj"}
    assert targets(target_modules=["down_proj"], layers_to_transform=[0, 2]) == {"0.mlp.down_proj", "2.mlp.down_proj"}
    assert targets(target_modules=["1.mlp.down_proj"]) == {"1.mlp.down_proj"}
    with_pattern = {"target_modules": ["c_proj"], "layers_to_transform": 1, "layers_pattern": "h"}
    assert targets("gpt2", **with_pattern) == {"transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"}


def test_a_regular_expression() -> None:
    assert targets(target_modules=r".*\.[02]\.mlp\.(up|down)_proj") == {
        "0.mlp.up_proj",
        "0.mlp.down_proj",
        "2.mlp.up_proj",
        "2.mlp.down_proj",
    }


def test_excluded_modules() -> None:
    down: dict[str, Any] = {"target_modules": ["down_proj"]}
    assert targets(exclude_modules=["1.mlp.down_proj"], **down) == {"0.mlp.down_proj", "2.mlp.down_proj"}
    assert targets(exclude_modules=r".*\.[12]\..*", **down) == {"0.mlp.down_proj"}
    with pytest.raises(ValueError, match="No modules were targeted for adaptation"):
        targets(exclude_modules=["down_proj"], **down)
    with pytest.raises(ValueError, match=r"Target modules \{'x_proj'\} not found in the base model"):
        targets(target_modules=["x_proj"])


@every_family
def test_all_linear_is_every_linear_but_the_head(family: str) -> None:
    base = build(family)
    head = base.get_output_embeddings()
    linears = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    expected = {f"{name}.weight" for name, module in linears.items() if module is not head}
    model = get_peft_model(base, LocFTConfig(target_modules="all-linear"))
    assert set(locations(model)) == expected
    # again, over the tuner's own layers
    model.add_adapter("again", LocFTConfig(target_modules="all-linear"))
    assert set(locations(model, "again")) == expected
    model.add_adapter("one", LocFTConfig(target_modules="all-linear", layers_to_transform=[0]))
    assert set(locations(model, "one")) == {name for name in expected if ".0." in name}
    assert len(locations(model, "one")) == len(expected) / 3


@pytest.mark.parametrize("layers", [None, [1]])
def test_all_linear_over_an_adapter_elsewhere(layers: list[int] | None) -> None:
    model = get_peft_model(build("llama"), LocFTConfig(target_modules=["model.norm"]), adapter_name="a")
    model.add_adapter("b", LocFTConfig(target_modules="all-linear", layers_to_transform=layers))
    assert len(locations(model, "b")) == 7 * (3 if layers is None else 1)
    assert not any("locft_delta.a.locft" in name for name, _ in model.named_parameters())


def test_all_linear_with_exclusions() -> None:
    found = targets(target_modules="all-linear", exclude_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert found == {f"{i}.mlp.{name}_proj" for i in range(3) for name in ("gate", "up", "down")}


# ---------------------------------------------------------------- beside the deltas


def test_modules_to_save(tmp_path: Path) -> None:
    base = build("llama")
    before = base_state(base)
    model = get_peft_model(base, LocFTConfig(modules_to_save=["lm_head"]))
    randomize(model)
    head = model.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.requires_grad
    head.weight.data += 0.1
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), expected)
    merged = model.merge_and_unload()
    assert same_bits(logits(merged), expected)
    assert changed(dict(merged.state_dict()), before) == {"lm_head.weight", "model.layers.1.mlp.down_proj.weight"}


def test_a_module_to_save_gets_no_delta() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(target_modules=["norm", "down_proj"], modules_to_save=["norm"]))
    assert {name.rpartition(".mlp.")[2] for name in locations(model)} == {"down_proj.weight"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainable_tokens(family: str, tmp_path: Path) -> None:
    def base() -> Any:
        return build(family, tie_word_embeddings=False)

    indices = {"wte" if family == "gpt2" else "embed_tokens": [5, 7]}
    model = get_peft_model(base(), LocFTConfig(trainable_token_indices=indices))
    randomize(model)
    (rows,) = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and p.requires_grad]
    rows.data += 0.5
    ids = torch.tensor([[5, 6, 7]])
    expected = logits(model, ids)
    assert not torch.allclose(expected, logits(base(), ids))
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(base(), tmp_path)
    assert same_bits(logits(reloaded, ids), expected)
    unmerged = base_state(base())
    assert same_bits(logits(copy.deepcopy(model).merge_and_unload(), ids), expected)
    assert_same_tensors(dict(reloaded.unload().state_dict()), unmerged)


# ---------------------------------------------------------------- how it is run


def gradient(delta: nn.Parameter) -> torch.Tensor:
    assert delta.grad is not None
    return delta.grad


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = get_peft_model(build("llama"), LocFTConfig(target_modules=["down_proj", "input_layernorm"]))
        randomize(model)
        model.train()
        if checkpointing is not None:
            inner = model.base_model.model
            inner.enable_input_require_grads()
            # transformers before 5.23 has the older name
            name = "activation" if hasattr(inner, "activation_checkpointing_enable") else "gradient"
            enable = getattr(inner, f"{name}_checkpointing_enable")
            enable(**{f"{name}_checkpointing_kwargs": checkpointing})
            assert getattr(inner, f"is_{name}_checkpointing")
        ids = token_ids()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: gradient(delta) for name, (delta, _) in locations(model).items()})
    for others in gradients[1:]:
        assert_same_tensors(others, gradients[0])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="older torch breaks the graph at PEFT's hooks (seen with 2.6)"
)
def test_a_compiled_model_is_one_graph() -> None:
    model = get_peft_model(
        build("llama", num_hidden_layers=1), LocFTConfig(target_modules=["down_proj", "norm"], scale=0.5)
    )
    randomize(model)
    expected = logits(model)
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert same_bits(logits(compiled), expected)
        compiled(token_ids()).logits.square().mean().backward()
        assert all(delta.grad is not None and delta.grad.any() for delta, _ in locations(model).values())
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype: torch.dtype) -> None:
    model = get_peft_model(build("llama", base_dtype), LocFTConfig())
    randomize(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = logits(model)
        model.merge_adapter()
        assert same_bits(logits(model), unmerged)
        model.unmerge_adapter()
        ids = token_ids()
        model(ids, labels=ids).loss.backward()
    ((delta, _),) = locations(model).values()
    assert delta.grad is not None and delta.grad.dtype == torch.float32 and delta.grad.any()


@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
def test_cast_while_merged_then_unmerged() -> None:
    model = get_peft_model(build("llama"), LocFTConfig(), adapter_name="a")
    model.add_adapter("b", LocFTConfig())
    for name in "ab":
        randomize(model, name)
    model.merge_adapter(["a"])
    model.half()
    # a second merge goes onto the cast base too
    model.merge_adapter(["b"])
    assert {tensor.dtype for tensor in base_state(model).values()} == {torch.float16}
    logits(model)
    model.unmerge_adapter()
    assert_same_tensors(base_state(model), base_state(build("llama").half()))
