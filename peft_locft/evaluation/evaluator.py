"""Measure what an edit did: reliability, generalization, locality, portability, fluency, general ability."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.edits import Edit, edits_sha256, read_edits
from ..data.encoding import encode_prompts
from ..data.leaks import trained_prompts, without_leaks
from ..data.texts import TextSource, text_windows
from ..engine.decoding import check_fits, generate_and_score
from ..engine.model_state import as_base, has_adapter
from ..engine.questions import STOPS, Answer, Choice, Question, TopK, greedy
from ..tuner.base_weights import differing_from_base
from .config import EvaluationConfig
from .edit_questions import ItemEncoder, Reply, items_of
from .intervals import Array
from .perplexity import measure_text
from .report import EvaluationReport
from .scoring import n_gram_entropy
from .tabulation import Column, PairedReplies, results

PACKAGES = ("peft-locft", "peft", "transformers", "torch")
EditSource: TypeAlias = Sequence[Edit] | datasets.Dataset | str | os.PathLike[str]

FLUENCY = "fluency_n_gram_entropy"
FLUENCY_TOKENS = 100
FLUENCY_TOP_K = 5


def evaluate_edits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: EditSource,
    args: EvaluationConfig | None = None,
    *,
    base_model: nn.Module | None = None,
    text: TextSource | None = None,
    progress: bool = True,
) -> EvaluationReport:
    """Measure what an edit did to a model, whoever made it.

    Every figure stands beside its before. The base is `base_model`; a model with an adapter has its base in it, and is
    asked once more with the adapter disabled. Without either there is no before, and what compares with it is missing.

    Args:
        model: the edited model; left as it is.
        tokenizer: its tokenizer, a fast one; left as it is.
        edits: whatever `read_edits` reads: the edits, with their rephrasings and probes.
        args: what is asked, and how.
        base_model: the model before it was edited, where `model` has no adapter to disable.
        text: any text, for perplexity and KL: a UTF-8 file, a dataset with the column `text` (or its name on the Hub),
            or texts, which are joined by blank lines.
        progress: show a progress bar.

    Returns:
        The metrics with confidence intervals, and every answer.

    Raises:
        ValueError: there are no edits, they cannot be read or encoded, the adapter was trained on another base
            (unless `args.allow_other_base`), the model is known to have been trained on a rephrasing or probe (unless
            `args.on_leak` says to leave it out), or the text is too short.
        FloatingPointError: the model's logits are NaN or infinite.

    Example:
        >>> report = evaluate_edits(peft_model, tokenizer, edits, text="wikitext2_test.txt")
        >>> print(report)
        >>> report.save("evaluation")
    """
    evaluator = EditEvaluator(model, tokenizer, edits, args, base_model=base_model, text=text, progress=progress)
    return evaluator.evaluate()


def _checked_edits(edits: Any) -> list[Edit]:
    if isinstance(edits, Sequence) and not isinstance(edits, str) and not edits:
        raise ValueError("edits: found none; expected at least one to evaluate. Is the slice of them empty?")
    return read_edits(edits)


def check_base(model: nn.Module, allow_other_base: bool) -> None:
    """Raise a ValueError if a LocFT adapter on a model was trained on another base, unless that is allowed."""
    configs = {} if allow_other_base else getattr(model, "peft_config", None) or {}
    differing = [tensor for name, config in configs.items() for tensor in differing_from_base(model, name, config)]
    if differing:
        raise ValueError(
            f"The adapter was trained on another base: {', '.join(differing[:3])} "
            f"{'and others ' if len(differing) > 3 else ''}differ from the weights that its deltas belong to, so that "
            "the figures would be of neither model. Load it onto its own base, at the revision and dtype that it was "
            "trained on, or pass allow_other_base=True."
        )


def base_of(
    model: nn.Module, base_model: nn.Module | None
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]] | None]:
    """Return the model that answers as a model's base, and what makes it do so; `None` for that: there is no base.

    Args:
        model: the edited model.
        base_model: the model before it was edited, if it is at hand.
    """
    # PEFT puts an adapter into the base that it is given: with the adapter disabled it is that again
    if base_model is None or any(module is base_model for module in model.modules()):
        return model, partial(as_base, model) if has_adapter(model) else None
    return base_model, nullcontext


class EditEvaluator:
    """Evaluates the same edits more than once, and asks the base only the first time; arguments as `evaluate_edits`.

    Example:
        >>> evaluator = EditEvaluator(peft_model, tokenizer, edits)
        >>> evaluator.evaluate()["reliability_exact_match"].after
        Estimate(value=0.995, low=0.985, high=1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        edits: EditSource,
        args: EvaluationConfig | None = None,
        *,
        base_model: nn.Module | None = None,
        text: TextSource | None = None,
        progress: bool = True,
    ) -> None:
        self.args = EvaluationConfig() if args is None else args
        read = _checked_edits(edits)
        self._identity = {"count": len(read), "sha256": edits_sha256(read)}
        self.edits, self._num_leaks = without_leaks(read, trained_prompts(model), self.args.on_leak)
        check_base(model, self.args.allow_other_base)
        self.tokenizer, self.progress, self.base_model = tokenizer, progress, base_model
        self._take(model)
        self.windows = None
        if text is not None:
            self.windows = text_windows(text, tokenizer, self.args.text_window, self.args.max_text_tokens, model)
        asked = set(self.args.protocols)
        self.items = [] if asked == {"fluency"} else items_of(self.edits)
        self.encoder = ItemEncoder(
            self.items,
            tokenizer,
            chat_template=self.args.chat_template,
            generate="generation" in asked,
            score="token_accuracy" in asked,
            compare="probability" in asked,
            max_new_tokens=self.args.max_new_tokens,
        )
        if self.items:
            check_fits(model, self.encoder.questions(), tokenizer)
        self._before: list[Reply] | None = None
        # a list here has the base read the text once, too, at the price of its logits' memory
        self.kept_logits: list[torch.Tensor] | None = None

    def evaluate(self, model: nn.Module | None = None) -> EvaluationReport:
        """Measure a model.

        Args:
            model: another than the one that was given, of the same base.

        Raises:
            FloatingPointError: the logits of the model, or of its base, are NaN or infinite.
        """
        if model is not None:
            self._take(model)
        args = self.args
        bootstrap = (args.num_resamples, args.confidence, args.seed)
        asked = self._ask_all()
        columns, missing = asked.columns(args.protocols)
        found = results(columns, *bootstrap)
        if "fluency" in args.protocols:
            found |= results({FLUENCY: self._fluency()}, *bootstrap)
        if self.windows is not None:
            measured = measure_text(
                self.model, self.windows, self.base, self.disabled, self.progress, self.kept_logits
            )
            found |= measured.results(*bootstrap)
        return EvaluationReport(found, missing, asked.rows(args.protocols), self._settings(), list(self._notes()))

    def _take(self, model: nn.Module) -> None:
        self.model = model
        self.base, self.disabled = base_of(model, self.base_model)

    def _ask_all(self) -> PairedReplies:
        """Ask the base, if it has not been, and the edited model all that the edits say."""
        if self._before is None and (answers := self._ask_base(self.encoder.questions())) is not None:
            self._before = self.encoder.replies(answers)
        answers = self._ask_edited(self.encoder.questions(self._before))
        return PairedReplies(self.edits, self.items, self.encoder.replies(answers), self._before)

    def _ask_base(self, questions: Sequence[Question], choose: Choice = greedy) -> list[Answer] | None:
        if self.disabled is None:
            return None
        with self.disabled():
            return self._ask(self.base, questions, "the base", choose)

    def _ask_edited(self, questions: Sequence[Question], choose: Choice = greedy) -> list[Answer]:
        return self._ask(self.model, questions, "the edited model", choose)

    def _ask(self, model: nn.Module, questions: Sequence[Question], whose: str, choose: Choice) -> list[Answer]:
        return generate_and_score(
            model,
            self.tokenizer,
            questions,
            choose=choose,
            max_tokens=self.args.max_tokens_per_forward,
            label=whose,
            progress=self.progress,
        )

    def _fluency(self) -> Column:
        """Let both models go on after the edits' prompts, past any EOS, as ROME's evaluation does."""
        prompts = list(dict.fromkeys(edit.prompt for edit in self.edits[: self.args.max_fluency_edits]))
        encoded = encode_prompts(prompts, self.tokenizer, chat_template=self.args.chat_template)
        questions = [Question(tuple(ids), num_stops=0, max_new_tokens=FLUENCY_TOKENS) for ids in encoded]
        choose = TopK(FLUENCY_TOP_K, self.args.seed)
        before, after = self._ask_base(questions, choose), self._ask_edited(questions, choose)
        meaning = "weighted entropy, in bits, of the 2-grams and 3-grams of 100 tokens after the prompt, top-5 sampled"
        return Column(meaning, self._entropies(after), None if before is None else self._entropies(before), "prompts")

    def _entropies(self, answers: Sequence[Answer]) -> Array:
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        # a text of too few words for 3-grams is one that says nothing
        return np.array([n_gram_entropy(text) or 0.0 for text in texts])

    def _settings(self) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        adapters = getattr(self.model, "active_adapters", None)
        return {
            "model": getattr(config, "name_or_path", None) or type(self.model).__name__,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "adapters": list(adapters) if isinstance(adapters, list) else None,
            "edits": self._identity,
            **asdict(self.args),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def _notes(self) -> Iterator[str]:
        edits = self.edits
        with_stops = sum(any(stop in edit.target for stop in STOPS) for edit in edits)
        if with_stops and "generation" in self.args.protocols:
            yield (
                f"{with_stops} of {len(edits)} targets have a full stop or line break in them. exact_match cuts "
                "answers there, as its published protocol does, so that these can never match; contains reads on."
            )
        prompts = Counter(edit.prompt for edit in edits)
        repeated = sum(count - 1 for count in prompts.values())
        if repeated:
            yield f"{repeated} of {len(edits)} edits repeat a prompt with another target: no model can give both."
        if self._num_leaks:
            yield f"{self._num_leaks} rephrasings and probes were left out: the adapter was trained on them."
        if self.disabled is None:
            yield "There is no base beside this model, so that no figure has a before."
