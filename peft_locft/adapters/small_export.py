"""Exports a smaller copy of an adapter, with a measured loss."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..io.checkpoint import Checkpoint
from ..io.disk_space import size
from .edited_parameters import edited_parameters
from .exports import base_of, check_export_source
from .provenance import Provenance
from .saving import adapter_folder, write_description
from .shrinking import check_shrinking, shrink_files


@dataclass(frozen=True, slots=True)
class SmallAdapter:
    """Summary of `export_small`.

    Attributes:
        path: the folder.
        share_kept: share of the deltas' squared Frobenius norm that is kept; 1 = all.
        num_bytes: size of the weights file.
        num_bytes_before: size of the original weights file.
    """

    path: Path
    share_kept: float
    num_bytes: int
    num_bytes_before: int

    def __str__(self) -> str:
        sizes = f"{size(self.num_bytes)} instead of {size(self.num_bytes_before)}"
        return f"{self.path}, {sizes}\nkept {self.share_kept:.6f} of the delta"


def export_small(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    *,
    delta_dtype: str | None = None,
    density: float | None = None,
    revision: str | None = None,
    force: bool = False,
) -> SmallAdapter:
    """Write a smaller copy of a LocFT adapter, and return a summary. The copy's answers are almost the same.

    A 16-bit dtype halves the file. `density` sets values to zero: the file has the same size and compresses better.
    Evaluate the copy before you publish it.

    Args:
        adapter: a local LocFT adapter folder.
        out: the folder to write.
        base: the base model, used only for `density`: a folder or a name on the Hub; `None`: the base named by the
            adapter.
        delta_dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None`: unchanged.
        density: share of a delta's values to keep, the largest relative to their weight (RECT).
        revision: branch, tag or commit of the base on the Hub.
        force: accept a base with other values than in training.

    Raises:
        ValueError: if neither `delta_dtype` nor `density` is given, or one is out of range; if
            `check_adapter` refuses the adapter, or `edited_parameters` the base; if a value is too large for the
            dtype.
        NotADirectoryError: if `out` or a parent is a file.
        OSError: if the base cannot be downloaded.

    Example:
        >>> print(export_small("locft-demo", "demo-small", delta_dtype="bfloat16"))  # of examples/demo.py
        demo-small, 1.8 MB instead of 3.5 MB
        kept 0.999997 of the delta
    """
    check_shrinking(delta_dtype, density)
    if delta_dtype is None and density is None:
        raise ValueError("delta_dtype=None, density=None: expected at least one of the two.")
    checked = check_export_source(adapter, out)
    parameters = {}
    if density is not None:
        checkpoint = Checkpoint(*base_of(checked, base, revision))
        edited = edited_parameters(checkpoint, [checked], force=force)
        parameters = {parameter.name: parameter for parameter in edited}
    with adapter_folder(out) as staging:
        shrunk = shrink_files(checked, staging, lambda name: parameters[name].base_parameter(), delta_dtype, density)
        config = PeftConfig.from_pretrained(str(staging))
        # drop the evaluation: the smaller delta may answer differently
        provenance = replace(Provenance.of_config(config, checked.provenance.run), shrunk=shrunk)
        write_description(staging, config, provenance)
    num_bytes = (Path(out) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return SmallAdapter(Path(out), shrunk.share_kept, num_bytes, checked.num_bytes)
