"""Edit facts in a language model: a PEFT tuner, its breadth-first trainer, and what goes with them.

Importing the package registers `LOCFT` with PEFT, and does nothing else.
"""

from ._version import __version__
from .adapter_folder import describe_adapter, save_adapter
from .adapter_reading import CheckedAdapter, check_adapter, read_adapter
from .edits import Edit, Probe, edits_sha256, read_edits
from .encoding import encode_edits, encode_prompts
from .exports import export_peft, export_weights
from .inspection import AdapterSummary, inspect_adapter
from .lora_export import export_lora
from .recipe import BreadthFirstConfig
from .sharing import push_adapter
from .shipped_edits import Conflicts, find_conflicts, shipped_edits
from .small_export import export_small
from .trainer import BreadthFirstTrainer
from .training_run import train_edits
from .tuner import LocFTConfig, LocFTModel

__all__ = [
    "AdapterSummary",
    "BreadthFirstConfig",
    "BreadthFirstTrainer",
    "CheckedAdapter",
    "Conflicts",
    "Edit",
    "LocFTConfig",
    "LocFTModel",
    "Probe",
    "__version__",
    "check_adapter",
    "describe_adapter",
    "edits_sha256",
    "encode_edits",
    "encode_prompts",
    "export_lora",
    "export_peft",
    "export_small",
    "export_weights",
    "find_conflicts",
    "inspect_adapter",
    "push_adapter",
    "read_adapter",
    "read_edits",
    "save_adapter",
    "shipped_edits",
    "train_edits",
]
