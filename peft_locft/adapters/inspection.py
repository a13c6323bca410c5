"""What an adapter folder holds, read and verified without building a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..io.checkpoint import Checkpoint
from ..io.files import sha256_of_file, size
from .card import evaluation_report, shrunk_in_words, usage_lines
from .edited_parameters import edited_parameters
from .reading import SAFETENSORS_WEIGHTS_NAME, CheckedAdapter, check_adapter
from .shipped_edits import EDITS_NAME, shipped_edits

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """What an adapter folder says about itself, and what of it was verified.

    Attributes:
        folder: where it is.
        config: its `adapter_config.json`.
        tensors: name, dtype and shape of every tensor in its weights file.
        num_bytes: size of the weights file.
        facts: its `locft_provenance.json`, empty where it has none.
        verified: what was found to be so, a sentence each.
    """

    folder: Path
    config: PeftConfig
    tensors: dict[str, tuple[str, tuple[int, ...]]]
    num_bytes: int
    facts: dict[str, Any]
    verified: tuple[str, ...]

    def __str__(self) -> str:
        rows = [*self._what_it_is(), *self._how_it_was_made(), *(("verified", what) for what in self.verified)]
        table = "\n".join(f"{key:<12}{value}" for key, value in rows)
        return f"{table}\n\nLoad it with:\n\n{usage_lines(self.config, str(self.folder))}"

    def _what_it_is(self) -> Iterator[tuple[str, str]]:
        config: Any = self.config
        of_base = self.facts.get("base_model", {})
        yield "method", str(getattr(config.peft_type, "value", config.peft_type))
        revision = of_base.get("commit") or config.revision
        at_revision = f" at {revision}" if revision else ""
        yield "base model", _printable(f"{config.base_model_name_or_path or 'not recorded'}{at_revision}")
        if of_base.get("license"):
            yield "licence", f"{of_base.get('license_name') or of_base['license']}, of the base model"
        yield "size", size(self.num_bytes)
        for name, (dtype, shape) in self.tensors.items():
            yield "trained", f"{_short(name)}  {dtype} {' x '.join(map(str, shape))}"
        if getattr(config, "scale", 1.0) != 1.0 and config.peft_type == "LOCFT":
            yield "scale", f"{config.scale:g}"
        if "shrunk" in self.facts:
            yield "smaller", shrunk_in_words(self.facts["shrunk"])
        export = self.facts.get("export")
        if export is not None:
            kept = f" of rank {export['rank']}, keeps {export['share_kept']:.2%}" if export["to"] == "lora" else ""
            yield "export", f"of a LocFT adapter, to {export['to']}{kept}"

    def _how_it_was_made(self) -> Iterator[tuple[str, str]]:
        if "edits" in self.facts:
            recipe, losses = self.facts["recipe"], self.facts["training"]["epoch_losses"]
            yield "edits", str(self.facts["edits"]["count"])
            if "continued" in self.facts:
                yield "continued", ", ".join(f"{count} {name}" for name, count in self.facts["continued"].items())
            yield "recipe", ", ".join(f"{key} {_printable(str(value))}" for key, value in recipe.items())
            if losses:
                unit = "edits" if recipe["edit_order"] == "depth_first" else "epochs"
                yield "loss", f"{losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} {unit}"
        augmentation = self.facts.get("augmentation")
        if augmentation is not None:
            counts = {"prefixes": len(augmentation["prefixes"])} | augmentation["counts"]
            words = [f"{count} {_printable(name).replace('_', ' ')}" for name, count in counts.items() if count]
            yield "augmented", ", ".join(words) or "with nothing"
            yield from (("prefix", _printable(prefix)) for prefix in augmentation["prefixes"])
        report = evaluation_report(self.facts)
        for name, result in {} if report is None else report.results.items():
            yield "measured", f"{name}  {f'{result.before} → ' if result.before else ''}{result.after}"
        if self.facts.get("versions"):
            yield "made with", ", ".join(f"{name} {version}" for name, version in self.facts["versions"].items())


def inspect_adapter(
    folder: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, *, revision: str | None = None
) -> AdapterSummary:
    """Read what an adapter folder holds, and verify it: see `check_adapter`. Every value is read, and must be finite.

    Args:
        folder: a local adapter folder, of any PEFT method.
        base: also verify that this base model, a folder or a name on the Hub, has the tensors that the adapter was
            trained on; for LocFT adapters alone, which record them.
        revision: branch, tag or commit of the base on the Hub.

    Raises:
        ValueError: if it is no adapter folder; if one of its files cannot be read or cannot be trusted; if the
            weights, or the edits that it ships, are not those whose sha256 is recorded; if the base's tensors are not
            those that are recorded, or nothing is recorded of them.
        OSError: if the base cannot be downloaded.

    Example:
        >>> print(inspect_adapter("out", "Qwen/Qwen2.5-7B-Instruct"))
    """
    adapter = check_adapter(folder, method=None)
    verified = [_verified_values(adapter), _verified_file(adapter), _verified_edits(adapter)]
    if base is not None:
        verified.append(_verified_base(adapter, base, revision))
    tensors = {name: (entry.dtype, entry.shape) for name, entry in sorted(adapter.tensors.items())}
    return AdapterSummary(
        adapter.folder, adapter.config, tensors, adapter.num_bytes, adapter.facts, tuple(filter(None, verified))
    )


def _verified_values(adapter: CheckedAdapter) -> str:
    for name in adapter.tensors:
        adapter.read(name)
    return f"all values of {len(adapter.tensors)} tensors are finite"


def _verified_file(adapter: CheckedAdapter) -> str | None:
    recorded = adapter.facts.get("files", {}).get(SAFETENSORS_WEIGHTS_NAME)
    if recorded is None:
        return None
    found = sha256_of_file(adapter.weights_file)
    if found != recorded:
        raise ValueError(
            f"{adapter.weights_file} has the sha256 {found[:16]}…; expected {recorded[:16]}…, which was recorded when "
            "it was saved. It was damaged or changed since: download it again, or, if you changed it, call "
            "describe_adapter."
        )
    return f"the weights are as they were saved, sha256 {found[:16]}…"


def _verified_edits(adapter: CheckedAdapter) -> str | None:
    edits = shipped_edits(adapter.folder)
    if edits is None:
        return None
    of_the_run = ", those that it was trained on" if "edits" in adapter.facts else ""
    return f"{len(edits)} edits in {EDITS_NAME}{of_the_run}"


def _verified_base(adapter: CheckedAdapter, base: str | os.PathLike[str], revision: str | None) -> str:
    recorded = getattr(adapter.config, "base_sha256", None)
    if not recorded:
        raise ValueError(
            f"{adapter.folder} does not record which base tensors it was trained on, so that {base} cannot be "
            "verified. Leave the base out."
        )
    found = edited_parameters(Checkpoint(base, revision), [adapter])
    count = sum(parameter.name in recorded for parameter in found)
    return f"{count} of {len(adapter.deltas)} edited tensors in {base} are those that it was trained on"


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
