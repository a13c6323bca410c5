"""All that a run trains on, encoded: the edits, variants of them, and what is kept as the base has it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..adapters.provenance import Augmentation
from ..data.augmentation import concatenated, paraphrased, swapped_subjects, with_prefix
from ..data.edits import Edit
from ..data.encoding import EncodedEdits, encode_edits
from ..data.generated_text import base_texts, generate_prefixes, generate_subjects
from ..data.leaks import check_paraphrases
from ..data.retained_facts import (
    BaseAnswers,
    base_answers,
    choose_retained_facts,
    join_encoded,
    slice_encoded,
    unanswered,
)
from ..data.texts import joined_text, text_windows
from ..engine.model_state import max_length
from .config import GENERATED, LOCALITY, BreadthFirstConfig
from .training_rows import TrainingRows

logger = logging.getLogger(__name__)

NAMES = 192  # at most, that the base is asked for
PIECE = 24  # tokens of a kept piece of text
SCORED = 4  # of them, the last: what is scored costs the head, and the tokens before it are what it is scored by
WINDOW = 128  # tokens that are read at once for statistics of a text


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        encoded: all rows.
        rows: which of them are of which kind.
        prefixes: that the base generated.
        counts: how many rows there are beside the edits, by their kind.
        prompts: that were trained on beside those of the edits.
        preserved: token ids of what a projector is made from: text, and kept prompts.
        preserved_weights: what each of these tokens counts.
    """

    encoded: EncodedEdits
    rows: TrainingRows
    prefixes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    preserved: Sequence[Sequence[int]] | None = None
    preserved_weights: Sequence[Sequence[float]] | None = None

    def record(self) -> Augmentation:
        """Return what `locft_provenance.json` says of it."""
        return Augmentation.of_rows(prefixes=self.prefixes, counts=self.counts, prompts=self.prompts)

    def with_targets(self, more: EncodedEdits | None, num_known: int) -> TrainingData:
        """Return the same with more rows that are trained towards targets, as edits are, and have no variants.

        Args:
            more: these rows, if there are any.
            num_known: edits that the model has learned before.
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


def training_data(
    edits: Sequence[Edit], model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig
) -> TrainingData:
    """Make what the recipe asks for of some edits. What the base has to say to it, it is asked here.

    Args:
        edits: the edits.
        model: the model, whose adapter is disabled where the base is asked.
        tokenizer: its tokenizer.
        args: the recipe.

    Raises:
        ValueError: if an edit or a variant cannot be encoded for this model, a training paraphrase is a rephrasing for
            evaluation, or there is nothing to keep where the recipe asks for it.
    """
    check_paraphrases(edits)
    prefixes = generate_prefixes(model, tokenizer, *_numbers(args.num_prefixes or 0), seed=args.seed)
    if prefixes:
        logger.info("Prefixes: %s", prefixes)
    swapped = _swapped(edits, model, tokenizer, args)
    prompts = _retained_prompts(swapped, edits, model, tokenizer, args)
    answers = _answers(model, tokenizer, prompts, args)
    kinds = {
        "paraphrases": [paraphrased(edit) for edit in edits],
        "prefixed": _prefixed(edits, prefixes, args),
        "concatenated": _concatenated(edits, answers, args),
    }
    variants = [[variant for own in of_edit for variant in own] for of_edit in zip(*kinds.values(), strict=True)]
    trained = [*edits, *(variant for own in variants for variant in own)]
    encoded = encode_edits(
        trained,
        tokenizer,
        append_eos=args.append_eos,
        chat_template=args.chat_template,
        max_length=max_length(model),
    )
    windows = _text(model, tokenizer, args)
    kept = {"retained facts": answers.encoded} if answers is not None and args.retained_per_edit else {}
    if args.kept_text_pieces and args.retained_per_edit:
        assert windows is not None
        kept["pieces of text to keep"] = _pieces(windows, args.kept_text_pieces, args.seed)
    counts = {kind: sum(map(len, rows)) for kind, rows in kinds.items()} | {kind: len(r) for kind, r in kept.items()}
    preserved, weights = _preserved(windows, answers, args)
    return TrainingData(
        encoded=join_encoded([encoded, *kept.values()]),
        rows=TrainingRows(
            len(edits),
            [len(own) for own in variants],
            sum(map(len, kept.values())),
            args.variants_per_epoch or math.inf,
            args.retained_per_edit or 0.0,
            [len(own) if args.retained_per_edit else 0 for own in swapped],
        ),
        prefixes=prefixes,
        counts={kind: count for kind, count in counts.items() if count},
        prompts=[*(edit.prompt for own in kinds["paraphrases"] for edit in own), *prompts],
        preserved=preserved,
        preserved_weights=weights,
    )


def check_sources(edits: Sequence[Edit], args: BreadthFirstConfig) -> None:
    """Read what a recipe names beside the edits, so that a mistake need not wait for a model to load.

    Raises:
        FileNotFoundError: if `retained_facts` is neither a file nor a dataset.
        ValueError: if a text or the facts to keep cannot be read, or nothing is left of them, or a training paraphrase
            is a rephrasing for evaluation.
    """
    check_paraphrases(edits)
    if args.retained_facts:
        choose_retained_facts(None if args.retained_facts == LOCALITY else args.retained_facts, edits)
    if _reads_text(args) and args.preserve_text != GENERATED:
        joined_text(args.preserve_text)


def _reads_text(args: BreadthFirstConfig) -> bool:
    return bool(args.kept_text_pieces or args.preserve_energy_share or args.preserve_soft_strength)


def _numbers(num_prefixes: int) -> tuple[int, int]:
    """Return how many prefixes are short and how many are long: a third and two thirds, as in the source."""
    short = num_prefixes // 3
    return short, num_prefixes - short


def _swapped(
    edits: Sequence[Edit], model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig
) -> list[list[str]]:
    """Return each edit's prompts about other subjects."""
    if not args.retained_subjects:
        return [[] for _ in edits]
    num = args.retained_subjects * len(edits)
    own = [edit.subject for edit in edits if edit.subject]
    names = generate_subjects(model, tokenizer, own, min(NAMES, num), seed=args.seed)
    swapped = swapped_subjects(edits, num, seed=args.seed, subjects=names or None)
    if not any(swapped):
        logger.warning("No edit names a subject that its prompt holds, so that retained_subjects has nothing to keep.")
    return swapped


def _retained_prompts(
    swapped: Sequence[Sequence[str]],
    edits: Sequence[Edit],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: BreadthFirstConfig,
) -> list[str]:
    """Return what is kept: what was made of the edits, edit by edit, then facts that are none of these."""
    prompts = [prompt for own in swapped for prompt in own]
    if args.retained_facts:
        prompts += choose_retained_facts(
            None if args.retained_facts == LOCALITY else args.retained_facts,
            edits,
            args.num_retained_facts,
            how=args.retained_facts_choice,
            seed=args.seed,
            model=model,
            tokenizer=tokenizer,
        )
    return list(dict.fromkeys(prompts))


def _prefixed(edits: Sequence[Edit], prefixes: Sequence[str], args: BreadthFirstConfig) -> list[list[Edit]]:
    random = np.random.default_rng(args.seed)
    num = min(args.prefixes_per_edit or len(prefixes), len(prefixes))
    chosen = (sorted(random.permutation(len(prefixes))[:num].tolist()) for _ in edits)
    return [[with_prefix(edit, prefixes[n]) for n in own] for edit, own in zip(edits, chosen, strict=True)]


def _concatenated(edits: Sequence[Edit], answers: BaseAnswers | None, args: BreadthFirstConfig) -> list[list[Edit]]:
    facts = answers.edits if answers and args.num_concatenated else []
    if args.num_concatenated and not facts:
        raise ValueError(
            f"BreadthFirstConfig.num_concatenated={args.num_concatenated} needs kept facts with answers to go on "
            "with: give retained_facts, or retained_subjects where edits have subjects, and retained_answer_tokens."
        )
    random = np.random.default_rng(args.seed)
    chosen = random.integers(len(facts) or 1, size=(len(edits), args.num_concatenated)).tolist()
    return [[concatenated(edit, facts[n]) for n in own] for edit, own in zip(edits, chosen, strict=True)]


def _answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], args: BreadthFirstConfig
) -> BaseAnswers | None:
    if not prompts:
        return None
    if args.retained_loss == "kl" and args.retained_answer_tokens == 1 and not args.num_concatenated:
        return unanswered(prompts, tokenizer, chat_template=args.chat_template)
    return base_answers(
        model, tokenizer, prompts, max_new_tokens=args.retained_answer_tokens or 1, chat_template=args.chat_template
    )


def _text(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: BreadthFirstConfig) -> torch.Tensor | None:
    if not _reads_text(args):
        return None
    text = args.preserve_text
    texts = base_texts(model, tokenizer, args.preserve_tokens, seed=args.seed) if text == GENERATED else text
    window = min(WINDOW, max_length(model) or WINDOW)
    return text_windows(texts, tokenizer, window, args.preserve_tokens, model)


def _pieces(windows: torch.Tensor, number: int, seed: int) -> EncodedEdits:
    """Cut pieces out of windows of text, of which the last tokens are scored."""
    pieces = windows[:, : windows.shape[1] // PIECE * PIECE].reshape(-1, PIECE)
    chosen = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:number]
    pieces = pieces[chosen]
    return EncodedEdits(
        pieces.flatten().int(), torch.arange(len(pieces) + 1) * PIECE, torch.full((len(pieces),), PIECE - SCORED)
    )


def _preserved(
    windows: torch.Tensor | None, answers: BaseAnswers | None, args: BreadthFirstConfig
) -> tuple[list[list[int]], list[list[float]]] | tuple[None, None]:
    """Return what a projector is made from: all tokens of the text, and the kept prompts' last, which answer them."""
    if windows is None or not (args.preserve_energy_share or args.preserve_soft_strength):
        return None, None
    tokens: list[list[int]] = windows.tolist()
    weights = [[1 / windows.numel()] * windows.shape[1]] * len(windows)
    if answers is not None and args.preserve_prompts:
        starts = answers.encoded.target_starts.tolist()
        prompts = [answers.encoded[n].input_ids[:start].tolist() for n, start in enumerate(starts)]
        tokens += prompts
        weights += [[0.0] * (len(prompt) - 1) + [args.preserve_prompts / len(prompts)] for prompt in prompts]
    return tokens, weights
