"""The room of the command line: options, commands and the tables that they print. It parses, calls one function of the
room below, and prints; nothing is computed here.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
