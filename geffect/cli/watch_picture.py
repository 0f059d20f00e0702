"""The picture of a watched run in the documents: `python -m geffect.cli.watch_picture RUN`."""

import sys
from pathlib import Path

from .followed import Followed
from .terminal import picture, write
from .watch_frame import BLOCKS, frame

WIDTH = 96
"""The columns of the terminal in the picture."""


def drawn(run: Path) -> str:
    """The frame of a run as SVG."""
    view = Followed(run).look()
    return picture(frame(view, BLOCKS, WIDTH), WIDTH, f"geffect watch {run.name}")


if __name__ == "__main__":
    write(drawn(Path(sys.argv[1])))
