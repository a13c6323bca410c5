"""The flags of the judge of `locft evaluate`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.judges import JudgeConfig


@dataclass(kw_only=True)
class JudgeArguments:
    """Who judges the answers, and how it is asked."""

    judge: str | None = field(
        default=None,
        metadata={"help": "Language model that judges the answers: a folder, or an address, to which they are sent."},
    )
    judge_model: str | None = field(default=None, metadata={"help": "Name of the judge's model at that address."})
    judge_key_variable: str = field(
        default="LOCFT_JUDGE_API_KEY", metadata={"help": "Environment variable that holds the judge's API key."}
    )
    judge_concurrency: int = field(default=8, metadata={"help": "Requests to the judge at the same time."})
    judge_tokens: int = field(default=256, metadata={"help": "Maximum number of tokens in a reply of the judge."})
    judge_request: str | None = field(
        default=None, metadata={"help": "Fields of the judge's request that replace ours, as JSON."}
    )


def with_judge(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with the flags of the judge as one `JudgeConfig`, or as `None`.

    Raises:
        ValueError: if they contradict each other, or there are some without `--judge`.
    """
    defaults = {each.name: each.default for each in dataclasses.fields(JudgeArguments)}
    given = {name: arguments.pop(name) for name in defaults}
    judge = given.pop("judge")
    if judge is None:
        beside = [name for name, value in given.items() if value != defaults[name]]
        if beside:
            raise ValueError(f"--{beside[0]} has no effect without --judge.")
        return arguments | {"judge": None}
    fields = {
        "model": given["judge_model"],
        "api_key_variable": given["judge_key_variable"],
        "concurrency": given["judge_concurrency"],
        "max_new_tokens": given["judge_tokens"],
        "request": json_fields("judge_request", given["judge_request"]),
    }
    return arguments | {"judge": JudgeConfig(judge, **fields)}


def json_fields(flag: str, text: str | None) -> dict[str, Any]:
    """Return the JSON object that a flag holds; empty without one.

    Raises:
        ValueError: if it is something else.
    """
    try:
        fields = json.loads(text or "{}")
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"--{flag}: found {text!r}; expected a JSON object, such as '{{\"max_tokens\": null}}'.")
    return fields
