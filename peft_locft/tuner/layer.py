"""The tuner layer: its deltas, the forward with `W + scale * delta`, the merge and the exact unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn

from .arithmetic import compose_weight
from .config import LocFTConfig
from .delta import Delta, DeltaTensors, check_finite, full_shape, is_whole, with_deltas
from .quantized import edited_copy, quantization_backend


@contextmanager
def substituted(module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Let `module` read `tensors` where it reads the parameters of those names.

    An instance attribute is found before a registered parameter, so the module's own forward, with its hooks, computes
    with the given tensor. (`torch.func.functional_call` swaps the registered parameter instead, which FSDP swaps back
    in its own pre-forward: the edit would be dropped without a word.)

    Raises:
        RuntimeError: if something in the module's forward put another tensor in the place of one of `tensors`.
    """
    own = module.__dict__
    before = {name: own[name] for name in tensors if name in own}
    own.update(tensors)
    try:
        yield
        overwritten = [name for name, tensor in tensors.items() if own.get(name) is not tensor]
    finally:
        for name in tensors:
            own.pop(name, None)
        own.update(before)
    if overwritten:
        raise RuntimeError(
            f"{type(module).__name__} computes its {', '.join(overwritten)} anew in every forward (a hook such as "
            "torch.nn.utils.weight_norm?), so a delta beside it has no effect. Remove that hook first."
        )


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


class LocFTLayer(MergeableLayer):
    """A module of the base model with deltas beside its `weight`, one for each adapter.

    The forward runs the base module's own forward with the composed weight in place of its parameter, whatever the
    module computes: a linear, a norm, a scaled embedding, a fused stack of experts. Where the base weight is not there
    to be added to (quantized, on the meta device, sharded), the delta's own output is added to the base's instead.

    Args:
        base_layer: the module to edit.
        adapter_name: name of the first adapter.
        config: its configuration.
        parameter_name: the edited parameter of the base module; `None` means its weight, and its bias if
            `config.train_bias`.

    Raises:
        ValueError: if the base module has no float parameter of that name.
    """

    adapter_layer_names = ("locft_delta",)
    other_param_names = ("scaling",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LocFTConfig,
        parameter_name: str | None = None,
        **quantization_kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.locft_delta = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self._originals = {}
        self._quantized_originals = []
        self._shapes = {}
        self._held: dict[str, torch.Tensor] = {}
        # another parameter than the weight is what it is, beside a quantized weight or not
        self.quantization_backend = (
            quantization_backend(base_layer, quantization_kwargs) if parameter_name is None else None
        )
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, config, parameter_name)

    def _features(self) -> tuple[int | None, int | None]:
        return getattr(self.base_layer, "in_features", None), getattr(self.base_layer, "out_features", None)

    def update_layer(self, adapter_name: str, config: LocFTConfig, parameter_name: str | None = None) -> None:
        """Add a delta of zero for `adapter_name`, or for one more parameter to the one that it has."""
        names = [parameter_name or "weight"]
        if parameter_name is None and config.train_bias and getattr(self.base_layer, "bias", None) is not None:
            names.append("bias")
        for name in names:
            # once, since the base may be sharded by the time of the next adapter
            self._shapes.setdefault(name, self._full_shape(name))
        if adapter_name not in self.locft_delta:
            self.locft_delta[adapter_name] = Delta()
        self._delta(adapter_name).add({name: self._shapes[name] for name in names}, config)
        self.scaling[adapter_name] = config.scale
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _full_shape(self, name: str) -> torch.Size:
        if name == "weight" and self.quantization_backend is not None:
            # a quantized weight is packed: its own shape says nothing
            return torch.Size((self.out_features, self.in_features))  # type: ignore[arg-type]
        parameter = self.base_layer._parameters.get(name)
        if parameter is None or not parameter.is_floating_point():
            raise ValueError(
                f"{type(self.base_layer).__name__} has no parameter {name} of a float dtype, so there is nothing to "
                "add a delta to. (A torch parametrization or a weight norm computes it; remove that first. A weight "
                "quantized by other means than PEFT knows cannot be edited.)"
            )
        return full_shape(parameter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the base's dtype; the precision of a delta is the user's choice
        delta = self.locft_delta[adapter_name]
        if device is None:
            # some quantized linears have no `weight`
            tensor = getattr(self.base_layer, next(iter(self._shapes)), None)
            device = next(self.base_layer.parameters()).device if tensor is None else tensor.device
        if device.type != "meta" and not any(parameter.is_meta for parameter in delta.parameters()):
            delta.to(device)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter: `W + scale * delta`. Adapters that are not on this layer are passed over.

        Raises:
            ValueError: if the adapter is merged, since the merged weight would not follow.
        """
        if adapter in self.merged_adapters:
            raise ValueError(f"Cannot set the scale of adapter '{adapter}' while it is merged: unmerge it first.")
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self._held:
            with substituted(self.base_layer, self._held):
                return self.base_layer(*args, **kwargs)
        names = [] if self.merged else self._present(self.active_adapters)
        if not names:
            return self.base_layer(*args, **kwargs)

        def use(tensors: list[DeltaTensors]) -> Any:
            if self._can_compose():
                with substituted(self.base_layer, self._compose(names, tensors)):
                    return self.base_layer(*args, **kwargs)
            return self._add_delta_output(self.base_layer(*args, **kwargs), names, tensors, args)

        return with_deltas([self._delta(name) for name in names], use)

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        """Compose the edited weight now, for all forwards and backwards inside.

        Their gradients reach the delta one by one, in its own precision, as without this.
        """
        names = [] if self.merged or self.disable_adapters else self._present(self.active_adapters)
        if not names or not self._can_compose():
            yield
            return
        with torch.no_grad():
            composed = self._compose(names, [self._delta(name).tensors() for name in names])
        for name, leaf in composed.items():
            deltas = [(getattr(self._delta(adapter), name, None), self.scaling[adapter]) for adapter in names]
            trained = [(delta, scale) for delta, scale in deltas if delta is not None and delta.requires_grad]
            if trained:
                leaf.requires_grad_().register_post_accumulate_grad_hook(partial(_hand_on_gradient, trained))
        self._held = composed
        try:
            yield
        finally:
            self._held = {}

    @property
    def weight(self) -> torch.Tensor:
        # some modules compute with another's weight and never call it, as torch's MultiheadAttention with its out_proj
        return self._effective("weight")

    @property
    def bias(self) -> torch.Tensor:
        return self._effective("bias")

    def _effective(self, name: str) -> torch.Tensor:
        if name in self._held:
            return self._held[name]
        active = [] if self.merged or self.disable_adapters else self._present(self.active_adapters)
        names = [adapter for adapter in active if name in self._delta(adapter).names]
        if names and self._can_compose():
            deltas = [self._delta(adapter) for adapter in names]
            return with_deltas(deltas, lambda tensors: self._compose(names, tensors)[name])
        return getattr(super(), name)

    def _add_delta_output(
        self, result: torch.Tensor, adapters: Sequence[str], tensors: Sequence[DeltaTensors], inputs: Sequence[Any]
    ) -> torch.Tensor:
        total = result.to(torch.promote_types(result.dtype, torch.float32))
        for adapter, delta in zip(adapters, tensors, strict=True):
            total = total + self.scaling[adapter] * self._delta_output(inputs[0], **delta).to(total)
        return total.to(result.dtype)

    def _delta_output(self, x: torch.Tensor, **delta: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            f"The {' and '.join(delta)} of {type(self.base_layer).__name__} is quantized, offloaded or sharded, and "
            "this module's output is not linear in it, so that a delta cannot be applied beside it. Keep this module "
            "in full on its device, or leave it out of target_modules."
        )

    def __repr__(self) -> str:
        return "locft." + super().__repr__()


def _hand_on_gradient(deltas: Sequence[tuple[torch.Tensor, float]], composed: torch.Tensor) -> None:
    """Do what backward through `compose_weight` would do with the gradient of its result."""
    assert composed.grad is not None
    wide = composed.grad.to(torch.promote_types(composed.dtype, torch.float32))
    composed.grad = None
    for delta, scale in deltas:
        gradient = (wide if scale == 1.0 else scale * wide).to(device=delta.device, dtype=delta.dtype)
        delta.grad = gradient.clone() if delta.grad is None else delta.grad.add_(gradient)
