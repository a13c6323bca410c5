"""How edits are evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from ..data.chat import chat_template_mode, template_arguments
from ..data.joining import TargetSeparator, target_separator_mode
from ..data.leaks import OnLeak
from .contexts import CONTEXTS
from .kinds import BY_PROBES
from .metrics import Protocol

ALL = "all"
MINIMUM = {
    "max_new_tokens": 1,
    "max_text_tokens": 2,
    "text_window": 2,
    "max_fluency_edits": 1,
    "num_resamples": 1,
    "max_tokens_per_forward": 1,
}


@dataclass
class EvaluationConfig:
    """What [`evaluate_edits`] measures, and how.

    Args:
        protocols (`list[str]`, defaults to `["generation", "token_accuracy", "probability"]`):
            `"generation"`: greedy answers, as in the evaluation released with arXiv 2509.22072. `"token_accuracy"`:
            teacher-forced, as in EasyEdit. `"probability"`: CounterFact's ES, PS and NS. `"fluency"`: n-gram entropy
            of 100 sampled tokens (top 5) after the prompts of some edits.
        contexts (`list[str]`, defaults to `[]`):
            Also ask prompts and rephrasings in these contexts, or in `["all"]`: `"question_answer"`: as "Question: …
            Answer:"; `"few_shot"`: so, after three answered questions; `"chat"`: in the chat template;
            `"after_paragraph"`: after an unrelated paragraph; `"second_turn"`: as the second question of a
            conversation.
        probes (`list[str]`, defaults to `[]`):
            Also measure these, or `["all"]`: `"belief"`: yes / no, negated, multiple-choice, either-or and reversed
            questions, made from the edits. `"locality_rings"`: other facts of the same subject, other subjects,
            unrelated text. `"multi_hop"`: portability probes over several facts. `"long_answers"`: targets of several
            sentences as a whole, and questions about their parts.
        embedding_model (`str`, *optional*):
            A sentence encoder that compares long answers: a folder or a name on the Hub. `None`: that of the extra
            `eval`.
        max_new_tokens (`int`, defaults to 32): longest greedy answer.
        chat_template (`str`, defaults to `"auto"`):
            How prompts are asked: `"off"`: as plain text; `"on"`: in the tokenizer's chat template; `"both"`: once in
            each form, and a metric is the mean of both. `"auto"`: as the adapter was trained; if that is unknown, as
            `BreadthFirstConfig.chat_template="auto"` would train these edits. `True` and `False` are `"on"` and
            `"off"`. Edits that are conversations are always asked in the template. There, the token that ends the
            answer's turn counts in `"token_accuracy"` and `"probability"`.
        chat_template_kwargs (`dict`, *optional*):
            Arguments of the template, such as `{"enable_thinking": False}`. `None`: those of the training.
        target_separator (`str`, defaults to `"auto"`):
            What stands between a prompt and an answer that is scored: `"space"`, `"none"`, or `"auto"`: as the adapter
            was trained; if that is unknown, as their scripts and punctuation are written.
        max_text_tokens (`int`, defaults to 16384): tokens of the text used for perplexity and KL.
        text_window (`int`, defaults to 512): tokens in a window of that text; windows do not overlap.
        max_fluency_edits (`int`, defaults to 100): edits used for fluency.
        num_resamples (`int`, defaults to 1000): resamples of the bootstrap over edits.
        confidence (`float`, defaults to 0.95): confidence of the intervals, between 0 and 1.
        seed (`int`, defaults to 0): seed of the bootstrap and of the sampling for fluency.
        max_tokens_per_forward (`int`, *optional*):
            Tokens in one forward pass; changes only speed and memory. `None` chooses by the device.
        allow_other_base (`bool`, defaults to `False`): evaluate an adapter on a base that it was not trained on.
        on_leak (`str`, defaults to `"error"`):
            What to do with rephrasings and probes that the adapter was trained on: `"error"` refuses, `"drop"` leaves
            them out.

    Raises:
        ValueError: if a field has none of the values named here.
    """

    protocols: list[str] = field(
        default_factory=lambda: ["generation", "token_accuracy", "probability"],
        metadata={"help": f"What to measure: one or more of {', '.join(get_args(Protocol))}."},
    )
    contexts: list[str] = field(
        default_factory=list,
        metadata={"help": f"Also ask the prompts in these contexts: all, or some of {', '.join(CONTEXTS)}."},
    )
    probes: list[str] = field(
        default_factory=list,
        metadata={"help": f"Also measure these: all, or some of {', '.join(BY_PROBES)}."},
    )
    embedding_model: str | None = field(
        default=None, metadata={"help": "Sentence encoder that compares long answers; default: that of `eval`."}
    )
    max_new_tokens: int = field(default=32, metadata={"help": "Maximum number of tokens in a greedy answer."})
    chat_template: str = field(
        default="auto",
        metadata={"help": "Ask in the chat template: on, off or both; auto: as the adapter was trained."},
    )
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Arguments of the template, as JSON; default: those of the training."}
    )
    target_separator: TargetSeparator = field(
        default="auto",
        metadata={"help": "Between prompt and answer: space or none; auto: as it was trained."},
    )
    max_text_tokens: int = field(
        default=16384, metadata={"help": "Maximum number of tokens of the text for perplexity."}
    )
    text_window: int = field(default=512, metadata={"help": "Tokens in one window of that text."})
    max_fluency_edits: int = field(default=100, metadata={"help": "Maximum number of edits used for fluency."})
    num_resamples: int = field(default=1000, metadata={"help": "Resamples of the bootstrap over edits."})
    confidence: float = field(default=0.95, metadata={"help": "Confidence of the intervals, between 0 and 1."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap and of the sampling for fluency."})
    max_tokens_per_forward: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens in one forward pass; changes only speed and memory."}
    )
    allow_other_base: bool = field(
        default=False, metadata={"help": "Evaluate an adapter on a base that it was not trained on."}
    )
    on_leak: OnLeak = field(
        default="error", metadata={"help": "What to do with prompts that the adapter was trained on: error or drop."}
    )

    def __post_init__(self) -> None:
        self.chat_template = chat_template_mode(self.chat_template, "EvaluationConfig.chat_template")
        self.chat_template_kwargs = template_arguments(
            self.chat_template_kwargs, "EvaluationConfig.chat_template_kwargs"
        )
        self.target_separator = target_separator_mode(self.target_separator, "EvaluationConfig.target_separator")
        _check_names("protocols", self.protocols, get_args(Protocol))
        if not self.protocols:
            expected = ", ".join(get_args(Protocol))
            raise ValueError(f"EvaluationConfig.protocols: found none; expected one or more of {expected}.")
        self.contexts = _all_or_some("contexts", self.contexts, CONTEXTS)
        self.probes = _all_or_some("probes", self.probes, tuple(BY_PROBES))
        if self.on_leak not in get_args(OnLeak):
            expected = ", ".join(get_args(OnLeak))
            raise ValueError(f"EvaluationConfig.on_leak={self.on_leak!r}: expected one of {expected}.")
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"EvaluationConfig.{name}={value}: expected {minimum} or more.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"EvaluationConfig.confidence={self.confidence}: expected a number between 0 and 1.")


def _all_or_some(name: str, values: object, known: Sequence[str]) -> list[str]:
    """Return names in the order of the known ones; all of them for `["all"]`."""
    found = _check_names(name, values, (*known, ALL))
    return [each for each in known if each in found or ALL in found]


def _check_names(name: str, values: object, known: Sequence[str]) -> list[str]:
    """Return a list of known names.

    Raises:
        ValueError: if it is a text, or has another name.
    """
    names = [values] if isinstance(values, str) else list(values)  # type: ignore[call-overload]
    wrong = [each for each in names if each not in known]
    if isinstance(values, str) and not wrong:
        raise ValueError(f"EvaluationConfig.{name}: found text; expected a list: {name}={names!r}.")
    if wrong:
        found = ", ".join(map(repr, wrong))
        raise ValueError(f"EvaluationConfig.{name}: found {found}; expected one or more of {', '.join(known)}.")
    return names
