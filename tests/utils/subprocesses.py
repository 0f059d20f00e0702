"""Code that runs in another process, or holds a file there."""

import subprocess
import sys
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
