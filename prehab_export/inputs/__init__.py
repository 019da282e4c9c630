"""This room holds the inputs of a compression: stored models, tokenizers and processors, tasks, data as batches, the
device to compute on, and the evaluation of a model on data. It imports ``config`` and ``system``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
