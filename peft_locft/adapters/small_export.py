"""A smaller copy of an adapter, at a loss that is measured."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from ..io.checkpoint import Checkpoint
from ..io.files import size
from .edited_parameters import edited_parameters
from .exports import base_of, check_export_source
from .provenance import Provenance
from .saving import adapter_folder, write_description
from .shrinking import check_shrinking, shrink_files


@dataclass(frozen=True, slots=True)
class SmallAdapter:
    """What `export_small` wrote.

    Attributes:
        path: the folder.
        share_kept: share of the deltas' squared Frobenius norm that is left; 1 is all of it.
        num_bytes: size of the weights file.
        num_bytes_before: of the adapter's own.
    """

    path: Path
    share_kept: float
    num_bytes: int
    num_bytes_before: int

    def __str__(self) -> str:
        sizes = f"{size(self.num_bytes)} of {size(self.num_bytes_before)}"
        return f"{self.path}, {sizes}\nkept {self.share_kept:.4%} of the delta"


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
    """Write a smaller copy of a LocFT adapter, which loads like the adapter and answers almost like it.

    A 16-bit dtype halves the file. `density` sets the other values to zero in a file of the same size, which then
    compresses better. Evaluate the copy before you ship it.

    Args:
        adapter: a local LocFT adapter folder.
        out: the folder to write.
        base: the base model, for `density`: a folder or a name on the Hub; `None` is the one that the adapter
            names.
        delta_dtype: `"float32"`, `"bfloat16"` or `"float16"`; `None` leaves the deltas as they are.
        density: share of a delta's values that stay, the largest relative to their weight (RECT).
        revision: branch, tag or commit of the base on the Hub.
        force: also use a base with other values than the adapter was trained on.

    Raises:
        ValueError: if neither `delta_dtype` nor `density` is given, or one is out of range; if the adapter is
            refused by `check_adapter` or the base by `edited_parameters`; if a value is too large for the dtype.
        NotADirectoryError: if `out` or one above it is a file.
        OSError: if the base cannot be downloaded.

    Example:
        >>> print(export_small("locft-demo", "demo-small", delta_dtype="bfloat16"))  # of examples/demo.py
        demo-small, 1.8 MB of 3.5 MB
        kept 99.9997% of the delta
    """
    check_shrinking(delta_dtype, density)
    if delta_dtype is None and density is None:
        raise ValueError("delta_dtype=None, density=None: expected one of the two, or both.")
    checked = check_export_source(adapter, out)
    parameters = {}
    if density is not None:
        checkpoint = Checkpoint(*base_of(checked, base, revision))
        found = edited_parameters(checkpoint, [checked], force=force)
        parameters = {parameter.name: parameter for parameter in found}
    with adapter_folder(out) as staging:
        shrunk = shrink_files(checked, staging, lambda name: parameters[name].base_parameter(), delta_dtype, density)
        config = PeftConfig.from_pretrained(str(staging))
        # without the evaluation: a smaller delta that answers otherwise is not what was evaluated
        provenance = replace(Provenance.of_config(config, checked.provenance.run), shrunk=shrunk)
        write_description(staging, config, provenance)
    num_bytes = (Path(out) / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return SmallAdapter(Path(out), shrunk.share_kept, num_bytes, checked.num_bytes)
