"""The pure parts of a search for a location: what is tried, how it is ranked, what is found."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
