"""Merges adapters into a model on disk (safetensors or GGUF), as a new one or in place, and detaches them again."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
