"""An adapter's model card: what the adapter changes, how it was made and measured, how to use it, its risks."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from .base_model import LICENCE_FIELDS, BaseModel, is_plain
from .provenance import Provenance, printable
from .shipped_edits import EDITS_NAME

if TYPE_CHECKING:
    from jinja2 import Template
    from peft import PeftConfig

TAGS = ("knowledge-editing", "model-editing", "peft", "transformers")
TEMPLATE_MARK = "[More Information Needed]"
INSTALL = "pip install peft-locft"
CARD_NAME = "README.md"
NAME_IN_CARD = "this-repository"


def usage_lines(config: PeftConfig, adapter: str) -> str:
    """Return the lines of Python that load an adapter."""
    registers = "import peft_locft  # registers LOCFT with PEFT\n" if config.peft_type == "LOCFT" else ""
    # PEFT's name for the class of a base that AutoModelForCausalLM does not load, such as one that reads images
    recorded = (config.auto_mapping or {}).get("base_model_class", "ForCausalLM")
    is_causal = config.task_type is not None or recorded.endswith(("ForCausalLM", "LMHeadModel"))
    auto_class = "AutoPeftModelForCausalLM" if is_causal else "AutoPeftModel"
    return f"{registers}from peft import {auto_class}\nmodel = {auto_class}.from_pretrained({_quoted(adapter)})\n"


def model_card(
    config: PeftConfig, provenance: Provenance, location: Sequence[str], *, ships_edits: bool = False
) -> str:
    """Return the text of the adapter's README.md.

    Args:
        config: the adapter's configuration.
        provenance: the adapter's provenance.
        location: names of the edited base tensors.
        ships_edits: whether the adapter's folder contains the edits.
    """
    base, run, evaluation = config.base_model_name_or_path, provenance.run, provenance.evaluation
    hub_id = base if is_hub_id(base) else None
    licence = _licence(provenance.base_model, hub_id)
    rows = [
        ("Base model", _base_row(base, provenance.base_model)),
        ("Licence of the base", _licence_row(licence)),
        ("Location", _markdown(", ".join(f"`{printable(name)}`" for name in location))),
        *((label.capitalize(), _markdown(value)) for label, value in provenance.rows(detailed=False)),
    ]
    return _template().render(
        header=Markup(_header(config, hub_id, licence)),
        hub_id=hub_id,
        base_name=_markdown(printable(Path(base).name)) if base else "",
        prompts="a list of prompts" if run is None else f"{run.edits.count:,} prompts",
        export=provenance.export,
        rows=rows,
        is_locft=config.peft_type == "LOCFT",
        install=INSTALL,
        usage=Markup(usage_lines(config, NAME_IN_CARD)),
        base=Markup(_quoted(hub_id or "the-base-model")),
        adapter=Markup(_quoted(NAME_IN_CARD)),
        evaluated=_evaluated(provenance),
        report=None if evaluation is None else _without_html(evaluation.to_markdown()),
        ships_edits=ships_edits,
        edits_name=EDITS_NAME,
    )


def replace_template(config: PeftConfig, folder: Path) -> None:
    """Replace the empty template of PEFT's `save_pretrained` by the card; leave any other card."""
    file = folder / CARD_NAME
    if file.is_file() and TEMPLATE_MARK in file.read_text(encoding="utf-8"):
        provenance = Provenance.of_config(config)
        file.write_text(model_card(config, provenance, location_of(config, provenance)), encoding="utf-8")


def location_of(config: Any, provenance: Provenance) -> list[str]:
    """Return the names of the base tensors that an adapter edits, or else of its target modules."""
    named = provenance.base_sha256 or getattr(config, "base_sha256", None) or config.target_modules or []
    return [named] if isinstance(named, str) else sorted(named)


def is_hub_id(base: str | None) -> bool:
    """Whether this is a name on the Hub, not a local path. The Hub refuses paths in a card."""
    return bool(base) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(base)) is not None and not Path(str(base)).exists()


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # not ModelCard.from_template: it does not escape, and hides missing values
    environment = Environment(
        loader=PackageLoader("peft_locft.adapters"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.jinja")


def _header(config: PeftConfig, hub_id: str | None, licence: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    tags = [*TAGS, *(["locft"] if config.peft_type == "LOCFT" else [])]
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="adapter" if hub_id else None,
        library_name="peft",
        **licence,
        pipeline_tag="text-generation",
        tags=sorted([*tags, *([f"base_model:adapter:{hub_id}"] if hub_id else [])]),
    )
    return str(data.to_yaml())


def _quoted(text: str) -> str:
    # a JSON string is also a Python string, with quotes and backslashes escaped
    return json.dumps(text, ensure_ascii=False)


def _without_html(text: str) -> Markup:
    # leave quotes readable: they mean nothing in Markdown
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _markdown(text: str) -> Markup:
    """Return text as escaped Markdown; parts between backticks become code."""
    parts = text.split("`")
    shown = [re.sub(r"([\\|\[\]*_])", r"\\\1", _without_html(part)) for part in parts[::2]]
    code = [part.replace("|", r"\|") for part in parts[1::2]]
    return Markup("`".join(part for pair in zip(shown, [*code, ""], strict=True) for part in pair).removesuffix("`"))


def _base_row(base: str | None, recorded: BaseModel) -> Markup:
    if not base:
        named = Markup("not recorded")
    elif is_hub_id(base):
        named = Markup(f"[`{base}`](https://huggingface.co/{base})")
    else:
        named = _markdown(f"`{printable(Path(base).name)}`, a folder on the author's machine")
    revision = recorded.commit or recorded.revision
    return named + (_markdown(f" at `{printable(revision)}`") if revision else "")


def _licence(base: BaseModel, hub_id: str | None) -> dict[str, str]:
    """Return the licence as fields of a card's header; empty if the base's is unknown."""
    named = {name: getattr(base, name) for name in LICENCE_FIELDS}
    found = {name: value for name, value in named.items() if value and is_plain(value)}
    link = found.get("license_link")
    if link and "://" not in link and hub_id:
        found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return found if "license" in found else {}


def _licence_row(licence: dict[str, str]) -> Markup:
    if not licence:
        return Markup("unknown; see the base model's card")
    name, link = licence.get("license_name") or licence["license"], licence.get("license_link", "")
    shown = Markup(f"[{_markdown(name)}]({escape(link)})") if "://" in link else Markup(f"`{name}`")
    return shown + Markup(", as the base model's card says")


def _evaluated(provenance: Provenance) -> str:
    if provenance.evaluation is None:
        return ""
    edits, run = provenance.evaluation.settings.get("edits"), provenance.run
    if edits is None:
        return "edits"
    of_the_run = run is not None and edits["sha256"] == run.edits.sha256
    return f"{edits['count']:,} edits{', those of this adapter' if of_the_run else ''}"
