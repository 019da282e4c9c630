"""The machine and its operating system: files of a run and their digests, child processes, protection against code in
the current folder, errors, terminal output, progress, Markdown from templates, and facts about the hardware. This room
knows nothing about models and imports only ``converters``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
