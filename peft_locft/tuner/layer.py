"""The forward with `W + scale * delta`, the merge, and the exact unmerge."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.distributed.tensor import DTensor

from .arithmetic import compose_weight
from .config import LocFTConfig
from .delta import Delta, check_finite, full_shape, quantization_backend


class LocFTLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with deltas beside its `weight`, one for each adapter.

    The forward runs the base module's own forward with the composed weight in place of its parameter, whatever the
    module computes: a linear, a norm, a scaled embedding, a fused stack of experts. Where the base weight is not there
    to be added to (quantized, on the meta device, sharded), the delta's own output is added to the base's instead.

    Args:
        base_layer: the module to edit; another tuner layer where several parameters of one module are edited.
        adapter_name: name of the first adapter.
        config: its configuration.
        parameter_name: the edited parameter of the base module.

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
        parameter_name: str = "weight",
        **quantization_kwargs: Any,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parameter_name = parameter_name
        self.locft_delta = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        # what a merge replaced, by parameter name: subtracting would not bring back the same bits
        self._originals: dict[str, torch.Tensor] = {}
        self._quantized_original: nn.Module | None = None
        self.quantization_backend = quantization_backend(self.get_base_layer(), quantization_kwargs)
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, config)

    def _features(self) -> tuple[int | None, int | None]:
        base = self.get_base_layer()
        return getattr(base, "in_features", None), getattr(base, "out_features", None)

    def update_layer(self, adapter_name: str, config: LocFTConfig) -> None:
        """Add a delta of zero for `adapter_name`."""
        base = self.get_base_layer()
        bias = getattr(base, "bias", None) if config.train_bias and self.parameter_name == "weight" else None
        self.locft_delta[adapter_name] = Delta(
            self._weight_shape(), None if bias is None else full_shape(bias), config
        )
        self.scaling[adapter_name] = config.scale
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _weight_shape(self) -> torch.Size:
        # a quantized weight is packed: its own shape says nothing
        if self.quantization_backend is not None:
            return torch.Size((self.out_features, self.in_features))  # type: ignore[arg-type]
        return full_shape(getattr(self.get_base_layer(), self.parameter_name))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own version also casts to the base's dtype; the precision of a delta is the user's choice
        delta = self.locft_delta[adapter_name]
        if device is None:
            device = getattr(self.get_base_layer(), self.parameter_name).device
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

    def _delta(self, adapter: str) -> Delta:
        return cast(Delta, self.locft_delta[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return `scale * delta` in float32, of the weight's shape; zeros if the adapter is not on this layer."""
        if adapter not in self.locft_delta:
            return torch.zeros(self._weight_shape(), device=self.base_tensors()[self.parameter_name].device)
        return self._delta(adapter).weight.float() * self.scaling[adapter]

    def base_tensors(self) -> dict[str, torch.Tensor]:
        """Return the base tensors that have a delta, by parameter name, as they are without any merged edit."""
        base = self.get_base_layer() if self._quantized_original is None else self._quantized_original
        names = [self.parameter_name]
        if any(delta.bias is not None for delta in self.locft_delta.values()):
            names.append("bias")
        return {name: self._originals.get(name, getattr(base, name)) for name in names}

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        names = [] if self.merged else self._present(self.active_adapters)
        if not names:
            return self.base_layer(*args, **kwargs)
        if self._can_compose():
            with self._in_place_of_base(self._compose(names)):
                return self.base_layer(*args, **kwargs)
        return self._add_delta_output(self.base_layer(*args, **kwargs), names, *args)

    def _present(self, adapters: Sequence[str]) -> list[str]:
        return [name for name in adapters if name in self.locft_delta]

    def _can_compose(self) -> bool:
        """Whether the base weight is there, whole, on the module that computes with it."""
        if self.quantization_backend is not None:
            return False
        base = self.get_base_layer()
        # an FSDP unit around the module forwards attribute reads but computes with its inner module's weight
        if self.parameter_name not in base._parameters and self.parameter_name not in base.__dict__:
            return False
        weight = getattr(base, self.parameter_name)
        return not (weight.is_meta or isinstance(weight, DTensor)) and weight.shape == self._delta_shape()

    def _delta_shape(self) -> torch.Size:
        return self._delta(next(iter(self.locft_delta))).weight.shape

    def _compose(self, adapters: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the edited tensors by parameter name, composed from the original ones."""
        # in one fixed order, so that the order in which adapters are activated or merged cannot change a bit
        adapters = sorted(adapters)
        base: Any = self.get_base_layer()
        deltas = [(self._delta(name), self.scaling[name]) for name in adapters]
        name = self.parameter_name
        composed = {
            name: compose_weight(
                self._originals.get(name, getattr(base, name)), [(delta.weight, scale) for delta, scale in deltas]
            )
        }
        biases = [(delta.bias, scale) for delta, scale in deltas if delta.bias is not None]
        if biases:
            composed["bias"] = compose_weight(self._originals.get("bias", base.bias), biases)
        return composed

    @contextmanager
    def _in_place_of_base(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Let the base module read `tensors` where it reads its parameters.

        An instance attribute is found before a registered parameter, so the module's own forward, with its hooks,
        computes with the composed tensor. (`torch.func.functional_call` swaps the registered parameter instead, which
        FSDP swaps back in its own pre-forward: the delta would be dropped without a word.)
        """
        base = self.get_base_layer()
        before = {name: base.__dict__[name] for name in tensors if name in base.__dict__}
        base.__dict__.update(tensors)
        try:
            for name, tensor in tensors.items():
                if getattr(base, name) is not tensor:
                    raise RuntimeError(
                        f"{type(base).__name__}.{name} is a property of its class (a torch parametrization?), so a "
                        "delta beside it would have no effect. Remove the parametrization before adding the adapter."
                    )
            yield
        finally:
            for name in tensors:
                del base.__dict__[name]
            base.__dict__.update(before)

    def _add_delta_output(self, result: torch.Tensor, adapters: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        total = result.float()
        for name in adapters:
            delta = self._delta(name)
            output = self._delta_output(x, delta.weight).to(total)
            if delta.bias is not None:
                output = output + delta.bias.to(total)
            total = total + self.scaling[name] * output
        return total.to(result.dtype)

    def _delta_output(self, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            f"The {self.parameter_name} of {type(self.get_base_layer()).__name__} is quantized, offloaded or sharded, "
            "and this module's output is not linear in it, so that a delta cannot be applied beside it. Keep this "
            "module in full on its device, or leave it out of target_modules."
        )

    # ------------------------------------------------------------------ merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the composed weight into the base module and keep the original, on the CPU, for `unmerge`.

        Args:
            safe_merge: refuse a weight that is not finite.
            adapter_names: adapters to merge; `None` means the active ones.

        Raises:
            ValueError: if `safe_merge` finds a value that is not finite, or if the base cannot be merged into.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        self.check_mergeable()
        if self.quantization_backend is not None:
            self._merge_quantized(names, safe_merge)
        else:
            base = self.get_base_layer()
            with torch.no_grad():
                composed = self._compose([*self.merged_adapters, *names])
            if safe_merge:
                check_finite(composed, names)
            for name, tensor in composed.items():
                parameter = getattr(base, name)
                self._originals.setdefault(name, parameter.data.cpu())
                parameter.data = tensor
        self.merged_adapters.extend(names)

    def check_mergeable(self) -> None:
        """Raise a ValueError, with the way forward, if the base weight cannot take the delta."""
        kind = type(self.get_base_layer()).__name__
        if self.quantization_backend is not None:
            if not self.quantization_backend.supports_merge:
                raise ValueError(
                    f"Cannot merge into {kind}: its backend, {self.quantization_backend.backend_name}, cannot write a "
                    "changed weight back. Load the base model without quantization and merge there, or keep the "
                    "adapter unmerged."
                )
        elif not self._can_compose():
            raise ValueError(
                f"Cannot merge into {kind}: its {self.parameter_name} is offloaded or sharded and not here in full. "
                "Gather it first (load the base model on one device, without FSDP, ZeRO-3 or disk offload), or keep "
                "the adapter unmerged."
            )

    def _merge_quantized(self, names: list[str], safe_merge: bool) -> None:
        backend: Any = self.quantization_backend
        # the backend changes the module, or replaces it: work on a copy, keep the original
        original = self.base_layer if self._quantized_original is None else self._quantized_original
        self._quantized_original, self.base_layer = original, copy.deepcopy(original)
        with torch.no_grad():
            base_weight = backend.get_base_weight(original)
            delta = torch.stack([self.get_delta_weight(name) for name in [*self.merged_adapters, *names]]).sum(0)
            edited = base_weight.float() + delta
            try:
                if safe_merge:
                    check_finite({self.parameter_name: edited}, names)
                backend.set_base_weight(self, edited.to(base_weight.dtype))
            except Exception:
                if not self.merged_adapters:
                    self.base_layer, self._quantized_original = original, None
                raise
            error = (backend.get_base_weight(self.get_base_layer()).float() - edited).norm()
        warnings.warn(
            f"Merged into a {backend.backend_name} weight: rounding to the quantized values moved it by {error:.3g}, "
            f"where the delta's own norm is {delta.norm():.3g}. To deploy the edit as it was evaluated, merge into "
            "the base model without quantization, or keep the adapter unmerged.",
            stacklevel=2,
        )

    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._quantized_original is not None:
            self.base_layer, self._quantized_original = self._quantized_original, None
        base = self.get_base_layer()
        for name, original in self._originals.items():
            parameter = getattr(base, name)
            parameter.data = original.to(parameter)
        self._originals = {}
        self.merged_adapters = []

    def __repr__(self) -> str:
        return "locft." + super().__repr__()
