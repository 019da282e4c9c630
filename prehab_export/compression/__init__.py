"""This room turns a dense model into low-rank factors: calibration, prehab, truncation, refinement and rehab. Its
functions take and return objects; the only files they read or write are those of the moments. It imports ``inputs``,
``linalg`` and the rooms below them.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
