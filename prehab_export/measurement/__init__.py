"""Measurement of the latency and memory of ONNX models: the bench and its worker processes, the ceilings of the
machine, layer times by rank, and kits for other targets. It knows nothing of how the models were made. It imports
``linalg`` and the rooms below it, and never ``deployment``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
