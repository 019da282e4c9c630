"""The room of runs: a folder, the stages that read and publish results in it, and what builds on them: fits, sweeps,
reports, the demo, model inspection. This is the only room where options meet files and functions. It imports every room
but ``cli``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
