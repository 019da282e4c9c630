"""The room of options: one frozen dataclass per stage, checked when it is made, with the name and meaning of every
option. It reads, merges, sets and compares options as nested mappings, and takes them to and from YAML. It is light:
the command line builds itself from it without loading torch. It imports ``system``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
