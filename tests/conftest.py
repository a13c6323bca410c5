"""What holds for every test: offline, quiet, one thread."""

import os

# before the first import of torch and transformers, which read them once; in subprocesses, too
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest first, so that no worker is left alone with them in the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
