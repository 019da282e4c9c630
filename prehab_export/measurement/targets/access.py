"""Access to a target: the limits of a local process, and the shell of another machine."""

from contextlib import AbstractContextManager

from prehab_export.config import Target
from prehab_export.measurement.targets.limits import Limits
from prehab_export.measurement.targets.shell import Shell, adb, ssh
from prehab_export.system import usable_cores


def limits_of(target: Target) -> Limits:
    """Return the cores and the memory that a local process may use.

    Raises:
        InputError: this system cannot enforce the limits.
    """
    cores = None if target.pin is None else tuple(usable_cores()[: target.pin])
    return Limits(cores, target.memory_mb)


def shell_of(target: Target) -> AbstractContextManager[Shell]:
    """Open the shell of a machine over ssh or adb.

    Raises:
        InputError: the address is malformed, or this machine has no ssh or adb.
        TargetError: the device cannot be reached.
    """
    if target.name.startswith("ssh://"):
        return ssh(target.name)
    return adb(target.name.partition(":")[2] or None)
