"""The room of options: one frozen dataclass a stage, checked when it is made; names, defaults and meanings of all
options; reading, merging, setting and comparing them as nested mappings; their way to and from YAML. It is light: the
command line builds itself from it without loading torch. It imports ``system``.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
