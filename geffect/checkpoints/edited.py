"""An edit of a checkpoint: the edited model in a folder, and the run file of what it does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from torch import nn

from geffect.capture.header import Declared
from geffect.capture.recording import Recording
from geffect.capture.rows import Entry
from geffect.capture.store_options import StoreOptions, kept
from geffect.devices import there
from geffect.drafts import NAMED, draft_folder_of
from geffect.edits import Change, Edit, as_edit, options_of
from geffect.interrupts import put_back_after
from geffect.layers import trainable
from geffect.risk import RiskSet, mean_nll, risk_gradient
from geffect.sources import FORGET, OBJECTIVE, RETAIN, UPDATE, check_risks
from geffect.store import Run, open_run
from geffect.store.paths import place_of
from geffect.store.place import check_place

from .folders import Folder, base_of, check_folder, positions_of
from .loading import Loader, save, whole_of
from .options import EditOptions, resolved_edit
from .sets import Data, check_files, check_known, sets_of

RUN = "edit.h5"
"""The run file, in the folder of the edited model, where no other is named."""

RISKS, TOUCHED = "edit", "touched"
"""The tables that such a run keeps: of each risk before and after, and of each parameter."""


def edit(
    model: Folder,
    output: Folder,
    edit: Edit | str,
    *,
    forget: Data,
    retain: Data,
    risks: Mapping[str, Data] | None = None,
    states: Mapping[str, Folder] | None = None,
    **options: Unpack[EditOptions],
) -> Run:
    """Edit a checkpoint into a new folder, and record what that does to each risk.

    - `model`: a folder as `save_pretrained` leaves it, of a model or of a LoRA adapter.
    - `output`: the folder to make; one that exists is refused. It gets the tokenizer, too.
    - `edit`: an `Edit` of `geffect.edits`, or a name of its catalogue such as "ssd".
    - `forget`, `retain` and further `risks` by name: JSONL files, folders of `datasets`, batches.
    - `states`: folders of the other models that the edit is made from, by name, such as "tuned".

    Options:

    - `run`: the run file; `edit.h5` in the folder by default.
    - `merge`: merge adapters into their models, and edit the weights. Without it, the factors of an
      adapter are edited, and an adapter is saved. The manifest says which.
    - `base`: the model that adapters are for, where it is not at the place that they name.
    - `device`: a device of torch; by default cuda where there is one.
    - `tokenizer`, `template`, `max_length`, `batch_size`, `seed`, `show`: as for `geffect.replay`.
    - `store`, `metadata`: as for `geffect.replay`.

    Returns the run, as `record_edit` writes it. Raises ValueError for an edit that changes nothing,
    and FileExistsError for an output that exists. No folder is left then.

    >>> import tempfile, torch, geffect
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> folder = Path(tempfile.mkdtemp())
    >>> config = GPT2Config(vocab_size=9, n_positions=8, n_embd=4, n_layer=1, n_head=1)
    >>> GPT2LMHeadModel(config).save_pretrained(folder / "model")
    >>> ids = torch.arange(8).reshape(2, 4)
    >>> batches = [{"input_ids": ids, "labels": ids}]
    >>> others = [{"input_ids": ids.flip(1), "labels": ids.flip(1)}]
    >>> run = edit(folder / "model", folder / "edited", geffect.edits.SSD(fraction=0.1),
    ...            forget=batches, retain=others)
    >>> run.sources, sorted(run.tables)
    (('objective', 'forget', 'retain', 'update'), ['edit', 'touched'])
    """
    what, chosen = as_edit(edit), resolved_edit(options)
    place = Path(output)
    _check_output(place)
    run = place_of(chosen["run"]) if chosen["run"] is not None else None
    if run is not None:
        check_place(run, overwrite=False, resume=False)
    check_risks("risks", risks or {}, taken=(FORGET, RETAIN))
    others = dict(states or {})
    _check_models(what, model, others, chosen)
    device = there(chosen["device"])
    given = {FORGET: forget, RETAIN: retain, **(risks or {})}
    configured = model if base_of(model) is None else chosen["base"] or base_of(model) or model
    check_files(given, configured)
    around = [folder for folder in (model, *others.values(), chosen["base"]) if folder is not None]
    sets = sets_of(given, chosen, around, device, positions=positions_of(configured))

    def loaded(folder: Folder) -> nn.Module:
        if chosen["merge"]:
            return whole_of(folder, chosen["base"], device)
        base = chosen["base"] if base_of(folder) is not None else None
        return Loader(base=base, device=device).load(folder)

    own = loaded(model)
    check_known(sets, own)
    change = what.change(own, {**sets, **{name: loaded(path) for name, path in others.items()}})
    _check_changes(what, change)
    with draft_folder_of(place.with_name(place.name[:NAMED])) as draft:
        with change:
            save(own, draft, configured, [model, configured])
        record_edit(
            own,
            change,
            draft / RUN if run is None else run,
            risks=sets,
            edit=what,
            metadata={"model": Path(model).name, **(chosen["metadata"] or {})},
            store=chosen["store"],
        )
        os.rename(draft, place)
    return open_run(place / RUN if run is None else run)


def record_edit(
    model: nn.Module,
    change: Change,
    path: str | os.PathLike[str],
    *,
    risks: Mapping[str, RiskSet],
    edit: Edit | None = None,
    metadata: Mapping[str, Any] | None = None,
    store: str | StoreOptions = "gram",
) -> Run:
    """Write what a change of a model does to risks into a run file; the model stays as it is.

    The run has one step, at the parameters before the change: the gradient of each risk over all
    of its data, and the displacement D as the source `update`. The edit is one step of gradient
    descent of rate 1 along -D, which stands there as the `objective`. So its G-effects are e_R(D) =
    -<grad R, D>, by how much the risk R falls to first order. `geffect.analysis.edited` puts them
    beside the measured falls.

    - `change`: of `edit.change(model, data)`, not made yet.
    - `path`: the run file to write.
    - `risks`: batches by name, "forget" and "retain" among them.
    - `edit`: for the manifest.
    - `metadata`, `store`: as for `geffect.Recorder`.

    Raises ValueError for a change that is made already, or of another model.
    """
    _check_unmade(model, change)
    if not risks:
        raise ValueError(
            "`risks` of an edit should be batches by name, one set or more. Found none. Pass, say, "
            '{"forget": batches}.'
        )
    recording = Recording(
        model,
        path,
        metadata=metadata,
        store=store,
        steps=None if kept(store) == StoreOptions() else [0],
        provenance={"edit": _described(edit, change)},
    )
    complete = False
    try:
        recording.announce([OBJECTIVE, *risks, UPDATE])
        found = {name: risk_gradient(model, batches) for name, batches in risks.items()}
        before = {name: risk.loss for name, risk in found.items()}
        measured = recording.measure(
            0,
            {**{name: risk.vector for name, risk in found.items()}, UPDATE: change.vector},
            before,
            {OBJECTIVE: {UPDATE: -1.0}, **{name: {name: 1.0} for name in (*risks, UPDATE)}},
        )
        declared: Declared = {OBJECTIVE: {UPDATE: -1.0}, **dict.fromkeys(risks, "loss")}
        stepped = [name in change.displacement for name in change.parameters]
        recording.write(Entry(0, measured, declared, lr=1.0, stepped=stepped))
        after = _after(model, change, risks)
        recording.keep_table(
            RISKS,
            {
                "risk": [*risks],
                "before": np.array([*before.values()]),
                "after": np.array([after[name] for name in risks]),
            },
        )
        counts = [change.touched.get(name, 0) for name in change.parameters]
        recording.keep_table(
            TOUCHED, {"parameter": [*change.parameters], "numbers": np.array(counts)}
        )
        complete = True
    finally:
        recording.close(complete=complete)
    return open_run(path)


def _after(model: nn.Module, change: Change, risks: Mapping[str, RiskSet]) -> dict[str, float]:
    def measured() -> dict[str, float]:
        change.apply()
        return {name: mean_nll(model, batches) for name, batches in risks.items()}

    return put_back_after(measured, change.revert)


def _check_unmade(model: nn.Module, change: Change) -> None:
    """Refuse a change whose gradients would be taken elsewhere than at the parameters before it."""
    own = list(map(id, trainable(model).values()))
    if own != list(map(id, change.parameters.values())):
        raise ValueError(
            "`change` should be of `model`. Found one of another model, or of other parameters "
            "than those that require a gradient now. Make it by edit.change(model, data)."
        )
    if change.made:
        raise ValueError(
            "`change` should not be made yet: its effects are told at the parameters before it. "
            "Found that it is. Call change.revert() before, and change.apply() afterwards."
        )


def _described(edit: Edit | None, change: Change) -> dict[str, Any]:
    own = {} if edit is None else {"name": type(edit).__name__, "options": options_of(edit)}
    return {**own, "space": change.space, "facts": change.facts}


def _check_output(place: Path) -> None:
    if place.exists() or place.is_symlink():
        raise FileExistsError(
            f"The folder of an edited model should not exist yet. Found `{place}`. Choose another "
            "name."
        )
    if not place.parent.is_dir():
        raise FileNotFoundError(
            f"The folder of an edited model should be in a folder that exists. Found no folder "
            f"`{place.parent}`. Create it."
        )


def _check_models(
    edit: Edit, model: Folder, states: Mapping[str, Folder], options: EditOptions
) -> None:
    """Refuse models that an edit lacks, and those that nothing is taken from."""
    if {*states} != {*edit.states}:
        needed = ", ".join(f"`{name}`" for name in edit.states) or "no other model"
        found = ", ".join(f"`{name}`" for name in states) or "none"
        given = " ".join(f"--state {name}=DIR" for name in edit.states)
        raise ValueError(
            f"`states` of {type(edit).__name__} should be {needed}. Found {found}. "
            + (
                f"Name the folder of each, and of no other; on the command line {given}."
                if given
                else "Leave them out."
            )
        )
    for folder in (model, *states.values()):
        check_folder(folder)
    adapted = any(base_of(folder) is not None for folder in (model, *states.values()))
    for option in ("merge", "base"):
        if options[option] and not adapted:
            raise ValueError(
                f"`{option}` should go with adapters. Found whole models. Leave `{option}` out."
            )


def _check_changes(edit: Edit, change: Change) -> None:
    if not any(change.touched.values()):
        facts = ", ".join(f"{name} {value}" for name, value in change.facts.items())
        raise ValueError(
            f"The edit should change the model. Found that {edit!r} changes none of its numbers"
            f"{': ' if facts else ''}{facts}. Choose other options."
        )
