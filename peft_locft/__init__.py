"""Edit facts in a language model: a PEFT tuner, its breadth-first trainer, and what goes with them.

Importing the package registers `LOCFT` with PEFT, and does nothing else.
"""

from ._version import __version__
from .adapters.adapter_folder import describe_adapter, save_adapter
from .adapters.adapter_reading import CheckedAdapter, check_adapter, read_adapter
from .adapters.exports import export_peft, export_weights
from .adapters.inspection import AdapterSummary, inspect_adapter
from .adapters.lora_export import export_lora
from .adapters.sharing import push_adapter
from .adapters.shipped_edits import Conflicts, find_conflicts, shipped_edits
from .adapters.small_export import export_small
from .data.edit_lists import EditPlan, edit_id, held_edits, merge_edit_lists
from .edits import Edit, Probe, edits_sha256, read_edits
from .encoding import encode_edits, encode_prompts
from .evaluation import EditEvaluator, evaluate_edits
from .locating.location_preset import LocationPreset
from .locating.location_results import LocationSearch
from .location_search import SearchPlan, search_locations
from .measuring.evaluation_config import EvaluationConfig
from .measuring.evaluation_report import EvaluationReport
from .measuring.evaluation_run import evaluate_model
from .measuring.harness import evaluate_on_tasks
from .merging.in_place import detach, merge_in_place
from .merging.stream_merge import MergeSummary, merge_checkpoint
from .recipe import BreadthFirstConfig
from .trainer import BreadthFirstTrainer
from .training.evaluation_callback import EvaluationCallback
from .training.lifelong import UpdateSummary, update_adapter
from .training.preserver import PreservationCallback, Preserver
from .training.scale_choice import TradeOff, choose_scale
from .training.training_run import train_edits
from .tuner import LocFTConfig, LocFTModel, balanced_config

__all__ = [
    "AdapterSummary",
    "BreadthFirstConfig",
    "BreadthFirstTrainer",
    "CheckedAdapter",
    "Conflicts",
    "Edit",
    "EditEvaluator",
    "EditPlan",
    "EvaluationCallback",
    "EvaluationConfig",
    "EvaluationReport",
    "LocFTConfig",
    "LocFTModel",
    "LocationPreset",
    "LocationSearch",
    "MergeSummary",
    "PreservationCallback",
    "Preserver",
    "Probe",
    "SearchPlan",
    "TradeOff",
    "UpdateSummary",
    "__version__",
    "balanced_config",
    "check_adapter",
    "choose_scale",
    "describe_adapter",
    "detach",
    "edit_id",
    "edits_sha256",
    "encode_edits",
    "encode_prompts",
    "evaluate_edits",
    "evaluate_model",
    "evaluate_on_tasks",
    "export_lora",
    "export_peft",
    "export_small",
    "export_weights",
    "find_conflicts",
    "held_edits",
    "inspect_adapter",
    "merge_checkpoint",
    "merge_edit_lists",
    "merge_in_place",
    "push_adapter",
    "read_adapter",
    "read_edits",
    "save_adapter",
    "search_locations",
    "shipped_edits",
    "train_edits",
    "update_adapter",
]
