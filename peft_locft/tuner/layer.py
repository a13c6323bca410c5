"""The tuner layer: its deltas, and the forward with `W + scale * delta`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import LocFTConfig
from .delta import Delta, DeltaTensors, full_shape, with_deltas
from .merging import MergeableLayer
from .quantized import quantization_backend
from .substitute import substituted


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
