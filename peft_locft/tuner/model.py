"""Finds the targets, combines adapters, and keeps a merge all or nothing."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs
from torch import nn

from .arithmetic import tensor_sha256
from .combine import COMBINATIONS, combine_deltas
from .config import LocFTConfig
from .delta import full_shape, quantization_backend
from .layer import LocFTLayer
from .modules import ParamWrapper, has_own_weight, wrap
from .presets import resolve_location

UNTIE = """
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()"""


class LocFTModel(BaseTuner):
    """Full-rank deltas at chosen locations of a base model.

    Use `peft.get_peft_model(model, LocFTConfig(...))`, which makes it.

    Args:
        model: the base model; it is changed in place, as in every PEFT method.
        config: which location, which precision.
        adapter_name: name of the first adapter.

    Raises:
        ValueError: if a targeted module has no weight of its own, if its weight is shared with another module, or if
            the default location cannot be found.
    """

    prefix = "locft_"
    tuner_layer_cls = LocFTLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  (as BaseTuner declares it); see presets

    def _prepare_adapter_config(self, peft_config: LocFTConfig, model_config: dict[str, Any]) -> LocFTConfig:
        resolve_location(peft_config, self.model)
        return peft_config

    def _prepare_model(self, peft_config: LocFTConfig, model: nn.Module) -> None:
        """Refuse what cannot be edited before the first module is replaced."""
        users = defaultdict(list)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            users[id(parameter)].append(_clean(name))
        for name, parameter in self._targeted_parameters(peft_config, model):
            if len(users[id(parameter)]) > 1:
                others = [user for user in users[id(parameter)] if user != name]
                raise ValueError(
                    f"{name} is tied to {', '.join(others)}: a delta would change both, or neither after a merge. "
                    f"Target another module, or untie them first:{UNTIE}"
                )

    def _targeted_parameters(self, config: LocFTConfig, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LocFTLayer))
        for name, module in model.named_modules():
            if not name or name.startswith(inside) or not self._check_target_module_exists(config, name):
                continue
            base: Any = module.get_base_layer() if isinstance(module, LocFTLayer) else module
            if quantization_backend(base, get_quantization_kwargs(model)) is not None:
                continue
            if not has_own_weight(base):
                raise ValueError(
                    f"target_modules matches {name}, a {type(base).__name__}, which has no weight of its own. Name "
                    "the modules inside it (a Linear, Conv1D, Embedding, convolution or norm), its parameters by "
                    "target_parameters, or whole decoder layers by target_modules='entire-layer'."
                )
            yield f"{name}.weight", base.weight
        for name, parameter in model.named_parameters(remove_duplicate=False):
            clean = _clean(name)
            if any(clean == target or clean.endswith(f".{target}") for target in config.target_parameters or []):
                yield clean, parameter

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
        if isinstance(target, LocFTLayer) and (
            parameter_name is None or (isinstance(target, ParamWrapper) and target.parameter_name == parameter_name)
        ):
            target.update_layer(adapter_name, peft_config)
            return
        layer = wrap(target, adapter_name, peft_config, parameter_name, **get_quantization_kwargs(self))
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # BaseTuner's own version copies `weight` onto what is unloaded, which fails on a wrapper that computes it
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # PEFT casts every adapter to float32; the precision of a delta is the user's choice
        dtype = getattr(torch, self.peft_config[adapter_name].delta_dtype)
        for _, layer in locft_layers(self.model):
            if adapter_name in layer.locft_delta:
                layer.locft_delta[adapter_name].to(dtype)

    # ------------------------------------------------------------------ merge

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, at all locations or, if one refuses, at none.

        Args:
            adapter_names: adapters to merge; `None` means the active ones.
            safe_merge: refuse weights that are not finite.

        Raises:
            ValueError: if `safe_merge` finds a value that is not finite, or if a base weight cannot be merged into.
        """
        with self._all_or_nothing():
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]  # BaseTuner returns the model, annotated None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # BaseTuner merges and replaces one module after the other; a refusal must come before the first replacement
        if merge:
            self.merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return super()._unload_and_optionally_merge(  # type: ignore[return-value]
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        before = [(layer, list(layer.merged_adapters)) for _, layer in locft_layers(self.model)]
        try:
            yield
        except Exception:
            for layer, merged in before:
                if layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=merged)
            raise

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
        """Add a new adapter that combines others. Deltas are full-rank, so `"linear"` is their exact weighted sum.

        Args:
            adapters: names of the adapters to combine; each may sit at other locations, the new one at all of them.
            weights: their weights, of any sign; each adapter's own scale is applied first.
            adapter_name: name of the new adapter; its scale is 1.
            combination_type: how the deltas are combined, as in `LoraModel.add_weighted_adapter`.
            density: share of the values to keep, in (0, 1]; needed by every type but `"linear"`.
            majority_sign_method: how TIES elects a sign.

        Raises:
            ValueError: if an adapter does not exist, the new name does, the lists differ in length, the type is
                unknown, or `density` is missing or out of range.
        """
        self._check_weighted(adapters, weights, adapter_name, combination_type, density)
        layers = [
            (name, layer)
            for name, layer in locft_layers(self.model)
            if any(adapter in layer.locft_delta for adapter in adapters)
        ]
        self.peft_config[adapter_name] = replace(
            self.peft_config[adapters[0]],
            target_modules=[name for name, layer in layers if not isinstance(layer, ParamWrapper)],
            target_parameters=[
                f"{name}.{layer.parameter_name}" for name, layer in layers if isinstance(layer, ParamWrapper)
            ]
            or None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            train_bias=any(self.peft_config[adapter].train_bias for adapter in adapters),
            scale=1.0,
            base_sha256=None,
        )
        self.inject_adapter(self.model, adapter_name)
        for _, layer in layers:
            sources = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.locft_delta]
            for kind, parameter in layer.locft_delta[adapter_name].named_parameters():
                parameter.requires_grad_(False)
                terms = [
                    (layer.scaling[a] * tensor.detach().float(), w)
                    for a, w in sources
                    if (tensor := getattr(layer.locft_delta[a], kind)) is not None
                ]
                if terms:
                    parameter.data.copy_(combine_deltas(terms, combination_type, density, majority_sign_method))

    def _check_weighted(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str,
        density: float | None,
    ) -> None:
        unknown = [adapter for adapter in adapters if adapter not in self.peft_config]
        if unknown or not adapters:
            raise ValueError(f"adapters={adapters}: expected names out of {sorted(self.peft_config)}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter '{adapter_name}' exists already: delete it first, or choose another name.")
        if len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights: expected one weight an adapter.")
        if combination_type not in COMBINATIONS:
            raise ValueError(f"combination_type={combination_type!r}: expected one of {', '.join(COMBINATIONS)}.")
        if combination_type != "linear" and (density is None or not 0 < density <= 1):
            raise ValueError(f"density={density!r}: {combination_type} needs the share of values to keep, in (0, 1].")

    # ------------------------------------------------------------------ provenance

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: LocFTConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        # every way of saving an adapter comes through here and then writes the config
        config.base_sha256 = base_sha256(model, adapter_name) or config.base_sha256
        return super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        expected = self.peft_config[adapter_name].base_sha256
        if expected:
            found = base_sha256(model, adapter_name)
            differing = sorted(name for name, digest in found.items() if expected.get(name, digest) != digest)
            if differing:
                warnings.warn(
                    f"Adapter '{adapter_name}' was trained on another base: {', '.join(differing[:3])} "
                    f"{'and others ' if len(differing) > 3 else ''}differ from the weights that its deltas belong to. "
                    f"Load it onto {self.peft_config[adapter_name].base_model_name_or_path or 'its own base model'}, "
                    "at the revision and dtype it was trained on, or expect other answers than it was evaluated with.",
                    stacklevel=2,
                )


def locft_layers(model: nn.Module) -> Iterator[tuple[str, LocFTLayer]]:
    """Yield every tuner layer with the name that its base module has in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, LocFTLayer):
            yield _clean(name), module


def base_sha256(model: nn.Module, adapter_name: str = "default") -> dict[str, str]:
    """Return the sha256 of every base tensor that has a delta of this adapter, by parameter name.

    The base is hashed as it is without edits, whether or not one is merged now. Tensors that are not here in full
    (offloaded, sharded) are left out.
    """
    return {
        f"{name}.{kind}": tensor_sha256(tensor)
        for name, layer in locft_layers(model)
        if adapter_name in layer.locft_delta
        for kind, tensor in layer.base_tensors().items()
        if tensor.shape == full_shape(tensor) and not tensor.is_meta and not hasattr(tensor, "device_mesh")
    }


def _clean(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
