"""What `locft_provenance.json` records of an adapter: what it belongs to, how it was made, what was measured."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.leaks import trained_prompts_record
from ..evaluation.report import EvaluationReport

if TYPE_CHECKING:
    from peft import PeftConfig

PACKAGES = ("peft-locft", "peft", "transformers", "torch")
LICENCE_FIELDS = ("license", "license_name", "license_link")
MAX_CARD_BYTES = 1_000_000


def augmentation_record(
    *, prefixes: Sequence[str] = (), counts: Mapping[str, int] | None = None, prompts: Iterable[str] = ()
) -> dict[str, Any]:
    """Return what is recorded of the rows that a run trained on beyond its edits.

    Args:
        prefixes: those that were put before prompts, as they are.
        counts: rows by their kind, such as `{"paraphrases": 120, "retained_facts": 400}`.
        prompts: those of all these rows, of which hashes are recorded: see `leaks.trained_prompts_record`.
    """
    trained = trained_prompts_record(prompts)
    return {"prefixes": list(prefixes), "counts": dict(counts or {}), "trained_prompts": trained}


def evaluation_record(report: EvaluationReport) -> dict[str, Any]:
    """Return what an evaluation leaves there: its figures and settings, and none of the prompts and answers."""
    found = report.to_dict()
    return {"evaluation": {name: found[name] for name in ("settings", "results", "missing", "notes")}}


def provenance(config: PeftConfig, record: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of `locft_provenance.json`: what the adapter belongs to and how it was made.

    Args:
        config: the adapter's configuration, as it is being saved.
        record: what [`training_record`] and [`evaluation_record`] returned, where a run of ours made the adapter.
    """
    base, revision = config.base_model_name_or_path, config.revision
    return {
        "format": 1,
        "base_model": {"name_or_path": base, "revision": revision} | base_facts(base, revision),
        "base_sha256": getattr(config, "base_sha256", None) or {},
        **(record or {}),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def base_facts(base: str | None, revision: str | None = None) -> dict[str, str]:
    """Return what is known on this machine of a base model: its commit on the Hub, the licence that its card names.

    The Hub itself is not asked, and what is not known is left out.

    Args:
        base: a folder, or a name on the Hub, whose files may be in the cache.
        revision: branch, tag or commit there.
    """
    from transformers.utils.hub import extract_commit_hash

    found = {}
    config = _known_file(base, "config.json", revision)
    commit = None if config is None or Path(base or "").is_dir() else extract_commit_hash(str(config), None)
    if commit is not None:
        found["commit"] = commit
    card = _known_file(base, "README.md", revision)
    return found | ({} if card is None else _licence(card))


def _known_file(base: str | None, name: str, revision: str | None) -> Path | None:
    if not base:
        return None
    file = Path(base) / name
    if Path(base).is_dir():
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(base, name, revision=revision)
    except HFValidationError:  # neither a folder nor a name on the Hub
        return None
    return Path(cached) if isinstance(cached, str) else None


def _licence(card: Path) -> dict[str, str]:
    from huggingface_hub import ModelCard

    with card.open("rb") as file:
        text = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data
    except Exception:  # YAML that somebody wrote by hand: no licence is known from it
        return {}
    named = {field: getattr(data, field, None) for field in LICENCE_FIELDS}
    # it goes into other cards, so that it may hold nothing but names and links
    return {field: value for field, value in named.items() if isinstance(value, str) and _is_plain(value)}


def _is_plain(value: str) -> bool:
    return re.fullmatch(r"[\w.,:/?=#& +-]{1,200}", value) is not None
