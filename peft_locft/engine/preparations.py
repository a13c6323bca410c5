"""What a run makes from a base model before it trains: kept for later runs, with one bar that shows how far it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from torch import nn
from tqdm.auto import tqdm

from ..io.bounded_folder import mark_used, remove_oldest
from ..io.files import write_atomically
from ..tuner.presets import find_decoder_layers
from .fingerprint import layer_digests, sha256_of
from .questions import Choice

logger = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
FORMAT = "1"  # of the files; to be raised when the same inputs give other results
MAX_BYTES = 2 * 10**9  # of the folder that all runs share


def preparations_folder(option: str | Path | None, device: torch.device) -> Path | None:
    """Return the folder for what runs prepare; `None`: nothing is kept.

    Args:
        option: a folder; `"auto"`: a folder in the cache of the Hub's libraries (`HF_HOME`), for this machine and
            its versions, since another one would round differently; `"off"` or `None`: no folder.
        device: where the model is.
    """
    if option in (None, OFF):
        return None
    if option != AUTO:
        return Path(str(option))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    machine = sha256_of(FORMAT, torch.__version__, transformers.__version__, device.type, name)
    return shared_folder() / machine[:16]


def shared_folder() -> Path:
    """Return the folder that all runs of this user share."""
    return Path(constants.HF_HOME) / "peft_locft" / "preparations"


def limit_shared_folder() -> None:
    """Remove what was unused for longest from the folder that all runs share, down to 2 GB."""
    if shared_folder().is_dir():
        remove_oldest(shared_folder(), MAX_BYTES)


class Preparations:
    """Stores what a base model generated, by all that it depends on, and moves a progress bar.

    Args:
        model: the model; adapters do not count.
        option: see [`preparations_folder`].
        bar: a bar of tokens; `None`: none is shown.
    """

    def __init__(self, model: nn.Module, option: str | Path | None = OFF, bar: tqdm[Any] | None = None) -> None:
        self.model = model
        self.bar = bar
        device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.folder = preparations_folder(option, device)
        self._digest: str | None = None

    def begin(self, what: str) -> None:
        """Name what is prepared next."""
        if self.bar is not None:
            self.bar.set_description(f"preparing: {what}")

    def add(self, num_tokens: int) -> None:
        """Add tokens that were not expected to the bar."""
        if self.bar is not None and self.bar.total is not None:
            self.bar.total = max(self.bar.total, self.bar.n + num_tokens)

    def counted(self, choose: Choice) -> Choice:
        """Return a choice of tokens that moves the bar."""

        def choose_and_count(logits: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
            if self.bar is not None:
                self.bar.update(len(places))
            return choose(logits, places)

        return choose_and_count

    def stored(self, inputs: Sequence[Any], compute: Callable[[], Any]) -> Any:
        """Return the stored result for these inputs to this model; else compute and store it.

        Args:
            inputs: plain data that decides the result, beside the model.
            compute: returns the result, plain data too.
        """
        path = self._path(inputs)
        if path is None:
            return compute()
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = compute()
        else:
            mark_used(path)
            return result
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(result))
            limit_shared_folder()
        except OSError as error:
            logger.info("%s: not stored for later runs: %s", path, error)
        return result

    def _path(self, inputs: Sequence[Any]) -> Path | None:
        if self.folder is None:
            return None
        if self._digest is None:
            try:
                self._digest = self._of_model()
            except ValueError:  # offloaded weights cannot be read
                self.folder = None
                return None
        return self.folder / f"{sha256_of(self._digest, json.dumps(inputs))}.json"

    def _of_model(self) -> str:
        try:
            layers = list(find_decoder_layers(self.model)[1])
        except ValueError:
            layers = []
        attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        digest = layer_digests(self.model, layers, len(layers), "preserve_cache_dir")[-1]
        return sha256_of(digest, str(attention))
