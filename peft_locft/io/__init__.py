"""Files on disk: atomic writes, copies, locks, safetensors checkpoints, parameter names."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
