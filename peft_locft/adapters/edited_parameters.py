"""Finds the parameters that adapters edit in a base checkpoint, verifies them, and composes them with their deltas."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..io.arithmetic import compose_weight, one_thread, values_sha256
from ..io.checkpoint import Checkpoint
from ..io.parameter_names import ParameterFinder, Span, StoredParameter
from ..io.safetensors_file import StoredTensor
from .reading import CheckedAdapter

NARROW_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's delta of an edited parameter.

    Attributes:
        adapter: the adapter.
        name: the parameter's name in the adapter, which depends on whether the model had a head.
        delta: where the delta is stored.
        scale: factor of the delta.
        weight: factor of the adapter, if several are combined first; `None` if each is added separately.
        combined_dtype: dtype of the combined delta.
    """

    adapter: CheckedAdapter
    name: str
    delta: StoredTensor
    scale: float
    weight: float | None
    combined_dtype: torch.dtype

    @property
    def recorded_sha256(self) -> str | None:
        """The sha256 of the base parameter in training; `None` if the adapter does not record it."""
        return (self.adapter.config.base_sha256 or {}).get(self.name)


@dataclass(frozen=True, slots=True)
class EditedParameter:
    """A parameter of the base checkpoint, and the deltas that adapters add to it.

    Attributes:
        base: where the parameter is stored.
        terms: the deltas.
        dtype: dtype in which the base is loaded; `None`: the dtype of the checkpoint.
    """

    base: StoredParameter
    terms: list[Term]
    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The first adapter's name of the parameter."""
        return self.terms[0].name

    def base_sha256(self, dtype: torch.dtype | None = None) -> str:
        """Return the `tensor_sha256` of the base parameter, rounded to `dtype` or else to `self.dtype`."""
        dtype = dtype or self.dtype
        return values_sha256(values if dtype is None else values.to(dtype) for values in self.base.values())

    def edited(self, span: Span) -> Iterator[torch.Tensor]:
        """Yield the edited values of one of the base's tensors, flat, in slices that fit in memory.

        Raises:
            ValueError: if an edited value is not finite, but the base value is.
        """
        for start, count in span.slices():
            base = span.tensor.read(start, count)
            if self.dtype is not None:
                base = base.to(self.dtype)
            edited = compose_weight(base, deltas_of(self.terms, span.start + start, count))
            # aminmax returns NaN if there is one; checking every value would take longer than composing them
            finite = torch.stack(torch.aminmax(edited)).isfinite().all()
            if not finite and not (edited.isfinite() | ~base.isfinite()).all():
                raise ValueError(
                    f"{span.name}: the edit produces NaN or infinite values. The adapter is broken, or its delta is "
                    f"too large for {span.tensor.dtype}. Nothing was written. Check the adapter with `locft inspect`."
                )
            yield edited

    def edited_tensor(self, span: Span) -> torch.Tensor:
        """Return one whole tensor of the base, edited."""
        return torch.cat(list(self.edited(span))).reshape(span.tensor.shape)

    def edited_parameter(self) -> torch.Tensor:
        """Return the whole edited parameter."""
        tensors = [values for span in self.base.spans for values in self.edited(span)]
        return torch.cat(tensors).reshape(self.base.shape)

    def base_parameter(self) -> torch.Tensor:
        """Return the whole base parameter."""
        values = self.base.read()
        return values if self.dtype is None else values.to(self.dtype)


def deltas_of(terms: Sequence[Term], start: int, count: int) -> list[tuple[torch.Tensor, float]]:
    """Return what is added to some values of a parameter: flat tensors, and their scales for `compose_weight`.

    Args:
        terms: the deltas of one parameter.
        start: flat index of the first value.
        count: number of values.
    """
    if terms[0].weight is None:
        return [(term.delta.read(start, count), term.scale) for term in terms]
    from ..tuner.delta import combine_deltas

    # same arithmetic as LocFTModel.scaled_deltas and add_weighted_adapter, for equal bits
    scaled = [(term.delta.read(start, count).float() * term.scale, term.weight or 0.0) for term in terms]
    combined = combine_deltas(scaled, "linear", None, "total")
    return [(combined.to(terms[0].combined_dtype), 1.0)]


def terms_of(
    adapters: Sequence[CheckedAdapter], weights: Sequence[float] | None = None, scale: float | None = None
) -> Iterator[Term]:
    """Yield every delta of some adapters, in the order of addition.

    Args:
        adapters: LocFT adapters.
        weights: one factor per adapter, to combine the adapters first; `None`: add each separately.
        scale: factor of all deltas; `None`: each adapter's own.
    """
    combined_dtype = getattr(torch, adapters[0].config.delta_dtype or "float32")
    for index, adapter in enumerate(adapters):
        strength = adapter.config.scale if scale is None else scale
        weight = None if weights is None else weights[index]
        for name, delta in adapter.delta_tensors.items():
            yield Term(adapter, name, delta, strength, weight, combined_dtype)


def edited_parameters(
    checkpoint: Checkpoint,
    adapters: Sequence[CheckedAdapter],
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> list[EditedParameter]:
    """Return the parameters that adapters edit, after checking that the adapters were trained on this base.

    Args:
        checkpoint: the base.
        adapters: LocFT adapters, in the order of addition.
        weights: one factor per adapter, to combine the adapters first; `None`: add each separately.
        scale: factor of all deltas; `None`: each adapter's own.
        dtype: dtype in which the base is loaded; `None`: the dtype of the checkpoint.
        force: accept base parameters with other values than in training.

    Raises:
        ValueError: if a parameter is missing in the base, quantized, tied, of another shape, or (without `force`) has
            other values than in training.
    """
    finder = ParameterFinder(checkpoint)
    by_spans: dict[tuple[str, ...], EditedParameter] = {}
    with one_thread():
        for term in terms_of(adapters, weights, scale):
            parameter = _find(finder, term, dtype, force)
            spans = tuple(span.name for span in parameter.base.spans)
            by_spans.setdefault(spans, EditedParameter(parameter.base, [], dtype)).terms.append(term)
    return list(by_spans.values())


def _find(finder: ParameterFinder, term: Term, dtype: torch.dtype | None, force: bool) -> EditedParameter:
    """Return a parameter with one term. It is verified, unless `force` or the adapter records no hash of it."""
    if term.recorded_sha256 is not None:
        by_name = finder.find_by_name(term.name, term.delta.shape)
        if by_name is not None:
            parameter = EditedParameter(by_name, [term], dtype)
            # same name, shape and values as in training: this is the parameter
            if parameter.base_sha256() == term.recorded_sha256:
                return parameter
    parameter = EditedParameter(finder.find(term.name, term.delta.shape), [term], dtype)
    if not force and term.recorded_sha256 is not None and parameter.base_sha256() != term.recorded_sha256:
        raise _other_base(finder.checkpoint, parameter)
    return parameter


def _other_base(checkpoint: Checkpoint, parameter: EditedParameter) -> ValueError:
    term = parameter.terms[0]
    rounded = [dtype for dtype in NARROW_DTYPES if parameter.base_sha256(dtype) == term.recorded_sha256]
    hint = ""
    if rounded:
        hint = (
            f", but it is after rounding to {str(rounded[0]).removeprefix('torch.')}: training loaded the base in "
            "that dtype. The edited model would differ from the evaluated one by that rounding"
        )
    return ValueError(
        f"{term.name} of {checkpoint.name} is not the weight that {term.adapter.folder} was trained on{hint}. Use "
        f"{term.adapter.config.base_model_name_or_path or 'its own base model'} with the revision and dtype of the "
        "training and without other edits. Or use force=True (--force); the answers may then change."
    )


def base_to_compare(model: str | None, adapters: Sequence[CheckedAdapter]) -> Checkpoint | None:
    """Return the model that adapters were trained on; `None` if it is not on this machine and was not named.

    Args:
        model: a folder or an id on the Hub; `None`: the adapters' own, if it is on this machine.
        adapters: the adapters.

    Raises:
        ValueError: if `model` is given and has no safetensors checkpoint.
        OSError: if `model` is given and cannot be had.
    """
    if model is not None:
        return Checkpoint(model)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = next((each for adapter in adapters if (each := adapter.config.base_model_name_or_path)), None)
    if name is None:
        return None
    try:
        # what is not on this machine would be downloaded, gigabytes for a comparison
        here = Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str)
        return Checkpoint(name) if here else None
    except (ValueError, OSError, HFValidationError):
        return None


def adapter_list(adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Return adapters as a list: one path, or a sequence of paths.

    Raises:
        ValueError: if the list is empty.
    """
    paths = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not paths:
        raise ValueError("adapters: found none; expected one or more. Give adapter folders or ids on the Hub.")
    return paths
