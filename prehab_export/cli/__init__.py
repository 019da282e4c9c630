"""The command line: options, commands and the tables that they print. A command parses its arguments, calls one
function of the pipeline and prints the result. It computes nothing itself.
"""

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
