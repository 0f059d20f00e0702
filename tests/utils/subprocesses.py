"""Code that runs in another process, or holds a file there."""

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent


def in_another_process(code: str, *arguments: object) -> str:
    """What the code prints; it must end well and say nothing on stderr."""
    program = f"import gc; gc.disable()\n{dedent(code)}"  # imports are most of what it does
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def in_a_fork(code: str, *arguments: object) -> str:
    """As `in_another_process`, in one that has imported already what this one has."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.argv, sys.stdout, sys.stderr = ["-c", *map(str, arguments)], out, err
                exec(compile(dedent(code), "<code>", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                out.flush()
                err.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        for written in (out, err):
            written.seek(0)
        assert (os.waitstatus_to_exitcode(status), err.read()) == (0, "")
        return out.read().strip()


@contextmanager
def locked_by_another_process(path: Path) -> Iterator[None]:
    """As long as the block lasts, another process has the file open for writing."""
    code = "import sys, h5py; f = h5py.File(sys.argv[1], 'r+'); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.communicate(b"\n")
