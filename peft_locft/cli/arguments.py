"""The flags of the commands that train or evaluate: fields of the configurations, and a few of their own.

First the flags of each command, then what its parser makes of them, then the parts that the parsers share.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..evaluation.config import EvaluationConfig
from ..locating.module_kinds import KINDS
from ..locating.plan import GRADIENT_TOKENS
from ..training.config import BreadthFirstConfig
from ..tuner import LocFTConfig
from ..tuner.config import ALL_LINEAR, ENTIRE_LAYER
from .fields_parser import FieldsParser, value_of
from .judge_arguments import JudgeArguments, with_judge

if TYPE_CHECKING:
    from ..locating.preset import LocationPreset

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
EDITS = "Edits: a JSON, JSONL, CSV, TSV or Parquet file, or a dataset on the Hub."
BASE = "Base model: a folder or a name on the Hub."
FIRST = "Use only the first N edits."
TEXT = "Text for perplexity and KL: a text file, or a dataset on the Hub."

# ---------------------------------------------------------------------- the flags of each command


@dataclass(kw_only=True)
class LoadArguments:
    """How the model is loaded."""

    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model on the Hub."})
    dtype: Dtype = field(default="auto", metadata={"help": "Precision of the model; auto: as its checkpoint says."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


@dataclass(kw_only=True)
class ConditionArguments:
    """When a command fails although it did its work."""

    fail_if: list[str] = field(
        default_factory=list,
        metadata={"help": "Exit with 3 if a metric is out of bounds, such as 'reliability<0.98'."},
    )


@dataclass(kw_only=True)
class TrainArguments(ConditionArguments, LoadArguments):
    """The base model, the edits, and what happens beside the training."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": f"{BASE} An adapter that you update names its own."}
    )
    edits: str | None = field(default=None, metadata={"help": EDITS})
    on_conflict: Literal["warn", "error", "last"] = field(
        default="warn", metadata={"help": "What to do if one prompt has two targets; last: use the last target."}
    )
    num_edits: int | None = field(default=None, metadata={"help": FIRST})
    peft_config: str | None = field(
        default=None,
        metadata={"help": "Train another PEFT method: its adapter_config.json, or the folder that holds it."},
    )
    ship_edits: bool = field(default=False, metadata={"help": "Save the edits in the adapter folder, for updates."})
    evaluate_every: int = field(
        default=0, metadata={"help": "Evaluate a sample of the edits every N epochs. Default: never."}
    )
    evaluate_num_edits: int = field(default=100, metadata={"help": "Number of edits in that sample."})
    best_metric: str | None = field(
        default=None, metadata={"help": "Metric that selects the best epoch; enables early stopping."}
    )
    patience: int = field(default=2, metadata={"help": "Stop after this many evaluations without improvement."})
    keep_reliability: float | None = field(
        default=None,
        metadata={"help": "After training, weaken the delta as far as its reliability stays at or above this."},
    )
    resume_from_adapter: str | None = field(
        default=None,
        metadata={"help": "Adapter folder to update: add --edits, withdraw --forget, and train on from its delta."},
    )
    forget: str | None = field(
        default=None,
        metadata={"help": "Text file of edits to withdraw: a prompt or an id of `locft inspect --edits` per line."},
    )
    trained_edits: str | None = field(
        default=None, metadata={"help": "Edits that the adapter learned, if its folder does not hold them."}
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
    delta_dtype: str | None = None
    scale: float = 1.0
    init_weights: bool = True


# one text for a field, in Python's help and in the command line's
for _field in dataclasses.fields(LocationArguments):
    _field.metadata = LocFTConfig.__dataclass_fields__[_field.name].metadata


@dataclass
class PresetArguments:
    """A location that `locft locate` found."""

    location: str | None = field(
        default=None,
        metadata={"help": "Train at the location, learning rate and tokens in a best.json of `locft locate`."},
    )


@dataclass(kw_only=True)
class EvaluateArguments(JudgeArguments, ConditionArguments, LoadArguments):
    """What is evaluated."""

    edits: str = field(metadata={"help": EDITS})
    adapter: str | None = field(default=None, metadata={"help": "PEFT adapter: a folder or a name on the Hub."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Edited model, or base of the adapter. Default: the base that it names."}
    )
    base_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model before it was edited, if there is no adapter."}
    )
    text: str | None = field(default=None, metadata={"help": TEXT})
    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness; needs the extra `eval`."}
    )
    limit: float | None = field(
        default=None, metadata={"help": "Use only the first X documents of each task; below 1: this share of them."}
    )
    num_fewshot: int | None = field(default=None, metadata={"help": "Number of examples in a task's prompt."})
    num_edits: int | None = field(default=None, metadata={"help": FIRST})
    in_scope: bool = field(
        default=False, metadata={"help": "Let the adapter act only in texts that name a subject of `locft scope`."}
    )
    output_dir: str | None = None
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Save the report even to a folder that holds an adapter or a model."}
    )


@dataclass(kw_only=True)
class LocateArguments(LoadArguments):
    """Where locations are searched."""

    model_name_or_path: str = field(metadata={"help": BASE})
    edits: str = field(metadata={"help": EDITS})
    num_edits: int | None = field(default=100, metadata={"help": "Number of edits in the sample, drawn by --seed."})
    modules: list[str] = field(
        default_factory=lambda: list(KINDS), metadata={"help": f"Some of {', '.join(KINDS)}, or names of modules."}
    )
    layers: list[int] | None = field(default=None, metadata={"help": "Decoder layers, from 0. Default: all."})
    widths: list[int] = field(
        default_factory=lambda: [1], metadata={"help": "Numbers of neighbouring layers to train together."}
    )
    try_gradient_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Values of --gradient_tokens to try at each location: some of {', '.join(GRADIENT_TOKENS)}. "
            "Default: only that of the recipe."
        },
    )
    stride: int = field(default=1, metadata={"help": "Try every Nth layer first, then layers nearer to the best."})
    keep: int = field(
        default=5, metadata={"help": "After each round, continue with one in N locations, and with at least two."}
    )
    num_rungs: int | None = field(
        default=None, metadata={"help": "Number of rounds; 1: try every location on all edits."}
    )
    learning_rates: list[str] = field(
        default_factory=list, metadata={"help": "Learning rates by module, such as entire-layer=5e-4 mlp=2e-3."}
    )
    score: list[str] = field(
        default_factory=list, metadata={"help": "Metrics that rank the locations, such as perplexity=2 NAME ..."}
    )
    text: str | None = field(default=None, metadata={"help": TEXT})
    max_text_tokens: int = field(default=2048, metadata={"help": "Use only the first N tokens of that text."})
    text_window: int = field(default=256, metadata={"help": "Number of tokens in a window of that text."})


@dataclass(kw_only=True)
class BaselineArguments(LoadArguments):
    """What the baselines are compared on."""

    model_name_or_path: str = field(metadata={"help": BASE})
    edits: str = field(metadata={"help": EDITS})
    num_edits: int | None = field(default=None, metadata={"help": FIRST})
    methods: list[str] | None = field(
        default=None,
        metadata={
            "help": "Methods to compare: FT-L, FT-M, LocFT, LoRA (each in four ways), LocFT-published, "
            "LocFT-balanced, MEMIT, AlphaEdit, UltraEdit, retrieval, retrieval-gated. Default: all that fit."
        },
    )
    num_seeds: int = field(default=1, metadata={"help": "Seeds for each baseline; the table has mean and deviation."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "Metrics to show, by their names in a report. Default: the main ones."}
    )
    protocols: list[str] | None = field(
        default=None, metadata={"help": "What to measure, as in `locft evaluate`; default: as there."}
    )
    tuning_edits: str | None = field(
        default=None,
        metadata={"help": "Edits to choose the settings of closed forms on. Default: those that follow."},
    )
    num_tuning_edits: int = field(default=30, metadata={"help": "Use only the first N of these."})
    text: str | None = field(default=None, metadata={"help": TEXT.replace(" and KL", "")})
    max_text_tokens: int = field(default=16384, metadata={"help": "Use only the first N tokens of that text."})
    contexts: list[str] | None = field(default=None, metadata={"help": "As in `locft evaluate`; default: none."})
    probes: list[str] | None = field(
        default=None, metadata={"help": "Also measure belief or locality_rings, as in `locft evaluate`."}
    )


# by title, the flags that `--help` shows; `--help-all` shows the others

_RECIPE = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "chat_template")

TRAIN_SECTIONS = {
    "model and edits": ("model_name_or_path", "edits", "num_edits"),
    "where to edit": ("target_modules", "layers_to_transform", "location"),
    "recipe": ("recipe", *_RECIPE),
    "output": ("output_dir", "overwrite_output_dir", "ship_edits", "fail_if"),
    "evaluate while training": ("evaluate_every",),
    "update an adapter": ("resume_from_adapter", "forget"),
}
EVALUATE_SECTIONS = {
    "model and edits": ("edits", "num_edits", "adapter", "model_name_or_path", "base_model_name_or_path"),
    "what to measure": ("protocols", "contexts", "probes", "text", "tasks", "chat_template"),
    "a judge": ("judge", "judge_model"),
    "output": ("output_dir",),
}
LOCATE_SECTIONS = {
    "model and edits": ("model_name_or_path", "edits", "num_edits"),
    "which locations": ("modules", "layers", "widths", "try_gradient_tokens", "stride"),
    "how to rank them": ("score", "text"),
    "recipe of a trial": (*_RECIPE, "learning_rates"),
    "output": ("output_dir",),
}
BASELINE_SECTIONS = {
    "model and edits": ("model_name_or_path", "edits", "num_edits"),
    "what to compare": ("methods", "text", "probes", "num_seeds", "columns", "tuning_edits"),
    "where to edit": ("target_modules", "layers_to_transform"),
    "recipe": _RECIPE,
    "output": ("output_dir",),
}

# ---------------------------------------------------------------------- from words to arguments


def parse_train(argv: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `train_edits` from the words after `locft train`.

    With `--resume_from_adapter` they are the arguments of `update_adapter`, `adapter` among them. `--config FILE.yaml`
    gives flags by name; flags on the command line replace those of the file.

    Raises:
        ValueError: if the YAML file cannot be read or has a key that is no flag or has no value, if fields of the
            configuration contradict each other, or if flags of LocFTConfig come with `--peft_config`, `--location` or
            `--resume_from_adapter`.
        SystemExit: from argparse, if a flag is unknown, missing or malformed.
    """
    parser = FieldsParser(
        "train",
        "--model_name_or_path MODEL --edits FILE --output_dir FOLDER [flags]\n"
        "--resume_from_adapter ADAPTER [--edits FILE] [--forget FILE] --output_dir FOLDER [flags]",
        "Train edits into a model and save the adapter; or add, replace and withdraw edits of a saved adapter.",
        TRAIN_SECTIONS,
        {
            "output_dir": "Folder for the adapter, and for checkpoints.",
            "resume_from_checkpoint": "Continue from this checkpoint; True: from the last one in --output_dir.",
        },
        (TrainArguments, LocationArguments, PresetArguments, BreadthFirstConfig),
    )
    words = parser.with_config_file(argv)
    # an adapter names its base, and its edits may be withdrawn without new ones
    parser.require("model_name_or_path", "edits", required=value_of("resume_from_adapter", words) is None)
    preset = value_of("location", words)
    if preset is not None:
        words = [*recipe_words(load_preset(preset)), *words]  # before what is given
    run, location, _, args = parser.parse_fields(words)
    arguments = vars(run)
    adapter = arguments.pop("resume_from_adapter")
    if adapter is not None:
        if preset is not None:
            raise ValueError("--resume_from_adapter trains at the adapter's own location: leave out --location.")
        return update_arguments(arguments, location) | {"adapter": adapter, "args": args}
    for name in ("forget", "trained_edits"):
        if arguments.pop(name) is not None:
            raise ValueError(f"--{name} is for updating an adapter: also give --resume_from_adapter.")
    return arguments | {"peft_config": what_to_train(arguments["peft_config"], location, preset), "args": args}


def parse_evaluate(argv: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `evaluate_model` from the words after `locft evaluate`; raises as `parse_train`."""
    parser = FieldsParser(
        "evaluate",
        "--edits FILE [--adapter ADAPTER] [--model_name_or_path MODEL] [--output_dir FOLDER] [flags]",
        "Measure what the edits changed in a model, beside its base.",
        EVALUATE_SECTIONS,
        {"output_dir": "Folder for the report: JSON, CSV and HTML."},
        (EvaluateArguments, EvaluationConfig),
    )
    run, args = parser.parse_fields(parser.with_config_file(argv))
    for name in ("limit", "num_fewshot"):
        if getattr(run, name) is not None and not run.tasks:
            parser.error(f"--{name} has no effect without --tasks")
    return with_judge(vars(run)) | {"args": args}


def parse_locate(argv: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `run_location_search` from the words after `locft locate`.

    Raises:
        ValueError: as `parse_train`, and if a flag that takes names with numbers has something else.
        SystemExit: as `parse_train`.
    """
    parser = FieldsParser(
        "locate",
        "--model_name_or_path MODEL --edits FILE --output_dir FOLDER [flags]",
        "Search for the best location to edit, and write it to best.json for `locft train --location`.",
        LOCATE_SECTIONS,
        {"output_dir": "Folder for the results; run again with the same folder to continue a search."},
        (LocateArguments, BreadthFirstConfig),
    )
    run, args = parser.parse_fields(parser.with_config_file(argv))
    from ..workflows.locate import SearchPlan

    arguments = vars(run)
    # --gradient_tokens is a field of the recipe
    arguments["gradient_tokens"] = arguments.pop("try_gradient_tokens")
    planned = {each.name: arguments.pop(each.name) for each in dataclasses.fields(SearchPlan)}
    planned["learning_rates"] = named_numbers("learning_rates", planned["learning_rates"])
    of_text = {name: arguments.pop(name) for name in ("max_text_tokens", "text_window")}
    evaluation = EvaluationConfig(protocols=["generation", "token_accuracy"], **of_text)
    score = named_numbers("score", arguments.pop("score"), default=1.0) or None
    return arguments | {"args": args, "plan": SearchPlan(**planned), "score": score, "evaluation": evaluation}


def parse_baselines(argv: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of `run_baselines` from the words after `locft baselines`; raises as `parse_train`."""
    parser = FieldsParser(
        "baselines",
        "--model_name_or_path MODEL --edits FILE --output_dir FOLDER [flags]",
        "Compare ways to edit on the same edits: fine-tuning in either order, closed forms, retrieval.",
        BASELINE_SECTIONS,
        {"output_dir": "Folder for the results; run again with the same folder to continue a comparison."},
        (BaselineArguments, LocationArguments, BreadthFirstConfig),
    )
    run, location, args = parser.parse_fields(parser.with_config_file(argv))
    given = locft_config(location) if changed_fields(location) else None
    arguments = vars(run)
    asked = {name: arguments.pop(name) for name in ("protocols", "contexts", "probes", "max_text_tokens")}
    evaluation = EvaluationConfig(**{name: value for name, value in asked.items() if value is not None})
    return arguments | {"location": given, "args": args, "evaluation": evaluation}


# ---------------------------------------------------------------------- what the commands share


def named_numbers(flag: str, words: Sequence[str], default: float | None = None) -> dict[str, float]:
    """Return the numbers by name from words like `name=number`; a name alone gets `default`.

    Raises:
        ValueError: if a word is something else, or a name alone and there is no default.
    """
    numbers = {}
    for word in words:
        name, equals, number = word.partition("=")
        try:
            value = float(number) if equals else default
        except ValueError:
            value = None
        if value is None or not name:
            raise ValueError(f"--{flag}: found {word!r}; expected NAME=NUMBER.")
        numbers[name] = value
    return numbers


def update_arguments(arguments: dict[str, Any], location: LocationArguments) -> dict[str, Any]:
    """Return the arguments of `update_adapter` out of those of `locft train`.

    Raises:
        ValueError: if a flag is given that an update does not take.
    """
    not_taken = {"peft_config", "evaluate_every", "evaluate_num_edits", "best_metric", "patience", "keep_reliability"}
    defaults = vars(TrainArguments())
    given = [name for name in arguments if name in not_taken and arguments[name] != defaults[name]]
    given += changed_fields(location)
    if given:
        raise ValueError(
            f"--resume_from_adapter trains the adapter's own delta and takes no --{given[0]}: leave it out."
        )
    taken = {name: value for name, value in arguments.items() if name not in not_taken}
    # without the flag, the adapter ships its edits if it did before
    return taken | {"ship_edits": arguments["ship_edits"] or None}


def what_to_train(path: str | None, location: LocationArguments, preset: str | None) -> PeftConfig | LocationPreset:
    """Return what `--peft_config`, `--location` or the flags of LocFTConfig say.

    Raises:
        ValueError: if more than one of them is given, or a file cannot be read.
    """
    flags = {"location": preset, "peft_config": path, **changed_fields(location)}
    given = [name for name, value in flags.items() if value is not None]
    if len(given) > 1 and given[0] in ("location", "peft_config"):
        others = ", ".join(f"--{name}" for name in given[1:])
        raise ValueError(f"found --{given[0]} beside {others}, and each says what to train: give one of them.")
    if preset is not None:
        return load_preset(preset)
    return locft_config(location) if path is None else read_peft_config(Path(path))


def load_preset(path: str) -> LocationPreset:
    """Return the location that `locft locate` found."""
    from ..locating.preset import LocationPreset

    return LocationPreset.load(path)


def recipe_words(preset: LocationPreset) -> list[str]:
    """Return the part of the recipe that a location was found with, as words of a command line."""
    tokens = [] if preset.gradient_tokens is None else [f"--gradient_tokens={preset.gradient_tokens}"]
    return [f"--learning_rate={preset.learning_rate}", *tokens]


def changed_fields(location: LocationArguments) -> dict[str, Any]:
    """Return the fields that differ from their defaults."""
    defaults = vars(LocationArguments())
    return {name: value for name, value in vars(location).items() if value != defaults[name]}


def locft_config(location: LocationArguments) -> LocFTConfig:
    """Return the configuration of the tuner that the flags describe."""
    fields = changed_fields(location)
    target = fields.get("target_modules")
    # names are words and dots; anything else that stands alone is a regular expression
    if target and len(target) == 1 and (target[0] in (ALL_LINEAR, ENTIRE_LAYER) or re.search(r"[^\w.]", target[0])):
        fields["target_modules"] = target[0]
    return LocFTConfig(**fields)


def read_peft_config(path: Path) -> PeftConfig:
    """Return the configuration of any PEFT method in a file, or in an adapter folder.

    Raises:
        ValueError: if it cannot be read, or is something else.
    """
    file = path / CONFIG_NAME if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        # a saved adapter names its base and revision; what is trained here has another
        content |= {"base_model_name_or_path": None, "revision": None, "inference_mode": False}
        return PeftConfig.from_peft_type(**content)
    except OSError as error:
        raise ValueError(f"--peft_config {path}: cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--peft_config {path}: not the configuration of a PEFT method: {error!r}") from None
