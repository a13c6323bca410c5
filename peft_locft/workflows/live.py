"""Pushes an adapter into a running inference server and takes it off exactly: vLLM, SGLang.

vLLM's workers get methods by `--worker-extension-cls peft_locft.workflows.live.LocFTWorkerExtension`. Each keeps the
original values of what a push changed. Where an engine packs its weights and frees them, as vLLM's build for CPUs
does, and in SGLang, which has no place for such methods, the originals come from the checkpoint. Neither server is
imported here.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..adapters.edited_parameters import edited_parameters
from ..adapters.exports import base_of, dtype_of, export_weights
from ..adapters.reading import check_adapter
from ..io.checkpoint import Checkpoint

LAYER = re.compile(r"(?:^|\.)(\d+)\.")


class LiveEdit:
    """The edited weights in a running model, and the originals.

    Args:
        model: a model whose `load_weights(pairs)` takes tensors by their names in the checkpoint, as those of vLLM do.
            It may fuse them, split them between processes and hold them on any device.
        reload: loads and packs tensors by their names in the checkpoint, for a model that has packed its weights.

    Attributes:
        label: what is pushed; `None` if nothing is.
        originals: the original values of each changed parameter, by its name in the model; of packed ones, by its name
            in the checkpoint.
    """

    def __init__(
        self, model: Any, reload: Callable[[Iterator[tuple[str, torch.Tensor]]], object] | None = None
    ) -> None:
        self.model, self.reload = model, reload
        self.label: str | None = None
        self.originals: dict[str, torch.Tensor] = {}
        self._is_packed = False

    @property
    def dtype(self) -> str:
        """The dtype that most of the model's parameters of two bytes or more have, such as `"bfloat16"`."""
        sizes: Counter[str] = Counter()
        for parameter in self.model.parameters():
            if parameter.is_floating_point() and parameter.element_size() > 1:
                sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
        return max(sizes, key=sizes.__getitem__, default="auto")

    @torch.no_grad()
    def push(
        self, weights: Mapping[str, torch.Tensor], label: str, stored: Mapping[str, torch.Tensor] | None = None
    ) -> list[str]:
        """Load edited weights, after taking off what was pushed before, and return the names of changed parameters.

        Args:
            weights: the edited tensors, by their names in the checkpoint, see `export_weights`.
            label: what they are, for `label`.
            stored: the same tensors of the checkpoint, which a model with packed weights needs.

        Raises:
            ValueError: if the model has not loaded them as they are: it is quantized, or knows none of the names. The
                model is as it was.
        """
        self.withdraw()
        if any(not parameter.numel() for _, parameter in _near(self.model, weights)):
            return self._push_packed(weights, label, stored or {})
        before = {name: parameter.clone() for name, parameter in _near(self.model, weights)}
        try:
            self.model.load_weights(iter(weights.items()))
            after = dict(self.model.named_parameters())
            changed = {name: old for name, old in before.items() if not torch.equal(after[name], old)}
            self._check(weights, before, changed, after)
        except BaseException:
            self._restore(before)
            raise
        self.label, self.originals = label, changed
        return sorted(changed)

    def withdraw(self) -> list[str]:
        """Put the original values back, bit for bit, and return the names of the restored parameters."""
        restored = sorted(self.originals)
        if self._is_packed:
            self._pack(self.originals)
        else:
            self._restore(self.originals)
        self.label, self.originals, self._is_packed = None, {}, False
        return restored

    def _push_packed(
        self, weights: Mapping[str, torch.Tensor], label: str, stored: Mapping[str, torch.Tensor]
    ) -> list[str]:
        modules = dict(self.model.named_modules())
        for name, weight in weights.items():
            module: Any = modules.get(name.removesuffix(".weight"))
            shape = (getattr(module, "output_size", None), getattr(module, "input_size", None))
            # a reload that fails leaves an engine without weights, so nothing that may fail is tried
            if self.reload is None or name not in stored or shape != weight.shape or module.bias is not None:
                raise ValueError(
                    f"{name}: the server has packed its weights and can only load a whole linear of this name and "
                    f"shape, {tuple(weight.shape)}, without a bias. Serve the merged model."
                )
        self._pack(weights)
        self.label, self.originals, self._is_packed = label, dict(stored), True
        return sorted(weights)

    def _pack(self, weights: Mapping[str, torch.Tensor]) -> None:
        assert self.reload is not None
        self.reload(iter(weights.items()))

    @torch.no_grad()
    def _restore(self, values: Mapping[str, torch.Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, value in values.items():
            parameters[name].copy_(value)

    def _check(
        self,
        weights: Mapping[str, torch.Tensor],
        before: Mapping[str, torch.Tensor],
        changed: Mapping[str, torch.Tensor],
        after: Mapping[str, torch.Tensor],
    ) -> None:
        quantized = [name for name in changed if not after[name].is_floating_point() or after[name].element_size() < 2]
        moved = [name for name in changed if after[name].shape != before[name].shape]
        if quantized or moved:
            raise ValueError(
                f"{(quantized or moved)[0]} is quantized or rearranged in the server, so edited weights cannot be "
                "loaded into it as they are. Serve the model without quantization, or serve the merged model."
            )
        if weights and not changed:
            raise ValueError(
                f"The server's model took none of {', '.join(list(weights)[:3])}: it is another model, or it already "
                "has these values."
            )


def _near(model: nn.Module, weights: Iterable[str]) -> Iterable[tuple[str, nn.Parameter]]:
    """Yield the parameters that loading some weights may change: those of the same layers, and others outside."""
    layers = {_layer(name) for name in weights}
    return ((name, parameter) for name, parameter in model.named_parameters() if _layer(name) in layers)


def _layer(name: str) -> str | None:
    match = LAYER.search(name)
    return None if match is None else match[1]


# ---------------------------------------------------------------------- vLLM


class LocFTWorkerExtension:
    """Methods that vLLM's workers get by `worker_extension_cls`; `llm.collective_rpc` calls them."""

    def locft_push(self, path: str, label: str = "", stored: str | None = None) -> list[str]:
        """Load the edited weights of a file that `export_weights` wrote; see `LiveEdit.push`."""
        return self._locft_edit().push(load_file(path), label or path, None if stored is None else load_file(stored))

    def locft_withdraw(self) -> list[str]:
        """Put the original weights back; see `LiveEdit.withdraw`."""
        return self._locft_edit().withdraw()

    def locft_status(self) -> dict[str, Any]:
        """Return what is pushed, which parameters it changed, and the dtype of the model's parameters."""
        live = self._locft_edit()
        return {"pushed": live.label, "changed": sorted(live.originals), "dtype": live.dtype}

    def _locft_edit(self) -> LiveEdit:
        if not hasattr(self, "_locft_live"):
            runner: Any = self.model_runner  # type: ignore[attr-defined]
            reload: Any = getattr(runner, "reload_weights", None)

            def pack(pairs: Iterator[tuple[str, torch.Tensor]]) -> None:
                reload(weights_iterator=pairs)

            self._locft_live = LiveEdit(runner.get_model(), pack if reload else None)
        return self._locft_live


def push_to_vllm(
    llm: Any,
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
) -> list[list[str]]:
    """Push an adapter into a running vLLM engine, and empty its prefix cache.

    Args:
        llm: a `vllm.LLM`, made with `worker_extension_cls="peft_locft.workflows.live.LocFTWorkerExtension"`.
        adapter: a local LocFT adapter folder.
        base: the model that the engine serves; `None`: the one that the adapter names.
        folder: where the edited weights are written for the workers to read, on a disk that all of them see; `None`: a
            temporary folder of this machine.

    Returns:
        The names of the changed parameters, for each worker.

    Raises:
        ValueError: as in `export_weights`, and if a worker refuses them.
        OSError: as in `export_weights`.

    Example:
        >>> llm = vllm.LLM(model, worker_extension_cls="peft_locft.workflows.live.LocFTWorkerExtension")
        >>> push_to_vllm(llm, "out")
        >>> withdraw_from_vllm(llm)
    """
    # the checkpoint may have another dtype than the engine, as SmolLM2's float32, which it serves in bfloat16
    dtype = llm.collective_rpc("locft_status")[0]["dtype"]
    with TemporaryDirectory(dir=folder) as place:
        export = export_weights(adapter, Path(place) / "edited.safetensors", base, dtype=dtype)
        stored = Path(place) / "stored.safetensors"
        save_file(_stored(adapter, base, dtype), stored)
        given = (str(export.path), str(adapter), str(stored))
        changed: list[list[str]] = llm.collective_rpc("locft_push", args=given)
    llm.reset_prefix_cache()
    return changed


def withdraw_from_vllm(llm: Any) -> list[list[str]]:
    """Take a pushed adapter off a running vLLM engine, bit for bit, and empty its prefix cache.

    Returns:
        The names of the restored parameters, for each worker; empty lists if nothing was pushed.
    """
    restored: list[list[str]] = llm.collective_rpc("locft_withdraw")
    llm.reset_prefix_cache()
    return restored


# ---------------------------------------------------------------------- SGLang


def push_to_sglang(
    engine: Any, adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, dtype: str = "auto"
) -> list[str]:
    """Push an adapter into a running SGLang engine, which empties its cache.

    Args:
        engine: a `sglang.Engine`.
        adapter: a local LocFT adapter folder.
        base: the model that the engine serves; `None`: the one that the adapter names.
        dtype: the dtype in which the engine serves it, such as `"bfloat16"`; `"auto"`: that of its checkpoint.

    Returns:
        The names of the edited tensors in the checkpoint.

    Raises:
        ValueError: as in `export_weights`.
        RuntimeError: if the engine refuses the weights.
        OSError: as in `export_weights`.
    """
    with TemporaryDirectory() as place:
        weights = load_file(export_weights(adapter, Path(place) / "edited.safetensors", base, dtype=dtype).path)
    return _update_sglang(engine, weights)


def withdraw_from_sglang(
    engine: Any, adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, dtype: str = "auto"
) -> list[str]:
    """Take a pushed adapter off a running SGLang engine: load the checkpoint's own tensors again.

    Args:
        engine: as in `push_to_sglang`.
        adapter: the adapter that was pushed.
        base: as in `push_to_sglang`.
        dtype: as in `push_to_sglang`.

    Returns:
        The names of the restored tensors in the checkpoint.

    Raises:
        ValueError: if the base has other weights than the adapter's training.
        RuntimeError: if the engine refuses the weights.
        OSError: as in `export_weights`.
    """
    return _update_sglang(engine, _stored(adapter, base, dtype))


def _stored(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None, dtype: str
) -> dict[str, torch.Tensor]:
    """Return the checkpoint's own tensors that an adapter edits, after checking that it was trained on them.

    Args:
        adapter: the adapter.
        base: the base.
        dtype: the dtype in which training loaded it; the tensors have that of the checkpoint.
    """
    checked = check_adapter(adapter)
    parameters = edited_parameters(Checkpoint(*base_of(checked, base, None)), [checked], dtype=dtype_of(dtype))
    tensors = {span.name: span.tensor for parameter in parameters for span in parameter.base.spans}
    return {name: tensor.read().reshape(tensor.shape) for name, tensor in tensors.items()}


def _update_sglang(engine: Any, weights: Mapping[str, torch.Tensor]) -> list[str]:
    result = engine.update_weights_from_tensor(list(weights.items()), flush_cache=True)
    succeeded, message = result[:2] if isinstance(result, tuple | list) else (result, "")
    if not succeeded:
        raise RuntimeError(f"SGLang refused the weights: {message}")
    return sorted(weights)
