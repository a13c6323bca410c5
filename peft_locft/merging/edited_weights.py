"""What a merge on disk changes: checked against the base before anything is written, then composed piece by piece."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters.reading import AdapterDeltas, read_deltas
from ..io.checkpoint import Checkpoint, StoredTensor, local_folder, raw_bytes, read_header
from ..io.copies import Progress, begin_writing, check_room, clone, copy_ranges, gaps, write_all
from ..io.parameter_names import ParameterFinder, Piece
from ..tuner.arithmetic import compose_weight, hashed_bytes
from ..tuner.delta import combine_deltas

# values of a tensor that are in memory at once; some forty bytes each
VALUES_AT_ONCE = 1 << 18
NARROW_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's part in an edited parameter.

    Attributes:
        adapter: the adapter.
        name: what it calls the parameter: a model without its head has other names than one with it.
        delta: where it lies.
        scale: its strength.
        weight: its factor where adapters are combined into one; `None` where each is added for itself.
        combined_dtype: the precision of the combination.
    """

    adapter: AdapterDeltas
    name: str
    delta: StoredTensor
    scale: float
    weight: float | None
    combined_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class EditedParameter:
    """A parameter of the model: the tensors of the checkpoint that it is made of, and what is added to it."""

    pieces: list[Piece]
    terms: list[Term]

    def base_sha256(self, dtype: torch.dtype | None = None) -> str:
        """Return what `tensor_sha256` gives of the base's parameter, once it is rounded to `dtype`."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            for start, count in _parts(piece):
                values = piece.tensor.read(start, count)
                digest.update(hashed_bytes(values if dtype is None else values.to(dtype)))
        return digest.hexdigest()

    def edited(self, piece: Piece) -> Iterator[torch.Tensor]:
        """Yield the edited values of one of the pieces, flat, from the first to the last.

        Raises:
            ValueError: if one is not finite where the base's is.
        """
        for start, count in _parts(piece):
            base = piece.tensor.read(start, count)
            edited = compose_weight(base, self._deltas(piece.start + start, count))
            # the extremes of what holds a NaN are NaN; looking at every value takes longer than composing them
            finite = torch.stack(torch.aminmax(edited)).isfinite().all()
            if not finite and not (edited.isfinite() | ~base.isfinite()).all():
                raise ValueError(
                    f"The edit would put NaN or infinite values into {piece.name}: the adapter is broken, or too "
                    f"strong for {piece.tensor.dtype}. Nothing was merged. `locft inspect` shows what it holds."
                )
            yield edited

    def _deltas(self, start: int, count: int) -> list[tuple[torch.Tensor, float]]:
        if self.terms[0].weight is None:
            return [(term.delta.read(start, count), term.scale) for term in self.terms]
        # as LocFTModel.scaled_deltas and add_weighted_adapter do it: what they would merge, bit for bit
        scaled = [(term.delta.read(start, count).float() * term.scale, term.weight or 0.0) for term in self.terms]
        combined = combine_deltas(scaled, "linear", None, "total")
        return [(combined.to(self.terms[0].combined_dtype), 1.0)]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the calling thread alone, and as before afterwards.

    What is computed here waits for files, and threads that wait for each other, on a machine or in a container with
    fewer cores to give than torch counts, take several times as long as one.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _parts(piece: Piece) -> Iterator[tuple[int, int]]:
    for start in range(0, piece.tensor.num_values, VALUES_AT_ONCE):
        yield start, min(VALUES_AT_ONCE, piece.tensor.num_values - start)


@dataclass(frozen=True, slots=True)
class MergePlan:
    """All that a merge changes in a checkpoint.

    Attributes:
        checkpoint: the base.
        adapters: in the order in which they are added.
        parameters: the edited ones.
    """

    checkpoint: Checkpoint
    adapters: list[AdapterDeltas]
    parameters: list[EditedParameter]

    def by_shard(self) -> dict[str, list[tuple[EditedParameter, Piece]]]:
        """Return what changes in each file of the checkpoint; files in which nothing does are not in it."""
        found: dict[str, list[tuple[EditedParameter, Piece]]] = {}
        for parameter in self.parameters:
            for piece in parameter.pieces:
                found.setdefault(self.checkpoint.files[piece.name], []).append((parameter, piece))
        return found


def plan_edits(
    checkpoint: Checkpoint,
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None,
    scale: float | None,
    force: bool,
) -> MergePlan:
    """Find what adapters change in a checkpoint, and check that it is the base that they were trained on.

    Args:
        checkpoint: the base.
        adapters: folders, or ids on the Hub.
        weights: as `merge_checkpoint` takes them.
        scale: as `merge_checkpoint` takes it.
        force: merge into another base.

    Raises:
        ValueError: as `merge_checkpoint` names them.
    """
    if not adapters:
        raise ValueError("No adapter to merge: give one or more adapter folders.")
    if weights is not None and len(weights) != len(adapters):
        raise ValueError(f"{len(adapters)} adapters but {len(weights)} weights: expected one weight an adapter.")
    found = [read_deltas(local_folder(adapter, only=["adapter_*", "locft_*"])) for adapter in adapters]
    dtype = getattr(torch, found[0].config.delta_dtype)
    finder = ParameterFinder(checkpoint)
    parameters: dict[tuple[str, ...], EditedParameter] = {}
    for index, adapter in enumerate(found):
        strength = adapter.config.scale if scale is None else scale
        weight = None if weights is None else weights[index]
        for name, delta in adapter.deltas.items():
            pieces = finder.find(name, delta.shape)
            parameter = parameters.setdefault(tuple(piece.name for piece in pieces), EditedParameter(pieces, []))
            parameter.terms.append(Term(adapter, name, delta, strength, weight, dtype))
    if not force:
        with one_thread():
            for parameter in parameters.values():
                _check_base(checkpoint, parameter)
    return MergePlan(checkpoint, found, list(parameters.values()))


def _check_base(checkpoint: Checkpoint, parameter: EditedParameter) -> None:
    digest = parameter.base_sha256()
    for term in parameter.terms:
        config, folder = term.adapter.config, term.adapter.folder
        expected = (config.base_sha256 or {}).get(term.name)
        if expected is None:
            warnings.warn(
                f"{folder} does not say which base its delta of {term.name} belongs to: it is merged unchecked.",
                stacklevel=4,
            )
        elif expected != digest:
            rounded = [dtype for dtype in NARROW_DTYPES if parameter.base_sha256(dtype) == expected]
            but = (
                f", but is, once it is rounded to {str(rounded[0]).removeprefix('torch.')}: the base was loaded in "
                "that dtype. The merged model would differ from what was evaluated by that rounding"
                if rounded
                else ""
            )
            raise ValueError(
                f"{term.name} of {checkpoint.folder} is not the weight that {folder} was trained on{but}. Merge into "
                f"{config.base_model_name_or_path or 'its own base model'}, at the revision it was trained on and "
                "without other edits, or force it (force=True, --force)."
            )


def write_edited_shard(
    source: Path, target: Path, edits: Sequence[tuple[EditedParameter, Piece]], progress: Progress
) -> dict[str, str]:
    """Write a copy of a safetensors file in which the bytes of the edited tensors, and no others, are new.

    Args:
        source: the file.
        target: the copy; it is on the disk when this returns.
        edits: the pieces that are in this file, each with its parameter.
        progress: told how many bytes were written.

    Returns:
        The sha256 of the new bytes by the tensors' names.

    Raises:
        ValueError: if an edited value is not finite.
        OSError: if what is on the disk afterwards is not what was written.
    """
    new = {piece.name: (parameter.edited(piece), piece.tensor) for parameter, piece in edits}
    values = {name: ((raw_bytes(part) for part in parts), tensor) for name, (parts, tensor) in new.items()}
    return write_patched(source, target, values, progress)


def write_patched(
    source: Path,
    target: Path,
    new: Mapping[str, tuple[Iterator[memoryview], StoredTensor]],
    progress: Progress,
) -> dict[str, str]:
    """Write a copy of a safetensors file with other bytes for some of its tensors, as `write_edited_shard` does.

    Args:
        source: the file.
        target: the copy.
        new: the bytes, in parts, by the tensor's name, and where they belong.
        progress: told how many bytes were written.
    """
    source = source.resolve()  # in the Hub's cache it is a symbolic link
    size = source.stat().st_size
    ranges = [(tensor.start, tensor.start + tensor.num_bytes) for _, tensor in new.values()]
    untouched = list(gaps(ranges, size))
    cloned = clone(source, target)
    if not cloned:
        check_room(target.parent, size)
    else:
        progress(sum(end - begin for begin, end in untouched))
    digests = {}
    mode = "r+b" if cloned else "wb"
    with one_thread(), ThreadPoolExecutor(1) as beside, open(target, mode, buffering=0) as writer:
        writer.truncate(size)
        # the kernel copies while the new bytes are computed
        copying = None if cloned else beside.submit(copy_ranges, source, target, untouched, progress)
        for name, (parts, tensor) in new.items():
            digest = hashlib.sha256()
            writer.seek(tensor.start)
            for part in parts:
                digest.update(part)
                start = writer.tell()
                write_all(writer, part)
                begin_writing(writer, start, len(part))
                progress(len(part))
            digests[name] = digest.hexdigest()
        if copying is not None:
            copying.result()
        os.fsync(writer.fileno())
    shutil.copymode(source, target)
    _verify(source, target, digests)
    return digests


def _verify(source: Path, target: Path, digests: Mapping[str, str]) -> None:
    tensors, _ = read_header(target)
    original, _ = read_header(source)
    same = [(tensor.dtype, tensor.shape, tensor.start) for tensor in tensors.values()] == [
        (tensor.dtype, tensor.shape, tensor.start) for tensor in original.values()
    ]
    wrong = [name for name, digest in digests.items() if tensors[name].bytes_sha256() != digest]
    if wrong or not same or target.stat().st_size != source.stat().st_size:
        raise OSError(
            f"{target.name} reads differently from what was written to it{': ' + wrong[0] if wrong else ''}. Nothing "
            "was merged. Check the disk."
        )
