"""What holds for every test: offline, quiet, one thread."""

import atexit
import os
import shutil
import tempfile

# before the first import of torch and transformers, which read them once; in subprocesses, too
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

# what runs prepare is stored there, and not in the user's cache
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="locft-tests-")

import pytest
import torch

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def transformers_takes_this_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    import peft  # here: processes of tests take the settings above and put others in their place before such imports
    import transformers.integrations.peft

    # transformers 5.24 refuses PEFT before 0.22, which is not released yet; what it does with PEFT is as before
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", peft.__version__)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # the longest first, so that no worker is left alone with them in the end
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
