"""prehab-export: compress trained transformers into low-rank models that deploy.

Every verb of the command line is an ordinary function here. Names are loaded on first use: importing the package
loads neither torch nor onnxruntime.
"""

from prehab_export.system.current_folder import is_the_program, leave_current_folder

if is_the_program():  # before anything else is imported, which might lie in the current folder
    leave_current_folder()

from prehab_export.system.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
