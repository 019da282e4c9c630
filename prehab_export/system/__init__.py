"""The room of the machine: the files of a run and their digests, child processes, the current folder that none of them
trusts, errors, the terminal, progress, Markdown from templates, and what the machine is made of. It knows nothing of
models, and imports only ``converters``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
