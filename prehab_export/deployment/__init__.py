"""The room where a model in memory becomes files that deploy: export that is held to what the model answers, parity,
verification of what was written, quantised and ``.ort`` graphs, merging of adapters. It imports ``compression`` and
what lies below it, and never ``measurement``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
