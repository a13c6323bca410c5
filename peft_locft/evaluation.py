"""Measure what an edit did: reliability, generalization, locality, portability, fluency, general ability."""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, get_args

import datasets
import numpy as np
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from .bootstrap import Array
from .decoding import ask, check_fits
from .edit_questions import ItemEncoder, items_of
from .edits import Edit, edits_sha256, read_edits
from .encoding import encode_prompts
from .evaluation_report import EvaluationReport
from .general_ability import measure_text, text_windows
from .metrics import Protocol
from .questions import STOPS, Answer, Choice, Question, TopK, greedy
from .scoring import n_gram_entropy
from .tabulation import Asked, Column, results
from .tuner.provenance import differing_from_base

PACKAGES = ("peft-locft", "peft", "transformers", "torch")
FLUENCY = "fluency_n_gram_entropy"
FLUENCY_TOKENS = 100
FLUENCY_TOP_K = 5


@dataclass(frozen=True)
class EvaluationConfig:
    """How edits are evaluated.

    Args:
        protocols: what is asked: `"generation"` (greedy answers, as released with arXiv 2509.22072),
            `"token_accuracy"` (teacher-forced, EasyEdit's), `"probability"` (CounterFact's ES, PS and NS), `"fluency"`
            (n-gram entropy of 100 tokens, top-5 sampled, after the prompts of the first `max_fluency_edits`).
        max_new_tokens: in a greedy answer at most.
        chat_template: ask with the tokenizer's chat template, as the edits were trained.
        max_text_tokens: of the text for perplexity and KL at most.
        text_window: tokens in a window of that text; windows do not overlap.
        max_fluency_edits: edits that are asked for 100 tokens.
        num_resamples: of the bootstrap over edits.
        confidence: of the intervals, between 0 and 1.
        seed: of the bootstrap, and of the sampling for fluency.
        max_tokens_per_forward: changes nothing but speed and memory; `None`: chosen by the device.
        allow_other_base: evaluate an adapter on a base that it was not trained on.

    Raises:
        ValueError: if a field does not have one of the values named here.
    """

    protocols: tuple[str, ...] = ("generation", "token_accuracy", "probability")
    max_new_tokens: int = 32
    chat_template: bool = False
    max_text_tokens: int = 16384
    text_window: int = 512
    max_fluency_edits: int = 100
    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0
    max_tokens_per_forward: int | None = None
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        known = get_args(Protocol)
        wrong = [name for name in self.protocols if name not in known]
        if wrong or not self.protocols:
            found = ", ".join(map(repr, wrong)) or "none"
            raise ValueError(f"EvaluationConfig.protocols: found {found}; expected some of {', '.join(known)}.")
        lowest = {"max_new_tokens": 1, "text_window": 2, "max_text_tokens": 2, "max_fluency_edits": 1}
        for name, least in (lowest | {"num_resamples": 1, "max_tokens_per_forward": 1}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"EvaluationConfig.{name}={value}: expected {least} or more.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"EvaluationConfig.confidence={self.confidence}: expected a number between 0 and 1.")


def evaluate_edits(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    edits: Sequence[Edit] | datasets.Dataset | str | os.PathLike[str],
    args: EvaluationConfig | None = None,
    *,
    base_model: nn.Module | None = None,
    text: str | os.PathLike[str] | Sequence[str] | datasets.Dataset | None = None,
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
            (unless `args.allow_other_base`), or the text is too short.
        RuntimeError: the model's logits are NaN or infinite.

    Example:
        >>> report = evaluate_edits(peft_model, tokenizer, edits, text="wikitext2_test.txt")
        >>> print(report)
        >>> report.save("evaluation")
    """
    args = EvaluationConfig() if args is None else args
    edits = _checked_edits(edits)
    _check_base(model, args.allow_other_base)
    run = _Run(model, base_model, tokenizer, args, progress)
    windows = None if text is None else text_windows(text, tokenizer, args.text_window, args.max_text_tokens)
    asked = run.ask_about(edits)
    columns, missing = asked.columns(args.protocols)
    bootstrap = (args.num_resamples, args.confidence, args.seed)
    found = results(columns, *bootstrap)
    if "fluency" in args.protocols:
        found |= results({FLUENCY: run.fluency(edits[: args.max_fluency_edits])}, *bootstrap)
    if windows is not None:
        found |= measure_text(model, windows, run.base, run.disabled, progress).results(*bootstrap)
    return EvaluationReport(found, missing, asked.rows(args.protocols), run.settings(edits), list(run.notes(edits)))


def _checked_edits(edits: Any) -> list[Edit]:
    if isinstance(edits, Sequence) and not isinstance(edits, str) and not edits:
        raise ValueError("edits: found none; expected at least one to evaluate. Is the slice of them empty?")
    return read_edits(edits)


def _check_base(model: nn.Module, allow_other_base: bool) -> None:
    configs = {} if allow_other_base else getattr(model, "peft_config", None) or {}
    differing = [tensor for name, config in configs.items() for tensor in differing_from_base(model, name, config)]
    if differing:
        raise ValueError(
            f"The adapter was trained on another base: {', '.join(differing[:3])} "
            f"{'and others ' if len(differing) > 3 else ''}differ from the weights that its deltas belong to, so that "
            "the figures would be of neither model. Load it onto its own base, at the revision and dtype that it was "
            "trained on, or pass allow_other_base=True."
        )


def disabling(model: nn.Module) -> Callable[[], AbstractContextManager[Any]] | None:
    """Return what makes a model answer as its base for a while; `None` for a model without an adapter."""
    if isinstance(model, PeftModel):
        return model.disable_adapter
    if not getattr(model, "_hf_peft_config_loaded", False):
        return None

    @contextmanager
    def disabled() -> Iterator[None]:
        # transformers' own integration of PEFT
        model.disable_adapters()  # type: ignore[operator]
        try:
            yield
        finally:
            model.enable_adapters()  # type: ignore[operator]

    return disabled


class _Run:
    """One evaluation: the model, its base, and who is asked what."""

    def __init__(
        self,
        model: nn.Module,
        base_model: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        args: EvaluationConfig,
        progress: bool,
    ) -> None:
        self.model, self.tokenizer, self.args, self.progress = model, tokenizer, args, progress
        self.base = base_model or model
        self.disabled = nullcontext if base_model is not None else disabling(model)

    def ask_base(self, questions: Sequence[Question], choose: Choice = greedy) -> list[Answer] | None:
        if self.disabled is None:
            return None
        with self.disabled():
            return self._ask(self.base, questions, "the base", choose)

    def ask_edited(self, questions: Sequence[Question], choose: Choice = greedy) -> list[Answer]:
        return self._ask(self.model, questions, "the edited model", choose)

    def _ask(self, model: nn.Module, questions: Sequence[Question], whose: str, choose: Choice) -> list[Answer]:
        return ask(
            model,
            self.tokenizer,
            questions,
            choose=choose,
            max_tokens=self.args.max_tokens_per_forward,
            whose=whose,
            progress=self.progress,
        )

    def ask_about(self, edits: Sequence[Edit]) -> Asked:
        """Ask the base and the edited model all that the edits say."""
        items, asked = items_of(edits), set(self.args.protocols)
        if asked == {"fluency"}:
            items = []
        encoder = ItemEncoder(
            items,
            self.tokenizer,
            chat_template=self.args.chat_template,
            generate="generation" in asked,
            score="token_accuracy" in asked,
            compare="probability" in asked,
            max_new_tokens=self.args.max_new_tokens,
        )
        questions = encoder.questions()
        if questions:
            check_fits(self.model, questions, self.tokenizer)
        answers = self.ask_base(questions)
        before = None if answers is None else encoder.replies(answers)
        return Asked(edits, items, encoder.replies(self.ask_edited(encoder.questions(before))), before)

    def fluency(self, edits: Sequence[Edit]) -> Column:
        """Let both models go on after the edits' prompts, past any EOS, as ROME's evaluation does."""
        prompts = list(dict.fromkeys(edit.prompt for edit in edits))
        encoded = encode_prompts(prompts, self.tokenizer, chat_template=self.args.chat_template)
        questions = [Question(tuple(ids), num_stops=0, max_new_tokens=FLUENCY_TOKENS) for ids in encoded]
        choose = TopK(FLUENCY_TOP_K, self.args.seed)
        before, after = self.ask_base(questions, choose), self.ask_edited(questions, choose)
        meaning = "weighted entropy, in bits, of the 2-grams and 3-grams of 100 tokens after the prompt, top-5 sampled"
        return Column(meaning, self._entropies(after), None if before is None else self._entropies(before), "prompts")

    def _entropies(self, answers: Sequence[Answer]) -> Array:
        texts = [self.tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
        # a text of too few words for 3-grams is one that says nothing
        return np.array([n_gram_entropy(text) or 0.0 for text in texts])

    def settings(self, edits: Sequence[Edit]) -> dict[str, Any]:
        config = getattr(self.model, "config", None)
        adapters = getattr(self.model, "active_adapters", None)
        return {
            "model": getattr(config, "name_or_path", None) or type(self.model).__name__,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "adapters": list(adapters) if isinstance(adapters, list) else None,
            "edits": {"count": len(edits), "sha256": edits_sha256(edits)},
            **asdict(self.args),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    def notes(self, edits: Sequence[Edit]) -> Iterator[str]:
        with_stops = sum(any(stop in edit.target for stop in STOPS) for edit in edits)
        if with_stops and "generation" in self.args.protocols:
            yield (
                f"{with_stops} of {len(edits)} targets have a full stop or line break in them. exact_match cuts "
                "answers there, as its published protocol does, so that these can never match; contains reads on."
            )
        prompts = Counter(edit.prompt for edit in edits)
        repeated = sum(count - 1 for count in prompts.values())
        if repeated:
            yield f"{repeated} edits have the prompt of another and another target: no model can answer with both."
        if self.disabled is None:
            yield "There is no base beside this model, so that no figure has a before."
