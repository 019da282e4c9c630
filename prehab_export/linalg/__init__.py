"""The mathematics: decompositions in whitened metrics, allocation of ranks, surrogates of rank, shrinkage of sampled
moments, quantisation grids, and an optimiser that works in an eigenbasis. Functions take tensors and return tensors; no
model, path or config object comes in here. This room imports ``converters`` for matrix roots and quantisation modes.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
