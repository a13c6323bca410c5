"""What makes a merge in place whole: files that are written aside and put in place together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .checkpoint import INDEX_NAME
from .file_copies import sync_folder
from .files import write_whole

# in a folder of its own: vLLM and others load every safetensors file that lies beside a model without an index
IN_PLACE_FOLDER = "locft"
UNDO_NAME = "locft_undo.safetensors"
COMMIT_NAME = "commit.json"
STAGED_FOLDER = "staged"


Action = Literal["merge", "detach"]


@dataclass(frozen=True, slots=True)
class Committed:
    """What was decided.

    Attributes:
        action: what puts the files in place.
        replaced: size and time of the files that staged ones replace, by name.
        tensors: names of the tensors that change.
    """

    action: Action
    replaced: dict[str, list[int]]
    tensors: list[str]


class Journal:
    """Files that are written aside and put in place together, whatever happens in between.

    `staging` gives the folder in which they are written; once they are all on the disk, `commit` writes down that they
    are to be put in place. That file decides: without it, `recover` removes what was written aside; with it, it puts
    in place what is not yet.

    Args:
        model_folder: the folder of the model.

    Attributes:
        folder: where the journal, the staged files and the undo file are.
        removed: whether `recover` found new files that were not decided on, and removed them.
        completed: what `recover` found decided and put in place, if anything.
    """

    folder: Path
    removed: bool
    completed: Committed | None

    def __init__(self, model_folder: Path) -> None:
        self._model = model_folder
        self.folder = model_folder / IN_PLACE_FOLDER
        self.removed, self.completed = False, None

    def recover(self) -> None:
        """End what another process was killed in.

        Raises:
            ValueError: if a file that is to be replaced was changed since.
        """
        if (self.folder / COMMIT_NAME).is_file():
            self.completed = self.carry_out()
        elif self.folder.exists():
            self.removed = (self.folder / STAGED_FOLDER).exists()
            self._clear()

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Give an empty folder for the new files; it goes away with an error."""
        staged = self.folder / STAGED_FOLDER
        try:
            staged.mkdir(parents=True)
            yield staged
        except BaseException:
            if not (self.folder / COMMIT_NAME).exists():
                self._clear()
            raise

    def commit(self, action: Action, shards: Sequence[str], tensors: Sequence[str]) -> None:
        """Decide that the staged files, which are on the disk, are the model's."""
        for folder in (self.folder / STAGED_FOLDER, self.folder, self._model):
            sync_folder(folder)
        replaced = {shard: _state(self._model / shard) for shard in shards}
        committed = Committed(action, replaced, list(tensors))
        write_whole(self.folder / COMMIT_NAME, json.dumps(asdict(committed)))
        sync_folder(self.folder)

    def carry_out(self) -> Committed | None:
        """Put in place what is decided on and not in place yet; whatever part of it was done before, the rest follows.

        Raises:
            ValueError: if a file that is to be replaced was changed since it was decided.
        """
        path = self.folder / COMMIT_NAME
        if not path.is_file():
            return None
        committed = _read_committed(path)
        staged = self.folder / STAGED_FOLDER
        waiting = [shard for shard in committed.replaced if (staged / shard).exists()]
        for shard in waiting:
            if _state(self._model / shard) != committed.replaced[shard]:
                raise ValueError(
                    f"{self._model / shard} was changed since a {committed.action} in place was interrupted. To end "
                    f"that, move {staged / shard} in its place; to give it up, remove {self.folder}, and get the "
                    "model again from where it came."
                )
        # the originals first: they must not be lost once the first file is replaced
        _move(staged / UNDO_NAME, self.folder / UNDO_NAME)
        sync_folder(self.folder)
        # without its index, no program finds a model of which some files are new and others old; what takes time, such
        # as waiting for the disk, comes before and after
        index, hidden = self._model / INDEX_NAME, self.folder / INDEX_NAME
        if len(committed.replaced) > 1:
            _move(index, hidden)
        for shard in waiting:
            os.replace(staged / shard, self._model / shard)
        _move(hidden, index)
        for folder in (self._model, self.folder, staged):
            sync_folder(folder)
        if committed.action == "detach":
            (self.folder / UNDO_NAME).unlink(missing_ok=True)
        path.unlink()
        self._clear()
        return committed

    def _clear(self) -> None:
        """Remove the staged files, and the folder if the originals are not in it."""
        shutil.rmtree(self.folder / STAGED_FOLDER, ignore_errors=True)
        for leftover in self.folder.glob(f".{COMMIT_NAME}-*"):
            leftover.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        sync_folder(self._model)


def _read_committed(path: Path) -> Committed:
    try:
        committed = Committed(**json.loads(path.read_text(encoding="utf-8")))
        names = [name for name in committed.replaced if Path(name).name == name and name.endswith(".safetensors")]
        known = isinstance(committed.replaced, dict) and 0 < len(names) == len(committed.replaced)
    except (ValueError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{path} is not what a merge in place wrote: it came with the model. Remove {path.parent}.")
    return committed


def _move(source: Path, target: Path) -> None:
    if source.exists():
        os.replace(source, target)


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]
