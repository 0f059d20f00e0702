"""Counts the reductions that geffect makes among processes, by what asks for each."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist

BELOW = ("geffect/distributed/", "geffect/dots.py")
"""Where reductions are made for others."""


@contextmanager
def named() -> Iterator[list[str]]:
    """The names of the functions that ask, in order. What FSDP2 and DDP reduce is not theirs."""
    found: list[str] = []
    reduce = dist.all_reduce

    def counted(*arguments: Any, **options: Any) -> Any:
        frame = sys._getframe(1)
        while frame is not None and any(map(frame.f_code.co_filename.__contains__, BELOW)):
            frame = frame.f_back
        assert frame is not None
        found.append(frame.f_code.co_qualname.partition(".<locals>")[0])
        return reduce(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        yield found
