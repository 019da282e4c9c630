"""A child process to its end, with what it says on the way."""

import subprocess
from collections.abc import Callable
from threading import Thread

Watch = Callable[[str], None]


def finish(process: "subprocess.Popen[str]", watch: Watch | None = None) -> tuple[str, str]:
    """stdout and stderr of a child, both pipes of text, once it has ended; a stdin that is a pipe stays open until
    then. By whatever way this is left, the child is gone.

    Args:
        watch: called with each line of stderr as it comes; what it raises ends the child and is raised here.
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
                    process.kill()  # else both ends would wait for each other

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
