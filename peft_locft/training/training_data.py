"""The encoded training data of a run: the edits, variants of them, and retained rows."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapters.provenance import Augmentation
from ..data.augmentation import concatenated, paraphrased, subject_of_swap, swapped_subjects, with_prefix
from ..data.chat import choose_chat_template, in_forms, prompts_in_forms
from ..data.edits import Edit, Prompt
from ..data.encoding import EncodedEdits, encode_edits, join_encoded, prompts_writing, slice_encoded
from ..data.generated_text import LONG_PREFIX, NAME_TOKENS, base_texts, generate_prefixes, generate_subjects
from ..data.gradient_tokens import GradientTokens
from ..data.leaks import check_paraphrases
from ..data.relations import answered_otherwise, same_subject
from ..data.retained_facts import (
    BaseAnswers,
    base_answers,
    choose_retained_facts,
    unanswered,
)
from ..data.subjects import find_subjects
from ..data.texts import TextSource, joined_text, text_windows
from ..engine.model_state import max_length
from ..engine.preparations import Preparations
from ..tuner.targets import early_modules
from .config import GENERATED, LOCALITY, BreadthFirstConfig
from .training_rows import TrainingRows

logger = logging.getLogger(__name__)

SUBJECT_TOKENS = 5  # of an edit's subject, about
MAX_SUBJECTS = 192  # that the base generates
CANDIDATES = 3  # other facts to ask the base about, for one that is retained
WINDOW = 128  # tokens in a window of preserved text


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        encoded: all rows.
        rows: which rows are of which kind.
        prefixes: texts that the base generated to stand before prompts.
        counts: number of rows beside the edits, by kind.
        prompts: trained prompts beside those of the edits.
        preserved: (windows, window) token ids of the text for a projector.
    """

    encoded: EncodedEdits
    rows: TrainingRows
    prefixes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    preserved: torch.Tensor | None = None

    def augmentation(self) -> Augmentation:
        """Return the entry in `locft_provenance.json`."""
        return Augmentation.of_rows(prefixes=self.prefixes, counts=self.counts, prompts=self.prompts)

    def with_targets(self, more: EncodedEdits | None, num_known: int) -> TrainingData:
        """Return the same data with more rows that are trained as edits, without variants.

        Args:
            more: these rows; `None`: none.
            num_known: edits that the model had learned before this run.
        """
        if more is None:
            return replace(self, rows=replace(self.rows, num_known=num_known))
        num_edits = self.rows.num_edits
        parts = (slice_encoded(self.encoded, 0, num_edits), more, slice_encoded(self.encoded, num_edits, None))
        none = [0] * len(more)
        rows = replace(
            self.rows,
            num_edits=num_edits + len(more),
            num_variants=[*self.rows.num_variants, *none],
            num_own_retained=[*self.rows.num_own_retained, *none],
            num_known=num_known,
        )
        return replace(self, encoded=join_encoded(parts), rows=rows)


def with_chat_template(
    args: BreadthFirstConfig, edits: Sequence[Edit], tokenizer: PreTrainedTokenizerBase
) -> BreadthFirstConfig:
    """Return a recipe whose `chat_template` is decided; it is a copy if it was `"auto"`.

    Args:
        args: the recipe; it is not changed.
        edits: the edits.
        tokenizer: the model's tokenizer.
    """
    if args.chat_template != "auto":
        return args
    settled = copy.copy(args)
    settled.chat_template = choose_chat_template(args.chat_template, edits, tokenizer, args.chat_template_kwargs)
    if settled.chat_template == "both":
        logger.warning(
            "The tokenizer has a chat template: every edit is trained as plain text and in chat (chat_template=both). "
            "Set chat_template to on or off to train one form only."
        )
    return settled


def with_gradient_tokens(args: BreadthFirstConfig, model: nn.Module) -> BreadthFirstConfig:
    """Return a recipe whose `gradient_tokens` are those of the early modules; it is a copy if it was `"auto"`.

    Args:
        args: the recipe; it is not changed.
        model: the model with its adapter.
    """
    if args.gradient_tokens != "auto":
        return args
    settled = copy.copy(args)
    settled.gradient_tokens = "subject" if early_modules(model) else "all"
    return settled


def _gradient_tokens(args: BreadthFirstConfig) -> GradientTokens:
    assert args.gradient_tokens != "auto"
    return args.gradient_tokens or "all"


def training_data(
    edits: Sequence[Edit], model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig
) -> TrainingData:
    """Make the training data of a recipe from edits. The base generates prefixes, subjects and answers here.

    Args:
        edits: the edits.
        model: the model; its adapter is disabled while the base generates.
        tokenizer: its tokenizer.
        args: the recipe.

    Raises:
        ValueError: if an edit or a variant cannot be encoded for this model, a training paraphrase is also a
            rephrasing for evaluation, or the recipe needs retained facts and there are none.
    """
    check_paraphrases(edits)
    args = with_gradient_tokens(args, model)
    edits, prefixes, own_retained, preserved = _generated(edits, model, tokenizer, args)
    forms = in_forms(edits, args.chat_template)
    subjects = _retained_prompts(own_retained, edits, model, tokenizer, args)
    prompts = list(subjects)
    answers = _answers(model, tokenizer, prompts, args)
    kinds = {
        "paraphrases": [paraphrased(edit) for edit in forms],
        "prefixed": _prefixed(forms, prefixes, args),
        "concatenated": _concatenated(forms, answers, args),
    }
    variants = [[variant for own in of_edit for variant in own] for of_edit in zip(*kinds.values(), strict=True)]
    trained = [*forms, *(variant for own in variants for variant in own)]
    encoded = encode_edits(
        trained,
        tokenizer,
        append_eos=args.append_eos,
        chat_template_kwargs=args.chat_template_kwargs,
        max_length=max_length(model),
        gradient_tokens=_gradient_tokens(args),
        target_separator=args.target_separator,
    )
    retained = None
    if answers is not None and args.retained_per_edit:
        retained = _with_writing_tokens(answers.encoded, subjects, tokenizer, args)
    num_retained = 0 if retained is None else len(retained)
    counts = {kind: sum(map(len, rows)) for kind, rows in kinds.items()} | {"retained facts": num_retained}
    return TrainingData(
        encoded=encoded if retained is None else join_encoded([encoded, retained]),
        rows=TrainingRows(
            len(forms),
            [len(own) for own in variants],
            num_retained,
            args.variants_per_epoch or math.inf,
            args.retained_per_edit or 0.0,
            [len(own) if args.retained_per_edit else 0 for own in own_retained],
        ),
        prefixes=prefixes,
        counts={kind: count for kind, count in counts.items() if count},
        prompts=[*(edit.prompt for own in kinds["paraphrases"] for edit in own), *(p.text for p in prompts)],
        preserved=preserved,
    )


def _with_writing_tokens(
    encoded: EncodedEdits,
    subjects: Mapping[Prompt, str | None],
    tokenizer: PreTrainedTokenizerBase,
    args: BreadthFirstConfig,
) -> EncodedEdits:
    """Return retained rows with the tokens that write into the delta: those of their own subjects."""
    mode = _gradient_tokens(args)
    if mode == "all":
        return encoded
    rows = prompts_writing(
        list(subjects), list(subjects.values()), tokenizer, mode, chat_template_kwargs=args.chat_template_kwargs
    )
    # an answer does not write
    filled = [own + [False] * (length - len(own)) for own, length in zip(rows, encoded.lengths.tolist(), strict=True)]
    return replace(encoded, writes=torch.tensor([each for own in filled for each in own]))


def _generated(
    edits: Sequence[Edit], model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig
) -> tuple[Sequence[Edit], tuple[str, ...], list[dict[Prompt, str | None]], torch.Tensor | None]:
    """Return edits with subjects, and what the base writes: prefixes, prompts beside each row, text to preserve."""
    with tqdm(total=_num_generated(edits, args), unit=" tokens", leave=False, disable=_is_silent(edits, args)) as bar:
        made = Preparations(model, args.preserve_cache_dir, bar)
        if _needs_subjects(args):
            made.begin("subjects of edits")
            found = find_subjects(model, tokenizer, edits, preparations=made)
            edits = [replace(edit, subject=subject) for edit, subject in zip(edits, found, strict=True)]
        made.begin("prefixes")
        prefixes = generate_prefixes(
            model, tokenizer, *_numbers(args.num_prefixes or 0), seed=args.seed, preparations=made
        )
        made.begin("other subjects")
        own = _own_retained(edits, model, tokenizer, args, made)
        made.begin("text to preserve")
        preserved = _preserved(model, tokenizer, args, made)
    if prefixes:
        logger.info("Prefixes: %s", prefixes)
    return edits, prefixes, own, preserved


def check_sources(edits: Sequence[Edit], args: BreadthFirstConfig) -> None:
    """Read the files that a recipe names, so that a mistake is found before a model is loaded.

    Raises:
        FileNotFoundError: if `retained_facts` is neither a file nor a dataset.
        ValueError: if a text or the retained facts cannot be read or are empty, or a training paraphrase is also a
            rephrasing for evaluation.
    """
    check_paraphrases(edits)
    if args.retained_facts:
        choose_retained_facts(None if args.retained_facts == LOCALITY else args.retained_facts, edits)
    if _reads_text(args) and args.preserve_text != GENERATED:
        joined_text(args.preserve_text)


def _needs_subjects(args: BreadthFirstConfig) -> bool:
    """Whether a recipe acts on subjects: those of edits that name none are then found."""
    retains = args.retained_per_edit and (args.retained_subjects or args.retained_relations)
    return bool(retains) or args.gradient_tokens in ("subject", "from_subject")


def _reads_text(args: BreadthFirstConfig) -> bool:
    return bool(args.preserve_energy_share or args.preserve_soft_strength)


def _numbers(num_prefixes: int) -> tuple[int, int]:
    """Return the number of short and of long prefixes: a third and two thirds, as in the source."""
    short = num_prefixes // 3
    return short, num_prefixes - short


def _num_generated(edits: Sequence[Edit], args: BreadthFirstConfig) -> int:
    """Return about how many tokens the base will generate."""
    names = min(MAX_SUBJECTS, (args.retained_subjects or 0) * len(edits))
    unknown = sum(not edit.subject for edit in edits) if _needs_subjects(args) else 0
    text = args.preserve_tokens if _reads_text(args) and args.preserve_text == GENERATED else 0
    return SUBJECT_TOKENS * unknown + LONG_PREFIX * (args.num_prefixes or 0) + NAME_TOKENS * names + text


def _is_silent(edits: Sequence[Edit], args: BreadthFirstConfig) -> bool:
    return bool(args.disable_tqdm) or args.local_process_index > 0 or not _num_generated(edits, args)


def _own_retained(
    edits: Sequence[Edit],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: BreadthFirstConfig,
    made: Preparations,
) -> list[dict[Prompt, str | None]]:
    """Return, for each row of an edit, the prompts to retain beside it in the form of that row, and their subjects."""
    swapped = _swapped(edits, model, tokenizer, args, made)
    related: list[list[str]] = [[] for _ in edits]
    if args.retained_relations:
        made.begin("other facts")
        candidates = same_subject(edits, args.seed, CANDIDATES * args.retained_relations)
        related = answered_otherwise(model, tokenizer, edits, candidates, args.retained_relations, preparations=made)
    rows: list[dict[Prompt, str | None]] = []
    found: set[Prompt] = set()
    for edit, others, own in zip(edits, swapped, related, strict=True):
        for form in in_forms([edit], args.chat_template):
            subjects = {Prompt(text, form.history): subject_of_swap(form, text) for text in others}
            subjects |= {Prompt(text, form.history): edit.subject for text in own}
            # edits with one subject share other facts about it
            rows.append({prompt: subject for prompt, subject in subjects.items() if prompt not in found})
            found |= subjects.keys()
    return rows


def _swapped(
    edits: Sequence[Edit],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: BreadthFirstConfig,
    made: Preparations,
) -> list[list[str]]:
    """Return the prompts of each edit with other subjects."""
    if not args.retained_subjects:
        return [[] for _ in edits]
    num = args.retained_subjects * len(edits)
    own = [edit.subject for edit in edits if edit.subject]
    names = generate_subjects(model, tokenizer, own, min(MAX_SUBJECTS, num), seed=args.seed, preparations=made)
    swapped = swapped_subjects(edits, num, seed=args.seed, subjects=names or None)
    if not any(swapped):
        logger.warning(
            "retained_subjects=%d has no effect: no edit has a subject that occurs in its prompt. Correct the "
            "subjects of the edits, or use retained_facts.",
            args.retained_subjects,
        )
    return swapped


def _retained_prompts(
    own: Sequence[Mapping[Prompt, str | None]],
    edits: Sequence[Edit],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: BreadthFirstConfig,
) -> dict[Prompt, str | None]:
    """Return the prompts to retain with their subjects: those made from the edits, edit by edit, then other facts."""
    prompts = {prompt: subject for beside in own for prompt, subject in beside.items()}
    if args.retained_facts:
        chosen = choose_retained_facts(
            None if args.retained_facts == LOCALITY else args.retained_facts,
            edits,
            args.num_retained_facts,
            how=args.retained_facts_choice,
            seed=args.seed,
            model=model,
            tokenizer=tokenizer,
        )
        prompts |= {prompt: None for prompt in prompts_in_forms(chosen, args.chat_template) if prompt not in prompts}
    return prompts


def _prefixed(edits: Sequence[Edit], prefixes: Sequence[str], args: BreadthFirstConfig) -> list[list[Edit]]:
    random = np.random.default_rng(args.seed)
    num = min(args.prefixes_per_edit or len(prefixes), len(prefixes))
    chosen = (sorted(random.permutation(len(prefixes))[:num].tolist()) for _ in edits)
    return [[with_prefix(edit, prefixes[n]) for n in own] for edit, own in zip(edits, chosen, strict=True)]


def _concatenated(edits: Sequence[Edit], answers: BaseAnswers | None, args: BreadthFirstConfig) -> list[list[Edit]]:
    facts = answers.edits if answers and args.num_concatenated else []
    if args.num_concatenated and not facts:
        raise ValueError(
            f"BreadthFirstConfig.num_concatenated={args.num_concatenated} needs retained facts with answers. "
            "Set retained_facts, or retained_subjects if the edits have subjects, and retained_answer_tokens."
        )
    random = np.random.default_rng(args.seed)
    chosen = random.integers(len(facts) or 1, size=(len(edits), args.num_concatenated)).tolist()
    return [
        [concatenated(edit, facts[n], args.target_separator) for n in own]
        for edit, own in zip(edits, chosen, strict=True)
    ]


def _answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], args: BreadthFirstConfig
) -> BaseAnswers | None:
    if not prompts:
        return None
    if args.retained_loss == "kl" and args.retained_answer_tokens == 1 and not args.num_concatenated:
        return unanswered(prompts, tokenizer, chat_template_kwargs=args.chat_template_kwargs)
    return base_answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=args.retained_answer_tokens or 1,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def _preserved(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig, made: Preparations
) -> torch.Tensor | None:
    return preserved_text(model, tokenizer, args, made) if _reads_text(args) else None


def preserved_text(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig, made: Preparations
) -> torch.Tensor:
    """Return the text to preserve, (windows, window) token ids: the recipe's own, or generated by the base."""
    texts: TextSource = args.preserve_text
    if texts == GENERATED:
        texts = base_texts(model, tokenizer, args.preserve_tokens, seed=args.seed, preparations=made)
    window = min(WINDOW, max_length(model) or WINDOW)
    return text_windows(texts, tokenizer, window, args.preserve_tokens, model)
