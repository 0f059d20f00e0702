"""Runs a function in two processes at once that talk to each other by gloo."""

import faulthandler
import gc
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from tests.utils import forks

RANKS = 2
SECONDS = 240.0
GRACE = 3.0
"""How long the others have to say what they have, after one has failed."""


def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function returns in each process, by rank. It has to be one of a module.

    Fails with the traceback of the processes in which it fails, and when they hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        context = forks.context()
        for rank in range(RANKS):
            ours, theirs = context.Pipe(duplex=False)
            told = (theirs, rank, os.path.join(folder, "store"), function, arguments)
            process = context.Process(target=_rank, args=told, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            said = _collected(pipes)
        finally:
            for process in processes:
                process.join(timeout=GRACE)
                process.kill()
                process.join()
    failures = [f"rank {rank}: {error}" for rank, (error, _) in said.items() if error]
    silent = [f"rank {rank}: no answer" for rank in range(RANKS) if rank not in said]
    if failures or silent:
        raise AssertionError("\n".join([*failures, *silent]))
    return [said[rank][1] for rank in range(RANKS)]


def tell_place(**others: Any) -> None:
    """Tell the environment what a launcher would: which of the processes of one node this is."""
    rank = dist.get_rank()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in (place | others).items()}


def _collected(pipes: list[Connection]) -> dict[int, tuple[str, Any]]:
    """The answers: (traceback or "", result), by rank."""
    said: dict[int, tuple[str, Any]] = {}
    waiting = dict(zip(pipes, range(RANKS), strict=True))
    until = monotonic() + SECONDS
    while waiting and (left := until - monotonic()) > 0:
        for pipe in wait(list(waiting), timeout=left):
            rank = waiting.pop(pipe)
            with suppress(EOFError):
                said[rank] = pickle.loads(pipe.recv_bytes())
            if rank not in said or said[rank][0]:
                until = min(until, monotonic() + GRACE)
    return said


def _rank(
    pipe: Connection, rank: int, store: str, function: Callable[..., Any], arguments: tuple
) -> None:
    gc.freeze()  # what was imported need not be searched for garbage
    gc.enable()
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(SECONDS - GRACE)  # where it hangs
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=SECONDS),
        )
        result = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        answer = "", result
    except BaseException:
        answer = traceback.format_exc(), None
    # Not `send`, which would leave tensors in memory that ends with this process.
    pipe.send_bytes(pickle.dumps(answer))
