"""What a merge believes of an adapter is what `check_adapter` believes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from saving_process import make_adapter
from test_reading import HOSTILE
from tiny_checkpoints import edit, save_base, snapshot, stored

from peft_locft import LocFTConfig, merge_checkpoint, merge_in_place, save_adapter
from peft_locft.adapters import check_adapter, read_adapter
from peft_locft.io.arithmetic import compose_weight

PARAMETER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model and an adapter for it."""
    folder = tmp_path_factory.mktemp("whole")
    save_base(folder / "base")
    save_adapter(make_adapter("down"), folder / "adapter")
    return folder


def test_the_deltas_are_where_a_checked_adapter_has_them(whole: Path, tmp_path: Path) -> None:
    found = check_adapter(whole / "adapter").delta_tensors
    assert list(found) == [PARAMETER]
    delta = found[PARAMETER]
    expected = read_adapter(whole / "adapter")[PARAMETER]
    assert delta.shape == expected.shape
    assert delta.read(0, delta.num_values).tolist() == expected.flatten().tolist()
    merge_checkpoint(whole / "base", [whole / "adapter"], tmp_path / "out")
    base = stored(whole / "base")[PARAMETER]
    assert stored(tmp_path / "out")[PARAMETER].tolist() == compose_weight(base, [(expected, 1.0)]).tolist()


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_adapter_is_merged_into_nothing(case: str, whole: Path, tmp_path: Path) -> None:
    base, adapter = (Path(shutil.copytree(whole / name, tmp_path / name)) for name in ("base", "adapter"))
    HOSTILE[case][0](adapter)
    before = snapshot(base)
    with pytest.raises(ValueError) as refused:  # of a value that is not finite, the merge speaks in its own words
        merge_checkpoint(base, [adapter], tmp_path / "out", force=True)
    assert str(refused.value).isprintable()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError):
        merge_in_place(base, [adapter], force=True)
    assert snapshot(base) == before


def test_a_link_that_is_changed_after_the_check_is_not_followed(whole: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(whole / "adapter", tmp_path / "adapter"))
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "kept")
    weights.symlink_to("kept")
    delta = check_adapter(adapter).delta_tensors[PARAMETER]
    expected = delta.read(0, 3).tolist()
    weights.unlink()
    weights.symlink_to("/dev/zero")
    assert delta.read(0, 3).tolist() == expected


def test_what_is_more_than_deltas_is_named(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    edit(base, tmp_path / "more", LocFTConfig(layers_to_transform=[1], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"holds base_model\.model\.lm_head\.weight; expected only deltas"):
        check_adapter(tmp_path / "more").refuse_all_but_deltas()
