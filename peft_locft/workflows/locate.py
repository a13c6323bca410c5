"""Search the best location: try all on a sample of the edits, drop the clearly worse ones, rank the rest."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.chat import written_form
from ..data.edits import Edit, EditSource, edits_sha256, read_edits
from ..data.texts import TextSource
from ..engine.activation_storage import SharedActivations
from ..engine.loading import load_model
from ..evaluation.config import EvaluationConfig
from ..io.interruption import explained_interruption
from ..locating.module_kinds import KINDS, location_of
from ..locating.plan import GRADIENT_TOKENS, Candidate, Rung, first_candidates, rungs
from ..locating.preset import model_shape
from ..locating.results import LocationSearchResult
from ..locating.score import LocationScore
from ..reporting.drawing import can_draw
from ..reporting.plots import draw_locations
from ..training.callbacks import logging_beside_bars
from ..training.config import BreadthFirstConfig, batch_size_for
from ..training.record import RECIPE_FIELDS
from ..training.training_data import with_chat_template
from ..tuner.presets import find_decoder_layers
from .location_trials import TRIALS, LocationTrials
from .output_folder import check_output_folder, what_trials_leave

logger = logging.getLogger(__name__)

STATES = "states"


@dataclass(frozen=True)
class SearchPlan:
    """The locations to try, and how many advance to the next rung.

    Args:
        modules: kinds of modules or their names, see `location_of`.
        layers: indices of decoder layers, from 0; `None` for all. Of a band, the first layer.
        stride: start with every `stride`-th layer, then halve the distance around the best ones.
        keep: one in `keep` locations advances to the next rung, at least two. A trial there costs up to `keep` times
            as much.
        num_rungs: 1 tries every location on all edits; `None` chooses, see `rungs`.
        learning_rates: learning rates by module, instead of the recipe's; coarse modules need a lower one.
        widths: numbers of neighbouring layers to train together: width 3 at layer 5 trains layers 5, 6 and 7. A band
            that goes past the last layer is not tried.
        gradient_tokens: values of `BreadthFirstConfig.gradient_tokens` to try at each location; `None`: only the
            recipe's.

    Raises:
        ValueError: if `widths` or `gradient_tokens` is empty or has repeats, a width is below 1, or a value of
            `gradient_tokens` is unknown.
    """

    modules: Sequence[str] = KINDS
    layers: Sequence[int] | None = None
    stride: int = 1
    keep: int = 5
    num_rungs: int | None = None
    learning_rates: Mapping[str, float] | None = None
    widths: Sequence[int] = (1,)
    gradient_tokens: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not self.widths or len(set(self.widths)) < len(self.widths) or min(self.widths) < 1:
            raise ValueError(
                f"widths: found {list(self.widths)}; expected numbers of neighbouring layers, 1 or more, no repeats."
            )
        tokens = self.gradient_tokens
        if tokens is None:
            return
        if isinstance(tokens, str) or not tokens or len(set(tokens)) < len(tokens) or set(tokens) - {*GRADIENT_TOKENS}:
            found = tokens if isinstance(tokens, str) else list(tokens)
            raise ValueError(
                f"gradient_tokens: found {found!r}; expected a list of some of {', '.join(GRADIENT_TOKENS)}, no "
                "repeats, or None for the recipe's."
            )


def search_locations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSource,
    args: BreadthFirstConfig,
    *,
    plan: SearchPlan | None = None,
    num_edits: int | None = 100,
    score: Mapping[str, float] | None = None,
    evaluation: EvaluationConfig | None = None,
    text: TextSource | None = None,
    show_progress: bool | None = None,
) -> LocationSearchResult:
    """Find the location of a model where edits work best.

    Successive halving: every location is trained on a few edits in small batches. One in `plan.keep`, by mean score,
    advances to the next rung with more and other edits. At least the last two are trained on all edits. The layers
    before a location run once for all locations of a rung, and the base is evaluated once.

    Every result is written to `args.output_dir` immediately: a killed search continues where it stopped, and several
    processes with the same arguments share the work. At the end, the search writes `locations.json`,
    `locations.md`, `best.json` (for `locft train --location`) and, with matplotlib, `locations.png`.

    Args:
        model: the base; unchanged at the end, since every adapter is removed.
        tokenizer: its fast tokenizer.
        edits: anything `read_edits` reads, with rephrasings and locality probes.
        args: recipe of every trial, and output folder.
        plan: which locations to try; `None` for all kinds of modules in all layers.
        num_edits: size of the sample, drawn with `args.seed`; `None` for all edits in their order.
        score: weights of metrics, see `LocationScore`; `None` for its default.
        evaluation: how to evaluate the last rung; earlier rungs measure only what the score needs, on a share of the
            text. `None`: greedy answers and token accuracy, 2,048 tokens of text in windows of 256.
        text: text for perplexity and KL, see `evaluate_edits`.
        show_progress: show a progress bar; `None` follows `args.disable_tqdm`.

    Raises:
        ValueError: edits, plan, score or text are invalid; the folder holds a search with other settings; the
            processes form a group (see `leave_group`); `args.output_dir` is missing, or holds an adapter or a model
            (see `overwrite_output_dir`); or training fails at every location.

    Example:
        >>> args = BreadthFirstConfig(output_dir="search", learning_rate=5e-3, per_device_train_batch_size=20)
        >>> search = search_locations(model, tokenizer, "zsre.json", args, plan=SearchPlan(stride=4))
        >>> search.preset.save("best.json")
    """
    if args.world_size > 1:
        raise ValueError(
            f"search_locations: found a group of {args.world_size} processes, which would train every location "
            "together; expected independent ones. Call peft_locft.engine.distributed.leave_group() before you create "
            "the BreadthFirstConfig, as `locft locate` does."
        )
    folder = check_output_folder(args.output_dir, overwrite=args.overwrite_output_dir, what="a search")
    plan = plan or SearchPlan()
    sample = _sample(read_edits(edits), num_edits, args.seed)
    layers = _check_plan(plan, model)
    weights = _score(score, sample, text is not None)
    evaluation = evaluation or EvaluationConfig(
        protocols=["generation", "token_accuracy"], max_text_tokens=2048, text_window=256
    )
    args = with_chat_template(args, sample, tokenizer)
    evaluation = replace(evaluation, **written_form(args)._asdict())
    first = _first_candidates(plan, layers, model)
    ladder = rungs(len(sample), batch_size_for(len(sample), args), len(first), plan.keep, plan.num_rungs)
    progress = not args.disable_tqdm if show_progress is None else show_progress
    rates = plan.learning_rates or {}
    shared = SharedActivations(folder / STATES, layers)
    trials = LocationTrials(model, tokenizer, sample, args, ladder, weights, evaluation, text, rates, shared)
    setting = _setting(model, sample, args, plan, layers, ladder, weights, trials)
    trials.begin(folder, setting)
    stopped = explained_interruption(what_trials_leave(folder, f"{TRIALS}/*.json"))
    with stopped, logging_beside_bars(progress):
        found = trials.search(first, layers, plan.stride, plan.keep, progress)
        search = LocationSearchResult(found, setting, model_shape(model.config))
        search.save(folder)
        if can_draw():
            draw_locations(search, folder / "locations.png")
    shutil.rmtree(folder / STATES, ignore_errors=True)
    return search


def _sample(edits: Sequence[Edit], num_edits: int | None, seed: int) -> list[Edit]:
    if num_edits is not None and num_edits < 1:
        raise ValueError(f"num_edits={num_edits}: expected 1 or more, or None for all")
    if num_edits is None:
        return list(edits)
    return random.Random(seed).sample(list(edits), min(num_edits, len(edits)))


def _check_plan(plan: SearchPlan, model: PreTrainedModel) -> list[int]:
    """Return the layers to try, after a check that every location exists."""
    num_layers = len(find_decoder_layers(model)[1])
    layers = list(range(num_layers)) if plan.layers is None else sorted(set(plan.layers))
    if not layers or not plan.modules or len(set(plan.modules)) < len(plan.modules):
        raise ValueError(
            f"plan: found modules={list(plan.modules)} and layers={layers}; expected one or more of each, no repeats."
        )
    rates = plan.learning_rates or {}
    unknown = sorted(set(rates) - set(plan.modules))
    wrong = [f"{name}={rate}" for name, rate in rates.items() if not 0 < rate < float("inf")]
    if unknown or wrong:
        raise ValueError(
            f"learning_rates: found {', '.join(unknown + wrong)}; expected rates above 0 for modules among "
            f"{', '.join(plan.modules)}."
        )
    bands = {range(layer, layer + width) for layer in layers for width in plan.widths if layer + width <= num_layers}
    reached = sorted({*layers, *(layer for band in bands for layer in band)})
    for module in plan.modules:
        for layer in reached:
            location_of(model, module, layer)
    return layers


def _first_candidates(plan: SearchPlan, layers: Sequence[int], model: PreTrainedModel) -> list[Candidate]:
    tokens = (None,) if plan.gradient_tokens is None else plan.gradient_tokens
    num_layers = len(find_decoder_layers(model)[1])
    return first_candidates(plan.modules, layers, plan.stride, num_layers, plan.widths, tokens)


def _score(weights: Mapping[str, float] | None, edits: Sequence[Edit], has_text: bool) -> LocationScore:
    measurable = {
        "reliability": True,
        "generalization": any(edit.rephrasings for edit in edits),
        "locality": any(edit.locality for edit in edits),
        "portability": any(edit.portability for edit in edits),
    }
    if weights is None:
        return LocationScore.default([kind for kind, is_measurable in measurable.items() if is_measurable], has_text)
    score = LocationScore(weights)
    impossible = [name for name in weights if not measurable.get(name.partition("_")[0], True)]
    if impossible or (score.needs_text and not has_text):
        raise ValueError(
            f"score: {', '.join(impossible) or 'perplexity and KL'} cannot be measured: no edit of the sample has the "
            "rephrasings or probes for it, or there is no text. Add them, or remove the metric from the score."
        )
    return score


def _setting(
    model: PreTrainedModel,
    edits: Sequence[Edit],
    args: BreadthFirstConfig,
    plan: SearchPlan,
    layers: Sequence[int],
    ladder: Sequence[Rung],
    score: LocationScore,
    trials: LocationTrials,
) -> dict[str, Any]:
    """Return all settings that change the results, as plain data."""
    recipe = {name: getattr(args, name) for name in RECIPE_FIELDS}
    return {
        "model": getattr(model.config, "name_or_path", ""),
        "shape": model_shape(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "edits": edits_sha256(edits),
        "recipe": {name: getattr(value, "value", value) for name, value in recipe.items()},
        "evaluation": asdict(trials.evaluation),
        "text": trials.text_sha256,
        "score": dict(score.weights),
        "modules": list(plan.modules),
        "layers": list(layers),
        "stride": plan.stride,
        "keep": plan.keep,
        "rungs": [[rung.num_edits, rung.batch_size] for rung in ladder],
        "learning_rates": dict(plan.learning_rates or {}),
        "widths": list(plan.widths),
        "gradient_tokens": None if plan.gradient_tokens is None else list(plan.gradient_tokens),
    }


def run_location_search(
    model_name_or_path: str | os.PathLike[str],
    edits: EditSource,
    args: BreadthFirstConfig,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    **arguments: Any,
) -> LocationSearchResult:
    """Load a model and search its locations, as `locft locate` does.

    Args:
        model_name_or_path: the base: a folder or a name on the Hub.
        edits: as in `search_locations`.
        args: as in `search_locations`.
        revision: branch, tag or commit of the base on the Hub.
        dtype: `"auto"` (the checkpoint's), `"float32"`, `"bfloat16"` or `"float16"`.
        trust_remote_code: run code that comes with the base.
        **arguments: further arguments of `search_locations`.

    Raises:
        ValueError: as in `search_locations`.
        OSError: if the model cannot be loaded.
    """
    # find errors before a large model is loaded
    check_output_folder(args.output_dir, overwrite=args.overwrite_output_dir, what="a search")
    read = read_edits(edits)
    model, tokenizer = load_model(model_name_or_path, dtype, revision=revision, trust_remote_code=trust_remote_code)
    return search_locations(model, tokenizer, read, args, **arguments)
