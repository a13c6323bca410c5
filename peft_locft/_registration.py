"""Registers the tuner with PEFT: now, where PEFT is loaded; else as soon as it is, so that nothing waits for it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


def register_with_peft() -> None:
    """Register `PeftType.LOCFT` if PEFT is imported already, or at the end of its import."""
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def _register() -> None:
    # the class first: where `peft_locft.tuner` is what imports PEFT, it is still under way and registers after this
    config: Any = importlib.import_module("peft_locft.tuner.config")
    config.LocFTConfig.card_writer = staticmethod(_write_card)
    importlib.import_module("peft_locft.tuner")


def _write_card(config: Any, folder: Path) -> None:
    from .adapters.card import replace_template

    replace_template(config, folder)


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as the finders behind it do, and registers the tuner when PEFT's own import has ended."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec
