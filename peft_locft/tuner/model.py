"""The tuner: wraps the targets, merges at all locations or none, combines adapters, and checks the base."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from peft.utils.other import _set_adapter
from torch import nn

from ..io.arithmetic import tensor_sha256
from ..io.parameter_names import clean_name
from .config import LocFTConfig
from .delta import Delta, check_combination, combine_deltas, combined_config
from .layer import LocFTLayer
from .layer_kinds import ParamWrapper, wrap
from .presets import resolve_location
from .targets import check_targets, names_in_a_layer
from .token_gate import UNGATED, TokenGate, has_ungated_parts


class LocFTModel(BaseTuner):
    """Full-rank deltas at chosen locations of a base model.

    Create it with `peft.get_peft_model(model, LocFTConfig(...))`.

    Args:
        model: the base model; changed in place, as in every PEFT method.
        config: location and precision.
        adapter_name: name of the first adapter.

    Raises:
        ValueError: if a targeted module has no weight of its own or shares it with another module, or if the default
            location cannot be found.
    """

    prefix = "locft_"
    tuner_layer_cls = LocFTLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as BaseTuner declares it); see presets
    gate: TokenGate | None = None  # at which tokens the deltas act; `None`: at all

    def _prepare_adapter_config(self, peft_config: LocFTConfig, model_config: dict[str, Any]) -> LocFTConfig:
        resolve_location(peft_config, self.model)
        return peft_config

    def _prepare_model(self, peft_config: LocFTConfig, model: nn.Module) -> None:
        # PEFT reads it after this, in every `get_peft_model`; a user can do nothing about it
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        check_targets(peft_config, model, self._check_target_module_exists)

    def _create_and_replace(
        self,
        peft_config: LocFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, Delta):
            return  # PEFT also looks for parameters of that name inside the tuner's layers
        # for one more parameter of a wrapped module, PEFT passes the base module inside the wrapper
        wrapped = parent if isinstance(parent, LocFTLayer) else target
        if isinstance(wrapped, LocFTLayer):
            wrapped.update_layer(adapter_name, peft_config, parameter_name)
            return
        layer = wrap(target, adapter_name, peft_config, parameter_name, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # BaseTuner's version copies `weight` to the unloaded module; here the wrapper computes `weight`
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # PEFT casts every adapter to float32 or leaves it in the base's dtype; here the user can choose another one
        name = self.peft_config[adapter_name].delta_dtype or ("float32" if autocast_adapter_dtype else None)
        for _, layer in locft_layers(self.model):
            layer.cast_delta(adapter_name, None if name is None else getattr(torch, name))

    # ------------------------------------------------------------------ merge

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, at all locations or at none.

        Args:
            adapter_names: adapters to merge; `None`: the active ones.
            safe_merge: refuse weights that are not finite.

        Raises:
            ValueError: if an adapter does not exist, `safe_merge` finds a value that is not finite, a base weight
                cannot be written, or the model has a scope. Then nothing is merged.
        """
        self._check_no_gate("merge")
        unknown = [] if isinstance(adapter_names, str) else set(adapter_names or []) - set(self.peft_config)
        if unknown:
            raise ValueError(f"No adapter {sorted(unknown)} to merge: expected names from {sorted(self.peft_config)}.")
        names = self.active_adapters if adapter_names is None else adapter_names
        pending = any(
            name in layer.locft_delta and name not in layer.merged_adapters
            for _, layer in locft_layers(self.model)
            for name in names
        )
        with self._all_or_nothing(), warnings.catch_warnings():
            if pending:  # a layer with nothing to merge would warn, although other layers merge
                warnings.filterwarnings("ignore", message="All adapters are already merged")
            self._check_merge_allowed()
            for layer in self._tuner_layers():
                own = adapter_names  # None: those that are active in the layer
                if adapter_names is not None and not isinstance(layer, LocFTLayer):
                    # PEFT's layer for trainable_token_indices fails for an adapter that it does not have
                    own = [name for name in adapter_names if name in layer._all_available_adapter_names()]
                with onload_layer(layer):
                    layer.merge(adapter_names=own, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the original base weights, bit for bit, at all locations."""
        merged = [layer for layer in self._tuner_layers() if layer.merged]
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for layer in merged:
            with onload_layer(layer):
                layer.unmerge()

    def _check_no_gate(self, what: str) -> None:
        if self.gate is not None:
            raise ValueError(
                f"{what}: the model has a scope, which works beside unmerged adapters only. Call its remove() first."
            )

    def _tuner_layers(self) -> list[BaseTunerLayer]:
        """Return the layers that can be merged: ours, and PEFT's own for `trainable_token_indices`."""
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def _unload_and_optionally_merge(  # type: ignore[override]  # BaseTuner returns the model, annotated None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self._check_no_gate("unload")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            if merge:
                # BaseTuner merges and replaces module by module; an error must come before the first
                self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
                adapter_names = []  # all are merged
            elif any(layer.merged for layer in self._tuner_layers()):
                # unload() returns the base model, without merged edits
                self.unmerge_adapter()
            return super()._unload_and_optionally_merge(  # type: ignore[return-value]
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before = [(layer, list(layer.merged_adapters)) for layer in self._tuner_layers()]
        try:
            yield
        except BaseException:  # KeyboardInterrupt, too
            for layer, merged in before:
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=merged)
            raise

    # ------------------------------------------------------------------ adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:  # PEFT would ignore it
            raise ValueError(
                "adapter_names: the rows of one batch cannot have different LocFT adapters, because each adapter "
                "changes the weight. Run one batch per adapter, with set_adapter."
            )
        yield

    @contextmanager
    def composed_once(self) -> Iterator[None]:
        """Compose every edited weight once, for all forwards and backwards inside. The deltas must not change there.

        A step of several micro-batches saves all compositions but one. Do not use it in data-parallel training:
        DistributedDataParallel waits for the backward of the delta, which does not run here.
        """
        with ExitStack() as stack:
            for _, layer in locft_layers(self.model):
                stack.enter_context(layer.composed_once())
            yield

    @contextmanager
    def written_by(self, writers: torch.Tensor, modules: Container[str] | None = None) -> Iterator[None]:
        """Let only some tokens write into the deltas: the gradient of a delta is made of their inputs alone.

        The forward, and the gradient of everything else, is that of the edited model at every token.

        Args:
            writers: (B, T) bool, as the tokens of the forwards inside.
            modules: names of the modules whose deltas they write; every token writes into those of the others. `None`:
                all modules.

        Raises:
            ValueError: in a forward, if an edited module does not compute token by token, or has other tokens.
        """
        with ExitStack() as stack:
            for name, layer in locft_layers(self.model):
                if modules is None or name in modules:
                    stack.enter_context(layer.written_by(writers))
            yield

    def set_gate(self, gate: TokenGate | None) -> None:
        """Let the deltas of all adapters act only where a gate says; `None`: at all tokens."""
        self.gate = gate
        for _, layer in locft_layers(self.model):
            layer.gate = gate

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter at all its locations and in its config: `W + scale * delta`.

        Raises:
            ValueError: if the adapter does not exist or is merged, or if the scale is not a finite number.
        """
        if adapter not in self.peft_config:
            raise ValueError(f"No adapter '{adapter}': expected one of {sorted(self.peft_config)}.")
        config = replace(self.peft_config[adapter], scale=scale)  # checks the number
        layers = [layer for _, layer in locft_layers(self.model)]
        if any(adapter in layer.merged_adapters for layer in layers):
            raise ValueError(f"Cannot set the scale of adapter '{adapter}' while it is merged: unmerge it first.")
        for layer in layers:
            layer.set_scale(adapter, scale)
        self.peft_config[adapter].scale = config.scale

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one or more adapters, or none (an empty list). What is merged is unmerged."""
        if adapter_name:
            super().set_adapter(adapter_name, inference_mode=inference_mode)
        else:
            # PEFT refuses this beside modules_to_save; it is the state after the last adapter was deleted
            for module in self.model.modules():
                if isinstance(module, LocFTLayer | AuxiliaryTrainingWrapper):
                    module.set_adapter([], inference_mode=inference_mode)
            self.active_adapter = []
        # PEFT unmerges the layers of the tuner only, and would leave the rows of trainable_token_indices merged
        if any(layer.merged for layer in self._tuner_layers()):
            self.unmerge_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If no active adapter is left, the first of the others, by name, becomes active.

        Raises:
            ValueError: if the adapter does not exist or is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist: expected one of {sorted(self.peft_config)}.")
        if any(adapter_name in layer.merged_adapters for layer in self._tuner_layers()):
            raise ValueError(
                f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name]
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        if was_active and not active and self.peft_config:
            active = sorted(self.peft_config)[:1]
            warnings.warn(f"Deleted the active adapter {adapter_name}; {active[0]} is active now.", stacklevel=2)
        # BaseTuner's version lets each layer choose from its own adapters, and raises halfway if the adapter has
        # modules_to_save and several others stay active
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*was active which is now deleted")
            for _, layer in locft_layers(self.model):
                layer.delete_adapter(adapter_name)
            for wrapper in self.model.modules():
                if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in wrapper._adapters:
                    wrapper.delete_adapter(adapter_name, [name for name in active if name in wrapper._adapters])
        self.active_adapter = active
        if was_active:
            # self.set_adapter would unmerge the others
            for _, layer in locft_layers(self.model):
                layer.set_adapter(active)
            if active:
                _set_adapter(self.model, active)

    # ------------------------------------------------------------------ combine

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that combines others. Deltas are full-rank, so `"linear"` is their exact weighted sum.

        Args:
            adapters: names of the adapters to combine. Their locations may differ; the new adapter has all of them.
            weights: one weight per adapter, of any sign; applied after the adapter's scale.
            adapter_name: name of the new adapter; its scale is 1.
            combination_type: as in `LoraModel.add_weighted_adapter`.
            density: share of the values to keep, in (0, 1]; required by every type but `"linear"`.
            majority_sign_method: how TIES elects a sign.

        Raises:
            ValueError: if an adapter does not exist, the new name exists, the lists differ in length, the type is
                unknown, `density` is missing or out of range, or an adapter has other weights than deltas.
        """
        check_combination(self.peft_config, adapters, weights, adapter_name, combination_type, density)
        terms = defaultdict(list)
        for name, layer in locft_layers(self.model):
            for adapter, weight in zip(adapters, weights, strict=True):
                for kind, delta in layer.scaled_deltas(adapter).items():
                    terms[name, isinstance(layer, ParamWrapper), kind].append((delta.detach(), weight))
        self.peft_config[adapter_name] = combined_config(
            [self.peft_config[adapter] for adapter in adapters],
            modules=sorted({name for name, by_parameter, _ in terms if not by_parameter}),
            parameters=sorted(f"{name}.{kind}" for name, by_parameter, kind in terms if by_parameter),
        )
        self.inject_adapter(self.model, adapter_name)
        layers = dict(locft_layers(self.model))
        for (name, _, kind), pairs in terms.items():
            combined = combine_deltas(pairs, combination_type, density, majority_sign_method)
            getattr(layers[name].locft_delta[adapter_name], kind).data.copy_(combined)

    # ------------------------------------------------------------------ provenance

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LocFTConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # every way of saving an adapter calls this before it writes the config
        config.base_sha256 = base_sha256(model, adapter_name) or config.base_sha256
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        names = [name.replace("_fsdp_wrapped_module.", "") for name, _ in _layers(model)]
        _drop_base_weights(names, state_dict)
        return selected | _delta_tensors(names, adapter_name, state_dict)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.gate is not None and has_ungated_parts(self.peft_config[adapter_name]):
            raise ValueError(f"Adapter '{adapter_name}' {UNGATED}. Call the scope's remove() first.")
        if self.peft_config[adapter_name].trainable_token_indices and any(x.merged for x in self._tuner_layers()):
            # PEFT would take the merged rows for the base's
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        disabled = any(layer.disable_adapters for _, layer in locft_layers(model))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            names = names_in_a_layer(model) if "not found in the base model" in str(error) else []
            if not names:
                raise
            raise type(error)(f"{error} A decoder layer of this model has {', '.join(names)}.") from None
        if disabled:
            # new layers start enabled
            self.disable_adapter_layers()
        self.set_gate(self.gate)
        _warn_of_other_base(model, adapter_name, self.peft_config[adapter_name])


# ---------------------------------------------------------------------- names


def locft_layers(model: nn.Module) -> Iterator[tuple[str, LocFTLayer]]:
    """Yield every tuner layer, with the name that its module has in the base model."""
    for name, layer in _layers(model):
        yield clean_name(name), layer


def _layers(model: nn.Module) -> list[tuple[str, LocFTLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LocFTLayer)]


# ---------------------------------------------------------------------- saving and loading


def base_sha256(model: nn.Module, adapter_name: str = "default") -> dict[str, str]:
    """Return the sha256 of every base tensor that this adapter has a delta for, by parameter name.

    The hash is of the unedited base, merged or not. Offloaded and sharded tensors are left out.
    """
    return {
        f"{name}.{kind}": tensor_sha256(tensor)
        for name, layer in locft_layers(model)
        for kind, tensor in layer.base_tensors(adapter_name).items()
    }


def differing_from_base(model: nn.Module, adapter_name: str, config: Any) -> list[str]:
    """Return the names of base tensors whose sha256 is not the one in the adapter's config, sorted.

    Args:
        model: a model with the adapter.
        adapter_name: name of the adapter.
        config: its configuration. Without `base_sha256`, as in other PEFT methods, the result is empty.
    """
    expected = getattr(config, "base_sha256", None)
    if not expected:
        return []
    current = base_sha256(model, adapter_name)
    return sorted(name for name, digest in current.items() if expected.get(name, digest) != digest)


def _warn_of_other_base(model: nn.Module, adapter_name: str, config: LocFTConfig) -> None:
    differing = differing_from_base(model, adapter_name, config)
    if differing:
        warnings.warn(
            f"Adapter '{adapter_name}' was trained on another base: {', '.join(differing[:3])} "
            f"{'and others ' if len(differing) > 3 else ''}differ from the weights of its training, so its "
            f"answers may change. Load {config.base_model_name_or_path or 'its own base model'}, at the revision and "
            "dtype it was trained on.",
            stacklevel=2,
        )


def _drop_base_weights(names: Sequence[str], state_dict: dict[str, torch.Tensor]) -> None:
    """Delete the base weights of the edited modules from a state dict that an adapter is saved from.

    If the location is an embedding or the head, PEFT would save its base weight too (edited, if an adapter is merged)
    and load it over the base model's own.
    """
    prefixes = tuple(f"{name}.base_layer." for name in names)
    for key in [key for key in state_dict if key.startswith(prefixes)]:
        del state_dict[key]


def _delta_tensors(
    names: Sequence[str], adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the deltas of an adapter in a state dict.

    PEFT searches by the module names of the wrapped model. While FSDP1 wraps it, they contain the wrapper's name, but
    a gathered state dict does not: PEFT would save an empty adapter.
    """
    prefixes = tuple(f"{name}.locft_delta.{adapter_name}." for name in names)
    return {key: tensor for key, tensor in state_dict.items() if key.startswith(prefixes)}
