"""What a run answers, to every question that its reader knows, and what the answers are worth."""

import pickle
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from geffect.store import Run, RunFileError, open_run
from geffect.store.schema import STEP_COLUMNS

REFUSED = "refused"

Answers = Mapping[str, bytes | str]
"""By question: the answer, as bytes; `REFUSED`, or the class of another error."""


def answers(path: Path, chance: random.Random | None = None, most: int = 99) -> Answers:
    """What the run at this path says of everything, or of as many things, drawn by chance."""
    opened: list[Run] = []
    found = {"open": _asked(lambda: _facts(opened, path))}
    questions = list(_questions(opened[0])) if opened else []
    if chance is not None and most < len(questions):
        questions = chance.sample(questions, most)
    return found | {question: _asked(ask) for question, ask in questions}


def verdict(found: Answers, right: Answers) -> str:
    """What is wrong with answers beside the right ones: nothing, or the first fault as a word."""
    for question, answer in found.items():
        if isinstance(answer, str) and answer != REFUSED:
            return f"foreign error: {answer} of {question}"
        if answer != REFUSED and answer != right.get(question):
            return f"silent difference: {question}"
    return ""


def alarm(found: Answers, right: Answers) -> str:
    """What is wrong with the answers of a file that is whole: the first that is not right."""
    return next((f"false alarm: {q}" for q, answer in found.items() if right[q] != answer), "")


def _facts(opened: list[Run], path: Path) -> object:
    run = open_run(path)
    opened.append(run)
    contents = run.contents
    return (
        run.name, run.state, run.sources, run.manifest, run.metadata, contents.blocks,
        contents.weights, contents.sketch, contents.gradients, contents.version,
        [astuple(parameter) for parameter in run.layers],
        run.steps.tolist(), run.rows.tolist(), run.drawn.tolist(),
    )  # fmt: skip


def _questions(run: Run) -> Iterator[tuple[str, Callable[[], object]]]:
    for ask in (run.gram, run.stepped, run.lengths, run.losses, run.rectification, run.weights):
        yield ask.__name__, ask
    for column in STEP_COLUMNS:
        yield column, lambda column=column: run.column(column)  # type: ignore[misc]
    yield "tables", lambda: run.tables
    yield "samples", lambda: run.table("samples")
    yield "stored steps", lambda: run.stored_steps
    for source in run.sources:
        yield f"sketch {source}", lambda source=source: run.sketch(source)  # type: ignore[misc]
        yield (
            f"gradients {source}",
            lambda source=source: [run.gradient(source, step) for step in (0, 2, 4)],  # type: ignore[misc]
        )


def _asked(ask: Callable[[], object]) -> bytes | str:
    try:
        return pickle.dumps(_plain(ask()))
    except RunFileError:
        return REFUSED
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def _plain(answer: Any) -> Any:
    """The same without what two pickles of equal things may differ in."""
    if isinstance(answer, np.ndarray):
        return answer.dtype.str, answer.shape, answer.tobytes()
    if isinstance(answer, Mapping):
        return [(key, _plain(value)) for key, value in answer.items()]
    if isinstance(answer, list | tuple):
        return [_plain(value) for value in answer]
    return repr(answer)
