"""The room of mathematics: tensors in, tensors out. Decompositions in whitened metrics, how ranks are shared out,
surrogates of rank, shrinkage of sampled moments, quantisation grids, and an optimiser in a basis of its own. No
model, no path and no config object comes in here; it imports ``converters`` for what names a quantisation has.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
