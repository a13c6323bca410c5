"""Evaluate edits: reliability, generalization, locality, portability, fluency, general ability."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .._version import package_versions
from ..data.chat import choose_chat_template, in_forms, marked_form
from ..data.edits import Edit, EditSource, Prompt, edits_sha256, prompt_identity, prompt_of, read_edits
from ..data.encoding import encode_prompts
from ..data.generated_text import generate_subjects
from ..data.leaks import trained_prompts, without_leaks
from ..data.texts import TextSource, text_windows
from ..engine.decoding import check_fits, generate_and_score
from ..engine.model_state import as_base, check_model_and_tokenizer, has_adapter
from ..engine.questions import STOPS, Answer, Choice, Question, TopK, greedy
from ..tuner.model import differing_from_base
from .asked_items import AskedItems, Sources, asked_items
from .config import EvaluationConfig
from .intervals import Array
from .items import EvalItem, ItemEncoder, Reply
from .kinds import AS_IT_IS
from .metric_result import Column
from .perplexity import measure_text
from .report import EvaluationReport
from .scoring import n_gram_entropy
from .similarity import TextEncoder, packaged_encoder, with_similarities
from .tabulation import PairedReplies, metric_results, results_by_language

Rewriter = Callable[[str], str]  # a prompt to the prompt that is asked instead

FLUENCY = "fluency_n_gram_entropy"
FLUENCY_TOKENS = 100
FLUENCY_TOP_K = 5
NAMES_SEED = 20_259  # of names that a training has not seen


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
    """Evaluate an edited model, before and after the edit. Any editing method can have made it.

    The base, for the values before the edit, is `base_model`, or the model itself with its adapter disabled. Without
    either, the report has no values from before, and metrics that compare with the base are missing.

    Args:
        model: the edited model; not changed.
        tokenizer: its fast tokenizer; not changed.
        edits: anything `read_edits` reads: edits with their rephrasings and probes.
        args: what to measure, and how.
        base_model: the model before the edit, if `model` has no adapter to disable.
        text: text for perplexity and KL: a UTF-8 file, a dataset with the column `text` (or its name on the Hub), or
            strings, which are joined by blank lines.
        progress: show a progress bar.

    Returns:
        The metrics with confidence intervals, and every answer.

    Raises:
        ValueError: there are no edits; they cannot be read or encoded; the adapter was trained on another base (unless
            `args.allow_other_base`); the model was trained on a rephrasing or probe (unless `args.on_leak` is
            `"drop"`); or the text is too short.
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
        raise ValueError("edits: found none; expected at least one to evaluate. Is your slice empty?")
    return read_edits(edits)


def check_base(model: nn.Module, allow_other_base: bool) -> None:
    """Raise a ValueError if a LocFT adapter of the model was trained on another base, unless that is allowed."""
    configs = {} if allow_other_base else getattr(model, "peft_config", None) or {}
    differing = [tensor for name, config in configs.items() for tensor in differing_from_base(model, name, config)]
    if differing:
        raise ValueError(
            f"The adapter was trained on another base: {', '.join(differing[:3])} "
            f"{'and others ' if len(differing) > 3 else ''}differ from the weights that its deltas belong to, so the "
            "metrics would describe neither model. Load the adapter onto its own base, with the revision and dtype "
            "that it was trained with, or pass allow_other_base=True."
        )


def find_base(
    model: nn.Module, base_model: nn.Module | None
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]] | None]:
    """Return the base of an edited model, and a function that returns a context in which it answers as the base.

    Args:
        model: the edited model.
        base_model: the model before the edit, if there is one.

    Returns:
        The second is `None` if there is no base.
    """
    # PEFT puts an adapter into the base that it is given, so that object is the base only with the adapter disabled
    if base_model is None or any(module is base_model for module in model.modules()):
        return model, partial(as_base, model) if has_adapter(model) else None
    return base_model, nullcontext


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Return what a report records of a model: its name, dtype and active adapters."""
    adapters = getattr(model, "active_adapters", None)
    configs = getattr(model, "peft_config", None)
    configs = configs if isinstance(configs, Mapping) else {}
    return {
        "model": getattr(getattr(model, "config", None), "name_or_path", None) or type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "adapters": list(adapters) if isinstance(adapters, list) else None,
        "methods": sorted({str(getattr(each.peft_type, "value", each.peft_type)) for each in configs.values()}),
    }


def _as_trained(
    args: EvaluationConfig, model: nn.Module, edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase
) -> EvaluationConfig:
    """Return settings with the chat template and the separator as they were trained, where they leave them open."""
    trained = marked_form(model)
    mode = trained.chat_template if args.chat_template == "auto" else args.chat_template
    given = args.chat_template_kwargs
    template_kwargs = dict(trained.chat_template_kwargs) if given is None else given
    chosen = choose_chat_template(mode, edits, tokenizer, template_kwargs)
    separator = trained.target_separator if args.target_separator == "auto" else args.target_separator
    return replace(args, chat_template=chosen, chat_template_kwargs=template_kwargs, target_separator=separator)


def _as_it_is() -> AbstractContextManager[Any]:
    """Return a context that changes nothing: a model without the rewriting of its prompts is the base."""
    return nullcontext()


class EditEvaluator:
    """Evaluates the same edits several times; the base answers only once. Arguments as in `evaluate_edits`.

    Example:
        >>> evaluator = EditEvaluator(peft_model, tokenizer, edits)
        >>> evaluator.evaluate()["reliability_exact_match"].after
        Estimate(value=0.995, low=0.985, high=1.0)
    """

    base: nn.Module
    as_base: Callable[[], AbstractContextManager[Any]] | None

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
        check_model_and_tokenizer(model, tokenizer, "evaluate_edits")
        read = _checked_edits(edits)
        self._identity = {"count": len(read), "sha256": edits_sha256(read)}
        self.edits, self._num_leaks = without_leaks(read, trained_prompts(model), self.args.on_leak)
        check_base(model, self.args.allow_other_base)
        self.args = _as_trained(self.args, model, self.edits, tokenizer)
        self.chat_template = self.args.chat_template
        self.tokenizer, self.progress, self.base_model = tokenizer, progress, base_model
        self._take(model)
        self.windows = None
        if text is not None:
            self.windows = text_windows(text, tokenizer, self.args.text_window, self.args.max_text_tokens, model)
        protocols = set(self.args.protocols)
        self.asked = AskedItems([], {}) if protocols == {"fluency"} else self._asked_items(model)
        self.items = self.asked.items
        self.encoder = self._encoder(self.items)
        if self.items:
            check_fits(model, self.encoder.questions(), tokenizer)
        self.text_encoder: TextEncoder | None = None
        if any(item.is_whole for item in self.items) and (self.args.embedding_model or packaged_encoder()):
            self.text_encoder = TextEncoder(self.args.embedding_model)
        self._before: list[Reply] | None = None
        self.rewrite: Rewriter | None = None
        # set it to [] to run the base on the text only once, at the price of the logits' memory
        self.base_logits: list[torch.Tensor] | None = None

    def _encoder(self, items: Sequence[EvalItem]) -> ItemEncoder:
        protocols = set(self.args.protocols)
        return ItemEncoder(
            items,
            self.tokenizer,
            chat_template_kwargs=self.args.chat_template_kwargs,
            target_separator=self.args.target_separator,
            generate="generation" in protocols,
            score="token_accuracy" in protocols,
            compare="probability" in protocols,
            max_new_tokens=self.args.max_new_tokens,
        )

    def _asked_items(self, model: nn.Module) -> AskedItems:
        sources = Sources(self.tokenizer, trained_prompts(model), self._names, self._old_answers)
        return asked_items(self.edits, self.args, sources)

    def _names(self, subjects: Sequence[str], num: int) -> Sequence[str]:
        """Return names like the edits' subjects, from another seed than a training uses by default."""
        return generate_subjects(self.base, self.tokenizer, subjects, num, seed=NAMES_SEED + self.args.seed)

    def _old_answers(self, edits: Sequence[Edit]) -> list[str | None]:
        """Return the base's greedy answers to the edits' prompts; `None` for all without a base."""
        forms = in_forms(edits, "on" if self.chat_template == "on" else "off")
        items = [EvalItem(n, "reliability", form.prompt, None, None, form.history) for n, form in enumerate(forms)]
        encoder = ItemEncoder(items, self.tokenizer, chat_template_kwargs=self.args.chat_template_kwargs)
        answers = self._base_answers(encoder.questions())
        return [None] * len(items) if answers is None else [reply.text for reply in encoder.replies(answers)]

    def evaluate(self, model: nn.Module | None = None, *, rewrite: Rewriter | None = None) -> EvaluationReport:
        """Return the report of a model.

        Args:
            model: another model with the same base; `None` for the one given to the constructor.
            rewrite: changes every prompt before the edited model is asked, such as `EditRetrieval`, which edits
                without a change of weights. The base gets the prompts as they are; without an adapter or `base_model`,
                the base is the model itself. Text for perplexity is not rewritten.

        Raises:
            FloatingPointError: the logits of the model or of its base are NaN or infinite.
        """
        self._take(self.model if model is None else model)
        self.rewrite = rewrite
        if rewrite is not None and self.as_base is None:
            self.base = self.model
            self.as_base = _as_it_is
        args = self.args
        bootstrap = (args.num_resamples, args.confidence, args.seed)
        scored = self._paired_replies().scored(args.protocols)
        columns, missing = scored.columns()
        metrics = metric_results(columns, *bootstrap)
        if "fluency" in args.protocols:
            metrics |= metric_results({FLUENCY: self._fluency()}, *bootstrap)
        if self.windows is not None:
            measured = measure_text(self.model, self.windows, self.base, self.as_base, self.progress, self.base_logits)
            metrics |= measured.metric_results(*bootstrap)
        return EvaluationReport(
            metrics,
            missing,
            scored.rows(),
            self._settings(),
            list(self._notes()),
            by_language=results_by_language(scored, *bootstrap),
        )

    def _take(self, model: nn.Module) -> None:
        self.model = model
        self.base, self.as_base = find_base(model, self.base_model)

    def _paired_replies(self) -> PairedReplies:
        """Return the replies of the edited model and of its base, which answers only the first time."""
        if self._before is None and (answers := self._base_answers(self.encoder.questions())) is not None:
            self._before = self._replies(self.encoder, answers)
        encoder = self.encoder
        if self.rewrite is not None:
            encoder = self._encoder([replace(item, prompt=self.rewrite(item.prompt)) for item in self.items])
            check_fits(self.model, encoder.questions(), self.tokenizer)
        replies = self._replies(encoder, self._edited_answers(encoder.questions(self._before)))
        before = None if self.as_base is None else self._before
        return PairedReplies(self.edits, self.items, replies, before, self.asked.kinds)

    def _replies(self, encoder: ItemEncoder, answers: Sequence[Answer]) -> list[Reply]:
        replies = encoder.replies(answers)
        return with_similarities(self.items, replies, self.text_encoder) if self.text_encoder else replies

    def _base_answers(self, questions: Sequence[Question], choose: Choice = greedy) -> list[Answer] | None:
        if self.as_base is None:
            return None
        with self.as_base():
            return self._answers(self.base, questions, "the base", choose)

    def _edited_answers(self, questions: Sequence[Question], choose: Choice = greedy) -> list[Answer]:
        return self._answers(self.model, questions, "the edited model", choose)

    def _answers(self, model: nn.Module, questions: Sequence[Question], whose: str, choose: Choice) -> list[Answer]:
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
        """Return the entropy of long continuations of the edits' prompts, past any EOS, as in ROME's evaluation."""
        forms = in_forms(self.edits[: self.args.max_fluency_edits], self.chat_template)
        prompts = list(dict.fromkeys(map(prompt_of, forms)))
        choose = TopK(FLUENCY_TOP_K, self.args.seed)
        before = self._base_answers(self._to_continue(prompts), choose)
        if self.rewrite is not None:
            prompts = [prompt._replace(text=self.rewrite(prompt.text)) for prompt in prompts]
        after = self._edited_answers(self._to_continue(prompts), choose)
        meaning = "weighted entropy, in bits, of the 2-grams and 3-grams of 100 sampled tokens (top 5)"
        entropies = None if before is None else self._entropies(before)
        return Column(meaning, self._entropies(after), entropies, "prompts", f"{AS_IT_IS}; fluency", "fluency, GE")

    def _to_continue(self, prompts: Sequence[Prompt]) -> list[Question]:
        encoded = encode_prompts(prompts, self.tokenizer, chat_template_kwargs=self.args.chat_template_kwargs)
        return [Question(tuple(ids), num_stops=0, max_new_tokens=FLUENCY_TOKENS) for ids in encoded]

    def _entropies(self, answers: Sequence[Answer]) -> Array:
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        # a text without a 3-gram is as empty as one that repeats itself
        return np.array([n_gram_entropy(text) or 0.0 for text in texts])

    def _settings(self) -> dict[str, Any]:
        return {
            **model_settings(self.model),
            "edits": self._identity,
            **asdict(self.args),
            "versions": package_versions(),
        }

    def _notes(self) -> Iterator[str]:
        edits = self.edits
        with_stops = sum(all(STOPS.search(right) for right in edit.right_answers) for edit in edits)
        if with_stops and "generation" in self.args.protocols:
            yield (
                f"{with_stops} of {len(edits)} targets contain a full stop or line break. exact_match cuts answers "
                "there, as the published protocol does, so these targets can never match; contains reads on."
            )
        prompts = Counter(map(prompt_identity, edits))
        repeated = sum(count - 1 for count in prompts.values())
        if repeated:
            yield f"{repeated} of {len(edits)} edits repeat a prompt with another target: no model can answer both."
        if self.chat_template == "both":
            yield (
                "Every prompt was asked twice, as plain text and in the chat template, as the edits were trained; a "
                "metric is the mean of both. Set chat_template to 'on' or 'off' to ask in one form only."
            )
        if self.rewrite is not None:
            yield f"Every prompt was rewritten before the edited model was asked: {self.rewrite}."
        yield from self.asked.notes
        if self._num_leaks:
            yield f"{self._num_leaks} rephrasings and probes were left out: the adapter was trained on them."
        if self.as_base is None:
            yield "There is no base model to compare with, so no metric has a value from before the edit."
