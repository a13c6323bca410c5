"""The flags of `locft`: fields of the configurations, and a few of their own."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers import HfArgumentParser

from ..evaluation.config import EvaluationConfig
from ..locating.module_kinds import KINDS
from ..locating.preset import LocationPreset
from ..training.config import BreadthFirstConfig
from ..tuner import LocFTConfig
from ..tuner.config import ALL_LINEAR, ENTIRE_LAYER
from ..workflows.baselines import METHODS
from ..workflows.locate import SearchPlan


@dataclass
class EvaluateArguments:
    """What is evaluated."""

    edits: str = field(metadata={"help": "Edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Edited model, or base of the adapter; unset: the one that the adapter names."},
    )
    adapter: str | None = field(default=None, metadata={"help": "A PEFT adapter: a folder or a name on the Hub."})
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before it was edited, where there is no adapter to take off."}
    )
    text: str | None = field(
        default=None, metadata={"help": "For perplexity and KL: a text file, or a dataset on the Hub."}
    )
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness; needs the extra `eval`."}
    )
    limit: float | None = field(default=None, metadata={"help": "Documents of each task, at most."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples in a task's prompt."})
    num_edits: int | None = field(default=None, metadata={"help": "Take so many edits from the beginning."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the report is written: JSON, CSV, HTML."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the model; 'auto' is what its checkpoint says."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass
class BaselineArguments:
    """What the baselines are compared on."""

    model_name_or_path: str = field(metadata={"help": "Base model: a folder or a name on the Hub."})
    edits: str = field(metadata={"help": "Edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."})
    num_edits: int | None = field(default=None, metadata={"help": "Take so many edits from the beginning."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Some of {', '.join(METHODS)}."}
    )
    text: str | None = field(default=None, metadata={"help": "For perplexity: a text file, or a dataset on the Hub."})
    max_text_tokens: int = field(default=16384, metadata={"help": "Tokens of that text, at most."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the base model; 'auto' is what its checkpoint says."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})


@dataclass
class PresetArguments:
    """A location that `locft locate` has found."""

    location: str | None = field(
        default=None,
        metadata={"help": "A best.json of `locft locate`: location, and rate unless --learning_rate is given."},
    )


@dataclass
class LocateArguments:
    """Where locations are searched."""

    model_name_or_path: str = field(metadata={"help": "Base model: a folder or a name on the Hub."})
    edits: str = field(metadata={"help": "Edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."})
    num_edits: int | None = field(default=100, metadata={"help": "Edits of the sample, drawn by --seed."})
    modules: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Some of {', '.join(KINDS)}, or names of modules."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers, from 0. Default: all."})
    stride: int = field(
        default=1, metadata={"help": "Begin with every so many-th layer, then come closer to the best."}
    )
    keep: int = field(
        default=5, metadata={"help": "One location in so many, two at least, goes on to a longer trial."}
    )
    num_rungs: int | None = field(default=None, metadata={"help": "1 tries every location in full."})
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "Of some modules, as in entire-layer=5e-4 mlp=2e-3."}
    )
    score: list[str] = field(
        default_factory=list, metadata={"help": "Metrics by which locations are ranked, as in perplexity=2 NAME ..."}
    )
    text: str | None = field(
        default=None, metadata={"help": "For perplexity and KL: a text file, or a dataset on the Hub."}
    )
    max_text_tokens: int = field(default=2048, metadata={"help": "Tokens of that text, at most."})
    text_window: int = field(default=256, metadata={"help": "Tokens in a window of that text."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the base model; 'auto' is what its checkpoint says."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})


def search_arguments(run: LocateArguments, args: BreadthFirstConfig) -> dict[str, Any]:
    """Return the arguments of `run_location_search`.

    Raises:
        ValueError: if a flag that takes names with numbers has something else.
    """
    arguments = vars(run)
    planned = {field.name: arguments.pop(field.name) for field in dataclasses.fields(SearchPlan)}
    planned["learning_rates"] = named_numbers("learning_rates", planned["learning_rates"])
    of_text = {name: arguments.pop(name) for name in ("max_text_tokens", "text_window")}
    evaluation = EvaluationConfig(protocols=["generation", "token_accuracy"], **of_text)
    score = named_numbers("score", arguments.pop("score"), default=1.0) or None
    return arguments | {"args": args, "plan": SearchPlan(**planned), "score": score, "evaluation": evaluation}


def named_numbers(flag: str, words: list[str], default: float | None = None) -> dict[str, float]:
    """Return what words like `name=number` say; a name alone is `default`, or an error without one."""
    found = {}
    for word in words:
        name, equals, number = word.partition("=")
        try:
            value = float(number) if equals else default
        except ValueError:
            value = None
        if value is None or not name:
            raise ValueError(f"--{flag}: found {word!r}; expected NAME=NUMBER.")
        found[name] = value
    return found


@dataclass
class RunArguments:
    """The base model and the edits."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Base model: a folder or a name on the Hub. A resumed adapter names its own."},
    )
    edits: str | None = field(
        default=None, metadata={"help": "Edits: a JSON, JSONL, CSV or Parquet file, or a dataset on the Hub."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Precision of the base model; 'auto' is what its checkpoint says."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})
    on_conflict: Literal["warn", "error", "last"] = field(
        default="warn", metadata={"help": "What to do about one prompt with two targets."}
    )
    num_edits: int | None = field(default=None, metadata={"help": "Take so many edits from the beginning."})
    evaluate_every: int = field(default=0, metadata={"help": "Epochs between evaluations while training; 0 for none."})
    evaluate_num_edits: int = field(default=100, metadata={"help": "Edits that are evaluated while training."})
    best_metric: str | None = field(
        default=None, metadata={"help": "Keep the evaluated epoch that is best by this metric, and stop behind it."}
    )
    patience: int = field(default=2, metadata={"help": "Evaluations without a better one before it stops."})
    keep_reliability: float | None = field(
        default=None, metadata={"help": "Take the weakest delta that keeps this reliability on the evaluated edits."}
    )
    peft_config: str | None = field(
        default=None,
        metadata={"help": "An adapter_config.json, or its folder, of another PEFT method to train instead of LocFT."},
    )
    ship_edits: bool = field(default=False, metadata={"help": "Save the edits in the adapter's folder, too."})
    resume_from_adapter: str | None = field(
        default=None,
        metadata={"help": "An adapter folder: train on from its delta, with --edits to add and --forget to withdraw."},
    )
    forget: str | None = field(
        default=None,
        metadata={"help": "A text file with a prompt, or an id of `locft inspect --edits`, on each line to withdraw."},
    )
    trained_edits: str | None = field(
        default=None, metadata={"help": "The edits that the resumed adapter was trained on, if it does not ship them."}
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
    """Return the arguments of `train_edits` from the words after `locft train`; with `--resume_from_adapter`, those of
    `update_adapter`, `adapter` among them.

    `--config FILE.yaml` gives flags by name; flags on the command line go before it.

    Raises:
        ValueError: if the YAML file cannot be read or has a key that is no flag or has no value, if fields of the
            configuration contradict each other, or if flags of LocFTConfig come with `--peft_config` or
            `--resume_from_adapter`.
        SystemExit: from argparse, if a flag is unknown, missing or malformed.
    """
    usage = "--model_name_or_path MODEL --edits FILE --output_dir FOLDER"
    types = (RunArguments, LocationArguments, PresetArguments, BreadthFirstConfig)
    run, location, preset, args = _parse(argv, "train", usage, types)
    arguments = vars(run)
    if arguments["resume_from_adapter"] is not None:
        if preset.location is not None:
            raise ValueError("--resume_from_adapter trains where the adapter has it, and takes no --location.")
        return _resumed_arguments(arguments, location) | {"args": args}
    del arguments["resume_from_adapter"]
    for name in ("forget", "trained_edits"):
        if arguments.pop(name) is not None:
            raise ValueError(f"--{name} is for an adapter that is trained on: give --resume_from_adapter, too.")
    return arguments | {"peft_config": _trained(arguments["peft_config"], location, preset.location), "args": args}


def _resumed_arguments(arguments: dict[str, Any], location: LocationArguments) -> dict[str, Any]:
    without_effect = (
        "peft_config",
        "evaluate_every",
        "evaluate_num_edits",
        "best_metric",
        "patience",
        "keep_reliability",
    )
    others = {name: arguments.pop(name) for name in without_effect} | vars(location)
    given = [name for name, value in others.items() if value != _default_of(name)]
    if given:
        raise ValueError(
            f"--resume_from_adapter trains what the adapter has, where it has it, and takes no --{given[0]}: leave it "
            "out."
        )
    # a flag that is not given leaves it as the adapter has it
    arguments["ship_edits"] = arguments["ship_edits"] or None
    return {"adapter": arguments.pop("resume_from_adapter")} | arguments


def _default_of(name: str) -> Any:
    of_run = {each.name: each.default for each in dataclasses.fields(RunArguments)}
    return of_run[name] if name in of_run else getattr(LocationArguments(), name)


def parse_evaluate(argv: list[str]) -> dict[str, Any]:
    """Return the arguments of `evaluate_model` from the words after `locft evaluate`; raises as `parse_train`."""
    usage = "--edits FILE [--model_name_or_path MODEL] [--adapter ADAPTER] [--output_dir FOLDER]"
    run, args = _parse(argv, "evaluate", usage, (EvaluateArguments, EvaluationConfig))
    return vars(run) | {"args": args}


def parse_baselines(argv: list[str]) -> dict[str, Any]:
    """Return the arguments of `run_baselines` from the words after `locft baselines`; raises as `parse_train`."""
    usage = "--model_name_or_path MODEL --edits FILE --output_dir FOLDER"
    run, location, args = _parse(argv, "baselines", usage, (BaselineArguments, LocationArguments, BreadthFirstConfig))
    return vars(run) | {"location": _peft_config(None, location), "args": args}


def parse_locate(argv: list[str]) -> dict[str, Any]:
    """Return the arguments of `run_location_search` from the words after `locft locate`; raises as `parse_train`."""
    usage = "--model_name_or_path MODEL --edits FILE --output_dir FOLDER"
    run, args = _parse(argv, "locate", usage, (LocateArguments, BreadthFirstConfig))
    return search_arguments(run, args)


def _trained(path: str | None, location: LocationArguments, preset: str | None) -> PeftConfig | LocationPreset:
    if preset is None:
        return _peft_config(path, location)
    fields = [name for name, value in vars(location).items() if value != getattr(LocationArguments(), name)]
    if fields or path is not None:
        raise ValueError(
            f"--location says what to train, and so {'do' if len(fields) > 1 else 'does'} "
            f"{', '.join(fields) or '--peft_config'}: give one or the other."
        )
    return LocationPreset.load(preset)


def _parse(argv: list[str], command: str, usage: str, types: tuple[type, ...]) -> tuple[Any, ...]:
    prog = f"locft {command}"
    usage = f"{prog} {usage} [--config FILE.yaml] [FLAG ...]"
    parser = HfArgumentParser(types, prog=prog, usage=usage, allow_abbrev=False)
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    if BreadthFirstConfig in types:
        # TrainingArguments has a folder of its own choice, and takes one name alone
        flags["output_dir"].required = True
        flags["report_to"].nargs = "+"
    # the file's words first: of two with the same name argparse takes the later one
    words = [*_config_file_words(argv, set(flags), prog, usage), *argv]
    if RunArguments in types:
        # an adapter that is resumed names its base, and edits may be withdrawn alone
        resumes = any(word.partition("=")[0] == "--resume_from_adapter" for word in words)
        flags["model_name_or_path"].required = flags["edits"].required = not resumes
    if PresetArguments in types:
        words = [*_preset_words(words), *words]
    parser.add_argument("--config", help="A YAML file with any of these flags as keys.")
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; `{prog} --help` lists the known ones")
    return tuple(parsed)


def _config_file_words(argv: list[str], flags: set[str], prog: str, usage: str) -> list[str]:
    """Return what the YAML file of `--config` says as words of a command line, so that both are checked alike."""
    early = argparse.ArgumentParser(prog=prog, usage=usage, add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(argv)[0].config
    if path is None:
        return []
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: found {type(content).__name__}, expected flags as `name: value` lines.")
    unknown = sorted(str(name) for name in content if name not in flags)
    if unknown:
        raise ValueError(f"--config {path}: unknown keys {', '.join(unknown)}. `{prog} --help` lists the known ones.")
    empty = [name for name, value in content.items() if value is None or value == []]
    if empty:
        raise ValueError(f"--config {path}: {', '.join(empty)} without a value. Give one, or remove the line.")
    return [word for name, value in content.items() for word in _words(name, value)]


def _preset_words(words: list[str]) -> list[str]:
    """Return the learning rate of the location that words name, to stand before them."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--location")
    path = early.parse_known_args(words)[0].location
    return [] if path is None else [f"--learning_rate={LocationPreset.load(path).learning_rate}"]


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    # in one word, so that a value may begin with a minus
    return [f"--{name}={json.dumps(value) if isinstance(value, dict) else value}"]


def _peft_config(path: str | None, location: LocationArguments) -> PeftConfig:
    fields = {name: value for name, value in vars(location).items() if value != getattr(LocationArguments(), name)}
    if path is not None:
        if fields:
            raise ValueError(
                f"--peft_config says what to train, and so do {', '.join(fields)}: give one or the other."
            )
        return _read_peft_config(Path(path))
    target = fields.get("target_modules")
    # names are words and dots; anything else that stands alone is a regular expression
    if target and len(target) == 1 and (target[0] in (ALL_LINEAR, ENTIRE_LAYER) or re.search(r"[^\w.]", target[0])):
        fields["target_modules"] = target[0]
    return LocFTConfig(**fields)


def _read_peft_config(path: Path) -> PeftConfig:
    file = path / CONFIG_NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # where an adapter was saved this says of which base, at which revision; what is trained here has its own
        content |= {"base_model_name_or_path": None, "revision": None, "inference_mode": False}
        return PeftConfig.from_peft_type(**content)
    except OSError as error:
        raise ValueError(f"--peft_config {path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--peft_config {path}: not the configuration of a PEFT method: {error!r}") from None
