"""What an evaluation asks of edits: their own prompts and probes, and what contexts and further probes add."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from ..data.edits import Edit, Message, Prompt
from ..data.relations import is_english, same_subject
from .belief import BeliefProbes, belief_items, belief_probes
from .config import EvaluationConfig
from .contexts import NEEDS_CHAT, NEEDS_ENGLISH, NUM_TOKENS, in_context
from .items import EvalItem, eval_items
from .kinds import OTHER_LANGUAGE_KINDS, PUBLISHED, Kind, asked_kinds
from .long_answers import long_items
from .rings import NUM_NAMES, PER_RING, ring_items, same_relation, unrelated


@dataclass(frozen=True)
class Sources:
    """Where what the edits do not hold comes from. A function is called only if it is needed.

    Args:
        tokenizer: the model's.
        trained: hashes of the prompts that the adapter was trained on.
        names: returns other subjects, given those of the edits and how many.
        answers: returns the base's greedy answer to the prompt of each edit; `None` without a base.
    """

    tokenizer: PreTrainedTokenizerBase
    trained: Set[str]
    names: Callable[[Sequence[str], int], Sequence[str]]
    answers: Callable[[Sequence[Edit]], Sequence[str | None]]


@dataclass
class AskedItems:
    """The items of an evaluation.

    Args:
        items: the published ones first.
        kinds: the kinds of items that were wanted, by name; there may be no item of a kind.
        notes: what was left out, and why.
    """

    items: list[EvalItem]
    kinds: dict[str, Kind]
    notes: list[str] = field(default_factory=list)


def asked_items(edits: Sequence[Edit], args: EvaluationConfig, sources: Sources) -> AskedItems:
    """Return the items that settings ask for.

    Args:
        edits: the edits.
        args: the settings, with a chat template that is on, off or both. If both, probes of belief are asked in the
            template, since they are questions, and other added items as text.
        sources: where what the edits do not hold comes from.
    """
    asked = AskedItems(eval_items(edits, args.chat_template), asked_kinds(args.contexts, args.probes))
    if any(edit.cross_lingual for edit in edits):
        asked.kinds = PUBLISHED | OTHER_LANGUAGE_KINDS | asked.kinds
    only_chat = args.chat_template == "on"
    _add_contexts(asked, edits, args.contexts, sources.tokenizer, only_chat)
    if "belief" in args.probes:
        probes = belief_probes(edits, _old_answers(edits, sources), args.seed)
        asked.items += belief_items(edits, probes.probes, in_chat=args.chat_template != "off")
        asked.notes += _left_out(probes, len(edits))
    if "locality_rings" in args.probes:
        _add_rings(asked, edits, args.seed, sources, only_chat)
    if "multi_hop" in args.probes:
        asked.items += [
            EvalItem(
                number,
                "portability_multi_hop",
                probe.prompt,
                probe.answer,
                None,
                _history(edit, only_chat),
                probe.aliases,
                language=probe.language,
            )
            for number, edit in enumerate(edits)
            for probe in edit.portability
            if probe.kind == "multi_hop"
        ]
    if "long_answers" in args.probes:
        asked.items += long_items(edits, sources.tokenizer, in_chat=only_chat)
    return asked


def _history(edit: Edit, in_chat: bool) -> tuple[Message, ...] | None:
    return edit.history if edit.history is not None or not in_chat else ()


def _add_contexts(
    asked: AskedItems,
    edits: Sequence[Edit],
    contexts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    in_chat: bool,
) -> None:
    others = sum(not is_english(edit) for edit in edits)
    for context in contexts:
        if context in NEEDS_CHAT and not tokenizer.chat_template:
            for kind in (f"reliability_{context}", f"generalization_{context}"):
                asked.kinds[kind] = replace(asked.kinds[kind], none="the tokenizer has no chat template")
            continue
        for number, edit in enumerate(edits):
            if context in NEEDS_ENGLISH and not is_english(edit):
                continue
            prompts = [("reliability", edit.prompt), *(("generalization", each) for each in edit.rephrasings)]
            for kind, text in prompts:
                prompt = in_context(Prompt(text, _history(edit, in_chat)), context)
                asked.items.append(
                    EvalItem(
                        number,
                        f"{kind}_{context}",
                        prompt.text,
                        edit.target,
                        None,
                        prompt.history,
                        edit.aliases,
                        max_new_tokens=NUM_TOKENS,
                    )
                )
    if others and set(contexts) & set(NEEDS_ENGLISH):
        asked.notes.append(
            f"{others} of {len(edits)} edits were asked in no context but the chat template: the language is not "
            "English."
        )


def _old_answers(edits: Sequence[Edit], sources: Sources) -> list[str | None]:
    """Return the answer of each edit before it: the data set's, or else the base's own."""
    unknown = [number for number, edit in enumerate(edits) if edit.ground_truth is None]
    old = [edit.ground_truth for edit in edits]
    if unknown:
        for number, answer in zip(unknown, sources.answers([edits[number] for number in unknown]), strict=True):
            old[number] = answer or None
    return old


def _left_out(probes: BeliefProbes, num_edits: int) -> Iterator[str]:
    """Yield a note for each reason for which probes of belief are not made."""
    by_reason: dict[tuple[str, int], list[str]] = {}
    for (kind, why), count in probes.left_out.items():
        by_reason.setdefault((why, count), []).append(f"belief_{kind}")
    for (why, count), kinds in by_reason.items():
        yield f"{count} of {num_edits} edits have no probe for {', '.join(kinds)}: {why}."


def _add_rings(asked: AskedItems, edits: Sequence[Edit], seed: int, sources: Sources, in_chat: bool) -> None:
    subjects = [edit.subject for edit in edits if edit.subject]
    names = sources.names(subjects, NUM_NAMES) if subjects else []
    rings = {
        "same_subject": same_subject(edits, seed, PER_RING, sources.trained),
        "same_relation": same_relation(edits, names, sources.trained, seed),
        "unrelated": unrelated(edits, seed),
    }
    asked.items += ring_items(edits, rings, in_chat=in_chat)
