"""Processes that are there at once: what tests import is imported, and no test has run in them."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest.mock import patch


def context() -> ForkServerContext:
    """Processes of it are forks of the server, once that has started."""
    return multiprocessing.get_context("forkserver")


def call(function: Callable[..., Any], *arguments: Any, seconds: float = 600.0) -> Any:
    """What the function of a module returns in a process of its own, which ends with it."""
    ours, theirs = context().Pipe(duplex=False)
    process = context().Process(target=_called, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise AssertionError(f"`{function.__name__}` still runs after {seconds} s.")
        error, result = ours.recv()
    finally:
        process.kill()
        process.join()
    if error:
        raise AssertionError(error)
    return result


def _called(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = "", function(*arguments)
    except BaseException:
        answer = traceback.format_exc(), None
    pipe.send(answer)


def start_server() -> None:
    """Fork the server from this process; a new one would import for many seconds."""
    if not hasattr(os, "fork"):
        return
    context().set_forkserver_preload([])
    with patch.object(util, "spawnv_passfds", _forked):
        forkserver.ensure_running()


def _forked(_: object, told: Sequence[object], kept: Sequence[int]) -> int:
    """Takes the place of starting Python: `told` ends in the program."""
    pid = os.fork()
    if pid == 0:
        try:
            _close_other_ends(kept)
            if "tests.utils.engines" in sys.modules:
                # Nine tenths of what an engine loads; it would be compiled when it is imported.
                with suppress(ImportError), patch("torch.compile", lambda function: function):
                    import_module("deepspeed.runtime.zero.muon.muon_optimizer")
            exec(str(told[-1]), {"__name__": "__main__"})
        finally:
            os._exit(0)
    return pid


def _close_other_ends(kept: Sequence[int]) -> None:
    """A server ends when nobody has the other end of its pipe any more, so it must have none."""
    pipes = [os.fstat(descriptor)[1:3] for descriptor in kept]
    for descriptor in {int(name) for name in os.listdir("/dev/fd")} - {*kept}:
        with suppress(OSError):  # that of the folder is closed
            if os.fstat(descriptor)[1:3] in pipes:
                os.close(descriptor)
