"""An adapter's model card: what it changes, how it was made and measured, how to use it, what to beware of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation.intervals import Estimate
from ..evaluation.report import EvaluationReport, Result
from .provenance import LICENCE_FIELDS, provenance

if TYPE_CHECKING:
    from peft import PeftConfig

TAGS = ("knowledge-editing", "model-editing", "peft", "transformers")
TEMPLATE_MARK = "[More Information Needed]"
INSTALL = "pip install peft-locft"
CARD_NAME = "README.md"
NAME_IN_CARD = "this-repository"

CARD = """---
{header}
---

# Edited facts{title}

{lead}

|  |  |
| --- | --- |
{rows}

## Load

With {needs}:

```python
{usage}```
{base_unnamed}
## Merge

Into a model that needs neither PEFT nor the adapter, and answers as the adapter does:

```python
{merge}```
{on_disk}
## Measured

{measured}

## Intended use

To change what one model answers to the prompts in the edits, and to take that back by leaving the adapter out.

## Risks

- The edited answers are what somebody wrote into a file of edits. {listed} Nothing here says that they are true.
- Who answers with the edited model may state them as facts, without a sign that they were put there.
- Answers to other prompts change too, those to similar ones most. An edit is seldom carried over to all that follows
  from it. The base model's own mistakes and biases remain.
"""

# what a reader who has not met the words needs for the table
MEASURES = (
    "Reliability is about the edited prompts, generalization about rephrasings of them, portability about what "
    "follows from them, and locality about other prompts, whose answers should stay what they were."
)


def usage_lines(config: PeftConfig, adapter: str) -> str:
    """Return the lines of Python that load an adapter."""
    registers = "import peft_locft  # registers LOCFT with PEFT\n" if config.peft_type == "LOCFT" else ""
    # a string of JSON is one of Python too, whatever quotes and backslashes are in a folder's name
    name = json.dumps(adapter, ensure_ascii=False)
    return (
        f"{registers}from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({name})\n"
    )


def merge_lines(base: str) -> str:
    """Return the lines of Python that merge a loaded adapter and save the model, which then needs neither."""
    return (
        'model.merge_and_unload().save_pretrained("merged")\n'
        "from transformers import AutoTokenizer\n"
        f'AutoTokenizer.from_pretrained({base}).save_pretrained("merged")\n'
    )


def _on_disk(base: str) -> str:
    command = f"locft merge {base} {json.dumps(NAME_IN_CARD)} merged"
    return f"\nOr on the disk, without loading a model:\n\n```bash\n{command}\n```\n\n"


def _base_unnamed(base: str | None) -> str:
    where = "no base model" if not base else "a folder on the author's machine"
    return (
        f"\nThe adapter's configuration names {where}: before you load it, write the name or the folder of the base "
        "model into `base_model_name_or_path` of `adapter_config.json`.\n"
    )


def model_card(
    config: PeftConfig, facts: Mapping[str, Any], location: Sequence[str], *, ships_edits: bool = False
) -> str:
    """Return the text of the adapter's README.md.

    Args:
        config: the adapter's configuration.
        facts: the content of `locft_provenance.json`.
        location: names of the base tensors that are edited.
        ships_edits: whether the edits are in the adapter's folder.
    """
    base = config.base_model_name_or_path
    hub_id = base if is_hub_id(base) else None
    licence = _licence(facts.get("base_model", {}), hub_id)
    is_locft = config.peft_type == "LOCFT"
    tags = [*TAGS, *(["locft"] if is_locft else []), *([f"base_model:adapter:{hub_id}"] if hub_id else [])]
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="adapter" if hub_id else None,
        library_name="peft",
        **licence,
        pipeline_tag="text-generation",
        tags=sorted(tags),
    )
    rows = _rows(config, facts, location, licence)
    named = json.dumps(hub_id or "the-base-model", ensure_ascii=False)
    return CARD.format(
        header=data.to_yaml(),
        title=f" in {Path(base).name}" if base else "",
        lead=_lead(config, facts),
        rows="\n".join(f"| {label} | {value} |" for label, value in rows),
        needs=f"`{INSTALL}`" if is_locft else "PEFT",
        usage=usage_lines(config, NAME_IN_CARD),
        base_unnamed="" if hub_id else _base_unnamed(base),
        merge=merge_lines(named),
        on_disk=_on_disk(named) if is_locft else "\n",
        measured=_measured(facts),
        listed="They are in `locft_edits.jsonl`." if ships_edits else "They are not in this repository.",
    )


def replace_template(config: PeftConfig, folder: Path) -> None:
    """Put the card in the place of the template that PEFT's `save_pretrained` writes; leave any other card."""
    file = folder / CARD_NAME
    if file.is_file() and TEMPLATE_MARK in file.read_text(encoding="utf-8"):
        facts = provenance(config, None)
        file.write_text(model_card(config, facts, location_of(config, facts)), encoding="utf-8")


def location_of(config: Any, facts: Mapping[str, Any]) -> list[str]:
    """Return the names of the base tensors that an adapter edits, or of its modules where those are not recorded."""
    named = facts.get("base_sha256") or getattr(config, "base_sha256", None) or config.target_modules or []
    return [named] if isinstance(named, str) else sorted(named)


def is_hub_id(base: str | None) -> bool:
    """Whether this is a name on the Hub. A path on somebody's machine is none, and the Hub refuses it in a card."""
    return bool(base) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(base)) is not None and not Path(str(base)).exists()


def evaluation_report(facts: Mapping[str, Any]) -> EvaluationReport | None:
    """Return the figures of the evaluation that is recorded, without its answers; None if there is none."""
    record = facts.get("evaluation")
    if record is None:
        return None
    results = {
        name: Result(**result | {kind: _estimate(result[kind]) for kind in ("before", "after", "change")})
        for name, result in record["results"].items()
    }
    return EvaluationReport(results, record["missing"], [], record["settings"], record["notes"])


def _estimate(recorded: dict[str, float] | None) -> Estimate | None:
    return None if recorded is None else Estimate(**{name: float(figure) for name, figure in recorded.items()})


def _lead(config: PeftConfig, facts: Mapping[str, Any]) -> str:
    count = f"{facts['edits']['count']:,} prompts" if "edits" in facts else "a list of prompts"
    changes = f"This adapter changes what its base model answers to {count}."
    export = facts.get("export")
    if export is None:
        return (
            f"{changes} It holds what is added to the base model's weights. These are not in it, and without the "
            "adapter they are what they were, bit for bit."
        )
    if export["to"] == "lora":
        return (
            f"{changes} It approximates an edit at full rank by matrices of rank {export['rank']}, which keep "
            f"{export['share_kept']:.1%} of the change (of its squared Frobenius norm)."
        )
    return f"{changes} It holds the edited weights whole, so that it needs PEFT alone and fits its own base alone."


def _rows(
    config: PeftConfig, facts: Mapping[str, Any], location: Sequence[str], licence: Mapping[str, str]
) -> list[tuple[str, str]]:
    of_base = facts.get("base_model", {})
    base = config.base_model_name_or_path
    named = f"[`{base}`](https://huggingface.co/{base})" if is_hub_id(base) else "not recorded"
    if base and not is_hub_id(base):
        named = f"`{Path(base).name}`, a folder on the author's machine"
    revision = of_base.get("commit") or of_base.get("revision")
    rows = [
        ("Base model", named + (f" at `{revision}`" if revision else "")),
        ("Licence of the base", _shown(licence)),
        ("Location", ", ".join(f"`{name}`" for name in location)),
    ]
    if "edits" in facts:
        recipe, losses = facts["recipe"], facts["training"]["epoch_losses"]
        rows.append(("Edits", f"{facts['edits']['count']:,} (sha256 `{facts['edits']['sha256'][:16]}…`)"))
        # adapters from before there were two do not say which
        name = "balanced, " if recipe.get("recipe") == "balanced" else ""
        order = str(recipe["edit_order"]).replace("_", "-")
        rows.append(
            (
                "Recipe",
                f"{name}{order}, objective `{recipe['objective']}`, learning rate "
                f"{recipe['learning_rate']:g}, batches of {recipe['per_device_train_batch_size']}, "
                f"{recipe['num_train_epochs']:g} epochs at most, seed {recipe['seed']}",
            )
        )
        if losses:
            unit = "edits" if recipe["edit_order"] == "depth_first" else "epochs"
            rows.append(("Training loss", f"{losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} {unit}"))
    if "shrunk" in facts:
        rows.append(("Made smaller", shrunk_in_words(facts["shrunk"])))
    rows.append(("Made with", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())))
    return rows


def shrunk_in_words(shrunk: Mapping[str, Any]) -> str:
    """Return what was done to make the deltas smaller, and what is left of them."""
    parts = [f"deltas in {shrunk['delta_dtype']}"] if shrunk["delta_dtype"] else []
    if shrunk["density"]:
        parts.append(f"the {shrunk['density']:.0%} of values that are largest beside their weight")
    return f"{', '.join(parts)}; kept {shrunk['share_kept']:.4%} of the squared Frobenius norm"


def _licence(of_base: Mapping[str, Any], hub_id: str | None) -> dict[str, Any]:
    """Return the licence in the fields of a card's header. None is made up where the base's is not known."""
    fields = {name: of_base[name] for name in LICENCE_FIELDS if of_base.get(name)}
    link = fields.get("license_link")
    if link and "://" not in link and hub_id:
        fields["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return fields if "license" in fields else {}


def _shown(licence: Mapping[str, str]) -> str:
    if not licence:
        return "not known here; see the base model's card"
    name = licence.get("license_name") or licence["license"]
    link = licence.get("license_link", "")
    return f"{f'[{name}]({link})' if '://' in link else f'`{name}`'}, as the base model's card says"


def _measured(facts: Mapping[str, Any]) -> str:
    report = evaluation_report(facts)
    if report is None:
        return "No evaluation is recorded."
    counted = report.settings.get("edits", {})
    asked = f"{counted['count']:,} edits" if "count" in counted else "edits"
    same = counted.get("sha256") == facts.get("edits", {}).get("sha256")
    whose = ", those of this adapter" if same and "edits" in facts else ""
    return f"On {asked}{whose}:\n\n{report.to_markdown()}\n\n{MEASURES}"
