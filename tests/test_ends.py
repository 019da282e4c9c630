"""How the program ends when it is told to."""

import signal
import subprocess
import sys

import pytest

CODE = """
import time
from prehab_export.cli import main
from prehab_export.cli.commands import cli

@cli.command()
def wait():
    try:
        print("started", flush=True)
        time.sleep(60)
    finally:
        print("tidied", flush=True)

main(["wait"])
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=["term", "hup", "int"]
)
def test_signals_unwind_and_have_a_code(number, code):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a suite in the background may have it ignored
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "tidied\n"
    assert process.returncode == code


def test_signals_that_are_ignored_stay_so():
    """As under nohup."""
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" + CODE.replace("sleep(60)", "sleep(1)")
    process = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=30)[0] == "tidied\n"
    assert process.returncode == 0
