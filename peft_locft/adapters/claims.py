"""Checks the configuration and the tensor names of an adapter that nobody vouches for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..io.json_checks import (
    Fields,
    any_of,
    check_fields,
    dict_of,
    is_count,
    is_flag,
    is_number,
    is_sha256,
    is_text,
    list_of,
    or_none,
)
from ..io.parameter_names import clean_name
from ..io.safetensors_file import StoredTensor, refusal
from ..io.untrusted_json import one_line, shortened

DELTA_DTYPES = ("F32", "BF16", "F16")
MODEL = "base_model.model."
DELTA_MARK = ".locft_delta."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

TEXTS = or_none(any_of(is_text, list_of(is_text)))
COUNTS = list_of(is_count)
# PEFT's TaskType
TASK_TYPES = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# of LocFTConfig and of every PEFT configuration: the check, and the expected value in words
CONFIG_FIELDS: Fields = {
    "auto_mapping": (or_none(dict_of(is_text)), "names of a class and its library, or null"),
    "base_model_name_or_path": (or_none(is_text), "a name or null"),
    "base_sha256": (or_none(dict_of(is_sha256)), "64 hexadecimal digits a tensor, or null"),
    "delta_dtype": (lambda value: value in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
    "exclude_modules": (TEXTS, "a name, names or null"),
    "inference_mode": (is_flag, "true or false"),
    "init_weights": (is_flag, "true or false"),
    "layers_pattern": (TEXTS, "a name, names or null"),
    "layers_to_transform": (or_none(any_of(is_count, COUNTS)), "layer numbers or null"),
    "modules_to_save": (or_none(list_of(is_text)), "names or null"),
    "peft_type": (is_text, "a name"),
    "peft_version": (or_none(is_text), "a version or null"),
    "revision": (or_none(is_text), "a name or null"),
    "scale": (is_number, "a finite number"),
    "target_modules": (TEXTS, "a name, names or null"),
    "target_parameters": (or_none(list_of(is_text)), "names or null"),
    "task_type": (lambda value: value in TASK_TYPES, f"null or one of {', '.join(TASK_TYPES[1:])}"),
    "train_bias": (is_flag, "true or false"),
    "trainable_token_indices": (or_none(any_of(COUNTS, dict_of(COUNTS))), "token numbers or null"),
}
# the value of a field that the file does not name, as in LocFTConfig
CONFIG_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(CONFIG_FIELDS),
    "delta_dtype": "float32",
    "inference_mode": False,
    "init_weights": True,
    "scale": 1.0,
    "train_bias": False,
}


def check_config(settings: dict[str, Any], where: Path, method: str | None) -> Any:
    """Return an adapter's configuration, made of the content of its `adapter_config.json`.

    Raises:
        ValueError: if it is of another method than `method` or of an unknown one, or a field has another type.
    """
    found = settings.get("peft_type")
    if method is not None and found != method:
        raise ValueError(
            f"{where} is the configuration of {shortened(found)}; expected {method!r}. Give a LocFT adapter. An "
            "adapter of another method merges with PEFT's own merge_and_unload."
        )
    if found == "LOCFT":
        check_fields(settings, CONFIG_FIELDS, where)
        return SimpleNamespace(**CONFIG_DEFAULTS | settings)
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**{"peft_type": None} | settings)
    except Exception as error:  # a value of the wrong type can raise anything in other methods' classes
        raise ValueError(
            f"{where} is not the configuration of a PEFT method ({type(error).__name__}: {one_line(error)}). "
            "Download or save it again, or upgrade peft."
        ) from None


def delta_names(tensors: Mapping[str, StoredTensor], config: Any, where: Path) -> dict[str, str]:
    """Return the name in the weights file of every delta, by the name of the base parameter that it belongs to.

    Raises:
        ValueError: if there is no delta; if a tensor is neither a delta nor of a module in `modules_to_save`; if a
            delta belongs to no target of the configuration, has a dtype other than `DELTA_DTYPES`, or is empty.
    """
    targets = _Targets(config)
    found: dict[str, str] = {}
    for name, entry in tensors.items():
        module, mark, parameter = name.removeprefix(MODEL).rpartition(DELTA_MARK)
        if not name.startswith(MODEL) or not mark or "." in parameter:
            if not targets.hold_whole(name):
                raise _stranger(where, name, "is not a delta, and belongs to no module in modules_to_save")
            continue
        base_name = f"{clean_name(module)}.{parameter}"
        if not targets.hold_delta(clean_name(module), parameter):
            raise _stranger(where, name, "belongs to no target in target_modules or target_parameters")
        if base_name in found:
            raise refusal(where, f"{found[base_name]} and {name}", f"one delta of {base_name}")
        if entry.dtype not in DELTA_DTYPES or 0 in entry.shape or not entry.shape:
            kind = f"{entry.dtype} of shape {shortened(entry.shape)}"
            raise refusal(where, f"{name}: {kind}", f"values of one of {', '.join(DELTA_DTYPES)}")
        found[base_name] = name
    if not found:
        raise refusal(where, "no delta", f"tensors named {MODEL}<module>{DELTA_MARK}<parameter>")
    return found


class _Targets:
    """The modules and parameters that an adapter may change, by its configuration."""

    def __init__(self, config: Any) -> None:
        # a regular expression that nobody vouches for is not run: it may take forever
        self.any_module = isinstance(config.target_modules, str)
        self.modules = frozenset(() if self.any_module else config.target_modules or ())
        self.parameters = frozenset(config.target_parameters or ())
        self.whole = tuple(config.modules_to_save or ())
        self.token_rows = config.trainable_token_indices is not None

    def hold_delta(self, module: str, parameter: str) -> bool:
        if not self.parameters.isdisjoint(_endings(f"{module}.{parameter}")):
            return True
        return parameter in ("weight", "bias") and (self.any_module or not self.modules.isdisjoint(_endings(module)))

    def hold_whole(self, name: str) -> bool:
        if self.token_rows and name.endswith(TOKEN_ROWS):
            return True
        module = f".{name.removeprefix(MODEL).rpartition('.')[0]}."
        return any(f".{target}." in module for target in self.whole)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _stranger(where: Path, name: str, why: str) -> ValueError:
    return ValueError(
        f"{where}: {name} {why} in adapter_config.json. Loading it could replace a weight of the base model. Do not "
        "use this adapter, or save it again."
    )
