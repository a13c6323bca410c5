"""The parameters that adapters edit, found in a base checkpoint, verified, and composed with their deltas."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..io.arithmetic import compose_weight, one_thread, values_sha256
from ..io.checkpoint import Checkpoint
from ..io.parameter_names import ParameterFinder, Span, StoredParameter
from ..io.safetensors_file import StoredTensor
from .reading import CheckedAdapter

NARROW_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's part in an edited parameter.

    Attributes:
        adapter: the adapter.
        name: its name of the parameter; adapters of a model with and without a head have different ones.
        delta: where the delta is stored.
        scale: factor of the delta.
        weight: factor of the adapter where several are combined into one; `None` where each is added by itself.
        combined_dtype: dtype of the combination.
    """

    adapter: CheckedAdapter
    name: str
    delta: StoredTensor
    scale: float
    weight: float | None
    combined_dtype: torch.dtype

    @property
    def recorded_sha256(self) -> str | None:
        """The sha256 of the base parameter that the adapter was trained on; `None` if it records none."""
        return (self.adapter.config.base_sha256 or {}).get(self.name)


@dataclass(frozen=True, slots=True)
class EditedParameter:
    """A parameter of the base checkpoint, and what adapters add to it.

    Attributes:
        base: where the parameter is stored.
        terms: what is added.
        dtype: dtype in which the base is loaded; `None` is that of the checkpoint.
    """

    base: StoredParameter
    terms: list[Term]
    dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """The first adapter's name of the parameter."""
        return self.terms[0].name

    def base_sha256(self, dtype: torch.dtype | None = None) -> str:
        """Return the `tensor_sha256` of the base's parameter, rounded to `dtype` or else to `self.dtype`."""
        dtype = dtype or self.dtype
        return values_sha256(values if dtype is None else values.to(dtype) for values in self.base.values())

    def edited(self, span: Span) -> Iterator[torch.Tensor]:
        """Yield the edited values of one of the base's tensors, flat, in slices that fit in memory.

        Raises:
            ValueError: if one is not finite where the base's is.
        """
        for start, count in span.slices():
            base = span.tensor.read(start, count)
            if self.dtype is not None:
                base = base.to(self.dtype)
            edited = compose_weight(base, self._deltas(span.start + start, count))
            # the extremes of what holds a NaN are NaN; a look at every value takes longer than composing them
            finite = torch.stack(torch.aminmax(edited)).isfinite().all()
            if not finite and not (edited.isfinite() | ~base.isfinite()).all():
                raise ValueError(
                    f"The edit would put NaN or infinite values into {span.name}: the adapter is broken, or too "
                    f"strong for {span.tensor.dtype}. Nothing was written. `locft inspect` shows what it holds."
                )
            yield edited

    def edited_tensor(self, span: Span) -> torch.Tensor:
        """Return one of the base's tensors, edited, as a whole."""
        return torch.cat(list(self.edited(span))).reshape(span.tensor.shape)

    def edited_parameter(self) -> torch.Tensor:
        """Return the whole edited parameter."""
        tensors = [values for span in self.base.spans for values in self.edited(span)]
        return torch.cat(tensors).reshape(self.base.shape)

    def base_parameter(self) -> torch.Tensor:
        """Return the whole base parameter."""
        found = self.base.read()
        return found if self.dtype is None else found.to(self.dtype)

    def _deltas(self, start: int, count: int) -> list[tuple[torch.Tensor, float]]:
        if self.terms[0].weight is None:
            return [(term.delta.read(start, count), term.scale) for term in self.terms]
        from ..tuner.delta import combine_deltas

        # as LocFTModel.scaled_deltas and add_weighted_adapter do it: what they would merge, bit for bit
        scaled = [(term.delta.read(start, count).float() * term.scale, term.weight or 0.0) for term in self.terms]
        combined = combine_deltas(scaled, "linear", None, "total")
        return [(combined.to(self.terms[0].combined_dtype), 1.0)]


def edited_parameters(
    checkpoint: Checkpoint,
    adapters: Sequence[CheckedAdapter],
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> list[EditedParameter]:
    """Find what adapters edit in a checkpoint, and check that it is the base that they were trained on.

    Args:
        checkpoint: the base.
        adapters: LocFT adapters, in the order in which they are added.
        weights: a factor for each adapter, if they are combined into one first.
        scale: factor of all deltas, in place of each adapter's own.
        dtype: dtype in which the base is loaded; `None` is that of the checkpoint.
        force: also return base parameters with other values than the adapters were trained on.

    Raises:
        ValueError: if the base does not have a parameter, or has it in another shape, quantized or tied, or, unless
            `force`, with other values than an adapter was trained on.
    """
    finder = ParameterFinder(checkpoint)
    found: dict[tuple[str, ...], EditedParameter] = {}
    combined_dtype = getattr(torch, adapters[0].config.delta_dtype)
    with one_thread():
        for index, adapter in enumerate(adapters):
            strength = adapter.config.scale if scale is None else scale
            weight = None if weights is None else weights[index]
            for name, delta in adapter.delta_tensors.items():
                term = Term(adapter, name, delta, strength, weight, combined_dtype)
                parameter = _find(finder, term, dtype, force)
                spans = tuple(span.name for span in parameter.base.spans)
                found.setdefault(spans, EditedParameter(parameter.base, [], dtype)).terms.append(term)
    return list(found.values())


def _find(finder: ParameterFinder, term: Term, dtype: torch.dtype | None, force: bool) -> EditedParameter:
    """Return a parameter with one term; verified, unless `force` or the adapter records nothing of it."""
    if term.recorded_sha256 is not None:
        by_name = finder.find_by_name(term.name, term.delta.shape)
        if by_name is not None:
            parameter = EditedParameter(by_name, [term], dtype)
            # with the values and the shape that were trained on, it is the parameter as the model has it
            if parameter.base_sha256() == term.recorded_sha256:
                return parameter
    parameter = EditedParameter(finder.find(term.name, term.delta.shape), [term], dtype)
    if not force and term.recorded_sha256 is not None and parameter.base_sha256() != term.recorded_sha256:
        raise _other_base(finder.checkpoint, parameter)
    return parameter


def _other_base(checkpoint: Checkpoint, parameter: EditedParameter) -> ValueError:
    term = parameter.terms[0]
    rounded = [dtype for dtype in NARROW_DTYPES if parameter.base_sha256(dtype) == term.recorded_sha256]
    but = ""
    if rounded:
        but = (
            f", but it is once it is rounded to {str(rounded[0]).removeprefix('torch.')}: the base was loaded in that "
            "dtype. The edited model would differ from the evaluated one by that rounding"
        )
    return ValueError(
        f"{term.name} of {checkpoint.name} is not the weight that {term.adapter.folder} was trained on{but}. Use "
        f"{term.adapter.config.base_model_name_or_path or 'its own base model'}, at the revision and dtype that it "
        "was trained on and without other edits, or force it (force=True, --force) and expect other answers."
    )


def one_or_more(adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str | os.PathLike[str]]:
    """Return adapters as a list: one path, or a sequence of paths.

    Raises:
        ValueError: if there is none.
    """
    found = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    if not found:
        raise ValueError("No adapter to merge: give one or more adapter folders.")
    return found
