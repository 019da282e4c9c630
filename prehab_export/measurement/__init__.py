"""The room of milliseconds and megabytes: the bench, its worker processes, machine ceilings, times of ranks, and the
targets that a kit is taken to. It measures ONNX files, and knows nothing of how they were made. It imports
``linalg`` and what lies below it, and never ``deployment``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
