"""The room of the machine: files written whole or not at all, their digests, child processes, the terminal, progress,
Markdown from templates, and what the machine is made of. It knows nothing of models, and imports only
``converters``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
