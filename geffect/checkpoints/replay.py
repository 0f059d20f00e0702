"""Replay: the G-effects of checkpoints that already exist."""

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Unpack

from geffect.capture.collector import Collector
from geffect.capture.recording import IfExists, Recording
from geffect.capture.rows import Entry
from geffect.capture.store_options import StoreOptions, kept
from geffect.devices import there
from geffect.gradients import Weights
from geffect.losses import NotFinite
from geffect.objectives import Objective, answers_of, as_objective, check_sides
from geffect.sources import FORGET, OBJECTIVE, RETAIN, UPDATE, check_risks
from geffect.store import Run, open_run
from geffect.store.schema import ESTIMATES, RELEARNED

from .at_copy import check_replayed, told
from .batch_gradients import Sources
from .estimators import ENOUGH_ROWS, split_batch
from .folders import Folder, base_of, by_step, check_folder, positions_of
from .loading import Loader
from .options import ReplayOptions, resolved
from .reference import model_before, reference_of
from .sets import Data, check_files, check_known, sets_of
from .traits import Estimator, Traits, traits_of


def replay(
    checkpoints: Folder | Sequence[Folder],
    path: str | os.PathLike[str],
    *,
    objective: Objective | Mapping[str, float] | str,
    forget: Data,
    retain: Data,
    risks: Mapping[str, Data] | None = None,
    estimator: Estimator = split_batch,
    **options: Unpack[ReplayOptions],
) -> Run:
    """The run of checkpoints that exist: one step each, with the gradients at its parameters.

    - `checkpoints`: folders as `save_pretrained` leaves them, of models or of LoRA adapters. They
      are numbered as they are named, `checkpoint-500`, else in their order.
    - `path`: the run file to write.
    - `objective`: an `Objective`, a name of the catalogue such as "npo", or weights of risks such
      as `{"forget": -1.0}`, which is GA and costs no backward pass.
    - `forget`, `retain` and further `risks` by name: JSONL files, folders of `datasets`, batches.
      Every batch is used; where a set has more of them than another, several stand together.
    - `estimator`: one of `geffect.checkpoints.estimators`. Its rows are the rows of the step, and
      numbers of the step are their mean; `geffect.analysis.intervals` tells how certain they are.

    - `relearned`: a `geffect.Relearned`, where the gradient of the objective is taken, but for its
      parts that are of other data than the forget set: at each checkpoint once that has relearned
      the whole forget set. An estimator without bias has none for that place.

    Models:

    - `reference`: the model before unlearning, for an objective that compares with it; by default
      the model that adapters are for, else the first checkpoint. Where likelihoods of the forget
      answers are all it asks for, nothing else is kept of that model.
    - `base`: the model that adapters are for, where it is not at the place that they name.
    - `device`: a device of torch; by default cuda where there is one.

    Data files; batches that are ready are taken as they are:

    - `tokenizer`: one, or the folder of one; by default that of the first checkpoint that has one.
    - `template`, `max_length`: as for `geffect.data.examples.read`.
    - `batch_size`: rows in a batch, at most, 4 by default; fewer for more batches, if the estimator
      needs these.
    - `seed`: shuffles the rows, 0 by default; None keeps their order.

    The run file:

    - `update`: also records the way to the next checkpoint, theta_{c+1} - theta_c, as the source
      `update`, so that `predicted_change` says what it does to each risk to first order. The last
      checkpoint has none.
    - `store`: what is kept beside the Gram matrices, as by a `Recorder`; "gram" by default.
    - `metadata`: facts of yours, kept with the run.
    - `overwrite`: replaces an existing run file.

    To follow the replay:

    - `report(checkpoint, done, total)` is called after each batch.
    - `show(set, text)` is called with the first row of each file, its scored part between
      [[ and ]].

    Returns the run, as `geffect.open_run` does. Raises ValueError for an objective, data or
    checkpoints that do not go together.

    One model holds the weights of each checkpoint in turn, in eval mode. The folders stay as they
    are.

    >>> import tempfile, torch
    >>> from pathlib import Path
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> folder = Path(tempfile.mkdtemp())
    >>> config = GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> GPT2LMHeadModel(config).save_pretrained(folder / "checkpoint-5")
    >>> ids = torch.arange(8).reshape(2, 4)
    >>> batches = [{"input_ids": ids, "labels": ids}, {"input_ids": ids + 1, "labels": ids + 1}]
    >>> run = replay(
    ...     [folder / "checkpoint-5"], folder / "run.h5",
    ...     objective={"forget": -1.0}, forget=batches, retain=batches,
    ... )
    >>> run.steps, run.sources
    (array([5]), ('objective', 'forget', 'retain'))
    """
    folders = by_step([checkpoints] if isinstance(checkpoints, str | os.PathLike) else checkpoints)
    given = {FORGET: forget, RETAIN: retain, **(risks or {})}
    options = resolved(options)
    traits, keep = traits_of(estimator), kept(options["store"])
    minimised, reference = as_objective(objective), options["reference"]
    _check(minimised, given, risks or {}, options["update"], len(folders))
    relearned = options["relearned"]
    check_replayed(relearned, minimised)
    _check_kept(keep, traits, estimator)
    for folder in [*folders.values(), *([] if reference is None else [reference])]:
        check_folder(folder)
    first = next(iter(folders.values()))
    own_base = base_of(first)
    _check_models(minimised, reference, options["base"], own_base, first)
    base = options["base"] or own_base
    configured = first if own_base is None or base is None else base
    check_files(given, configured)
    device = there(options["device"])
    around = [folder for folder in (*folders.values(), reference, base) if folder is not None]
    sets = sets_of(
        given,
        options,
        around,
        device,
        answers={name: answers_of(minimised, name) for name in given},
        positions=positions_of(configured),
        least=traits.batches,
        even=traits.even,
    )
    counts = {name: len(batches) for name, batches in sets.items()}
    _tell_rows(_name_of(estimator), traits, counts)
    before = model_before(minimised, reference, first, base if own_base else None)
    new_loader = partial(Loader, base=base, device=device)
    loader = new_loader()
    model = loader.load(first)
    check_known(sets, model)
    running = minimised.begin(model)
    recording = Recording(
        model,
        path,
        metadata={
            **(options["metadata"] or {}),
            "checkpoints": {str(step): folder.name for step, folder in folders.items()},
        },
        store=keep,
        steps=_rows(folders, traits, keep, counts),
        existing=IfExists(overwrite=options["overwrite"]),
        provenance={
            "rows": "matrices" if traits.matrices else ESTIMATES,
            "replay": {
                "estimator": _name_of(estimator),
                "biased": traits.biased,
                "batch_size": options["batch_size"],
                "seed": options["seed"],
                "batches": counts,
                "batches_used": traits.used(counts),
            },
            **({} if relearned is None else {RELEARNED: told(relearned, minimised, sets)}),
        },
    )
    following = [*folders.values()][1:]
    complete = False
    try:
        recording.announce([OBJECTIVE, *sets, *([UPDATE] if options["update"] else [])])
        recording.note_objective(running, before.described if before else None)
        compared = reference_of(before, minimised, sets[FORGET], loader, new_loader)
        for (step, folder), after in zip_longest(folders.items(), following):
            sources = Sources(
                loader.load(folder),
                running,
                sets,
                reference=compared,
                update=loader.change(after) if options["update"] and after is not None else None,
                relearned=relearned,
                collector=partial(_collector, recording, keep, step),
                report=partial(options["report"], folder.name) if options["report"] else None,
            )
            with _losses_of(folder):
                for row, measured in enumerate(estimator(sources)):
                    recording.write(Entry(step, measured, sources.declared, batch=row))
        complete = True
    finally:
        recording.close(complete=complete)
    return open_run(path)


@contextmanager
def _losses_of(folder: Path) -> Iterator[None]:
    """A block in which a loss that is not finite is one of this checkpoint."""
    try:
        yield
    except NotFinite as error:
        raise ValueError(
            f"`{folder}` should have finite losses. Found {error.value} for `{error.name}`. Leave "
            "this checkpoint out; or see whether its numbers are too large for its precision, and "
            "save it in float32."
        ) from error


def _check(
    objective: Objective,
    given: Mapping[str, Data],
    risks: Mapping[str, Data],
    update: bool,
    count: int,
) -> None:
    check_risks("risks", risks, taken=(FORGET, RETAIN))
    first = {name: _first(data, answers_of(objective, name)) for name, data in given.items()}
    check_sides(objective, first, add='Pass risks={{"{side}": ...}}.')
    if update and count < 2:
        raise ValueError(
            "`checkpoints` should be two or more for `update`, the way from one to the next. Found "
            "one. Name more, or leave `update` out."
        )


def _first(data: Data, answers: Sequence[str]) -> Mapping[str, Any]:
    """The first batch of a set; rows of a file say what they have when they are read."""
    if isinstance(data, str | os.PathLike):
        return {answer: {} for answer in answers}
    return data[0] if len(data) else {}


def _check_models(
    objective: Objective,
    reference: Folder | None,
    base: Folder | None,
    own_base: Folder | None,
    first: Path,
) -> None:
    """Refuse models that nothing is taken from."""
    if reference is not None and objective.reference == "none":
        raise ValueError(
            "`reference` should go with an objective that compares with a model. Found "
            f"{objective!r}, which compares with none. Leave `reference` out."
        )
    if base is not None and own_base is None:
        raise ValueError(
            f"`base` should go with adapters, which are for it. Found `{first.name}`, a whole "
            "model. Leave `base` out."
        )


def _check_kept(keep: StoreOptions, traits: Traits, estimator: Estimator) -> None:
    if keep.gradients is not None and not traits.vectors:
        raise ValueError(
            f'`store` should be "gram" or "sketch" with `{_name_of(estimator)}`, whose Gram '
            "matrices are of no gradients that could be kept: the two factors are taken on "
            f'different batches. Found "{keep.gradients}". Choose one of those, or another '
            "estimator, such as `full`."
        )


def _tell_rows(estimator: str, traits: Traits, counts: Mapping[str, int]) -> None:
    """Warn where steps get too few rows for their scores to have intervals."""
    # Without any the estimator refuses the batches itself.
    if traits.rows is None or not 0 < (found := traits.rows(counts)) < ENOUGH_ROWS:
        return
    rows_of = traits.rows
    enough = next(n for n in itertools.count(1) if rows_of(dict.fromkeys(counts, n)) >= ENOUGH_ROWS)
    there = ", ".join(f"{count} of {name}" for name, count in counts.items())
    warnings.warn(
        f"A step should have {ENOUGH_ROWS} rows or more for its scores to have intervals. Found "
        f"{found}, which is what `{estimator}` makes of the batches: {there}. For intervals pass "
        f"{enough} batches of each set or more, by more examples or smaller batches.",
        stacklevel=3,
    )


def _name_of(estimator: Estimator) -> str:
    return getattr(estimator, "__name__", repr(estimator))


def _rows(
    folders: Mapping[int, Path], traits: Traits, keep: StoreOptions, counts: Mapping[str, int]
) -> list[int] | None:
    """The steps of the rows that are going to be written, where their size matters."""
    if keep == StoreOptions() or traits.rows is None:
        return None
    # Gradients that all rows of a step share are kept once.
    count = 1 if keep.gradients and traits.shared else traits.rows(counts)
    return [step for step in folders for _ in range(count)]


def _collector(
    recording: Recording, keep: StoreOptions, step: int, weights: Weights, row: int, gradients: bool
) -> Collector | None:
    """What takes the gradients of a row, if more is kept of them than their Gram matrix."""
    if gradients and keep != StoreOptions():
        return recording.collector(step, weights, row)
    if keep.sketch is None and not any(parameter.experts for parameter in recording.table):
        return None
    return Collector(recording.table, recording.parameters, weights, sketch=keep.sketch)
