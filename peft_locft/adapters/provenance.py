"""The provenance of an adapter, `locft_provenance.json`: its base model, its training and its evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from .._version import package_versions
from ..data.chat import ChatTemplate, chat_template_mode, mark_form
from ..data.joining import TargetSeparator, target_separator_mode
from ..data.leaks import mark_trained, trained_prompts_record
from ..evaluation.report import EvaluationReport, curves_from_json, curves_to_json
from ..io.json_checks import (
    Fields,
    check_fields,
    dict_of,
    has_fields,
    is_count,
    is_number,
    is_sha256,
    is_text,
    list_of,
    or_none,
)
from ..io.untrusted_json import shortened
from .base_model import BaseModel

if TYPE_CHECKING:
    from peft import PeftConfig

PROVENANCE_NAME = "locft_provenance.json"
FORMAT = 1
RECIPE_NUMBERS = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "seed")
RECIPE_NAMES = ("edit_order", "objective")
# a training run has all of RUN; BESIDE_RUN are optional and need a run
RUN = ("edits", "recipe", "training")
BESIDE_RUN = ("augmentation", "continued")


@dataclass(frozen=True, slots=True)
class TrainedEdits:
    """The edits that an adapter was trained on.

    Attributes:
        count: number of edits.
        sha256: see `edits_sha256`.
        others: fields of a later format.
    """

    count: int
    sha256: str
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """The course of a training run.

    Attributes:
        epoch_losses: mean loss of each epoch; in depth-first order, of each edit.
        steps: number of optimizer steps.
        curves: metrics by epoch, each with an `epoch`, from an `EvaluationCallback`.
        best_epoch: the epoch whose weights the adapter has, if the callback chose one.
        learned: number of learned and of all edits, and the median probability of their targets.
        others: fields of a later version.
    """

    epoch_losses: Sequence[float]
    steps: int | None = None
    curves: list[dict[str, float]] = field(default_factory=list)
    best_epoch: float | None = None
    learned: dict[str, float] | None = None
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """The rows that a run trained on beyond its edits.

    Attributes:
        prefixes: texts prepended to prompts.
        counts: number of rows by kind, such as `{"paraphrases": 120, "retained_facts": 400}`.
        trained_prompts: hashes of these rows' prompts, see `leaks.trained_prompts_record`.
        others: fields of a later version.
    """

    prefixes: list[str]
    counts: dict[str, int]
    trained_prompts: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_rows(
        cls, *, prefixes: Sequence[str] = (), counts: Mapping[str, int] | None = None, prompts: Iterable[str] = ()
    ) -> Augmentation:
        """Return the record of rows with these prefixes, counts and prompts. The prompts are only hashed."""
        return cls(list(prefixes), dict(counts or {}), trained_prompts_record(prompts))


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """The training run that made an adapter.

    Attributes:
        edits: the trained edits.
        recipe: settings by name, see `training.record.RECIPE_FIELDS`, also unknown ones.
        training: losses and metrics.
        augmentation: the rows beyond the edits; `None` if there were none.
        continued: number of updates of the adapter, and of edits added, replaced and withdrawn.
    """

    edits: TrainedEdits
    recipe: dict[str, Any]
    training: TrainingResult
    augmentation: Augmentation | None = None
    continued: dict[str, int] = field(default_factory=dict)

    @property
    def chat_template(self) -> ChatTemplate:
        """How the edits were written, see `BreadthFirstConfig.chat_template`; `"off"` if it is not recorded."""
        return chat_template_mode(self.recipe.get("chat_template", "off"), "recipe.chat_template")

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """The arguments of the chat template."""
        return dict(self.recipe.get("chat_template_kwargs") or {})

    @property
    def target_separator(self) -> TargetSeparator:
        """What stood between prompts and targets; `"space"` if it is not recorded, as it always was then."""
        return target_separator_mode(self.recipe.get("target_separator", "space"), "recipe.target_separator")

    @property
    def is_depth_first(self) -> bool:
        return bool(self.recipe["edit_order"] == "depth_first")

    def rows(self, *, detailed: bool) -> Iterator[tuple[str, str]]:
        yield "edits", f"{self.edits.count:,} (sha256 `{self.edits.sha256[:16]}…`)"
        if self.continued:
            yield "continued", ", ".join(f"{count} {printable(name)}" for name, count in self.continued.items())
        recipe, losses = self.recipe, self.training.epoch_losses
        # adapters from before the balanced recipe do not record their recipe's name
        name = "balanced, " if recipe.get("recipe") == "balanced" else ""
        order = printable(recipe["edit_order"]).replace("_", "-")
        yield (
            "recipe",
            f"{name}{order}, objective `{printable(recipe['objective'])}`, learning rate "
            f"{recipe['learning_rate']:.3g}, batches of {recipe['per_device_train_batch_size']}, "
            f"{recipe['num_train_epochs']:g} epochs at most, seed {recipe['seed']}",
        )
        if self.chat_template != "off":
            forms = "in chat" if self.chat_template == "on" else "as plain text and in chat"
            named = ", ".join(
                f"{printable(name)}={printable(value)}" for name, value in self.chat_template_kwargs.items()
            )
            yield "chat template", f"edits trained {forms}{f', with {named}' if named else ''}"
        if detailed:
            yield "settings", ", ".join(f"{printable(key)} {printable(value)}" for key, value in recipe.items())
        if losses:
            unit = "edits" if self.is_depth_first else "epochs"
            yield "training loss", f"{losses[0]:.4f} → {losses[-1]:.4f} in {len(losses)} {unit}"
        learned = self.training.learned
        if learned:
            share = f"{learned['num_learned']:,} of {learned['num_edits']:,} edits"
            yield "learned", f"{share}, median probability of a target {learned['median_probability']:.3f}"
        if self.augmentation is not None:
            counts = {"prefixes": len(self.augmentation.prefixes)} | self.augmentation.counts
            words = [f"{count} {printable(kind).replace('_', ' ')}" for kind, count in counts.items() if count]
            if words or detailed:
                yield "augmentation", ", ".join(words) or "none"
            if detailed:
                yield from (("prefix", printable(prefix)) for prefix in self.augmentation.prefixes)


def mark_run(model: nn.Module, run: TrainingRun) -> None:
    """Store on a model what its evaluations need to know of its training: trained prompts, and the chat template."""
    if run.augmentation is not None:
        mark_trained(model, run.augmentation.trained_prompts)
    mark_form(model, run)


@dataclass(frozen=True, slots=True)
class Shrinking:
    """How the deltas were shrunk.

    Attributes:
        delta_dtype: new dtype of the deltas; `None`: unchanged.
        density: share of values kept; `None`: all.
        share_kept: share of the deltas' squared Frobenius norm kept; 1 = all.
        others: fields of a later version.
    """

    delta_dtype: str | None
    density: float | None
    share_kept: float
    others: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"deltas in {printable(self.delta_dtype)}"] if self.delta_dtype else []
        if self.density:
            parts.append(f"a share of {self.density:g} of the values, the largest relative to their weight")
        return f"{', '.join(parts)}; kept {self.share_kept:.6f} of the squared Frobenius norm"


@dataclass(frozen=True, slots=True)
class ExportDetails:
    """The export form of an adapter.

    Attributes:
        to: `"peft"` (whole weights) or `"lora"`.
        rank: rank of the LoRA matrices.
        share_kept: share of the deltas' squared Frobenius norm that the LoRA matrices keep; 1 = all.
        others: fields of a later version.
    """

    to: str
    rank: int | None = None
    share_kept: float | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lora = f" of rank {self.rank}, keeps {self.share_kept:.4f} of the delta" if self.to == "lora" else ""
        return f"from a LocFT adapter to {self.to}{lora}"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The recorded facts about an adapter. `Provenance()` is empty.

    Attributes:
        base_model: the model that it edits.
        base_sha256: sha256 of each edited base tensor, by parameter name.
        run: the training run that made it; `None` if another program trained it.
        evaluation: evaluation results, without prompts and answers; `None` if there are none.
        shrunk: how its deltas were shrunk; `None` if they were not.
        export: its export form; `None` if it is not an export.
        versions: versions of the packages that made it.
        files: sha256 of its files, by name.
        others: fields of a later format; they are kept when the file is rewritten.
    """

    base_model: BaseModel = field(default_factory=lambda: BaseModel(None, None))
    base_sha256: dict[str, str] = field(default_factory=dict)
    run: TrainingRun | None = None
    evaluation: EvaluationReport | None = None
    shrunk: Shrinking | None = None
    export: ExportDetails | None = None
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_config(
        cls, config: PeftConfig, run: TrainingRun | None = None, evaluation: EvaluationReport | None = None
    ) -> Provenance:
        """Return the provenance of an adapter to save with this configuration."""
        return cls(
            base_model=BaseModel.known_here(config.base_model_name_or_path, config.revision),
            base_sha256=getattr(config, "base_sha256", None) or {},
            run=run,
            evaluation=evaluation,
            versions=package_versions(),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: object) -> Provenance:
        """Return the provenance from the content of an untrusted file, the inverse of `to_dict`.

        Unknown fields are kept, so rewriting the file does not lose the fields of a later format. An unknown
        format and unknown fields of a metric are refused.

        Args:
            data: the content of `locft_provenance.json`.
            where: the file, for messages.

        Raises:
            ValueError: if a field is missing or invalid.
        """
        if "format" not in data:
            raise ValueError(f"{where}: found no format; expected {FORMAT}. Download it again, or remove it.")
        check_fields(data, FIELDS, where)
        present = set(data) & {*RUN, *BESIDE_RUN}
        if present and not set(RUN) <= present:
            raise ValueError(
                f"{where}: found only {', '.join(sorted(present))}; expected all of {', '.join(RUN)}, or none. "
                "Download it again, or remove it."
            )
        parts = {"base_model": BaseModel, "shrunk": Shrinking, "export": ExportDetails}
        read: dict[str, Any] = {name: _part(kind, data[name]) for name, kind in parts.items() if name in data}
        read |= {name: data[name] for name in ("base_sha256", "versions", "files") if name in data}
        others = {name: value for name, value in data.items() if name not in FIELDS}
        return cls(run=_run(data, where), evaluation=_evaluation(data, where), others=others, **read)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `locft_provenance.json`."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "base_model": _plain(self.base_model),
            "base_sha256": self.base_sha256,
        }
        if self.run is not None:
            curves = {"curves": curves_to_json(self.run.training.curves)} if self.run.training.curves else {}
            content |= {
                "edits": _plain(self.run.edits),
                "recipe": self.run.recipe,
                "training": _plain(self.run.training) | curves,
            }
            if self.run.augmentation is not None:
                content["augmentation"] = _plain(self.run.augmentation)
            if self.run.continued:
                content["continued"] = self.run.continued
        if self.evaluation is not None:
            content["evaluation"] = self.evaluation.summary_to_dict()
        content |= {name: _plain(part) for name in ("shrunk", "export") if (part := getattr(self, name)) is not None}
        content["versions"] = self.versions
        return content | ({"files": self.files} if self.files else {}) | self.others

    def rows(self, *, detailed: bool) -> list[tuple[str, str]]:
        """Return readable rows, a label and a text each. Names are in backticks.

        Args:
            detailed: also list all settings, prefixes and metrics.
        """
        rows = [] if self.run is None else list(self.run.rows(detailed=detailed))
        rows += [("shrunk", str(self.shrunk))] if self.shrunk is not None else []
        rows += [("export", str(self.export))] if self.export is not None else []
        if detailed and self.evaluation is not None:
            for name, result in self.evaluation.results.items():
                before = f"{result.before} → " if result.before else ""
                rows.append(("measured", f"{printable(name)}  {before}{result.after}"))
        versions = ", ".join(f"{printable(name)} {printable(version)}" for name, version in self.versions.items())
        return [*rows, ("made with", versions)] if versions else rows


def printable(value: object) -> str:
    """Return a value as text that is safe in a terminal and between backticks."""
    return "".join(letter if letter.isprintable() and letter != "`" else "?" for letter in str(value))


def _is_recipe(value: Any) -> bool:
    return (
        dict_of(lambda item: True)(value)
        and all(is_number(value.get(name)) for name in RECIPE_NUMBERS)
        and all(is_text(value.get(name)) for name in RECIPE_NAMES)
        and value.get("chat_template", "off") in (True, False, *get_args(ChatTemplate))
        and or_none(dict_of(lambda item: True))(value.get("chat_template_kwargs"))
        and value.get("target_separator", "auto") in get_args(TargetSeparator)
    )


def _is_export(value: Any) -> bool:
    if not isinstance(value, dict) or value.get("to") not in ("peft", "lora"):
        return False
    return value["to"] == "peft" or (is_count(value.get("rank")) and is_number(value.get("share_kept")))


def _is_short_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None


# all fields; "evaluation" has its own parser
FIELDS: Fields = {
    "format": (lambda value: type(value) is int and value == FORMAT, str(FORMAT)),
    "augmentation": (
        has_fields(
            prefixes=list_of(is_text),
            counts=dict_of(is_count),
            trained_prompts=has_fields(count=is_count, sha256=list_of(_is_short_hash)),
        ),
        "prefixes, counts and the hashes of trained_prompts",
    ),
    "base_model": (dict_of(or_none(is_text)), "names"),
    "base_sha256": (dict_of(is_sha256), "64 hexadecimal digits per tensor"),
    "edits": (has_fields(count=is_count, sha256=is_sha256), "a count and a sha256"),
    "evaluation": (lambda value: True, ""),
    "continued": (dict_of(is_count), "counts of edits"),
    "recipe": (_is_recipe, f"settings such as {', '.join(RECIPE_NUMBERS)}"),
    "export": (_is_export, "to='peft', or to='lora' with rank and share_kept"),
    "files": (dict_of(is_sha256), "64 hexadecimal digits per file"),
    "shrunk": (
        has_fields(delta_dtype=or_none(is_text), density=or_none(is_number), share_kept=is_number),
        "delta_dtype, density and share_kept",
    ),
    "training": (
        has_fields(
            epoch_losses=list_of(is_number),
            steps=or_none(is_count),
            curves=or_none(lambda value: isinstance(value, list)),
            best_epoch=or_none(is_number),
        ),
        "epoch_losses, a list of finite numbers; optional: steps, curves, best_epoch",
    ),
    "versions": (dict_of(is_text), "version texts"),
}


def _run(data: dict[str, Any], where: object) -> TrainingRun | None:
    if "edits" not in data:
        return None
    training = dict(data["training"])
    try:
        training["curves"] = curves_from_json(training.get("curves") or [])
    except ValueError as error:
        raise ValueError(f"{where}: training: {error}. Download or save it again.") from None
    augmentation = _part(Augmentation, data["augmentation"]) if "augmentation" in data else None
    return TrainingRun(
        _part(TrainedEdits, data["edits"]),
        data["recipe"],
        _part(TrainingResult, training),
        augmentation,
        data.get("continued", {}),
    )


def _evaluation(data: dict[str, Any], where: object) -> EvaluationReport | None:
    if "evaluation" not in data:
        return None
    try:
        return EvaluationReport.from_dict(data["evaluation"], summary=True)
    except ValueError as error:
        raise ValueError(
            f"{where}: evaluation is {shortened(data['evaluation'])}; expected results, settings, notes and "
            f"missing ({error}). Download or save it again."
        ) from None


def _part(kind: Any, data: dict[str, Any]) -> Any:
    """Return a part of a provenance. Missing required fields become None; unknown fields go to `others`."""
    names = {each.name: _is_required(each) for each in fields(kind) if each.name != "others"}
    known = {name: data.get(name) for name, required in names.items() if required or name in data}
    return kind(**known, others={name: value for name, value in data.items() if name not in names})


def _plain(part: Any) -> dict[str, Any]:
    """Return a part as plain data for JSON, without empty optional fields."""
    values = {each.name: getattr(part, each.name) for each in fields(part) if each.name != "others"}
    required = {each.name for each in fields(part) if _is_required(each)}
    return {name: value for name, value in values.items() if name in required or value not in (None, [])} | part.others


def _is_required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING
