"""How a target is reached: the shell of another machine, the limits of a process here."""

from contextlib import AbstractContextManager

from prehab_export.config import Target
from prehab_export.measurement.targets.limits import Limits
from prehab_export.measurement.targets.shell import Shell, adb, ssh
from prehab_export.system import usable_cores


def limits_of(target: Target) -> Limits:
    """The cores and the memory that a process here may use.

    Raises:
        InputError: this system has no such limits.
    """
    cores = None if target.pin is None else tuple(usable_cores()[: target.pin])
    return Limits(cores, target.memory_mb)


def shell_of(target: Target) -> AbstractContextManager[Shell]:
    """The shell of a machine that is reached over ssh or adb.

    Raises:
        TargetError: it cannot be reached.
    """
    if target.name.startswith("ssh://"):
        return ssh(target.name)
    return adb(target.name.partition(":")[2] or None)
