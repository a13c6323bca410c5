"""Tasks of EleutherAI's lm-evaluation-harness on a model and its base."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from .._version import package_versions
from ..engine.model_state import check_vocabulary, evaluating
from .evaluator import check_base, find_base, model_settings
from .perplexity import finite_logits
from .task_results import Number, TaskResults, task_rows


def evaluate_on_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str],
    *,
    base_model: nn.Module | None = None,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | str = 8,
    include_path: str | os.PathLike[str] | None = None,
    allow_other_base: bool = False,
    **options: Any,
) -> TaskResults:
    """Run tasks of lm-evaluation-harness on a model and on its base.

    The model runs twice, with the adapter disabled and enabled. The harness' own argument `peft` would resize the
    vocabulary to the tokenizer's, and fails with `KeyError: 'LOCFT'` unless `peft_locft` was imported. Runs in one
    process; needs the extra `eval`.

    Args:
        model: the edited model; not changed. Its adapter is active while the harness runs it.
        tokenizer: its tokenizer; not changed.
        tasks: names of tasks, groups or tags (`lm-eval ls tasks` lists them), or patterns such as `"arc_*"`.
        base_model: the model before the edit, if `model` has no adapter to disable. Without either, the results have
            no values from before.
        limit: maximum number of documents per task; below 1, a share of them.
        num_fewshot: examples in a prompt; `None` for the task's own number.
        batch_size: prompts in a padded forward pass; `"auto"` lets the harness try what fits.
        include_path: a folder of your own task files.
        allow_other_base: evaluate an adapter on a base that it was not trained on.
        options: other arguments of `lm_eval.simple_evaluate`, such as `apply_chat_template`, `gen_kwargs`,
            `bootstrap_iters` or `confirm_run_unsafe_code`.

    Returns:
        A row for each metric: before, after and change, with standard errors.

    Raises:
        ImportError: lm-evaluation-harness is not installed.
        ValueError: there are no tasks, or one is unknown; a number is out of range; the adapter was trained on another
            base (unless `allow_other_base`); the tokenizer has tokens that the model lacks; or several processes run.
        FloatingPointError: the model's logits are NaN or infinite.

    Example:
        >>> results = evaluate_on_tasks(peft_model, tokenizer, ["piqa", "arc_easy"], limit=200)
        >>> print(results)
        >>> results.save("evaluation")
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    _check(names, limit, num_fewshot, batch_size, include_path)
    check_base(model, allow_other_base)
    manager = _task_manager(names, include_path)
    names = _known(names, manager, include_path)

    arguments = dict(tasks=names, task_manager=manager, limit=limit, num_fewshot=num_fewshot, **options)
    before = None
    base, as_base = find_base(model, base_model)
    if as_base is not None:
        with as_base():
            before = _run(base, tokenizer, batch_size, arguments)
    after = _run(model, tokenizer, batch_size, arguments)
    settings = {
        **model_settings(model),
        "tasks": names,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "batch_size": batch_size,
        "options": options,
        "versions": package_versions("lm-eval"),
    }
    return TaskResults(list(task_rows(before, after)), settings)


def _check(names: Sequence[str], limit: Number, num_fewshot: int | None, batch_size: int | str, folder: Any) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("lm-evaluation-harness is not installed: pip install 'peft-locft[eval]'")
    if not names:
        raise ValueError("tasks: found none; expected at least one name, such as 'piqa'; see `lm-eval ls tasks`.")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit={limit}: expected a number of documents, or a share of them between 0 and 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot}: expected 0 or more.")
    if (isinstance(batch_size, int) and batch_size < 1) or (
        isinstance(batch_size, str) and not batch_size.startswith("auto")
    ):
        raise ValueError(f"batch_size={batch_size!r}: expected a number of prompts, at least 1, or 'auto'.")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"include_path={os.fspath(folder)!r}: expected a folder of task files.")
    if os.environ.get("LOCAL_RANK", "0") != "0":
        raise ValueError(
            f"LOCAL_RANK={os.environ['LOCAL_RANK']}: the harness runs a loaded model in one process only. Start this "
            "without torchrun or accelerate launch, or call it in the first process only."
        )


def _task_manager(names: Sequence[str], include_path: str | os.PathLike[str] | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        own = TaskManager(include_path=Path(include_path), include_defaults=False)
        # indexing the harness' own 14,000 tasks takes ten seconds
        if set(names) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=None if include_path is None else Path(include_path))


def _known(names: Sequence[str], manager: Any, include_path: str | os.PathLike[str] | None) -> list[str]:
    """Return the names of the tasks that names and patterns match, each once."""
    known: dict[str, None] = {}
    for name in names:
        matching = manager.match_tasks([name])
        if not matching:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5)
            advice = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them."
            skipped = " The harness skips files there that are not valid YAML." if include_path else ""
            where = f", nor in {os.fspath(include_path)}" if include_path else ""
            raise ValueError(f"tasks: {name!r} is not one of lm-evaluation-harness{where}: {advice}{skipped}")
        known |= dict.fromkeys(matching)
    return list(known)


def _run(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int | str, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    with evaluating(model), _random_states_unchanged():
        results: dict[str, Any] = simple_evaluate(_harness_model(model, tokenizer, batch_size), **arguments)
    return results


def _harness_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int | str) -> Any:
    """Return the harness' model, with a check for NaN and infinite logits, which argmax would turn into answers."""
    from lm_eval.models.huggingface import HFLM

    class ChecksLogits(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return finite_logits(scores, "a task")

    class Checked(HFLM):
        def _model_call(self, inps: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            check_vocabulary(model, inps)
            return finite_logits(super()._model_call(inps, *arguments, **keywords), "a task")

        def _model_generate(self, context: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
            check_vocabulary(model, context)
            checks = LogitsProcessorList([ChecksLogits()])
            generated: torch.Tensor = super()._model_generate(context, *arguments, logits_processor=checks, **keywords)
            return generated

    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that a model given as an object keeps its device
    try:
        # it may add a padding token to the tokenizer
        return Checked(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    finally:
        logger.setLevel(level)


@contextmanager
def _random_states_unchanged() -> Iterator[None]:
    """Restore the random states, which the harness seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
