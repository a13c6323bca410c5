"""The PEFT tuner. Importing it registers `PeftType.LOCFT`; nothing else of PEFT is touched."""

# `peft` before its parts: if another thread is importing it, this waits
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import hotswap, register_peft_method


def _add_peft_type(name: str) -> None:
    """Append a member to the closed enum `PeftType`.

    PEFT has no interface for tuners of other packages: `register_peft_method` takes members of this enum only, and a
    plain string in its mappings breaks transformers' `load_adapter`. An appended member works like one in PEFT's
    source: lookup, iteration, copy, pickle, JSON.
    """
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # EnumMeta.__setattr__ refuses this; Python 3.12 and newer need the attribute for PeftType.LOCFT
    type.__setattr__(PeftType, name, member)


if "LOCFT" not in PeftType.__members__:
    _add_peft_type("LOCFT")

from ..io.arithmetic import compose_weight, tensor_sha256  # noqa: E402
from .config import LocFTConfig  # noqa: E402  (the config class needs PeftType.LOCFT)
from .layer import LocFTLayer  # noqa: E402
from .model import LocFTModel  # noqa: E402
from .presets import Location, balanced_config, default_location, find_decoder_layers  # noqa: E402

_registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType.LOCFT)
if _registered is None:
    register_peft_method(name="locft", config_cls=LocFTConfig, model_cls=LocFTModel)
    # keys of the config that must agree for a hot-swap: none, since a delta has no rank or alpha
    hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LOCFT] = []
elif (_registered.__module__, _registered.__qualname__) != (LocFTConfig.__module__, LocFTConfig.__qualname__):
    raise ImportError(
        f"PEFT already has a method LOCFT, registered by {_registered.__module__}. Uninstall that package, or use it "
        "instead of peft_locft."
    )

__all__ = [
    "LocFTConfig",
    "LocFTLayer",
    "LocFTModel",
    "Location",
    "balanced_config",
    "compose_weight",
    "default_location",
    "find_decoder_layers",
    "tensor_sha256",
]
