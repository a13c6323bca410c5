"""Checks the configuration and the tensor names of an untrusted adapter."""

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
# fields of LocFTConfig and of all PEFT configurations: the check, and the expected value in words
CONFIG_FIELDS: Fields = {
    "auto_mapping": (or_none(dict_of(is_text)), "names of a class and its library, or null"),
    "base_model_name_or_path": (or_none(is_text), "a name or null"),
    "base_sha256": (or_none(dict_of(is_sha256)), "64 hexadecimal digits per tensor, or null"),
    "delta_dtype": (
        lambda value: value in (None, "float32", "bfloat16", "float16"),
        "float32, bfloat16, float16 or null",
    ),
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
# defaults of missing fields, as in LocFTConfig
CONFIG_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(CONFIG_FIELDS),
    "inference_mode": False,
    "init_weights": True,
    "scale": 1.0,
    "train_bias": False,
}


def check_config(settings: dict[str, Any], where: Path, method: str | None) -> Any:
    """Return an adapter's configuration from the content of its `adapter_config.json`.

    Raises:
        ValueError: if its method is not `method` or is unknown, or a field has a wrong type.
    """
    peft_type = settings.get("peft_type")
    if method is not None and peft_type != method:
        raise ValueError(
            f"{where}: peft_type is {shortened(peft_type)}; expected {method!r}. Give a LocFT adapter. For another "
            "method, use PEFT's merge_and_unload."
        )
    if peft_type == "LOCFT":
        check_fields(settings, CONFIG_FIELDS, where)
        return SimpleNamespace(**CONFIG_DEFAULTS | settings)
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**{"peft_type": None} | settings)
    except Exception as error:  # other methods' classes can raise anything for a wrong type
        raise ValueError(
            f"{where} is not a valid PEFT configuration ({type(error).__name__}: {one_line(error)}). "
            "Download or save it again, or upgrade peft."
        ) from None


def delta_names(tensors: Mapping[str, StoredTensor], config: Any, where: Path) -> dict[str, str]:
    """Return the name of every delta in the weights file, by the name of its base parameter.

    Raises:
        ValueError: if there is no delta; if a tensor is neither a delta nor part of a module in `modules_to_save`; if
            a delta belongs to no target of the configuration, has a dtype outside `DELTA_DTYPES`, or is empty.
    """
    targets = _Targets(config)
    names: dict[str, str] = {}
    for name, entry in tensors.items():
        module, mark, parameter = name.removeprefix(MODEL).rpartition(DELTA_MARK)
        if not name.startswith(MODEL) or not mark or "." in parameter:
            if not targets.allow_other_tensor(name):
                raise _unexpected_tensor(where, name, "is neither a delta nor part of a module in modules_to_save")
            continue
        base_name = f"{clean_name(module)}.{parameter}"
        if not targets.allow_delta(clean_name(module), parameter):
            raise _unexpected_tensor(where, name, "belongs to no target in target_modules or target_parameters")
        if base_name in names:
            raise refusal(where, f"{names[base_name]} and {name}", f"one delta of {base_name}")
        if entry.dtype not in DELTA_DTYPES or 0 in entry.shape or not entry.shape:
            kind = f"{entry.dtype} of shape {shortened(entry.shape)}"
            raise refusal(where, f"{name}: {kind}", f"at least one value, of dtype {', '.join(DELTA_DTYPES)}")
        names[base_name] = name
    if not names:
        raise refusal(where, "no delta", f"tensors named {MODEL}<module>{DELTA_MARK}<parameter>")
    return names


class _Targets:
    """The modules and parameters that the configuration allows an adapter to change."""

    def __init__(self, config: Any) -> None:
        # an untrusted regular expression is not run: it may take forever
        self.any_module = isinstance(config.target_modules, str)
        self.modules = frozenset(() if self.any_module else config.target_modules or ())
        self.parameters = frozenset(config.target_parameters or ())
        self.saved_modules = tuple(config.modules_to_save or ())
        self.token_rows = config.trainable_token_indices is not None

    def allow_delta(self, module: str, parameter: str) -> bool:
        if not self.parameters.isdisjoint(_endings(f"{module}.{parameter}")):
            return True
        return parameter in ("weight", "bias") and (self.any_module or not self.modules.isdisjoint(_endings(module)))

    def allow_other_tensor(self, name: str) -> bool:
        if self.token_rows and name.endswith(TOKEN_ROWS):
            return True
        module = f".{name.removeprefix(MODEL).rpartition('.')[0]}."
        return any(f".{target}." in module for target in self.saved_modules)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _unexpected_tensor(where: Path, name: str, reason: str) -> ValueError:
    return ValueError(
        f"{where}: {name} {reason} in adapter_config.json. Loading it could replace a weight of the base model. Do "
        "not use this adapter, or save it again."
    )
