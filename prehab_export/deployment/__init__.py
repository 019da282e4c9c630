"""This room turns a model in memory into files to deploy: export, parity checks against the model's own outputs,
verification of the written files, quantised and ``.ort`` graphs. It imports ``compression`` and the rooms below it,
never ``measurement``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
