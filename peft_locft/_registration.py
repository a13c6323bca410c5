"""Registers the tuner with PEFT: at once if PEFT is imported, else at the end of its import.

So `import peft_locft` does not load PEFT and torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any


def register_with_peft() -> None:
    """Register `PeftType.LOCFT`, and the writer of model cards, now or as soon as their modules are imported."""
    call_after_import("peft_locft.tuner.config", _set_card_writer)
    call_after_import("peft", _register)


def _register(peft: Any) -> None:
    # if `peft_locft.tuner` is what imports PEFT, in this thread or another, it registers when it goes on
    if "peft_locft.tuner" not in sys.modules:
        importlib.import_module("peft_locft.tuner")


def _set_card_writer(config: Any) -> None:
    config.LocFTConfig.card_writer = staticmethod(_write_card)


def _write_card(config: Any, folder: Path) -> None:
    from .adapters.card import replace_template

    replace_template(config, folder)


def call_after_import(name: str, action: Callable[[Any], None]) -> None:
    """Call `action` with a module: now if it is imported, else at the end of its first import that succeeds."""
    if name in sys.modules:
        action(sys.modules[name])
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module as the finders behind it do, with a loader that calls the action.

    It stays until an import succeeds: others look for PEFT without importing it (transformers' `is_peft_available`),
    and a failed import can be tried again.
    """

    def __init__(self, name: str, action: Callable[[Any], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:  # a namespace package has none
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """The loader that was found, except that the action follows `exec_module`. The module keeps the one found."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.action(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
