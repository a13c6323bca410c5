"""The tuner layer: its deltas, the forward with `W + scale * delta`, the merge and the exact unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge, onload_layer
from torch import nn

from ..io.arithmetic import compose_weight
from .base_weights import called_with, edited_copy, full_shape, is_whole, quantization_backend
from .config import DELTA_DTYPES, LocFTConfig
from .delta import Delta, DeltaTensors, add_to_delta_gradients, check_finite, with_deltas
from .token_gate import TokenGate
from .writing_tokens import Compute, explained_choice, with_gradient_of


class LocFTLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with deltas beside its `weight`, one for each adapter.

    The forward is the base module's own, with the composed weight in place of its parameter. So it fits any module: a
    linear, a norm, a scaled embedding, fused experts. If the base weight is quantized, offloaded or sharded, the
    forward is `base(x) + x · deltaᵀ` instead.

    Args:
        base_layer: the module to edit.
        adapter_name: name of the first adapter.
        config: its configuration.
        parameter_name: parameter of the base module to edit; `None`: its weight, and its bias if `config.train_bias`.

    Raises:
        ValueError: if the base module has no float parameter of that name.
    """

    adapter_layer_names = ("locft_delta",)
    other_param_names = ("scaling",)
    works_by_rows = False  # whether the output at a token depends on the input at that token alone

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
        # full shapes (not those of a local shard) of the base parameters that an adapter has a delta for, by name
        self._shapes: dict[str, torch.Size] = {}
        # base tensors that a merge replaced, by name: subtracting the delta would not bring back the same bits
        self._originals: dict[str, torch.Tensor] = {}
        # in a list, so that it is not a submodule, which would be saved with the adapter
        self._quantized_originals: list[nn.Module] = []
        # edited tensors inside `composed_once`, by name
        self._composed: dict[str, torch.Tensor] = {}
        # inside `written_by`: the tokens whose inputs write into the deltas
        self._writers: torch.Tensor | None = None
        # at which tokens the deltas act; `None`: at all
        self.gate: TokenGate | None = None
        # a named parameter is not quantized, even beside a quantized weight
        self.quantization_backend = (
            quantization_backend(base_layer, quantization_kwargs) if parameter_name is None else None
        )
        self.in_features, self.out_features = self._features()
        self.update_layer(adapter_name, config, parameter_name)

    def _features(self) -> tuple[int | None, int | None]:
        return getattr(self.base_layer, "in_features", None), getattr(self.base_layer, "out_features", None)

    def update_layer(self, adapter_name: str, config: LocFTConfig, parameter_name: str | None = None) -> None:
        """Add a delta of zero to adapter `adapter_name`, for the weight (and bias) or one more parameter."""
        names = [parameter_name or "weight"]
        if parameter_name is None and config.train_bias and getattr(self.base_layer, "bias", None) is not None:
            names.append("bias")
        for name in names:
            # read once: the base may be sharded when the next adapter comes
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
                f"{type(self.base_layer).__name__} has no parameter {name} of a float dtype to add a delta to. If a "
                "torch parametrization or a weight norm computes it, remove that first. If it is quantized in a way "
                "that PEFT does not know, load the base model without quantization."
            )
        return full_shape(parameter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base's dtype; here the user chooses the delta's dtype
        delta = self.locft_delta[adapter_name]
        if device is None:
            # some quantized linears have no `weight`
            tensor = getattr(self.base_layer, next(iter(self._shapes)), None)
            device = next(self.base_layer.parameters()).device if tensor is None else tensor.device
        if device.type != "meta" and not any(parameter.is_meta for parameter in delta.parameters()):
            delta.to(device)

    def cast_delta(self, adapter: str, dtype: torch.dtype | None) -> None:
        """Cast the adapter's deltas to `dtype`; `None`: each to the dtype of its base tensor.

        A delta stays as it is if that dtype is not one of `DELTA_DTYPES` (float64, or a quantized base).
        """
        for name, delta in self._delta(adapter).tensors().items() if adapter in self.locft_delta else ():
            if dtype is not None:
                wanted = dtype
            elif name == "weight" and self.quantization_backend is not None:
                wanted = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
            else:
                wanted = getattr(self.base_layer, name).dtype
            if str(wanted).removeprefix("torch.") in DELTA_DTYPES:
                delta.data = delta.data.to(wanted)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter: `W + scale * delta`. Does nothing if this layer does not have the adapter.

        Raises:
            ValueError: if the adapter is merged.
        """
        if adapter in self.merged_adapters:
            raise ValueError(f"Cannot set the scale of adapter '{adapter}' while it is merged: unmerge it first.")
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    # ------------------------------------------------------------------ deltas and base weights

    def _delta(self, adapter: str) -> Delta:
        return cast(Delta, self.locft_delta[adapter])

    def scaled_deltas(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return `scale * delta` in float32 by parameter name; empty if this layer does not have the adapter."""
        if adapter not in self.locft_delta:
            return {}
        return {
            name: tensor.float() * self.scaling[adapter] for name, tensor in self._delta(adapter).tensors().items()
        }

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return `scale * delta` of the weight in float32; zeros if this layer does not have the adapter."""
        deltas = self.scaled_deltas(adapter)
        if "weight" in deltas:
            return deltas["weight"]
        other = next(self.locft_delta.parameters(), None)
        return torch.zeros(self._shapes["weight"], device=None if other is None else other.device)

    def base_tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """Return the base tensors that the adapter has a delta for, by name, without any merged edit.

        Tensors that are not here in full are left out (offloaded, sharded, or a quantized module without `weight`).
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
        # in a fixed order, so that the order of activation or merging does not change a bit
        return sorted({name for name in adapters if name in self.locft_delta})

    def _can_compose(self) -> bool:
        """Whether the module that computes with the base weights has them in full."""
        if self.quantization_backend is not None:
            return False
        base = self.base_layer
        # an FSDP unit around the module forwards attribute reads but computes with its inner module's weight
        return all(
            (name in base._parameters or name in base.__dict__) and is_whole(getattr(base, name), shape)
            for name, shape in self._shapes.items()
        )

    def _compose(self, adapters: Sequence[str], tensors: Sequence[DeltaTensors]) -> dict[str, torch.Tensor]:
        """Return the edited tensors by parameter name, composed from the unmerged base tensors."""
        terms: dict[str, list[tuple[torch.Tensor, float]]] = {}
        for adapter, delta in zip(adapters, tensors, strict=True):
            for name, tensor in delta.items():
                terms.setdefault(name, []).append((tensor, self.scaling[adapter]))
        return {name: compose_weight(self._original(name), pairs) for name, pairs in terms.items()}

    def _original(self, name: str) -> torch.Tensor:
        current: torch.Tensor = getattr(self.base_layer, name)
        # the model may have been moved, or cast, since the merge
        return self._originals[name].to(current) if name in self._originals else current

    # ------------------------------------------------------------------ forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self.base_layer, *args, **kwargs)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the base module, or a method of it, with the edited tensors in place of its parameters."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return function(*args, **kwargs)
        if self.gate is None:
            return self._edited(function, *args, **kwargs)
        edited = partial(self._edited, function, *args, **kwargs)
        return self.gate.output(self.base_layer, edited, partial(function, *args, **kwargs))

    def _edited(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._composed:
            return self._written(partial(called_with, self.base_layer, function), self._composed, args, kwargs)
        names = [] if self.merged else self._present(self.active_adapters)
        if not names:
            return function(*args, **kwargs)

        def use(tensors: list[DeltaTensors]) -> Any:
            if self._can_compose():
                composed = self._compose(names, tensors)
                return self._written(partial(called_with, self.base_layer, function), composed, args, kwargs)
            if function is not self.base_layer:
                return LocFTLayer._delta_output(self, args, **tensors[0])
            flat = {(n, name): tensor for n, own in enumerate(tensors) for name, tensor in own.items()}

            def add(values: Mapping[tuple[int, str], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
                own = [{name: values[n, name] for name in found} for n, found in enumerate(tensors)]
                return self._add_delta_output(function(*args, **kwargs), names, own, args)

            return self._written(add, flat, args, kwargs)

        return with_deltas([self._delta(name) for name in names], use)

    def _written(
        self, compute: Compute, tensors: Mapping[Any, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._writers is None or not torch.is_grad_enabled():
            return compute(tensors, *args, **kwargs)
        with explained_choice(self.base_layer):
            return with_gradient_of(self._writers, compute, tensors, args, kwargs, by_rows=self.works_by_rows)

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        """Compose the edited weight once, for all forwards and backwards inside.

        Each backward adds its gradient to the delta, in the delta's dtype, as without this.
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
                leaf.requires_grad_().register_post_accumulate_grad_hook(partial(add_to_delta_gradients, trained))
        self._composed = composed
        try:
            yield
        finally:
            self._composed = {}

    @contextmanager
    def written_by(self, writers: torch.Tensor) -> Iterator[None]:
        """Let only some tokens write into the deltas, in all forwards with a gradient inside.

        Args:
            writers: bool, of the shape of the tokens in the module's output: (B, T), or flattened.
        """
        self._writers = writers
        try:
            yield
        finally:
            self._writers = None

    @property
    def weight(self) -> torch.Tensor:
        # some modules read another module's weight and never call it: torch's MultiheadAttention and its out_proj
        return self._effective("weight")

    @property
    def bias(self) -> torch.Tensor:
        return self._effective("bias")

    def __getattr__(self, name: str) -> Any:
        # Some modules are read by their owner, which finds the tuner layer in their place: stacked experts that it
        # slices, a router with a buffer for it, a module with other methods than forward.
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            # a private attribute is the base module's own: its hooks, what transformers and accelerate note there
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
        if name in self._shapes:
            return self._effective(name)
        found = getattr(base, name)
        return partial(self._call, found) if getattr(found, "__self__", None) is base else found

    def _effective(self, name: str) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()  # as the forward does, which such a module never calls
        if self._writers is not None and torch.is_grad_enabled() and not self.disable_adapters:
            with explained_choice(self.base_layer):
                raise ValueError(f"its owner reads its {name} and computes with it")
        if name in self._composed:
            return self._composed[name]
        active = [] if self.merged or self.disable_adapters else self._present(self.active_adapters)
        names = [adapter for adapter in active if name in self._delta(adapter).names]
        if names and self.gate is not None:
            raise ValueError(f"{type(self.base_layer).__name__} cannot have a scope: its owner reads its {name}.")
        if names and self._can_compose():
            deltas = [self._delta(adapter) for adapter in names]
            return with_deltas(deltas, lambda tensors: self._compose(names, tensors)[name])
        if name in ("weight", "bias"):
            return getattr(super(), name)
        if names:
            self._delta_output(name, **self._delta(names[0]).tensors())
        return getattr(self.base_layer, name)

    def _add_delta_output(
        self, result: torch.Tensor, adapters: Sequence[str], tensors: Sequence[DeltaTensors], inputs: Sequence[Any]
    ) -> torch.Tensor:
        total = result.to(torch.promote_types(result.dtype, torch.float32))
        for adapter, delta in zip(adapters, tensors, strict=True):
            total = total + self.scaling[adapter] * self._delta_output(inputs[0], **delta).to(total)
        return total.to(result.dtype)

    def _delta_output(self, x: Any, **delta: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(
            f"The {' and '.join(delta)} of {type(self.base_layer).__name__} is quantized, offloaded or sharded. This "
            "module's output is not linear in it, so a delta cannot be applied beside it. Keep this module "
            "in full on its device, or leave it out of target_modules."
        )

    # ------------------------------------------------------------------ merge

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the composed weight into the base module. The original stays on the CPU for `unmerge`.

        Args:
            safe_merge: refuse a weight that is not finite.
            adapter_names: adapters to merge; `None`: the active ones.

        Raises:
            ValueError: if `safe_merge` finds a value that is not finite, or the base weight cannot be written.
        """
        wanted: Any = self.active_adapters if adapter_names is None else adapter_names
        if not isinstance(wanted, str):  # PEFT's check refuses a string
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
        """Raise a ValueError if the base weight cannot be written; it says what to do."""
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
                f"Cannot merge into {kind}: its {' and '.join(self._shapes)} is offloaded or sharded. Load the base "
                "model on one device first (without FSDP, ZeRO-3 or disk offload), or keep the adapter unmerged."
            )

    def _merge_composed(self, names: list[str], safe_merge: bool) -> None:
        deltas = {name: self._delta(name).tensors() for name in names}
        composed = self._compose(names, list(deltas.values()))
        if safe_merge:
            check_finite(composed, deltas)
        originals = {name: self._originals.get(name, getattr(self.base_layer, name).data.cpu()) for name in composed}
        for name, tensor in composed.items():
            getattr(self.base_layer, name).data = tensor
        self._originals = originals

    def _merge_quantized(self, names: list[str], safe_merge: bool) -> None:
        original: Any = self._quantized_originals[0] if self._quantized_originals else self.base_layer
        deltas = {name: self._delta(name).tensors() for name in names}
        if safe_merge:
            for adapter, tensors in deltas.items():
                check_finite(tensors, {adapter: tensors})
        total = torch.stack([self.get_delta_weight(name) for name in names]).sum(0)
        edited: Any = edited_copy(self.quantization_backend, original, total)
        biases = [(tensors["bias"], self.scaling[name]) for name, tensors in deltas.items() if "bias" in tensors]
        if biases:
            edited.bias.data = compose_weight(original.bias, biases)
        self._quantized_originals, self.base_layer = [original], edited

    def unmerge(self) -> None:
        """Restore the original weight, bit for bit."""
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

    def __repr__(self) -> str:
        return "locft." + super().__repr__()
