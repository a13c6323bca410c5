"""Where a model's parameter lies in its checkpoint, whose tensors may have other names, or hold parts of it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .checkpoint import FLOAT_DTYPES, Checkpoint, StoredTensor

CLASSIC_WAY = (
    "Merge this one with a model in memory instead: "
    "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)."
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint that is a parameter of the model, or an unbroken part of one.

    Attributes:
        name: as the checkpoint has it.
        tensor: where it lies.
        start: its first value's place among those of the parameter, in row-major order.
    """

    name: str
    tensor: StoredTensor
    start: int


class Source(NamedTuple):
    """A tensor of the checkpoint, and what fuses it with others into a parameter, where something does."""

    name: str
    converter: WeightConverter | None
    pattern: str | None


# the tensors of a checkpoint by the names that the model has for them
Table = dict[str, list[Source]]


class ParameterFinder:
    """Finds a model's parameters in a checkpoint, with transformers' own tables of renamed and fused tensors.

    Args:
        checkpoint: the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._config = _transformers_config(checkpoint)
        self._tables: list[Table] = []

    def find(self, name: str, shape: tuple[int, ...]) -> list[Piece]:
        """Return the tensors that together are a parameter, in the order of its values.

        Args:
            name: as the model has it, such as `"model.layers.3.mlp.down_proj.weight"`.
            shape: the parameter's.

        Raises:
            ValueError: if the checkpoint does not hold it, holds it quantized, in another shape or in an arrangement
                that is not known here, or if it is tied to another parameter.
        """
        self._refuse_tied(name, len(shape))
        if name in self.checkpoint.files:
            rearranged = [source for source in self._sources_called(name) if source.converter is not None]
            return self._stacked(name, shape, rearranged[:1]) if rearranged else [self._whole(name, name, shape)]
        for table in self._renamed():
            for candidate in _with_and_without_prefix(name, table):
                sources = table[candidate]
                if sources[0].converter is not None:
                    return self._stacked(name, shape, sources)
                if len(sources) > 1:
                    raise ValueError(
                        f"{name} may be {' or '.join(source.name for source in sources)} of {self.checkpoint.folder}. "
                        f"{CLASSIC_WAY}"
                    )
                return [self._whole(name, sources[0].name, shape)]
        raise ValueError(self._missing(name))

    def _sources_called(self, name: str) -> list[Source]:
        return [_rename(name, transforms)[1] for transforms in _ways_to_load(self._config)]

    def _whole(self, name: str, source: str, shape: tuple[int, ...]) -> Piece:
        tensor = self._float_tensor(source)
        if tensor.shape != shape:
            raise ValueError(
                f"{source} of {self.checkpoint.folder} has the shape {list(tensor.shape)}, but the delta of {name} "
                f"has {list(shape)}: the adapter belongs to another model."
            )
        return Piece(source, tensor, 0)

    def _float_tensor(self, source: str) -> StoredTensor:
        tensor = self.checkpoint.tensor(source)
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{source} of {self.checkpoint.folder} is quantized ({tensor.dtype}): a delta cannot be added to it "
                "without loss. Merge into the base model without quantization, and quantize the result."
            )
        return tensor

    def _stacked(self, name: str, shape: tuple[int, ...], sources: Sequence[Source]) -> list[Piece]:
        """Return the pieces of a parameter that stacks a list of modules, of each one or several tensors as rows."""
        converter: Any = sources[0].converter
        kinds = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
        if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            raise ValueError(
                f"{name} is made of {sources[0].name} of {self.checkpoint.folder} by "
                f"{', '.join(kind.__name__ for kind, _ in kinds)}, which a merge on disk cannot turn around. "
                f"{CLASSIC_WAY}"
            )
        ordered = sorted(sources, key=lambda source: dot_natural_key(source.name))
        by_pattern = [
            [(source.name, self._float_tensor(source.name)) for source in ordered if source.pattern == pattern]
            for pattern in converter.source_patterns
        ]
        pieces, start = [], 0
        for of_one_module in zip(*by_pattern, strict=False):
            for source_name, tensor in of_one_module:
                pieces.append(Piece(source_name, tensor, start))
                start += tensor.num_values
        if not _stack_to(shape, [[tensor.shape for _, tensor in found] for found in by_pattern]):
            raise ValueError(
                f"{len(sources)} tensors of {self.checkpoint.folder}, {sources[0].name} and others, do not stack to "
                f"the shape {list(shape)} of {name}: the adapter belongs to another model."
            )
        return pieces

    def _renamed(self) -> list[Table]:
        """Return, for each way to load the checkpoint, its tensors by the names that the model gives them."""
        if not self._tables:
            for transforms in _ways_to_load(self._config):
                table: Table = {}
                for name in self.checkpoint.files:
                    renamed, source = _rename(name, transforms)
                    table.setdefault(renamed, []).append(source)
                self._tables.append(table)
        return self._tables

    def _missing(self, name: str) -> str:
        module = name.rpartition(".")[0]
        beside = [key for key in self.checkpoint.files if key.startswith((f"{module}.", f"{name}:"))]
        quantized = [key for key in beside if not key.endswith((".weight", ".bias"))]
        where = f"{self.checkpoint.folder} holds no {name}"
        if quantized:
            return (
                f"{where}, but {', '.join(sorted(quantized)[:3])}: it is quantized, and a delta cannot be added to it "
                "without loss. Merge into the base model without quantization, and quantize the result."
            )
        near = difflib.get_close_matches(name, self.checkpoint.files, n=2)
        return (
            f"{where}{', but ' + ' and '.join(near) if near else ''}: the adapter belongs to another model, or to one "
            f"whose checkpoint has other names. {CLASSIC_WAY}"
        )

    def _refuse_tied(self, name: str, num_dimensions: int) -> None:
        if self._is_tied(name, num_dimensions):
            raise ValueError(
                f"{name} is tied in {self.checkpoint.folder}: one tensor is both the embedding and the head, and a "
                "delta would change both. If the adapter was trained on an untied model, merge into that one: save it "
                "with model.save_pretrained(folder) after AutoModelForCausalLM.from_pretrained(base, "
                "tie_word_embeddings=False) and model.lm_head.weight.data = "
                "model.get_input_embeddings().weight.data.clone()."
            )

    def _is_tied(self, name: str, num_dimensions: int) -> bool:
        config = self._config
        model_class = next(_classes(config), None) if config is not None else None
        if config is None or model_class is None:
            # code from elsewhere: what may be tied are embeddings, which are in no layer
            in_a_layer = any(part.isdigit() for part in name.split("."))
            return (
                bool(self.checkpoint.config.get("tie_word_embeddings", True))
                and num_dimensions == 2
                and not in_a_layer
            )
        if not getattr(config.get_text_config(), "tie_word_embeddings", False):
            return False
        pairs = getattr(model_class, "_tied_weights_keys", None) or {}
        patterns = [*pairs, *pairs.values()] if isinstance(pairs, dict) else list(pairs)
        return any(re.fullmatch(pattern, name) for pattern in patterns)


def _stack_to(shape: tuple[int, ...], by_pattern: Sequence[Sequence[tuple[int, ...]]]) -> bool:
    """Whether modules, of which each has one tensor in every one of the lists, stack to a shape, row below row."""
    if len(shape) != 3 or any(len(shapes) != shape[0] for shapes in by_pattern):
        return False
    same = all(shapes == [shapes[0]] * shape[0] and shapes[0][1:] == shape[2:] for shapes in by_pattern)
    return same and sum(shapes[0][0] for shapes in by_pattern) == shape[1]


def _transformers_config(checkpoint: Checkpoint) -> Any:
    """Return the model's configuration; `None` if there is none, or none that transformers knows."""
    if not checkpoint.config:
        return None
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError):
        return None


def _classes(config: Any) -> Iterator[Any]:
    for name in config.architectures or []:
        if hasattr(transformers, name):
            yield getattr(transformers, name)


def _ways_to_load(config: Any) -> Iterator[list[Any]]:
    """Yield lists of transforms, each for a model that the checkpoint may be loaded as."""
    legacy = get_checkpoint_conversion_mapping("legacy") or []
    if config is None:
        yield legacy
        return
    text = config.get_text_config()
    whole = _first_mapping([*(config.architectures or []), config.model_type])
    inner = get_checkpoint_conversion_mapping(str(MODEL_MAPPING_NAMES.get(config.model_type))) or []
    for transform in inner:
        # as transformers does for the model inside of the one with the head
        transform.scope_prefix = ""
        transform.base_model_prefix = getattr(next(_classes(config), None), "base_model_prefix", "model")
    inside = _first_mapping([text.model_type]) if text is not config else []
    yield [*whole, *inner, *inside, *legacy]
    if text is not config:  # the language model alone
        yield [*_first_mapping([MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type), text.model_type]), *legacy]


def _first_mapping(names: Sequence[str | None]) -> list[Any]:
    found = (get_checkpoint_conversion_mapping(name) for name in names if name)
    return next((mapping for mapping in found if mapping is not None), [])


def _rename(name: str, transforms: Sequence[Any]) -> tuple[str, Source]:
    """Return the name that a model loaded with these transforms has for a tensor of the checkpoint."""
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamed, pattern = rename_source_key(name, renamings, converters)
    converter = next((found for found in converters if pattern in found.source_patterns), None)
    return renamed, Source(name, converter, pattern)


def _with_and_without_prefix(name: str, table: Table) -> list[str]:
    """Return the names in `table` that mean `name`: with or without the base model's prefix."""
    longer = [key for key in table if key.endswith(f".{name}") and key.count(".") == name.count(".") + 1]
    return [key for key in (name, name.partition(".")[2], *longer) if key in table]
