"""The flags of `locft train`: every field of LocFTConfig and of BreadthFirstConfig, and a few of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig
from transformers import HfArgumentParser

from .recipe import BreadthFirstConfig
from .tuner import LocFTConfig
from .tuner.config import ALL_LINEAR, ENTIRE_LAYER


@dataclass
class RunArguments:
    """The base model and the edits."""

    model_name_or_path: str = field(metadata={"help": "Base model: a folder or a name on the Hub."})
    edits: str = field(metadata={"help": "Edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the base model; 'auto' is what its checkpoint says."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})
    on_conflict: Literal["warn", "error", "last"] = field(
        default="warn", metadata={"help": "What to do about one prompt with two targets."}
    )
    peft_config: str | None = field(
        default=None,
        metadata={"help": "An adapter_config.json, or its folder, of another PEFT method to train instead of LocFT."},
    )


@dataclass
class LocationArguments:
    """The fields of LocFTConfig in the types that a command line can give."""

    target_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None
    train_bias: bool = False
    delta_dtype: str = "float32"
    scale: float = 1.0
    init_weights: bool = True


# one text for a field, in Python's help and in the command line's
for _field in dataclasses.fields(LocationArguments):
    _field.metadata = LocFTConfig.__dataclass_fields__[_field.name].metadata


def parse_train(argv: list[str]) -> dict[str, Any]:
    """Return the arguments of `train_edits` from the words after `locft train`.

    `--config FILE.yaml` gives flags by name; flags on the command line go before it.

    Raises:
        ValueError: if the YAML file cannot be read or has a key that is no flag, if `output_dir` is missing, or if
            flags of LocFTConfig come with `--peft_config`.
        SystemExit: from argparse, if a flag is unknown, missing or malformed.
    """
    parser = HfArgumentParser((RunArguments, LocationArguments, BreadthFirstConfig), prog="locft train")
    parser.add_argument("--config", help="A YAML file with any of these flags as keys.")
    known = {action.dest: action for action in parser._actions}
    given = _config_file(argv)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"--config: unknown keys {', '.join(unknown)}. `locft train --help` lists the known ones.")
    for name in given:
        known[name].required = False
    parser.set_defaults(**given)
    run, location, args, _ = parser.parse_args_into_dataclasses(argv)
    if "output_dir" not in given and not any(word.split("=")[0] == "--output_dir" for word in argv):
        raise ValueError("--output_dir is missing: say where the adapter is to be saved.")
    arguments = vars(run)
    return arguments | {"peft_config": _peft_config(arguments["peft_config"], location), "args": args}


def _config_file(argv: list[str]) -> dict[str, Any]:
    early = HfArgumentParser((), add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(argv)[0].config
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: found {type(content).__name__}, expected flags as `name: value` lines.")
    return content


def _peft_config(path: str | None, location: LocationArguments) -> PeftConfig:
    fields = {name: value for name, value in vars(location).items() if value != getattr(LocationArguments(), name)}
    if path is not None:
        if fields:
            raise ValueError(
                f"--peft_config says what to train, and so do {', '.join(fields)}: give one or the other."
            )
        config = PeftConfig.from_pretrained(str(Path(path).parent if Path(path).is_file() else path))
        config.inference_mode = False
        return config
    target = fields.get("target_modules")
    if isinstance(target, list) and len(target) == 1 and target[0] in (ALL_LINEAR, ENTIRE_LAYER):
        fields["target_modules"] = target[0]
    return LocFTConfig(**fields)
