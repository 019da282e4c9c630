"""Runs the command line, and is killed in the midst of a walk over blocks.

The first argument is the number of parts (blocks and their like) that are written before; the rest is the command line.
"""

import os
import signal
import sys

from prehab_export.cli.entry import main
from prehab_export.compression import checkpoints, factor_files, moment_files


def dying_after(parts, save):
    """Return ``save``, which kills this process when so many parts are written."""
    written = []

    def save_or_die(tensors, path, metadata):
        if path.stem.isdigit():  # not a checkpoint
            if len(written) == parts:
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(path)
        save(tensors, path, metadata)

    return save_or_die


if __name__ == "__main__":
    checkpoints.INTERVAL = 0.0
    moment_files.save_beside = factor_files.save_beside = dying_after(int(sys.argv[1]), checkpoints.save_beside)
    main(sys.argv[2:])
