"""How the suite is run: on the CPU, in memory, with a heap that is not searched for long."""

# ruff: noqa: E402
import gc
import os
import signal

# Before anything imports torch or matplotlib; child processes inherit it.
os.environ["MPLBACKEND"] = "Agg"
# The suite is one of the CPU: what looks for a device of CUDA or of accelerate finds none.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TRITON_INTERPRET"] = "1"  # Triton runs kernels on the CPU
# Tiny tensors gain nothing from threads, and lose much to them where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests press Ctrl-C, which what a shell has started in its background ignores.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# What is imported and collected stays: to look for garbage meanwhile takes a fifth of that time.
gc.disable()

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# Where memory has room it holds the files of tests, which are small, many, and soon gone: a disk
# takes longer to write and remove them than most tests to make them.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4e9:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_configure(config: pytest.Config) -> None:
    """Who hands tests out to other processes runs none: what fixtures import takes seconds."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.utils.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No id holds an address, which every process has its own; who waits for the study is first."""
    placed = [item.nodeid for item in items if re.search(r"\b0x[0-9a-f]", item.nodeid)]
    if placed:
        raise pytest.UsageError(f"Ids should hold no address. Found {placed}. Give `ids=`.")
    items.sort(key=lambda item: "quick_study" not in getattr(item, "fixturenames", ()))


def pytest_collection_finish() -> None:
    """What is imported by now stays: `gc.collect()`, which each training calls, skips it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """What was frozen is let go of as the process ends: extension modules complain otherwise."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """So does what a module of tests leaves behind, in caches and by what it has imported."""
    done = yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return done
