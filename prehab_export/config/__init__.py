"""Options of a run: one frozen dataclass per stage that validates itself on construction, with the name, type, default
and meaning of every option. This room also reads, merges, sets and compares options as nested mappings, and converts
them to and from YAML. It does not load torch, because the command line builds itself from it. It imports ``system``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
