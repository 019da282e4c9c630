"""The room where a dense model becomes factors: calibration, prehab, truncation, refinement and rehab. Every verb takes
objects and returns objects; no file is read or written but the moments. It imports ``inputs``, ``linalg`` and what
lies below them.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
