"""Replay: the G-effects of checkpoints that already exist."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from geffect.objectives import Objective
from geffect.objectives.base import Batch
from geffect.sources import FORGET, OBJECTIVE, RETAIN, RETAIN_EMA, UPDATE, is_risk
from geffect.store import Run, open_run
from geffect.store.schema import ESTIMATES

from .checkpoints import Folder, Loader, by_step, check_folder, tokenizer_of
from .data import batched, read
from .estimators import Estimator, Sources, reference_ema, same_batch, split_batch
from .recording import Recording
from .reference import LIKELIHOODS_SUFFICE, Likelihoods, missing_in, with_reference

Data = str | os.PathLike[str] | Sequence[Batch]
"""A file or folder that `geffect.capture.data.read` reads, or batches that are ready."""

Report = Callable[[str, int, int], None]
"""Told after each batch: the name of the checkpoint, how many batches it has had, of how many."""


def replay(
    checkpoints: Folder | Sequence[Folder],
    path: str | os.PathLike[str],
    *,
    objective: Objective | Mapping[str, float],
    forget: Data,
    retain: Data,
    risks: Mapping[str, Data] | None = None,
    reference: Folder | None = None,
    estimator: Estimator = split_batch,
    batch_size: int = 4,
    seed: int | None = 0,
    update: bool = False,
    base: Folder | None = None,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    report: Report = lambda checkpoint, done, total: None,
) -> Run:
    """The run of checkpoints that exist: one step each, with the gradients at its parameters.

    Checkpoints are folders as `save_pretrained` leaves them, of models or of LoRA adapters. They
    are numbered as they are named, `checkpoint-500`, else in their order. One model holds the
    weights of each in turn, in eval mode; neither they nor the folders are changed.

    - `objective`: an `Objective`, or weights such as `{"forget": -1.0}`, which is GA and costs no
      backward pass. One that compares with a reference model and has none gets `reference`, by
      default the first checkpoint, and of that only the likelihoods of the forget answers are kept.
    - `forget`, `retain` and further `risks` by name: JSONL files, folders of `datasets`, batches.
      Rows of files are shuffled by `seed` into batches of `batch_size`; None keeps their order.
    - `estimator`: one of `geffect.capture.estimators`. Its rows are the rows of the step, and
      numbers of the step are their mean; `geffect.analysis.intervals` tells how certain they are.
    - `update`: also record the way to the next checkpoint, theta_{c+1} - theta_c, as the source
      `update`, so that `predicted_change` says what it does to each risk to first order. The last
      checkpoint has none.
    - `base`: the model that adapters are for, where it is not at the place they name.
    - `tokenizer`: one, or the folder of one; by default that of the first checkpoint that has one.

    >>> import tempfile, geffect
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
    _check(objective, given, risks or {}, update, len(folders))
    for folder in [*folders.values(), *([] if reference is None else [reference])]:
        check_folder(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = partial(batched, size=batch_size, seed=seed, even=estimator is split_batch)
    around = [folder for folder in (*folders.values(), reference, base) if folder is not None]
    sets = _sets(given, tokenizer, around, batches, device)
    new_loader = partial(Loader, base=base, device=device)
    loader = new_loader()
    first = next(iter(folders.values()))
    compared = _compared(objective, reference, first, sets[FORGET], loader, new_loader)
    recording = Recording(
        loader.load(first),
        path,
        metadata={
            **(metadata or {}),
            "checkpoints": {str(step): folder.name for step, folder in folders.items()},
        },
        overwrite=overwrite,
        provenance={
            "rows": "matrices" if estimator in (same_batch, reference_ema) else ESTIMATES,
            "replay": {
                "objective": repr(objective),
                "reference": None if compared is objective else Path(reference or first).name,
                "estimator": getattr(estimator, "__name__", repr(estimator)),
                "batch_size": batch_size,
                "seed": seed,
                "batches": {name: len(batches) for name, batches in sets.items()},
            },
        },
    )
    declared = {
        OBJECTIVE: "loss" if isinstance(objective, Objective) else objective,
        **dict.fromkeys(sets, "loss"),
    }
    following = [*folders.values()][1:]
    complete = False
    try:
        for (step, folder), after in zip_longest(folders.items(), following):
            sources = Sources(
                loader.load(folder),
                compared,
                sets,
                update=loader.change(after) if update and after is not None else None,
                report=partial(report, folder.name),
            )
            for row, measured in enumerate(estimator(sources)):
                recording.write(step, measured, declared=declared, batch=row)
        complete = True
    finally:
        recording.close(complete=complete)
    return open_run(path)


def _check(
    objective: Objective | Mapping[str, float],
    given: Mapping[str, Data],
    risks: Mapping[str, Data],
    update: bool,
    count: int,
) -> None:
    wrong = [name for name in risks if name in (FORGET, RETAIN) or not is_risk(name) or "/" in name]
    if wrong:
        raise ValueError(
            f"`risks` should have names of their own, none of `{FORGET}`, `{RETAIN}`, `{UPDATE}`, "
            f"`{RETAIN_EMA}`, nor one that begins with `{OBJECTIVE}` or has a slash. Found "
            f"{', '.join(wrong)}. Choose another name."
        )
    if not isinstance(objective, Objective) and not (
        isinstance(objective, Mapping) and objective and objective.keys() <= given.keys()
    ):
        raise ValueError(
            "`objective` should be an `Objective`, or weights of the risks "
            f"{', '.join(given)}. Found {objective!r}. Pass, say, NPO(beta=0.1), or "
            '{"forget": -1.0}.'
        )
    if update and count < 2:
        raise ValueError(
            "`checkpoints` should be two or more for `update`, the way from one to the next. Found "
            "one. Name more, or leave `update` out."
        )


def _sets(
    given: Mapping[str, Data],
    tokenizer: Any,
    folders: Sequence[Folder],
    batches: Callable[..., list[Batch]],
    device: str | torch.device,
) -> dict[str, list[Batch]]:
    """The batches of each set, on the device."""

    @cache
    def found_tokenizer() -> Any:
        if isinstance(tokenizer, str | os.PathLike):
            return tokenizer_of([tokenizer])
        return tokenizer_of(folders) if tokenizer is None else tokenizer

    sets: dict[str, list[Batch]] = {}
    for name, data in given.items():
        if isinstance(data, str | os.PathLike):
            examples = read(data, found_tokenizer())
            data = batches(examples, padding=found_tokenizer().pad_token_id or 0)
        sets[name] = [{key: x.to(device) for key, x in batch.items()} for batch in data]
    return sets


def _compared(
    objective: Objective | Mapping[str, float],
    reference: Folder | None,
    first: Path,
    forget: Sequence[Batch],
    loader: Loader,
    new_loader: Callable[[], Loader],
) -> Objective | Mapping[str, float]:
    """The objective with its reference: what it said of the forget answers, or a model to keep."""
    lacking = missing_in(objective) if isinstance(objective, Objective) else []
    if not isinstance(objective, Objective) or not lacking:
        return objective
    if not all(isinstance(part, LIKELIHOODS_SUFFICE) for part in lacking):
        kept = new_loader().load(first if reference is None else reference)
        return with_reference(objective, kept.requires_grad_(False))
    # The first checkpoint is about to be loaded anyway; another model is let go at once.
    model = loader.load(first) if reference is None else new_loader().load(reference)
    return with_reference(objective, Likelihoods(model, forget))
