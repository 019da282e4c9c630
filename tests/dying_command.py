"""Runs the command line in one of several processes, of which the last is killed in the midst of a stage.

The first argument names the stage; the rest is the command line.
"""

import os
import signal
import sys
from dataclasses import replace

from prehab_export.cli.entry import main
from prehab_export.pipeline.stages.table import STAGES


def dies(_session, _folder):
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    stage = STAGES[sys.argv[1]]
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        STAGES[stage.name] = replace(stage, work=dies)
    main(sys.argv[2:])
