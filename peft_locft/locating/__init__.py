"""The parts of a location search that train nothing: its plan, score, results and preset."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
