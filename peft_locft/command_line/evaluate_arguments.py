"""The flags of `locft evaluate` and `locft baselines` that are no fields of EvaluationConfig or BreadthFirstConfig."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..training.baselines import METHODS


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
