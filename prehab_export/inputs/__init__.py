"""The room of what comes in: models, tokenizers and processors as they are stored, the tasks, data as batches, the
device to compute on, and how good a model is on data. It imports ``config`` and ``system``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
