"""Plans a merge into a GGUF file: which tensor a delta belongs to, how it is laid out there, and the evidence."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.edited_parameters import NARROW_DTYPES, Term, deltas_of
from ..io.arithmetic import compose_weight, tensor_sha256
from ..io.checkpoint import Checkpoint
from ..io.gguf_file import GGUFFile, GGUFTensor, decode_values, encode_values, gguf_package
from ..io.parameter_names import ParameterFinder

# largest relative distance, |file - base| / |base|, of a tensor that still counts as the one that was trained on.
# Types of 4 bits and more stay below 0.12; tensors that have nothing to do with each other have about 1.4
TOLERANCE = 0.25
# the same for a tensor that is not quantized: rounding to BF16 gives 0.002
FLOAT_TOLERANCE = 0.01
# above it, rounding to the file's type changes the weight by a quarter of what the edit changes
COSTLY = 0.25
DEFAULT_TYPE = "F16"
SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFModel:
    """A model in one GGUF file, or in several that `gguf-split` made.

    Args:
        path: the file; of several, any.

    Attributes:
        files: its files, in order.

    Raises:
        ValueError: if a file is missing or broken, or is no model.
        OSError: if a file cannot be opened.
    """

    files: list[GGUFFile]

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: expected a model in GGUF.")
        paths = split_names(path)
        missing = [each.name for each in paths if not each.is_file()]
        if missing:
            raise ValueError(
                f"{path.parent} lacks {missing[0]}: the model has {len(paths)} files. Download all of them."
            )
        self.files = [GGUFFile(each) for each in paths]
        kind = self.first.value("general.type", "model")
        if kind != "model":
            raise ValueError(
                f"{path} is of the type {kind!r}: expected a model. The model comes first, then its adapters."
            )

    @property
    def first(self) -> GGUFFile:
        """The file with the model's metadata."""
        return self.files[0]

    def file_of(self, name: str) -> GGUFFile | None:
        """Return the file that holds a tensor; `None` if none does."""
        return next((file for file in self.files if name in file.tensors), None)

    def stored_name(self, parameter: str) -> str:
        """Return the file's name of a parameter of the model.

        Args:
            parameter: its name in transformers, such as `"model.layers.3.mlp.down_proj.weight"`.

        Raises:
            ValueError: if the package `gguf` knows no such name, or the file has no such tensor.
        """
        gguf = gguf_package()
        known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        architecture = self.first.architecture
        if architecture not in known:
            raise ValueError(
                f"{self.first.path} is of the architecture {architecture!r}, unknown to the package gguf."
            )
        names = gguf.get_tensor_name_map(known[architecture], int(self.value("block_count", 0)))
        tried = []
        for candidate in _other_names(parameter):
            found = names.get_name(candidate, try_suffixes=(".weight", ".bias"))
            # the packed experts are a parameter of their own in transformers, without a suffix
            for stored in (found, f"{found}.weight") if found else ():
                if self.file_of(stored) is not None:
                    return str(stored)
                tried.append(stored)
        tied = " The file has no head of its own: it is tied to the embeddings." if "output.weight" in tried else ""
        looked = f"it has no {' or '.join(dict.fromkeys(tried))}" if tried else "it has no such parameter"
        raise ValueError(
            f"{parameter} is not in {self.first.path} ({architecture}): {looked}.{tied} The adapter belongs to "
            "another model, or GGUF stores this parameter together with others."
        )

    def value(self, key: str, default: Any = None) -> Any:
        """Return a value of the metadata that belongs to the architecture."""
        return self.first.value(f"{self.first.architecture}.{key}", default)

    def heads(self, layer: int, of_keys: bool) -> int:
        """Return the number of heads of a layer's attention."""
        count = self.value("attention.head_count_kv" if of_keys else "attention.head_count", 0)
        count = self.value("attention.head_count", 0) if of_keys and not count else count
        return int(count[layer] if isinstance(count, list) else count)


def split_names(path: Path) -> list[Path]:
    """Return the files of the model that a file belongs to."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    return [path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _other_names(parameter: str) -> Iterator[str]:
    """Yield the names by which a parameter may be known: as part of a larger model, or without a head."""
    text = parameter.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
    yield from dict.fromkeys((parameter, text, f"model.{parameter}", f"transformer.{parameter}"))


# ---------------------------------------------------------------------- layouts


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file arranges a parameter's values.

    Attributes:
        name: what it is called in messages.
        to_model: from the file's tensor to the model's.
        to_file: from the model's to the file's.
    """

    name: str
    to_model: Callable[[torch.Tensor], torch.Tensor]
    to_file: Callable[[torch.Tensor], torch.Tensor]


PLAIN = Layout("as in the model", lambda values: values, lambda values: values)
TRANSPOSED = Layout("transposed", lambda values: values.t(), lambda values: values.t())
# a few converters store 1 + w of a norm; a delta is added to both in the same way
SHIFTED = Layout("plus one", lambda values: values - 1, lambda values: values + 1)


def rotary_layout(num_heads: int) -> Layout:
    """Return the layout of Llama's queries and keys: the two halves of each head are interleaved for RoPE."""

    def regrouped(values: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
        return values.reshape(num_heads, *rows, *values.shape[1:]).transpose(1, 2).reshape(values.shape)

    return Layout(
        "interleaved for RoPE",
        lambda values: regrouped(values, (len(values) // num_heads // 2, 2)),
        lambda values: regrouped(values, (2, len(values) // num_heads // 2)),
    )


def possible_layouts(
    model: GGUFModel, parameter: str, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> list[Layout]:
    """Return the layouts by which a tensor of the file may be the parameter, the most likely one first.

    Args:
        model: the model.
        parameter: the parameter's name.
        shape: the tensor's shape in the file.
        wanted: the parameter's shape in the model.
    """
    match = re.search(r"\.(\d+)\..*\b([qk])_proj\.(weight|bias)$", parameter)
    layouts = [PLAIN] if shape == wanted else []
    if match and shape == wanted:
        num_heads = model.heads(int(match[1]), of_keys=match[2] == "k")
        if num_heads and shape[0] % (2 * num_heads) == 0:
            layouts.append(rotary_layout(num_heads))
    if len(shape) == 1 and shape == wanted:
        layouts.append(SHIFTED)
    # of a square one, only the name tells: GPT-2 has Conv1D, whose weight is that of a Linear transposed
    if len(shape) == 2 and shape[::-1] == wanted and (shape != wanted or re.search(r"\.c_\w+\.weight$", parameter)):
        layouts.append(TRANSPOSED)
    return layouts


# ---------------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True)
class GGUFEdit:
    """The change of one tensor of a GGUF file.

    Attributes:
        tensor: the tensor.
        terms: the deltas that are added to it.
        layout: how the file arranges it.
        evidence: how it was recognized as the one that was trained on, in words.
    """

    tensor: GGUFTensor
    terms: list[Term]
    layout: Layout
    evidence: str

    def edited(self, tensor_type: str | None) -> tuple[str, bytes, float]:
        """Return the edited tensor: its type, its bytes, and what rounding to this type costs.

        The cost is `|stored - exact| / |delta|`, over the tensor.

        Args:
            tensor_type: the new type; `None`: the old one, or F16 if that is quantized. A vector keeps its type.

        Raises:
            ValueError: if the edited values are not finite, or do not fit the type.
        """
        base = self.layout.to_model(self.tensor.values())
        shape, count = self.terms[0].delta.shape, base.numel()
        deltas = [(delta.reshape(shape), scale) for delta, scale in deltas_of(self.terms, 0, count)]
        is_vector = len(self.tensor.shape) == 1 and not self.tensor.is_quantized
        keeps = tensor_type is None or is_vector  # llama.cpp computes with vectors in their own type
        type_name = (DEFAULT_TYPE if self.tensor.is_quantized else self.tensor.type) if keeps else str(tensor_type)
        # for a type of torch, one rounding, as in the model
        edited = compose_weight(base if type_name == self.tensor.type else base.float(), deltas)
        if not (edited.isfinite() | ~base.isfinite()).all():
            raise ValueError(
                f"{self.tensor.name}: the edit produces NaN or infinite values. Nothing was written. Check the "
                "adapter with `locft inspect`."
            )
        stored = self.layout.to_file(edited)
        content = encode_values(stored, type_name, self.tensor.name)
        exact = self.layout.to_file(compose_weight(base.float(), deltas))
        change = (exact - self.layout.to_file(base).float()).norm()
        written = decode_values(content, type_name, tuple(stored.shape), self.tensor.name).float()
        cost = float((written - exact).norm() / change) if change else 0.0
        return type_name, content, cost


def plan_gguf_edits(
    model: GGUFModel,
    terms: Sequence[Term],
    base: Checkpoint | None,
    tolerance: float,
    force: bool,
) -> dict[str, GGUFEdit]:
    """Return the changes of a merge by the file's names of the tensors, after comparing the file with the base.

    Args:
        model: the model.
        terms: the deltas.
        base: the model that the adapters were trained on, to compare with; `None` if it is not at hand.
        tolerance: the largest relative distance from the base.
        force: accept a tensor that is further away, or that cannot be compared.

    Raises:
        ValueError: if a tensor is missing or of another shape; without `force`, if it cannot be compared, or is not
            near the base.
    """
    edits: dict[str, GGUFEdit] = {}
    for term in terms:
        name = model.stored_name(term.name)
        file = model.file_of(name)
        assert file is not None
        tensor = file.tensors[name]
        if name == "token_embd.weight" and model.file_of("output.weight") is None:
            raise ValueError(
                f"{term.name} is tied in {file.path}: one tensor is both the embedding and the head, so a delta would "
                "change both."
            )
        layouts = possible_layouts(model, term.name, tensor.shape, term.delta.shape)
        if not layouts:
            raise ValueError(
                f"{name} of {file.path} has the shape {list(tensor.shape)}, but the delta of {term.name} has "
                f"{list(term.delta.shape)}: the adapter belongs to another model."
            )
        layout, evidence = recognized(tensor, term, layouts, base, tolerance, force)
        if name in edits and edits[name].layout.name != layout.name:
            raise ValueError(f"{name} of {file.path}: the adapters were trained on different arrangements of it.")
        edits.setdefault(name, GGUFEdit(tensor, [], layout, evidence)).terms.append(term)
    return edits


def recognized(
    tensor: GGUFTensor,
    term: Term,
    layouts: Sequence[Layout],
    base: Checkpoint | None,
    tolerance: float,
    force: bool,
) -> tuple[Layout, str]:
    """Return the layout of a tensor, and how it was recognized as the one that was trained on.

    Raises:
        ValueError: if it is not, or this cannot be known, and `force` is not given.
    """
    values = tensor.values()
    for layout in layouts:
        arranged = layout.to_model(values)
        if term.recorded_sha256 is not None:
            if tensor_sha256(arranged) == term.recorded_sha256:
                return layout, "the weights of the training"
            for dtype in NARROW_DTYPES:
                if tensor_sha256(arranged.to(dtype)) == term.recorded_sha256:
                    return layout, f"the weights of the training, which rounded them to {_short(dtype)}"
    trained_on = term.adapter.config.base_model_name_or_path or "its base"
    if base is None:
        if force and len({layout.name for layout in layouts} - {SHIFTED.name}) == 1:
            return layouts[0], "not compared"
        raise ValueError(
            f"{tensor.name} of {tensor.file} ({tensor.type}) has other values than {term.adapter.folder} was trained "
            f"on, as a quantized file does, and there is nothing to compare it with. Give the base model, "
            f"{trained_on}, as base_model (--base_model)"
            + (", or use force=True (--force) if you are sure." if len(layouts) == 1 else ".")
        )
    original = ParameterFinder(base).find(term.name, term.delta.shape).read().float()
    distances = [float((layout.to_model(values).float() - original).norm() / original.norm()) for layout in layouts]
    distance, layout = min(zip(distances, layouts, strict=True), key=lambda each: each[0])
    allowed = tolerance if tensor.is_quantized else min(tolerance, FLOAT_TOLERANCE)
    if not distance <= allowed and not force:
        raise ValueError(
            f"{tensor.name} of {tensor.file} ({tensor.type}) is not near {term.name} of {base.name}: its relative "
            f"distance is {distance:.2f}, and at most {allowed} is a rounding. It is another model, or the file "
            "arranges this weight in a way that is unknown here. Take a file made from the base model, or raise "
            "tolerance (--tolerance)."
        )
    how = "near the base" if distance <= allowed else "not near the base, but forced"
    return layout, f"{how}, at a relative distance of {distance:.2g}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def warn_about_costs(costs: Mapping[str, tuple[str, float]]) -> None:
    """Warn where the type of a tensor rounds much of an edit away.

    Args:
        costs: by tensor name: the type, and the cost as in `GGUFEdit.edited`.
    """
    for name, (type_name, cost) in costs.items():
        if cost > COSTLY:
            warnings.warn(
                f"{name}: rounding to {type_name} changes the weight by {cost:.2f} of what the edit changes, so the "
                "model may not answer as edited. F16, BF16 and F32 hold an edit, and so does Q8_0 mostly.",
                stacklevel=3,
            )
