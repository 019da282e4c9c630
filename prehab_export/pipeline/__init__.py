"""The room of runs: a folder, stages that read and publish results in it, and what is built on them: fits, sweeps,
reports, the demo, a look at a model. Only here do options meet files and functions. It imports every room but
``cli``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
