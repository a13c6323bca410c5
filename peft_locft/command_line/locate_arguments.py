"""The flags of `locft locate`, and that of `locft train` which takes what it has found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ..location_search import SearchPlan
from ..measuring.evaluation_config import EvaluationConfig
from ..recipe import BreadthFirstConfig
from ..tuner.module_kinds import KINDS


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
