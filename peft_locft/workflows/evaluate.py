"""From a model's name to an evaluation report in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from ..adapters.loading import base_of, load_adapter
from ..adapters.provenance import TrainingRun, mark_run
from ..adapters.reading import read_provenance
from ..adapters.scope import Scope
from ..adapters.scoped_model import apply_scope
from ..data.edits import Edit, EditSource, first_edits
from ..data.texts import TextSource
from ..engine.loading import load_model
from ..evaluation.config import EvaluationConfig
from ..evaluation.evaluator import EditEvaluator
from ..evaluation.harness import evaluate_on_tasks
from ..evaluation.judges import JudgeConfig, check_judge
from ..evaluation.judging import judge_report
from ..evaluation.report import EvaluationReport
from ..io.disk_space import explained_disk_full
from ..reporting.page import save_report
from .output_folder import check_output_folder

REPLIES_NAME = "judge_replies.jsonl"  # in the folder of a report


def evaluate_model(
    model_name_or_path: str | os.PathLike[str] | None,
    edits: EditSource,
    args: EvaluationConfig | None = None,
    *,
    adapter: str | os.PathLike[str] | None = None,
    base_model_name_or_path: str | os.PathLike[str] | None = None,
    text: TextSource | None = None,
    tasks: Sequence[str] = (),
    limit: float | None = None,
    num_fewshot: int | None = None,
    num_edits: int | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    overwrite_output_dir: bool = False,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    judge: JudgeConfig | None = None,
    in_scope: bool = False,
) -> EvaluationReport:
    """Load a model, with or without an adapter, and evaluate it, as `locft evaluate` does.

    Args:
        model_name_or_path: a folder or a name on the Hub: the base of `adapter`, or an edited model. `None`: the base
            named by the adapter.
        edits: anything `read_edits` reads.
        args: metrics and settings. Where they leave the chat template open, it is that of the adapter's training.
        adapter: a PEFT adapter of any method.
        base_model_name_or_path: the model before the edit, if there is no adapter to disable.
        text: text for perplexity and KL, see `evaluate_edits`.
        tasks: tasks of lm-evaluation-harness, see `evaluate_on_tasks`; need the extra `eval`.
        limit: maximum number of documents per task; below 1, a share of them.
        num_fewshot: examples in a task's prompt; `None` for the task's own number.
        num_edits: use only the first `num_edits` edits; `None` for all.
        output_dir: folder for the report; `None`: do not save it.
        overwrite_output_dir: save the report even to a folder that holds an adapter or a model.
        revision: branch, tag or commit of the model on the Hub.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: run the code that comes with the model. Read that code first.
        judge: a language model that judges the answers, see `judge_report`; `None`: nothing is sent anywhere. The
            report is saved before it judges, and its replies to `judge_replies.jsonl` in `output_dir`, if it has no
            `cache` of its own.
        in_scope: let the adapter act only where a text names a subject of its scope, see `apply_scope`.

    Returns:
        See `evaluate_edits`. `curves` holds the metrics by epoch from the adapter's provenance.

    Raises:
        ValueError: no model is named; edits or text are invalid; the adapter does not fit the model, or was trained
            on another base or on a prompt of the evaluation (see `EvaluationConfig.on_leak`); `num_edits` is below 1;
            there is no scope for `in_scope`;
            `output_dir` holds an adapter or a model, and `overwrite_output_dir` is False.
        OSError: model, tokenizer or adapter cannot be loaded.
        ImportError: there are tasks, and lm-evaluation-harness is not installed.
        FloatingPointError: a model's logits are NaN or infinite.
        ConnectionError: the judge's address gives no reply.

    Example:
        >>> report = evaluate_model(None, "edits.jsonl", adapter="out", output_dir="evaluation")
        >>> print(report)
    """
    read = first_edits(edits, num_edits)
    if output_dir is not None:  # fail now, not after the evaluation
        check_output_folder(output_dir, overwrite=overwrite_output_dir, what="a report").mkdir(
            parents=True, exist_ok=True
        )
    if judge is not None:
        check_judge(judge)
    name = _checked_name(model_name_or_path, adapter)
    scope = _scope_of(adapter) if in_scope else None
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    model, tokenizer = load_model(name, dtype, **source)
    # an adapter on the Hub is not a local folder: its run is unknown
    run = None if adapter is None else read_provenance(Path(adapter)).run
    edited = _edited(model, tokenizer, adapter, run, scope)
    base = None
    if base_model_name_or_path is not None:
        base, _ = load_model(base_model_name_or_path, dtype, trust_remote_code=trust_remote_code)
    evaluator = EditEvaluator(edited, tokenizer, read, args, base_model=base, text=text)
    task_metrics = {}
    if tasks:  # first, to report unknown names early
        how: dict[str, Any] = {"base_model": base, "limit": limit, "num_fewshot": num_fewshot}
        how |= {"allow_other_base": evaluator.args.allow_other_base}
        task_results = evaluate_on_tasks(edited, tokenizer, tasks, **how)
        task_metrics = task_results.metric_results(evaluator.args.confidence)
    report = evaluator.evaluate()
    settings = report.settings | {"adapter": _text(adapter), "tasks": list(tasks), "in_scope": in_scope}
    report = replace(report, results=report.results | task_metrics, curves=_curves(run), settings=settings)
    if output_dir is not None:
        _save(report, output_dir)
    return report if judge is None else _judged(report, read, judge, output_dir)


def _edited(
    model: Any,
    tokenizer: Any,
    adapter: str | os.PathLike[str] | None,
    run: TrainingRun | None,
    scope: Scope | None,
) -> Any:
    """Return a model with an adapter, with the notes of its run and its scope; without an adapter, as it is."""
    edited = model if adapter is None else load_adapter(model, adapter)
    if run is not None:
        mark_run(edited, run)
    if scope is not None:
        apply_scope(edited, tokenizer, scope)
    return edited


def _judged(
    report: EvaluationReport, edits: Sequence[Edit], judge: JudgeConfig, folder: str | os.PathLike[str] | None
) -> EvaluationReport:
    if folder is not None and judge.cache is None:
        judge = replace(judge, cache=Path(folder) / REPLIES_NAME)
    report = judge_report(report, edits, judge)
    if folder is not None:
        _save(report, folder)
    return report


def _save(report: EvaluationReport, folder: str | os.PathLike[str]) -> None:
    with explained_disk_full(folder):
        save_report(report, folder)


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _check_adapter(adapter: str | os.PathLike[str] | None) -> None:
    """Raise a ValueError if something local is no adapter."""
    if adapter is None or not Path(adapter).exists() or (Path(adapter) / CONFIG_NAME).is_file():
        return
    is_model = (Path(adapter) / "config.json").is_file()
    found = "a model" if is_model else "a file" if Path(adapter).is_file() else f"a folder without {CONFIG_NAME}"
    advice = "Give a model as model_name_or_path." if is_model else "Give the folder that `locft train` wrote."
    raise ValueError(f"{adapter}: found {found}; expected the folder of an adapter. {advice}")


def _checked_name(name: str | os.PathLike[str] | None, adapter: str | os.PathLike[str] | None) -> Any:
    _check_adapter(adapter)
    return name or _base_of(adapter)


def _scope_of(adapter: str | os.PathLike[str] | None) -> Scope:
    if adapter is None:
        raise ValueError("in_scope: a scope is part of an adapter, and none is given. Pass adapter.")
    return Scope.load(adapter)


def _base_of(adapter: str | os.PathLike[str] | None) -> str:
    if adapter is None:
        raise ValueError("Found neither a model nor an adapter to evaluate. Pass model_name_or_path or adapter.")
    return base_of(adapter)


def _curves(run: TrainingRun | None) -> list[dict[str, float]]:
    """Return the recorded metrics, or else the losses, by epoch of a training run."""
    if run is None or run.training.curves:
        return [] if run is None else run.training.curves
    if run.is_depth_first:
        return []  # depth-first losses are per edit, not per epoch
    return [{"epoch": n, "loss": loss} for n, loss in enumerate(run.training.epoch_losses, start=1)]
