"""A thousand random lives of a model with adapters: each step as the formula says, in the end not a bit changed."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model
from tiny_models import base_name, same_bits
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from peft_locft import LocFTConfig

# where each adapter is: `a` and `b` share a location, `d` has none in common with `a`
LOCATIONS: dict[str, dict[str, Any]] = {
    "a": {"target_modules": ["mlp.down_proj"]},
    "b": {"target_modules": ["mlp.down_proj", "model.norm"], "delta_dtype": "bfloat16"},
    "d": {"target_modules": ["self_attn.q_proj", "model.norm"], "scale": 0.5},
}
NAMES = st.sampled_from(sorted(LOCATIONS))
INDICES = st.integers(0, 2)
SUBSETS = st.lists(NAMES, min_size=1, max_size=3, unique=True)
SCALES = st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.0])
SEEDS = st.integers(0, 2**16)
IDS = torch.tensor([[3, 5, 7]])


def tiny() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn(parameter.shape))
    return model


PRISTINE = tiny()
ORIGINAL = {name: parameter.detach().clone() for name, parameter in PRISTINE.named_parameters()}


class Adapters(RuleBasedStateMachine):
    """The model, and beside it what must be true of it, kept in plain dictionaries."""

    deltas: dict[str, dict[str, torch.Tensor]]
    scales: dict[str, float]

    @initialize(first=NAMES)
    def start(self, first: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model: PeftModel = get_peft_model(
            copy.deepcopy(PRISTINE), LocFTConfig(**LOCATIONS[first]), adapter_name=first
        )
        self.deltas, self.scales = {}, {}
        self.active = [first]
        self.enabled = True
        # by parameter: the adapters merged there, and the weight that they gave
        self.merged: dict[str, tuple[set[str], torch.Tensor]] = {}
        self.remember(first)

    def remember(self, adapter: str) -> None:
        self.deltas[adapter] = {
            base_name(name).replace(f".locft_delta.{adapter}", ""): parameter.data
            for name, parameter in self.model.named_parameters()
            if f".locft_delta.{adapter}." in name
        }
        self.scales[adapter] = LOCATIONS[adapter].get("scale", 1.0)

    # ------------------------------------------------------------ what must be true

    def formula(self, name: str, adapters: set[str] | list[str]) -> torch.Tensor:
        total = ORIGINAL[name].float()
        for adapter in sorted(adapters):
            if name in self.deltas.get(adapter, {}):
                total = total + self.scales[adapter] * self.deltas[adapter][name].float()
        return total.to(torch.bfloat16)

    def expected_weights(self) -> dict[str, torch.Tensor]:
        """Return what the forward computes with."""
        if not self.enabled:
            return ORIGINAL
        return {
            name: self.merged[name][1] if name in self.merged else self.formula(name, self.active) for name in ORIGINAL
        }

    def answer(self) -> torch.Tensor:
        # not PeftModel itself, which remembers one active adapter of several, and fails when that one is deleted
        with torch.no_grad():
            return self.model.base_model(IDS).logits

    @rule()
    def check_answer(self) -> None:
        with torch.no_grad():
            expected = functional_call(PRISTINE, self.expected_weights(), (IDS,)).logits
        assert same_bits(self.answer(), expected)
        if not self.enabled:
            self.merged = {}  # a disabled forward unmerges

    @invariant()
    def base_weights_are_the_original_or_as_merged(self) -> None:
        if not hasattr(self, "model"):
            return
        for name, parameter in self.model.named_parameters():
            if ".locft_" not in name:
                name = base_name(name)
                expected = self.merged[name][1] if name in self.merged else ORIGINAL[name]
                assert same_bits(parameter.data, expected), name
        assert self.model.active_adapters == self.active

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.check_answer()
        if self.merged:
            self.model.unmerge_adapter()
            self.merged = {}
        self.base_weights_are_the_original_or_as_merged()
        self.check_answer()
        base = dict(self.model.unload().named_parameters())
        assert base.keys() == ORIGINAL.keys()
        assert all(same_bits(base[name].data, ORIGINAL[name]) for name in ORIGINAL)
        shutil.rmtree(self.folder)

    # ------------------------------------------------------------ what can happen

    def is_merged(self, adapter: str) -> bool:
        return any(adapter in adapters for adapters, _ in self.merged.values())

    def present(self, index: int) -> str:
        return sorted(self.deltas)[index % len(self.deltas)]

    @precondition(lambda self: len(self.deltas) < 3)
    @rule(index=INDICES)
    def add(self, index: int) -> None:
        absent = sorted(LOCATIONS.keys() - self.deltas.keys())
        name = absent[index % len(absent)]
        self.model.add_adapter(name, LocFTConfig(**LOCATIONS[name]))
        self.remember(name)
        self.merged = {}  # PEFT unmerges first

    @rule(names=SUBSETS)
    def switch(self, names: list[str]) -> None:
        names = [name for name in names if name in self.deltas]
        if len(names) == 1:
            self.model.set_adapter(names[0])
        elif names:
            self.model.base_model.set_adapter(names)
        if names:
            self.active, self.merged = names, {}

    @rule(names=st.none() | SUBSETS, safe_merge=st.booleans())
    def merge(self, names: list[str] | None, safe_merge: bool) -> None:
        if names is not None:
            names = [name for name in names if name in self.deltas]
        self.model.merge_adapter(adapter_names=names, safe_merge=safe_merge)
        wanted = self.active if names is None else names
        for name in ORIGINAL:
            already = self.merged[name][0] if name in self.merged else set()
            new = {adapter for adapter in wanted if name in self.deltas[adapter]} - already
            if new:
                self.merged[name] = (already | new, self.formula(name, already | new))

    @precondition(lambda self: self.merged)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = {}

    @rule()
    def disable_or_enable(self) -> None:
        if self.enabled:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
        self.enabled = not self.enabled

    @precondition(lambda self: self.enabled)
    @rule()
    def disable_for_a_while(self) -> None:
        self.disable_or_enable()
        self.check_answer()
        self.disable_or_enable()

    @precondition(lambda self: len(self.deltas) > 1)
    @rule(index=INDICES)
    def delete(self, index: int) -> None:
        name = self.present(index)
        if self.is_merged(name):
            with pytest.raises(ValueError, match="while they are merged"):
                self.model.delete_adapter(name)
            return
        self.model.delete_adapter(name)
        del self.deltas[name], self.scales[name]
        self.active = [active for active in self.active if active != name] or sorted(self.deltas)[:1]

    @rule(index=INDICES, seed=SEEDS)
    def train(self, index: int, seed: int) -> None:
        """Write new values into an adapter, merged or not: what is merged stays as it is until it is unmerged."""
        generator = torch.Generator().manual_seed(seed)
        for delta in self.deltas[self.present(index)].values():
            delta.copy_(torch.randn(delta.shape, generator=generator))

    @rule(index=INDICES, scale=SCALES)
    def set_scale(self, index: int, scale: float) -> None:
        name = self.present(index)
        if self.is_merged(name):
            with pytest.raises(ValueError, match="while it is merged"):
                self.model.base_model.set_scale(name, scale)
            return
        self.model.base_model.set_scale(name, scale)
        self.scales[name] = scale

    @precondition(lambda self: len(self.deltas) > 1)
    @rule(index=INDICES)
    def save_delete_and_load(self, index: int) -> None:
        name = self.present(index)
        if self.is_merged(name):
            return
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        deltas, scale = self.deltas[name], self.scales[name]
        self.delete(index)
        self.model.load_adapter(self.folder / name, adapter_name=name, is_trainable=True)
        self.merged = {}  # PEFT unmerges first
        self.remember(name)
        self.scales[name] = scale
        assert self.deltas[name].keys() == deltas.keys()
        assert all(same_bits(self.deltas[name][key], deltas[key]) for key in deltas)


Adapters.TestCase.settings = settings(
    max_examples=1000,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
@pytest.mark.filterwarnings("ignore:Already following adapters were merged")
@pytest.mark.filterwarnings("ignore:All adapters are already merged")
@pytest.mark.filterwarnings("ignore:Deleted the active adapter .")
class TestAdapters(Adapters.TestCase):  # type: ignore[misc, valid-type]
    pass
