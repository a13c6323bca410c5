"""A process leaves the group that a launcher has put it into."""

from __future__ import annotations

from peft_locft.engine.distributed import leave_group


def test_it_forgets_the_group_and_keeps_its_device() -> None:
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "HOME": "/home"}
    assert leave_group(environment) == 5
    assert environment == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "1"}


def test_it_takes_one_of_the_devices_that_it_may_see() -> None:
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert leave_group(environment) == 1
    assert environment == {"CUDA_VISIBLE_DEVICES": "6"}


def test_alone_it_changes_nothing() -> None:
    environment = {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "4,6"}
    assert leave_group(environment) == 0
    assert environment == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "4,6"}
