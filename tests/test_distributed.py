"""A process leaves the group of its launcher."""

from __future__ import annotations

from peft_locft.engine.distributed import leave_group


def test_it_forgets_the_group_and_keeps_its_device() -> None:
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "HOME": "/home"}
    assert leave_group(environment) == 5
    assert environment == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "1"}


def test_it_keeps_one_of_its_visible_devices() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert leave_group(environment) == 1
    assert environment == {"CUDA_VISIBLE_DEVICES": "6"}


def test_without_a_group_nothing_changes() -> None:
    environment = {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert leave_group(environment) == 0
    assert environment == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "4,6"}
