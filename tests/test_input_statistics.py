"""Second moments of inputs, against sums over every input by hand, and what is kept of them on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_families import build as build_family
from tiny_models import VOCAB_SIZE, base_state, build, changed, every_family, randomize, same_bits, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_locft import LocFTConfig
from peft_locft.training.input_statistics import InputStatistics, input_statistics
from peft_locft.tuner import find_decoder_layers

WINDOWS = token_ids(batch_size=5, length=9)
DOWN = "model.layers.1.mlp.down_proj"
LOCATIONS = ["model.layers.0.self_attn.o_proj", DOWN]


def linears_of(model: nn.Module, layers: tuple[int, ...] = (0, 1)) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(f".{layer}." in name for layer in layers)
    ]


def by_hand(model: nn.Module, name: str, rows: Any) -> torch.Tensor:
    """Sum k kᵀ one token after the other, each row read alone by the whole model."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.as_tensor(row)[None])
    handle.remove()
    inputs = torch.cat([each.flatten(0, -2) for each in found]).double()
    total = torch.zeros(inputs.shape[1], inputs.shape[1], dtype=torch.float64)
    for k in inputs:
        total += torch.outer(k, k)
    return (total / len(inputs)).float()


@contextmanager
def counted(model: nn.Module, name: str) -> Iterator[list[int]]:
    """Count the rows that come to a module."""
    calls: list[int] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(1), with_kwargs=True
    )
    yield calls
    handle.remove()


def one(model: nn.Module, windows: Any = WINDOWS, **arguments: Any) -> InputStatistics:
    return input_statistics(model, windows, [DOWN], progress=False, **arguments)[DOWN]


# ---------------------------------------------------------------------- what is measured


@every_family
def test_statistics_are_those_by_hand(family: str) -> None:
    model = build(family)
    before = base_state(model)
    names = linears_of(model)
    assert len(names) > 3
    found = input_statistics(model, WINDOWS, names, max_tokens_per_forward=20, progress=False)
    assert list(found) == names
    for name in names:
        assert found[name].num_tokens == WINDOWS.numel()
        expected = by_hand(model, name, WINDOWS)
        torch.testing.assert_close(found[name].second_moment, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[name].second_moment, found[name].second_moment.T)
    assert changed(base_state(model), before) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_of_a_narrow_model_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    found = one(model)
    assert found.second_moment.dtype == torch.float32
    # by hand a window is read alone, which may round otherwise
    expected = by_hand(model, DOWN, WINDOWS)
    torch.testing.assert_close(found.second_moment, expected, rtol=2e-2, atol=2e-2 * float(expected.max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_prompts_of_any_length_are_read_without_padding(family: str) -> None:
    model = build(family)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16, 17], [18]]
    for name in linears_of(model, layers=(1,)):
        found = input_statistics(model, prompts, [name], progress=False)[name]
        assert found.num_tokens == 14
        torch.testing.assert_close(found.second_moment, by_hand(model, name, prompts), rtol=1e-4, atol=1e-5)


def test_what_is_there_twice_counts_twice() -> None:
    model = build("llama")
    prompts = [[5, 6, 7], [8, 9, 10], [5, 6, 7]]
    found = one(model, prompts)
    assert found.num_tokens == 9
    torch.testing.assert_close(found.second_moment, by_hand(model, DOWN, prompts), rtol=1e-4, atol=1e-5)


def test_the_base_is_read_whatever_adapter_is_on_it() -> None:
    expected = one(build("llama"))
    for config in (
        LocFTConfig(target_modules=["down_proj", "o_proj"]),
        LoraConfig(target_modules=["down_proj"], init_lora_weights=False),
    ):
        model = get_peft_model(build("llama"), config)
        if isinstance(config, LocFTConfig):
            randomize(model)
        found = one(model)
        assert same_bits(found.second_moment, expected.second_moment)
        assert model.active_adapters == ["default"]
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        assert layers
        assert not any(layer.disable_adapters for layer in layers)


def test_layers_behind_the_last_location_do_not_run() -> None:
    model = build("llama").train()
    with counted(model, DOWN) as own, counted(model, "model.layers.2.mlp.down_proj") as behind:
        one(model)
    assert (len(own), len(behind)) == (1, 0)
    assert model.training
    with counted(model, DOWN) as own:
        input_statistics(model, WINDOWS, [*LOCATIONS, *LOCATIONS], progress=False)
    assert len(own) == 1  # the text is read once for all
    assert vars(model.model.layers[2]).get("forward") is None


@pytest.mark.parametrize("name", ["falcon", "bloom", "rwkv"])
def test_layers_that_return_tuples_are_read(name: str) -> None:
    model = build_family(name)
    stack, _ = find_decoder_layers(model)
    location = next(each for each in linears_of(model) if each.startswith(f"{stack}.1."))
    windows = torch.arange(24).view(3, 8)
    found = input_statistics(model, windows, [location], progress=False)[location]
    torch.testing.assert_close(found.second_moment, by_hand(model, location, windows), rtol=1e-4, atol=1e-5)


def test_the_head_is_a_location_too() -> None:
    model = build("llama")
    found = input_statistics(model, WINDOWS, ["lm_head", DOWN], progress=False)
    assert found["lm_head"].num_tokens == WINDOWS.numel()
    torch.testing.assert_close(
        found["lm_head"].second_moment, by_hand(model, "lm_head", WINDOWS), rtol=1e-4, atol=1e-5
    )
    assert same_bits(found[DOWN].second_moment, one(model).second_moment)


# ---------------------------------------------------------------------- kept on disk


def test_what_is_kept_is_what_was_measured(tmp_path: Path) -> None:
    model = build("llama")
    plain = input_statistics(model, WINDOWS, LOCATIONS, progress=False)
    missed = input_statistics(model, WINDOWS, LOCATIONS, cache_dir=tmp_path / "kept", progress=False)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    with counted(model, "model.embed_tokens") as read:
        hit = input_statistics(model, WINDOWS, LOCATIONS[::-1], cache_dir=tmp_path / "kept", progress=False)
    assert not read
    assert list(hit) == LOCATIONS[::-1]
    for name in LOCATIONS:
        assert same_bits(plain[name].second_moment, missed[name].second_moment)
        assert same_bits(plain[name].second_moment, hit[name].second_moment)
        assert plain[name].num_tokens == missed[name].num_tokens == hit[name].num_tokens


def num_retained(folder: Path, model: nn.Module, windows: Any = WINDOWS, **arguments: Any) -> int:
    one(model, windows, cache_dir=folder, **arguments)
    return len(list(folder.iterdir()))


def test_runs_that_differ_in_nothing_of_effect_share_what_is_kept(tmp_path: Path) -> None:
    assert num_retained(tmp_path, build("llama")) == 1
    later = build("llama")
    with torch.no_grad():
        later.model.layers[2].mlp.down_proj.weight.add_(1.0)
    later.config.use_cache = False
    assert num_retained(tmp_path, later) == 1
    edited = get_peft_model(build("llama"), LocFTConfig())
    randomize(edited)
    assert num_retained(tmp_path, edited) == 1
    assert num_retained(tmp_path, build("llama"), max_tokens_per_forward=10) == 1
    assert num_retained(tmp_path, build("llama"), WINDOWS.tolist()) == 1
    # another location in the same pass: the first is taken, the second is made
    input_statistics(build("llama"), WINDOWS, LOCATIONS, cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 2


def test_whatever_has_an_effect_is_another_file(tmp_path: Path) -> None:
    earlier = build("llama")
    with torch.no_grad():
        earlier.model.layers[0].mlp.down_proj.weight.view(-1)[0] += 1.0
    embedding = build("llama")
    with torch.no_grad():
        embedding.model.embed_tokens.weight.view(-1)[0] += 1.0
    others = [earlier, embedding, build("llama", torch.bfloat16), build("llama", rms_norm_eps=1e-2)]
    for number, model in enumerate([build("llama"), *others], start=1):
        assert num_retained(tmp_path, model) == number
    number = len(others) + 1
    other_text = WINDOWS.clone()
    other_text[-1, -1] += 1
    for windows in (other_text, WINDOWS[:, :8], WINDOWS.flatten()[None]):
        number += 1
        assert num_retained(tmp_path, build("llama"), windows) == number


def test_a_file_that_is_not_whole_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    expected = one(model, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        found = one(model, cache_dir=tmp_path)
    assert "is incomplete" in caplog.text
    assert same_bits(found.second_moment, expected.second_moment)
    assert list(tmp_path.iterdir()) == [path]
    caplog.clear()
    one(model, cache_dir=tmp_path)
    assert not caplog.text


def test_weights_that_are_not_here_have_no_name_to_be_kept_by(tmp_path: Path) -> None:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"mlp.up_proj.weight is offloaded .* Unset preserve_cache_dir"):
        one(model, cache_dir=tmp_path)


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("locations", "message"),
    [
        ([], "locations: found none"),
        (["model.layers.9.mlp.down_proj"], "found 'model.layers.9.mlp.down_proj', which is no module"),
        (["down_proj"], "found 'down_proj', which is no module"),
        (["model.embed_tokens"], "found model.embed_tokens, a Embedding; expected a Linear or Conv1D"),
        (["model.layers.1.input_layernorm"], "a LlamaRMSNorm; expected a Linear or Conv1D"),
    ],
)
def test_a_location_without_inputs_to_multiply_is_refused(locations: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        input_statistics(build("llama"), WINDOWS, locations)


def test_fused_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="a MixtralExperts; expected a Linear or Conv1D"):
        input_statistics(build("mixtral"), WINDOWS, ["model.layers.1.mlp.experts"])


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "windows: there are no rows"),
        ([[3, 4], []], "windows: row 1 is empty"),
        (torch.ones(2, 3, 4, dtype=torch.int64), "found 3 dimensions"),
        ([[3, VOCAB_SIZE]], "they do not belong together"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(windows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one(build("llama"), windows)


class Routed(nn.Module):
    """Shows an expert every second token, as a router may, or none."""

    def __init__(self, expert: nn.Module, step: int | None) -> None:
        super().__init__()
        self.expert = expert
        self.step = step

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states if self.step is None else states + self.expert(states.flatten(0, 1)[:: self.step]).mean()


def test_an_expert_is_measured_on_what_it_gets() -> None:
    model = build("llama")
    name = "model.layers.1.mlp.expert"
    model.model.layers[1].mlp = Routed(nn.Linear(32, 32), step=2)
    found = input_statistics(model, WINDOWS[:1], [name], progress=False)[name]
    assert found.num_tokens == 5
    model.model.layers[1].mlp.step = None
    with pytest.raises(ValueError, match=f"{name} gets no token of the text"):
        input_statistics(model, WINDOWS, [name])


def test_what_is_not_finite_is_refused() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=f"{DOWN} gets inputs that are NaN or infinite"):
        one(model)


def test_a_merged_adapter_is_refused() -> None:
    model = get_peft_model(build("llama"), LocFTConfig())
    randomize(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"down_proj has an adapter merged into it"):
        one(model)
    assert any(getattr(module, "merged", False) for module in model.modules())
