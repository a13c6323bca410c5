"""The public interface: what `peft_locft` offers, and that every type a public function returns is public too."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import typing
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import datasets
import pytest
from test_architecture import ROOMS

import peft_locft

NAMES = [
    "LocFTConfig",
    "LocFTModel",
    "Edit",
    "Probe",
    "read_edits",
    "BreadthFirstConfig",
    "BreadthFirstTrainer",
    "train_edits",
    "update_adapter",
    "EvaluationConfig",
    "EvaluationReport",
    "evaluate_edits",
    "evaluate_model",
    "evaluate_on_tasks",
    "search_locations",
    "LocationPreset",
    "compare_baselines",
    "save_adapter",
    "inspect_adapter",
    "push_adapter",
    "export_adapter",
    "merge_checkpoint",
    "merge_in_place",
    "detach",
]


def names_of(module: ModuleType) -> list[str]:
    return list(vars(module)["__all__"])


def test_the_package_offers_these_names() -> None:
    public = names_of(peft_locft)
    assert set(NAMES) < set(public) and len(public) <= 50
    assert dir(peft_locft) == sorted(public)


def public_functions() -> dict[str, Any]:
    modules = [importlib.import_module(name) for name in ("peft_locft", *(f"peft_locft.{room}" for room in ROOMS))]
    named = {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in names_of(module)}
    return {name: value for name, value in named.items() if inspect.isfunction(value)}


def classes_in(hint: Any) -> Iterator[type]:
    """Yield the classes of ours in an annotation, and those that they have as fields."""
    for argument in typing.get_args(hint):
        yield from classes_in(argument)
    if isinstance(hint, type) and hint.__module__.startswith("peft_locft."):
        yield hint
        if dataclasses.is_dataclass(hint) or hasattr(hint, "_fields"):
            for field in typing.get_type_hints(hint).values():
                yield from classes_in(field)


def is_public(kind: type) -> bool:
    room = importlib.import_module(".".join(kind.__module__.split(".")[:2]))
    return kind.__name__ in names_of(room) and getattr(room, kind.__name__) is kind


def private_classes(function: Any) -> set[str]:
    # a module that is imported for annotations only is not there when they are read
    returned = typing.get_type_hints(function, localns={"datasets": datasets}).get("return")
    return {f"{kind.__module__}.{kind.__name__}" for kind in classes_in(returned) if not is_public(kind)}


@pytest.mark.parametrize("name", public_functions())
def test_what_a_public_function_returns_is_public(name: str) -> None:
    function = public_functions()[name]
    assert "return" in function.__annotations__
    assert private_classes(function) == set()


def test_a_private_class_is_found() -> None:
    from peft_locft.adapters.inspection import AdapterSummary
    from peft_locft.engine.prefix_tree import PrefixTree

    def function() -> dict[str, list[PrefixTree] | AdapterSummary]:
        raise NotImplementedError

    function.__annotations__["return"] = dict[str, list[PrefixTree] | AdapterSummary]
    assert private_classes(function) == {"peft_locft.engine.prefix_tree.PrefixTree"}
