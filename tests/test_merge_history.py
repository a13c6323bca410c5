"""What was merged into a model is listed, and one of several adapters comes off alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import LAYER_1, edit, save_base, snapshot
from tiny_gguf import save_gguf, stored_bytes

from peft_locft import LocFTConfig, detach, merge_checkpoint, merge_in_place
from peft_locft.cli import main
from peft_locft.merging import (
    detach_adapter,
    detach_gguf,
    in_place,
    merge_gguf,
    merge_gguf_in_place,
    merge_history,
)

LAYERS_1_AND_2 = LocFTConfig(target_modules=["down_proj"], layers_to_transform=[1, 2])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_base(tmp_path / "model", hidden_size=64, intermediate_size=64)


@pytest.fixture
def adapters(model: Path, tmp_path: Path) -> list[Path]:
    for seed, config in enumerate((LAYER_1, LAYERS_1_AND_2, LAYER_1)):
        edit(model, tmp_path / f"adapter{seed}", config, seed=seed)
    return [tmp_path / f"adapter{seed}" for seed in range(3)]


def test_of_a_folder(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    assert merge_history(model) == []
    merge_checkpoint(model, adapters[:2], tmp_path / "first", weights=[0.5, 2.0])
    merge_checkpoint(tmp_path / "first", adapters[2], tmp_path / "second", scale=0.25, force=True)
    merge_in_place(tmp_path / "second", adapters[0], force=True)
    found = merge_history(tmp_path / "second")
    assert [[each.adapter for each in merge.adapters] for merge in found] == [
        [str(adapters[0])],
        [str(adapters[2])],
        [str(adapters[0]), str(adapters[1])],
    ]
    assert [merge.can_detach for merge in found] == [True, False, False]
    assert [merge.when is None for merge in found] == [False, False, True]
    assert found[1].adapters[0].scale == 0.25 and [each.weight for each in found[2].adapters] == [0.5, 2.0]
    assert "in place, `locft detach` undoes it:" in str(found[0]) and "weight 0.5)" in str(found[2])
    detach(tmp_path / "second")
    assert merge_history(tmp_path / "second") == found[1:]


def test_of_a_gguf_file(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    path = save_gguf(model, tmp_path / "model.gguf")
    assert merge_history(path) == []
    merge_gguf(path, adapters[0], tmp_path / "out.gguf")
    merge_gguf_in_place(tmp_path / "out.gguf", adapters[1], force=True)
    found = merge_history(tmp_path / "out.gguf")
    assert [[each.adapter for each in merge.adapters] for merge in found] == [[str(adapters[1])], [str(adapters[0])]]
    assert [merge.can_detach for merge in found] == [True, False]


@pytest.mark.parametrize("how", [{}, {"scale": 0.5}, {"weights": [1.0, 0.5, -1.0]}])
@pytest.mark.parametrize("kind", ["folder", "F32", "Q4_1"])
def test_one_of_several_comes_off(
    kind: str, how: dict[str, Any], model: Path, adapters: list[Path], tmp_path: Path
) -> None:
    rest = [adapters[0], adapters[2]]
    less = how | ({"weights": [1.0, -1.0]} if "weights" in how else {})
    if kind == "folder":
        before, place = snapshot(model), model
        merge_checkpoint(model, rest, tmp_path / "expected", **less)
        merge_in_place(model, adapters, **how)
        detach_adapter(model, adapters[1])
        weights = "model.safetensors"
        assert snapshot(model)[weights] == snapshot(tmp_path / "expected")[weights]
    else:
        place = save_gguf(model, tmp_path / "model.gguf", kind)
        before_bytes = place.read_bytes()
        merge_gguf(place, rest, tmp_path / "expected.gguf", **less)
        merge_gguf_in_place(place, adapters, **how)
        detach_adapter(place, adapters[1])
        assert stored_bytes(place) == stored_bytes(tmp_path / "expected.gguf")
    assert [each.adapter for each in merge_history(place)[0].adapters] == [str(each) for each in rest]
    for adapter in rest:  # the last one leaves the original
        detach_adapter(place, str(adapter))
    assert (snapshot(model) == before) if kind == "folder" else (place.read_bytes() == before_bytes)


def test_what_is_not_there_changes_nothing(model: Path, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is merged in place there"):
        detach_adapter(model, adapters[0])
    merge_in_place(model, adapters[:2])
    merged = snapshot(model)
    with pytest.raises(ValueError, match=r"is not merged in place in .*Merged are: .*adapter0, .*adapter1"):
        detach_adapter(model, adapters[2])
    shutil.move(adapters[0], tmp_path / "elsewhere")
    with pytest.raises((ValueError, OSError), match="adapter0"):
        detach_adapter(model, adapters[1])
    assert snapshot(model) == merged


def test_a_failure_in_between_puts_all_back(
    model: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_in_place(model, adapters[:2])
    merged = snapshot(model)
    real, calls = in_place.write_undo, []

    def failing(*arguments: Any, **named: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no room")
        real(*arguments, **named)

    monkeypatch.setattr(in_place, "write_undo", failing)
    with pytest.raises(OSError, match="no room"):
        detach_adapter(model, adapters[1])
    assert snapshot(model)["model.safetensors"] == merged["model.safetensors"]


def test_the_command_line(
    model: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["history", str(model)])
    assert "Nothing is merged into it" in capsys.readouterr().out
    merge_in_place(model, adapters[:2])
    main(["history", str(model)])
    assert f"  {adapters[1]} (scale 1)" in capsys.readouterr().out
    main(["detach", str(model), "--adapter", str(adapters[0])])
    assert [each.adapter for each in merge_history(model)[0].adapters] == [str(adapters[1])]
    with pytest.raises(ValueError, match="is neither a local folder nor a GGUF file"):
        merge_history(tmp_path / "none")
    path = save_gguf(save_base(tmp_path / "other"), tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="nothing is merged in place there"):
        detach_gguf(path)
