"""A forward pass: cached activations, packed tokens, decoding and scoring, offload, memory, processes, loading."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
