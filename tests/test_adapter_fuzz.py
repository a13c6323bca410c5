"""Some seconds of fuzz_adapters.py, the same ones in every run."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from fuzz_adapters import FuzzedFolder, check_header, headers, quietly
from hypothesis import given, seed
from hypothesis import strategies as st

from peft_locft.io.safetensors_file import read_header


def test_any_bytes_are_a_header_that_safetensors_reads_alike_or_are_refused() -> None:
    outcomes = []

    @seed(0)
    @quietly(600)
    @given(headers)
    def fuzz(data: bytes) -> None:
        outcomes.append(check_header(data))

    fuzz()
    assert set(outcomes) == {True, False}


def test_any_file_of_a_folder_is_read_or_refused(tmp_path: Path) -> None:
    folder, outcomes = FuzzedFolder(tmp_path / "adapter"), []

    @seed(0)
    @quietly(300)
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        outcomes.append(folder.check(*data.draw(folder.files())))

    fuzz()
    assert set(outcomes) == {True, False}


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'"",', b"1,", b"[[[[[[[[]]]]]]]],"])
def test_a_megabyte_of_header_takes_no_more_than_fifty(unit: bytes, tmp_path: Path) -> None:
    content = b'{"a": [' + unit * (1_000_000 // len(unit)) + b"0]}"
    file = tmp_path / "file"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected dtype, shape and data_offsets"):
        read_header(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
