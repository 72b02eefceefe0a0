"""kerastrip: metric learning for Keras 3."""

from kerastrip._version import __version__

__all__ = ["__version__"]
