"""Composing the edited weight, merging it into the base module, and the exact unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn

from .arithmetic import compose_weight
from .delta import Delta, DeltaTensors, check_finite, is_whole
from .quantized import edited_copy


class MergeableLayer(nn.Module, BaseTunerLayer):
    """The part of a tuner layer that knows the base weights: as they are, edited, and as they were before a merge."""

    base_layer: nn.Module
    locft_delta: nn.ModuleDict
    scaling: dict[str, float]
    # of the base parameters that some adapter has a delta of, by name: the full ones, not those of a local shard
    _shapes: dict[str, torch.Size]
    # what a merge replaced, by parameter name: subtracting would not bring back the same bits
    _originals: dict[str, torch.Tensor]
    # in a list, so that it is not a submodule: it would be saved as part of the adapter
    _quantized_originals: list[nn.Module]

    def _delta(self, adapter: str) -> Delta:
        return cast(Delta, self.locft_delta[adapter])

    def scaled_deltas(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return `scale * delta` in float32 by the name of the base parameter; empty if it is not on this layer."""
        if adapter not in self.locft_delta:
            return {}
        return {
            name: tensor.float() * self.scaling[adapter] for name, tensor in self._delta(adapter).tensors().items()
        }

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return `scale * delta` of the weight in float32; zeros if the adapter has none on this layer."""
        deltas = self.scaled_deltas(adapter)
        if "weight" in deltas:
            return deltas["weight"]
        other = next(self.locft_delta.parameters(), None)
        return torch.zeros(self._shapes["weight"], device=None if other is None else other.device)

    def base_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return the base tensors that the adapter has a delta of, by name, as they are without any merged edit.

        Those that are not here in full (offloaded, sharded, or without a `weight`, as some quantized ones) are left
        out.
        """
        base = self._quantized_originals[0] if self._quantized_originals else self.base_layer
        packed = "weight" if self.quantization_backend is not None else None
        found = {}
        for name in self._delta(adapter).names if adapter in self.locft_delta else ():
            tensor = self._originals.get(name, getattr(base, name, None))
            if tensor is not None and is_whole(tensor, tensor.shape if name == packed else self._shapes[name]):
                found[name] = tensor
        return found

    def _present(self, adapters: Sequence[str]) -> list[str]:
        # in one fixed order, so that the order in which adapters are activated or merged cannot change a bit
        return sorted({name for name in adapters if name in self.locft_delta})

    def _can_compose(self) -> bool:
        """Whether the base weights are there, whole, on the module that computes with them."""
        if self.quantization_backend is not None:
            return False
        base = self.base_layer
        # an FSDP unit around the module forwards attribute reads but computes with its inner module's weight
        return all(
            (name in base._parameters or name in base.__dict__) and is_whole(getattr(base, name), shape)
            for name, shape in self._shapes.items()
        )

    def _compose(self, adapters: Sequence[str], tensors: Sequence[DeltaTensors]) -> dict[str, torch.Tensor]:
        """Return the edited tensors by parameter name, composed from the original ones."""
        terms: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for adapter, delta in zip(adapters, tensors, strict=True):
            for name, tensor in delta.items():
                terms.setdefault(name, []).append((tensor, self.scaling[adapter]))
        return {name: compose_weight(self._original(name), pairs) for name, pairs in terms.items()}

    def _original(self, name: str) -> torch.Tensor:
        current: torch.Tensor = getattr(self.base_layer, name)
        # the model may have been moved, or cast, since the merge
        return self._originals[name].to(current) if name in self._originals else current

    # ------------------------------------------------------------------ merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the composed weight into the base module and keep the original, on the CPU, for `unmerge`.

        Args:
            safe_merge: refuse a weight that is not finite.
            adapter_names: adapters to merge; `None` means the active ones.

        Raises:
            ValueError: if `safe_merge` finds a value that is not finite, or if the base cannot be merged into.
        """
        wanted: Any = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(wanted, str):  # which PEFT's check refuses
            wanted = self._present(wanted)
        names = check_adapters_to_merge(self, wanted) if wanted else []
        if not names:
            return
        with self._onloaded(), torch.no_grad():
            self.check_mergeable()
            merged = self._present([*self.merged_adapters, *names])
            if self.quantization_backend is not None:
                self._merge_quantized(merged, safe_merge)
            else:
                self._merge_composed(merged, safe_merge)
        self.merged_adapters.extend(names)

    def _onloaded(self) -> AbstractContextManager[None]:
        # BaseTuner does this around its own merge and unmerge; set_adapter and a disabled forward unmerge without it
        weight = getattr(self.base_layer, next(iter(self._shapes)), None)
        return onload_layer(self) if weight is not None and weight.is_meta else nullcontext()

    def check_mergeable(self) -> None:
        """Raise a ValueError, with the way forward, if the base weight cannot take the delta."""
        kind = type(self.base_layer).__name__
        if self.quantization_backend is not None:
            if not self.quantization_backend.supports_merge:
                raise ValueError(
                    f"Cannot merge into {kind}: its backend, {self.quantization_backend.backend_name}, cannot write a "
                    "changed weight back. Load the base model without quantization and merge there, or keep the "
                    "adapter unmerged."
                )
        elif not self._can_compose():
            raise ValueError(
                f"Cannot merge into {kind}: its {' and '.join(self._shapes)} is offloaded or sharded and not here in "
                "full. Gather it first (load the base model on one device, without FSDP, ZeRO-3 or disk offload), or "
                "keep the adapter unmerged."
            )

    def _merge_composed(self, names: list[str], safe_merge: bool) -> None:
        composed = self._compose(names, [self._delta(name).tensors() for name in names])
        if safe_merge:
            check_finite(composed.items(), names)
        originals = {name: self._originals.get(name, getattr(self.base_layer, name).data.cpu()) for name in composed}
        for name, tensor in composed.items():
            getattr(self.base_layer, name).data = tensor
        self._originals = originals

    def _merge_quantized(self, names: list[str], safe_merge: bool) -> None:
        original: Any = self._quantized_originals[0] if self._quantized_originals else self.base_layer
        tensors = [self._delta(name).tensors() for name in names]
        if safe_merge:
            check_finite([pair for delta in tensors for pair in delta.items()], names)
        total = torch.stack([self.get_delta_weight(name) for name in names]).sum(0)
        edited: Any = edited_copy(self.quantization_backend, original, total)
        biases = [(d["bias"], self.scaling[name]) for name, d in zip(names, tensors, strict=True) if "bias" in d]
        if biases:
            edited.bias.data = compose_weight(original.bias, biases)
        self._quantized_originals, self.base_layer = [original], edited

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._quantized_originals:
            self.base_layer = self._quantized_originals.pop()
        with self._onloaded():
            for name in self._originals:
                getattr(self.base_layer, name).data = self._original(name)
        self._originals = {}
        self.merged_adapters = []
