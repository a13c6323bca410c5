"""Finds a model's parameters in its checkpoint, where they may have other names or be split into several tensors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .checkpoint import Checkpoint
from .safetensors_file import DTYPES, FLOAT_DTYPES, StoredTensor

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

# number of values in memory at a time; composing takes about 40 bytes per value
VALUES_AT_ONCE = 1 << 18
MERGE_IN_MEMORY = (
    "Merge this adapter in memory instead: "
    "AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().save_pretrained(out)."
)


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor of the checkpoint that holds a whole parameter of the model, or a contiguous part of it.

    Attributes:
        name: its name in the checkpoint.
        tensor: where it is stored.
        start: flat index of its first value in the parameter, in row-major order.
    """

    name: str
    tensor: StoredTensor
    start: int

    def slices(self) -> Iterator[tuple[int, int]]:
        """Yield slices of the tensor that fit in memory: flat index of the first value, and number of values."""
        for start in range(0, self.tensor.num_values, VALUES_AT_ONCE):
            yield start, min(VALUES_AT_ONCE, self.tensor.num_values - start)


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of the model, and where its checkpoint stores it.

    Attributes:
        shape: its shape.
        spans: the tensors that hold its values, in order.
    """

    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    def values(self) -> Iterator[torch.Tensor]:
        """Yield all values, flat, in slices that fit in memory."""
        for span in self.spans:
            for start, count in span.slices():
                yield span.tensor.read(start, count)

    def read(self) -> torch.Tensor:
        """Return the whole parameter, in the dtype of the checkpoint."""
        return torch.cat([span.tensor.read() for span in self.spans]).reshape(self.shape)


class Source(NamedTuple):
    """A tensor of the checkpoint, and the converter that fuses it with others into a parameter, if any."""

    name: str
    converter: WeightConverter | None
    pattern: str | None


# the tensors of a checkpoint, by parameter name in the model
Table = dict[str, list[Source]]


class ParameterFinder:
    """Finds a model's parameters in a checkpoint, by transformers' own rules for renamed and fused tensors.

    Args:
        checkpoint: the checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def find_by_name(self, name: str, shape: tuple[int, ...]) -> StoredParameter | None:
        """Return the tensor of exactly that name and shape, or `None`; also `None` if it may be tied.

        A fast path that does not import transformers, so it misses that transformers may rearrange the tensor on
        loading. The caller must verify the values, for instance by their hash. `find` covers all cases.
        """
        if name not in self.checkpoint.files or not self._is_surely_untied(name):
            return None
        tensor = self.checkpoint.tensor(name)
        if tensor.dtype not in FLOAT_DTYPES or tensor.shape != shape:
            return None
        return StoredParameter(shape, (Span(name, tensor, 0),))

    def find(self, name: str, shape: tuple[int, ...]) -> StoredParameter:
        """Return where a parameter is stored.

        Args:
            name: its name in the model, such as `"model.layers.3.mlp.down_proj.weight"`.
            shape: its shape.

        Raises:
            ValueError: if the checkpoint lacks it, or stores it quantized, in another shape, or in an unknown
                arrangement; or if it is tied to another parameter.
        """
        self._refuse_tied(name, len(shape))
        found = self._sources_of(name)
        if found is None:
            raise ValueError(self._missing(name))
        return self._stored(name, found[1], shape)

    def find_beside(self, name: str) -> dict[str, StoredParameter]:
        """Return all other tensors of a parameter's module, including submodules, by name in the model.

        Raises:
            ValueError: as in `find`, or if the checkpoint lacks a tensor that the module has.
        """
        found = self._sources_of(name)
        if found is None:
            raise ValueError(self._missing(name))
        own, _, table = found
        module, stored_module = name.rpartition(".")[0], own.rpartition(".")[0]
        beside = {
            f"{module}{key.removeprefix(stored_module)}": sources
            for key, sources in table.items()
            if key.startswith(f"{stored_module}.") and key != own
        }
        expected = self._shapes_inside(module)
        if name in self.checkpoint.files and expected is not None:
            # the module's other tensors may be stored under their own names, too
            own_names = (expected.keys() & self.checkpoint.files.keys()) - beside.keys() - {name}
            beside |= {key: [Source(key, None, None)] for key in own_names}
        if expected is not None:
            missing = sorted(expected.keys() - beside.keys() - {name})
            if missing:
                raise ValueError(
                    f"{self.checkpoint.name} lacks {missing[0]}, a tensor of the edited module {module}, so the "
                    f"module cannot be saved as a whole. Export the edited weights instead. {MERGE_IN_MEMORY}"
                )
            beside = {key: sources for key, sources in beside.items() if key in expected}
        shapes = expected or {}
        return {key: self._stored(key, self._applied(sources, shapes.get(key))) for key, sources in beside.items()}

    # ------------------------------------------------------------------ names

    @cached_property
    def _config(self) -> Any:
        """The model's configuration; `None` if there is none, or transformers does not know it."""
        if not self.checkpoint.config:
            return None
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.checkpoint.folder, trust_remote_code=False)
        except (ValueError, KeyError, OSError, StrictDataclassError):
            return None

    @cached_property
    def _tables(self) -> list[Table]:
        """For each way to load the checkpoint: its tensors, by parameter name in the model."""
        tables = []
        for transforms in _ways_to_load(self._config):
            table: Table = {}
            for name in self.checkpoint.files:
                renamed, source = _rename(name, transforms)
                table.setdefault(renamed, []).append(source)
            tables.append(table)
        return tables

    def _sources_of(self, name: str) -> tuple[str, list[Source], Table] | None:
        """Return a parameter's name in a table, the tensors that form it, and the table."""
        if name in self.checkpoint.files:
            # stored under its own name: unchanged, unless one way to load it rearranges it
            found = [
                (key, own, table)
                for table in self._tables
                for key, sources in table.items()
                if (own := [source for source in sources if source.name == name])
            ]
            return next((each for each in found if each[1][0].converter is not None), found[0])
        for table in self._tables:
            for candidate in _with_and_without_prefix(name, table):
                return candidate, table[candidate], table
        return None

    def _shapes_inside(self, module: str) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of a module's tensors in the model; `None` if transformers does not know the model."""
        if self._skeleton is None:
            return None
        inside = [name for name, _ in self._skeleton.named_modules() if name]
        for candidate in _with_and_without_prefix(module, dict.fromkeys(inside)):
            tensors = self._skeleton.get_submodule(candidate).state_dict()
            return {f"{module}.{key}": tuple(tensor.shape) for key, tensor in tensors.items()}
        return None

    @cached_property
    def _skeleton(self) -> Any:
        """The model on the meta device, without values; `None` if it cannot be built."""
        model_class = None if self._config is None else next(_model_classes(self._config), None)
        if model_class is None:
            return None
        try:
            with torch.device("meta"):
                return model_class._from_config(self._config)
        except Exception:  # a model's constructor can raise anything; its modules are then unknown
            return None

    # ------------------------------------------------------------------ tensors

    def _applied(self, sources: list[Source], shape: tuple[int, ...] | None) -> list[Source]:
        """Return the sources of a parameter of this shape, without a converter that would leave them as they are."""
        converter: Any = sources[0].converter
        operations = [] if converter is None else converter.operations
        # transformers transposes only a tensor of another shape than the parameter's
        only_transposes = all(type(each).__name__ == "Transpose" and each.check_dims for each in operations)
        idle = only_transposes and len(sources) == 1 and self.checkpoint.tensor(sources[0].name).shape == shape
        return [Source(sources[0].name, None, None)] if idle else sources

    def _stored(self, name: str, sources: Sequence[Source], shape: tuple[int, ...] | None = None) -> StoredParameter:
        """Return a parameter that `sources` form. Without a `shape`, any shape and dtype is allowed."""
        if sources[0].converter is not None:
            return self._stacked(name, sources, shape)
        if len(sources) > 1:
            raise ValueError(
                f"{name} is ambiguous in {self.checkpoint.name}: it may be "
                f"{' or '.join(source.name for source in sources)}. {MERGE_IN_MEMORY}"
            )
        source = sources[0].name
        tensor = self.checkpoint.tensor(source) if shape is None else self._float_tensor(source)
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{source} of {self.checkpoint.name} has the unknown dtype {tensor.dtype}: expected one of "
                f"{', '.join(DTYPES)}."
            )
        if shape is not None and tensor.shape != shape:
            raise ValueError(
                f"{source} of {self.checkpoint.name} has the shape {list(tensor.shape)}, but the delta of {name} "
                f"has {list(shape)}: the adapter belongs to another model."
            )
        return StoredParameter(tensor.shape, (Span(source, tensor, 0),))

    def _float_tensor(self, source: str) -> StoredTensor:
        tensor = self.checkpoint.tensor(source)
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(
                f"{source} of {self.checkpoint.name} is quantized ({tensor.dtype}): a delta cannot be added to it "
                f"without loss. Expected one of {', '.join(FLOAT_DTYPES)}: use the base model without quantization, "
                "and quantize the result."
            )
        return tensor

    def _stacked(self, name: str, sources: Sequence[Source], shape: tuple[int, ...] | None) -> StoredParameter:
        """Return a parameter that stacks several modules, each with one or more tensors as its rows."""
        converter: Any = sources[0].converter
        kinds = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
        if kinds not in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
            raise ValueError(
                f"{name} is built from {sources[0].name} of {self.checkpoint.name} by "
                f"{', '.join(kind for kind, _ in kinds)}, which a merge on disk cannot reverse. {MERGE_IN_MEMORY}"
            )
        from transformers.core_model_loading import dot_natural_key

        ordered = sorted(sources, key=lambda source: dot_natural_key(source.name))
        by_pattern = [
            [(source.name, self._float_tensor(source.name)) for source in ordered if source.pattern == pattern]
            for pattern in converter.source_patterns
        ]
        spans, start = [], 0
        for module_tensors in zip(*by_pattern, strict=False):
            for source_name, tensor in module_tensors:
                spans.append(Span(source_name, tensor, start))
                start += tensor.num_values
        stacked = _stacked_shape([[tensor.shape for _, tensor in tensors] for tensors in by_pattern])
        if stacked is None or stacked != (shape or stacked):
            expected = "one shape" if shape is None else f"the shape {list(shape)}"
            raise ValueError(
                f"{len(sources)} tensors of {self.checkpoint.name}, {sources[0].name} and others, do not stack to "
                f"{expected} of {name}: the adapter belongs to another model."
            )
        return StoredParameter(stacked, tuple(spans))

    def _missing(self, name: str) -> str:
        module = name.rpartition(".")[0]
        beside = [key for key in self.checkpoint.files if key.startswith((f"{module}.", f"{name}:"))]
        quantized = [key for key in beside if not key.endswith((".weight", ".bias"))]
        lacks = f"{self.checkpoint.name} has no tensor {name}"
        if quantized:
            return (
                f"{lacks}, but {', '.join(sorted(quantized)[:3])}: it is quantized, and a delta cannot be added to it "
                "without loss. Use the base model without quantization, and quantize the result."
            )
        near = difflib.get_close_matches(name, self.checkpoint.files, n=2)
        return (
            f"{lacks}{', but ' + ' and '.join(near) if near else ''}: the adapter belongs to another model, or the "
            f"checkpoint uses unknown names. {MERGE_IN_MEMORY}"
        )

    # ------------------------------------------------------------------ tied parameters

    def _refuse_tied(self, name: str, num_dimensions: int) -> None:
        if not self._is_surely_untied(name) and self._is_tied(name, num_dimensions):
            raise ValueError(
                f"{name} is tied in {self.checkpoint.name}: one tensor is both the embedding and the head, so a "
                "delta would change both. If the adapter was trained on an untied model, use that model as the base: "
                "save it with model.save_pretrained(folder) after AutoModelForCausalLM.from_pretrained(base, "
                "tie_word_embeddings=False) and model.lm_head.weight.data = "
                "model.get_input_embeddings().weight.data.clone()."
            )

    def _is_surely_untied(self, name: str) -> bool:
        """Whether `config.json` alone proves that a parameter is not tied."""
        config = self.checkpoint.config
        # inside of numbered modules, transformers ties only the heads of object detectors
        detects = any(
            str(architecture).endswith("ForObjectDetection") for architecture in config.get("architectures") or []
        )
        return (_is_in_a_layer(name) and not detects) or (
            "text_config" not in config and config.get("tie_word_embeddings") is False
        )

    def _is_tied(self, name: str, num_dimensions: int) -> bool:
        config = self._config
        model_class = next(_model_classes(config), None) if config is not None else None
        if config is None or model_class is None:
            # custom code: only embeddings may be tied, and they are outside of the layers
            return (
                bool(self.checkpoint.config.get("tie_word_embeddings", True))
                and num_dimensions == 2
                and not _is_in_a_layer(name)
            )
        if not getattr(config.get_text_config(), "tie_word_embeddings", False):
            return False
        pairs = getattr(model_class, "_tied_weights_keys", None) or {}
        patterns = [*pairs, *pairs.values()] if isinstance(pairs, dict) else list(pairs)
        return any(re.fullmatch(pattern, name) for pattern in patterns)


def clean_name(name: str) -> str:
    """Return a module's or parameter's name in the base model, without the parts that PEFT and FSDP add."""
    for added in (".base_layer", "_fsdp_wrapped_module.", "._fsdp_wrapped_module", "_orig_mod."):
        name = name.replace(added, "")
    return name.removeprefix("base_model.model.")


def _is_in_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _stacked_shape(by_pattern: Sequence[Sequence[tuple[int, ...]]]) -> tuple[int, ...] | None:
    """Return the shape of the stacked modules, each with one matrix per pattern; `None` if they do not fit."""
    num_modules = len(by_pattern[0])
    first = [shapes[0] for shapes in by_pattern if shapes]
    same = all(len(shapes) == num_modules and set(shapes) == {shapes[0]} for shapes in by_pattern if shapes)
    if len(first) < len(by_pattern) or not same or {len(shape) for shape in first} != {2}:
        return None
    columns = {shape[1] for shape in first}
    return (num_modules, sum(shape[0] for shape in first), columns.pop()) if len(columns) == 1 else None


def _model_classes(config: Any) -> Iterator[Any]:
    import transformers

    for name in config.architectures or []:
        if hasattr(transformers, name):
            yield getattr(transformers, name)


def _ways_to_load(config: Any) -> Iterator[list[Any]]:
    """Yield one list of transforms for each model class that the checkpoint may be loaded as."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    legacy = get_checkpoint_conversion_mapping("legacy") or []
    if config is None:
        yield legacy
        return
    text = config.get_text_config()
    whole = _first_mapping([*(config.architectures or []), config.model_type])
    inner = get_checkpoint_conversion_mapping(str(MODEL_MAPPING_NAMES.get(config.model_type))) or []
    for transform in inner:
        # transformers does the same for the inner model of a model with a head
        transform.scope_prefix = ""
        transform.base_model_prefix = getattr(next(_model_classes(config), None), "base_model_prefix", "model")
    inside = _first_mapping([text.model_type]) if text is not config else []
    yield [*whole, *inner, *inside, *legacy]
    if text is not config:  # the language model alone
        yield [*_first_mapping([MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type), text.model_type]), *legacy]


def _first_mapping(names: Sequence[str | None]) -> list[Any]:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found = (get_checkpoint_conversion_mapping(name) for name in names if name)
    return next((mapping for mapping in found if mapping is not None), [])


def _rename(name: str, transforms: Sequence[Any]) -> tuple[str, Source]:
    """Return a tensor's name in a model that is loaded with these transforms, and the tensor as a source."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamed, pattern = rename_source_key(name, renamings, converters)
    converter = next((found for found in converters if pattern in found.source_patterns), None)
    return renamed, Source(name, converter, pattern)


def _with_and_without_prefix(name: str, names: dict[str, Any]) -> list[str]:
    """Return the entries of `names` that match `name` with or without the base model's prefix."""
    longer = [key for key in names if key.endswith(f".{name}") and key.count(".") == name.count(".") + 1]
    return [key for key in (name, name.partition(".")[2], *longer) if key in names]
