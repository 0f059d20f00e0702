"""Worker processes, and what their jobs tell of themselves while they run."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty
from typing import Any, Protocol

SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a job is: `done` between 0 and 1, and what it says of itself."""

    job: str
    stage: str
    weight: float
    done: float
    says: str


OnProgress = Callable[[Progress], None]
Say = Callable[[float, str], None]


class Job(Protocol):
    """Work for one process. `weight` is how long it takes beside the others."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def run(self, say: Say) -> Any: ...


@contextmanager
def working(
    count: int, report: OnProgress, threads: int = 1
) -> Iterator[Callable[[Sequence[Job]], list[Any]]]:
    """A function that runs jobs in `count` processes, the longest first, and returns their results.

    Models as small as the embedded one are slower on two threads than on one. Where the block ends
    by an error or an interrupt, the processes end at once, in the middle of their jobs. They also
    end where their parent is killed.
    """
    # Not forked: a process that inherits torch's thread pool may hang.
    context = multiprocessing.get_context("spawn")
    news = context.Queue()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        count, mp_context=context, initializer=_start, initargs=(news, threads)
    )

    def run(jobs: Sequence[Job]) -> list[Any]:
        with _interrupts_held_back():
            futures = {
                job.name: pool.submit(_run, job) for job in sorted(jobs, key=lambda j: -j.weight)
            }
        _watch(list(futures.values()), news, report)
        return [futures[job.name].result() for job in jobs]

    try:
        yield run
    except BaseException:
        with _interrupts_held_back():
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """An interrupt that comes meanwhile takes effect afterwards.

    Processes that are started meanwhile never see one: it is for the first process to end them.
    """
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(futures: Sequence[Future[Any]], news: Any, report: OnProgress) -> None:
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED)
        for future in ended:
            future.result()  # a job that failed ends the study
        while True:
            try:
                report(news.get_nowait())
            except Empty:
                break


_news: Any = None


def _start(news: Any, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    global _news
    _news = news
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(job: Job) -> Any:
    def say(done: float, says: str) -> None:
        _news.put(Progress(job.name, job.stage, job.weight, done, says))

    say(0.0, "starts")
    result = job.run(say)
    say(1.0, "done")
    return result
