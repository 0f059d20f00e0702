"""Many mutants of run files: `python -m tests.fuzz`, with exit code 1 where one is not refused."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .originals import originals
from .runner import faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Try them all, and name every one that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=main.__doc__)
    parser.add_argument("--mutants", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="that of the first")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = originals(Path(folder))
    seeds = range(options.seed, options.seed + options.mutants)
    found = faults(runs, seeds, processes=options.processes)
    seconds = time.monotonic() - began
    sys.stdout.writelines(f"{line}\n" for line in found)
    sys.stdout.write(f"{options.mutants} mutants, {len(found)} faults, {seconds:.0f} s\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
