"""What an adapter says of itself, in its configuration, its provenance and its tensors' names; and whether it may."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unicodedata import category

from ..io.parameter_names import clean_name
from ..io.safetensors_file import StoredTensor, refusal
from ..io.untrusted_json import one_line, shortened

PROVENANCE_NAME = "locft_provenance.json"
PROVENANCE_FORMAT = 1
MAX_TEXT_LENGTH = 1000
DELTA_DTYPES = ("F32", "BF16", "F16")
MODEL = "base_model.model."
DELTA_MARK = ".locft_delta."
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"

Check = Callable[[Any], bool]


def is_text(value: Any) -> bool:
    # control characters have no place in a name, and would reach the terminal of whoever inspects the adapter; spaces
    # other than the common one are not printable to Python
    return (
        isinstance(value, str)
        and all(letter.isprintable() or category(letter) == "Zs" for letter in value)
        and len(value) <= MAX_TEXT_LENGTH
    )


def _is_prose(value: Any) -> bool:
    # goes into the card, and to no terminal
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_list(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(check(item) for item in value)


def _is_dict(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(is_text(key) and check(item) for key, item in value.items())


def _any_of(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def _has(**fields: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(value.get(name)) for name, check in fields.items())


def _is_short_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


TEXTS = _or_none(_any_of(is_text, _is_list(is_text)))
COUNTS = _is_list(is_count)
_are_edits = _has(count=is_count, sha256=is_sha256)
_are_trained_prompts = _has(count=is_count, sha256=_is_list(_is_short_hash))
_is_augmentation = _has(prefixes=_is_list(is_text), counts=_is_dict(is_count), trained_prompts=_are_trained_prompts)
_is_shrunk = _has(delta_dtype=_or_none(is_text), density=_or_none(is_number), share_kept=is_number)
# PEFT's TaskType
TASK_TYPES = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# of LocFTConfig and of what PEFT has in every configuration: the check, and what to write
CONFIG_FIELDS: dict[str, tuple[Check, str]] = {
    "auto_mapping": (_or_none(_is_dict(is_text)), "names of a class and its library, or null"),
    "base_model_name_or_path": (_or_none(is_text), "a name or null"),
    "base_sha256": (_or_none(_is_dict(is_sha256)), "64 hexadecimal digits a tensor, or null"),
    "delta_dtype": (lambda value: value in ("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
    "exclude_modules": (TEXTS, "a name, names or null"),
    "inference_mode": (_is_flag, "true or false"),
    "init_weights": (_is_flag, "true or false"),
    "layers_pattern": (TEXTS, "a name, names or null"),
    "layers_to_transform": (_or_none(_any_of(is_count, COUNTS)), "layer numbers or null"),
    "modules_to_save": (_or_none(_is_list(is_text)), "names or null"),
    "peft_type": (is_text, "a name"),
    "peft_version": (_or_none(is_text), "a version or null"),
    "revision": (_or_none(is_text), "a name or null"),
    "scale": (is_number, "a finite number"),
    "target_modules": (TEXTS, "a name, names or null"),
    "target_parameters": (_or_none(_is_list(is_text)), "names or null"),
    "task_type": (lambda value: value in TASK_TYPES, f"null or one of {', '.join(TASK_TYPES[1:])}"),
    "train_bias": (_is_flag, "true or false"),
    "trainable_token_indices": (_or_none(_any_of(COUNTS, _is_dict(COUNTS))), "token numbers or null"),
}
# what a field is where the file does not name it, as in LocFTConfig
CONFIG_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(CONFIG_FIELDS),
    "delta_dtype": "float32",
    "inference_mode": False,
    "init_weights": True,
    "scale": 1.0,
    "train_bias": False,
}


def _is_export(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("to") not in ("peft", "lora"):
        return False
    return value["to"] == "peft" or (is_count(value.get("rank")) and is_number(value.get("share_kept")))


FIGURES = ("before", "after", "change")


RECIPE_NUMBERS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")


def _is_recipe(value: Any) -> bool:
    return (
        _is_dict(lambda item: True)(value)
        and all(is_number(value.get(name)) for name in RECIPE_NUMBERS)
        and all(is_text(value.get(name)) for name in ("edit_order", "objective"))
    )


def _is_evaluation(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_dict(_is_result)(value.get("results")):
        return False
    settings = value.get("settings")
    return (
        isinstance(settings, dict)
        and is_number(settings.get("confidence"))
        and ("edits" not in settings or _are_edits(settings["edits"]))
        and _is_dict(_is_prose)(value.get("missing"))
        and _is_list(_is_prose)(value.get("notes"))
    )


def _is_result(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"meaning", "count", "unit", *FIGURES}
        and _is_prose(value["meaning"])
        and is_text(value["unit"])
        and is_count(value["count"])
        and all(value[name] is None or _is_figure(value[name]) for name in FIGURES)
        and value["after"] is not None
    )


def _is_figure(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"value", "low", "high"}:
        return False
    # JSON has no infinity, which a perplexity can be
    return all(is_number(figure) or figure in ("inf", "-inf", "nan") for figure in value.values())


PROVENANCE_FIELDS: dict[str, tuple[Check, str]] = {
    "format": (lambda value: type(value) is int and value == PROVENANCE_FORMAT, str(PROVENANCE_FORMAT)),
    "augmentation": (_is_augmentation, "prefixes, counts and the hashes of trained_prompts"),
    "base_model": (_is_dict(_or_none(is_text)), "names"),
    "base_sha256": (_is_dict(is_sha256), "64 hexadecimal digits a tensor"),
    "edits": (_are_edits, "their count and sha256"),
    "continued": (_is_dict(is_count), "counts of edits"),
    "recipe": (_is_recipe, f"settings, {', '.join(RECIPE_NUMBERS)} and others"),
    "export": (_is_export, "to peft, or to lora with a rank and the share_kept"),
    "files": (_is_dict(is_sha256), "64 hexadecimal digits a file"),
    "evaluation": (_is_evaluation, "results, settings, notes and what is missing"),
    "shrunk": (_is_shrunk, "delta_dtype, density and share_kept"),
    "training": (
        lambda value: isinstance(value, dict) and _is_list(is_number)(value.get("epoch_losses")),
        "epoch_losses, a list of finite numbers",
    ),
    "versions": (_is_dict(is_text), "versions"),
}


def check_config(settings: dict[str, Any], where: Path, method: str | None) -> Any:
    """Return an adapter's configuration, made of the content of its `adapter_config.json`.

    Raises:
        ValueError: if it is of another method than `method`, of none that PEFT knows, or has a field of another type.
    """
    found = settings.get("peft_type")
    if method is not None and found != method:
        raise ValueError(
            f"{where} is the configuration of {shortened(found)}; expected {method!r}. Give a LocFT adapter, or merge "
            "this one with PEFT's own merge_and_unload."
        )
    if found == "LOCFT":
        _check_fields(settings, CONFIG_FIELDS, where)
        return SimpleNamespace(**CONFIG_DEFAULTS | settings)
    from peft import PeftConfig

    try:
        return PeftConfig.from_peft_type(**{"peft_type": None} | settings)
    except Exception as error:  # other methods' classes raise whatever a value of the wrong type makes them
        raise ValueError(
            f"{where} is not the configuration of a PEFT method ({type(error).__name__}: {one_line(error)}). "
            "Download or save it again, or upgrade peft."
        ) from None


def check_facts(facts: dict[str, Any], where: Path) -> None:
    """Check the content of a `locft_provenance.json`, so that it can be shown.

    Raises:
        ValueError: if a field is missing or of another type.
    """
    if "format" not in facts:
        raise ValueError(f"{where}: found no format; expected {PROVENANCE_FORMAT}. Download it again, or remove it.")
    _check_fields(facts, PROVENANCE_FIELDS, where)
    of_a_run = {"edits", "recipe", "training"}
    if facts.keys() & of_a_run not in (set(), of_a_run):
        raise ValueError(
            f"{where}: found {', '.join(sorted(facts.keys() & of_a_run))} alone; expected all of "
            f"{', '.join(sorted(of_a_run))}, or none. Download it again, or remove it."
        )


def delta_names(tensors: Mapping[str, StoredTensor], config: Any, where: Path) -> dict[str, str]:
    """Return the name in the weights file of every delta, by the name of the base parameter that it belongs to.

    Raises:
        ValueError: if there is none, or a tensor is no delta and nothing else that the configuration names, belongs
            to no module that it names, has another dtype than a delta may have, or has no values.
    """
    targets = _Targets(config)
    found: dict[str, str] = {}
    for name, entry in tensors.items():
        module, mark, parameter = name.removeprefix(MODEL).rpartition(DELTA_MARK)
        if not name.startswith(MODEL) or not mark or "." in parameter:
            if not targets.hold_whole(name):
                raise _stranger(where, name, "is no delta, and in no module that modules_to_save names")
            continue
        base_name = f"{clean_name(module)}.{parameter}"
        if not targets.hold_delta(clean_name(module), parameter):
            raise _stranger(where, name, "is in no module that target_modules or target_parameters names")
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
    """What a configuration says that its adapter changes."""

    def __init__(self, config: Any) -> None:
        # a regular expression from anywhere is not run: it may take forever
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
        f"{where}: {name} {why}, says the configuration beside it. Loading could put it in the place of a weight of "
        "the base model. Do not use this adapter, or save it again."
    )


def _check_fields(found: dict[str, Any], fields: dict[str, tuple[Check, str]], where: Path) -> None:
    for name, (check, expected) in fields.items():
        if name in found and not check(found[name]):
            raise ValueError(
                f"{where}: {name} is {shortened(found[name])}; expected {expected}. Download or save it again."
            )
