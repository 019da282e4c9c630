"""Output of a child process, read until the process ends."""

import subprocess
from collections.abc import Callable
from threading import Thread

# Receives each line of a child's stderr.
Watch = Callable[[str], None]


def collect_output(process: "subprocess.Popen[str]", watch: Watch | None = None) -> tuple[str, str]:
    """Wait for a child process and return its stdout and stderr, which must be text pipes.

    A stdin pipe stays open until the process ends. If this function raises, the process is killed.

    Args:
        watch: called with each line of stderr when it arrives. An exception from it kills the process and is raised
            again.
    """
    errors: list[str] = []
    failures: list[Exception] = []

    def read_errors() -> None:
        assert process.stderr is not None
        for text in process.stderr:
            errors.append(text)
            if watch is not None and not failures:
                try:
                    watch(text.rstrip("\n"))
                except Exception as error:
                    failures.append(error)
                    process.kill()  # otherwise both sides would wait for each other

    reader = Thread(target=read_errors, daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        output = process.stdout.read()
        process.wait()
    finally:
        process.kill()
        process.wait()
        reader.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    if failures:
        raise failures[0]
    return output, "".join(errors)
