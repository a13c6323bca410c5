"""Feeds broken adapters to the reader: whatever the bytes, it reads them or says a ValueError, and allocates no more.

pytest runs it for seconds, by way of test_adapter_fuzz.py. For longer: `python tests/fuzz_adapters.py --minutes 10`.
"""

from __future__ import annotations

import argparse
import atexit
import json
import math
import resource
import struct
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (offline, one thread)
import safetensors
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from safetensors.torch import save
from saving_process import make_adapter

from peft_locft import save_adapter
from peft_locft.adapters import check_adapter
from peft_locft.adapters.reading import MAX_HEADER_BYTES
from peft_locft.io.safetensors_file import DTYPES, check_tensors, read_header

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "locft_provenance.json"
# Python's own objects around a file of some kilobytes; what a header could claim begins far above
ALLOWANCE = 400_000
FOLDER = tempfile.TemporaryDirectory()
atexit.register(FOLDER.cleanup)
FILE = Path(FOLDER.name) / "file"

numbers = st.one_of(
    st.integers(0, 64),
    st.sampled_from([-1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**30, 10**5000 // 10**1000, 1.5, True, None, "1"]),
)
shapes = st.one_of(st.lists(numbers, max_size=9), numbers)
good_names = st.sampled_from([f"model.layers.{number}.{kind}" for number in range(3) for kind in ("weight", "bias")])
bad_names = st.one_of(st.sampled_from(["../a", "", ".", "a..b", "a/b", "__metadata__"]), st.text(max_size=8))
names = st.one_of(good_names, bad_names)
json_values: SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)
entries = st.one_of(
    st.fixed_dictionaries(
        {"dtype": st.sampled_from([*DTYPES, "F4", "f32", 3]), "shape": shapes, "data_offsets": st.lists(numbers)}
    ),
    json_values,
)


@st.composite
def tensor_files(draw: Any) -> bytes:
    """Draw a file whose header is mostly a header: whole tensors with some of what is said of them changed."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(good_names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    for name in list(header):
        if draw(st.integers(0, 5)) == 0:
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[name][field] = draw(st.one_of(shapes, json_values, st.sampled_from(sorted(DTYPES))))
    if draw(st.integers(0, 3)) == 0:
        header[draw(names)] = draw(entries)
    raw = json.dumps(header).encode()
    length = draw(st.integers(0, 2**64 - 1)) if draw(st.integers(0, 7)) == 0 else len(raw)
    return struct.pack("<Q", length) + raw + bytes(max(0, position + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 8]))))


@st.composite
def mutated(draw: Any, whole: bytes) -> bytes:
    """Draw a whole file with some bytes of its first part changed, cut or put in."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, min(len(data), 400)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if kind == "end":
            del data[draw(st.integers(0, len(data))) :]
        elif kind == "cut":
            del data[place : place + draw(st.integers(1, 8))]
        else:
            added = draw(st.binary(min_size=1, max_size=4))
            data[place : place + (len(added) if kind == "change" else 0)] = added
    return bytes(data)


@st.composite
def with_other_fields(draw: Any, whole: bytes) -> bytes:
    fields = json.loads(whole)
    changed = draw(st.dictionaries(st.sampled_from(sorted(fields)), json_values, min_size=1, max_size=2))
    return json.dumps(fields | changed).encode()


WHOLE_FILE = save({"a.weight": torch.ones(3, 5), "b.weight": torch.ones(7, dtype=torch.bfloat16)}, {"format": "pt"})
headers = st.one_of(tensor_files(), mutated(WHOLE_FILE), st.binary(max_size=64))


def check_header(data: bytes) -> bool:
    """Read a file's header; what is accepted must be read alike by safetensors itself. Returns whether it was."""
    FILE.write_bytes(data)
    tracemalloc.start()
    try:
        found, _ = read_header(FILE, max_header_bytes=MAX_HEADER_BYTES)
        check_tensors(found, FILE)
    except ValueError as error:
        assert "is not a readable safetensors file: found " in str(error)
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 3 * len(data) + ALLOWANCE, f"{peak} bytes for a file of {len(data)}"
    theirs = dict(safetensors.deserialize(data))
    assert {name: (entry.dtype, list(entry.shape)) for name, entry in found.items()} == {
        name: (said["dtype"], said["shape"]) for name, said in theirs.items()
    }
    for name, entry in found.items():
        assert data[entry.start : entry.start + entry.num_bytes] == theirs[name]["data"]
        # what reads the values goes on to give them their shape
        assert torch.zeros(math.prod(entry.shape), dtype=torch.bool).reshape(entry.shape).shape == entry.shape
    return True


class FuzzedFolder:
    """An adapter folder of which one file is replaced, read and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_adapter(make_adapter("down"), folder)
        self.whole = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS, FACTS)}

    def files(self) -> SearchStrategy[tuple[str, bytes]]:
        """Return the files to put in the place of one: some bytes changed, or some fields of its JSON."""
        kinds = [st.tuples(st.just(name), mutated(content)) for name, content in self.whole.items()]
        kinds += [st.tuples(st.just(name), with_other_fields(self.whole[name])) for name in (CONFIG, FACTS)]
        return st.one_of(kinds)

    def check(self, name: str, content: bytes) -> bool:
        (self.folder / name).write_bytes(content)
        try:
            adapter = check_adapter(self.folder)
            for parameter in adapter.deltas:
                adapter.read_delta(parameter)
        except ValueError as error:
            assert str(self.folder) in str(error), "it does not say where"
            assert str(error).isprintable()
            return False
        finally:
            (self.folder / name).write_bytes(self.whole[name])
        return True


def quietly(max_examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of processor time")
    parser.add_argument("--first_seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # PEFT's, of fields that it does not know
    end = time.process_time() + 60 * arguments.minutes
    counts = {"headers": [0, 0], "folders": [0, 0]}
    with tempfile.TemporaryDirectory() as temporary:
        folder = FuzzedFolder(Path(temporary) / "adapter")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        number = arguments.first_seed
        while time.process_time() < end:

            @seed(number)
            @quietly(2000)
            @given(headers)
            def fuzz_headers(data: bytes) -> None:
                counts["headers"][check_header(data)] += 1

            @seed(number)
            @quietly(500)
            @given(folder.files())
            def fuzz_folders(file: tuple[str, bytes]) -> None:
                counts["folders"][folder.check(*file)] += 1

            fuzz_headers()
            fuzz_folders()
            number += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    for what, (refused, read) in counts.items():
        print(f"{what}: {refused + read} tried, {refused} refused with a ValueError, {read} read")
    print(f"seeds {arguments.first_seed} to {number - 1}; peak memory grew by {grown / 1024:.1f} MB")


if __name__ == "__main__":
    main()
