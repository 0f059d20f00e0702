"""An audit: every model passes the batteries, one at a time, and what they find is judged."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any, Unpack

import numpy as np
import pandas as pd
from torch import nn

from geffect.checkpoints.folders import tokenizer_of
from geffect.data.examples import spelled
from geffect.evaluation.resampling import DRAWS
from geffect.evaluation.tokens import evaluate_tokens
from geffect.notes import noting
from geffect.risk import predicts_next
from geffect.store import Run

from .attacks import READ
from .batteries import BATTERIES
from .budget import Budget
from .checks import check_answered, check_apart, check_one_tokenizer, check_readable, tokens_of
from .controlled import Controlled
from .controls import CONTROLS
from .geometry import Geometry, check_run_of, checkpoint_metrics, depths_in, sets_in
from .look import Look, Original
from .models import (
    ORIGINAL,
    RETRAINED,
    ROLES,
    AuditModels,
    Source,
    form_of,
    kind_of,
    limits_of,
    named,
)
from .options import AuditOptions, Report, chosen_of, names_of
from .reading import sets_of
from .report import AuditReport
from .sets import FORGET, HOLDOUT, RETAIN, AuditSet, AuditSets, check_labels
from .summary import table_of
from .table import FEWEST, with_mean
from .thresholds import Thresholds
from .verdict import judged

STEP_SHARE = 0.005
"""A step of relearning moves a weight by so much of the size of weights, where no rate is given."""

TIMED = 16
"""So many items tell how long a forward takes."""


def audit(
    unlearned: Source,
    original: Source,
    retrained: Source | Sequence[Source] | None = None,
    *,
    sets: Mapping[str, Any],
    batteries: Iterable[str] | None = None,
    thresholds: Thresholds | None = None,
    **options: Unpack[AuditOptions],
) -> AuditReport:
    """Audit an unlearned model: is what should be forgotten gone, or only hidden?

    - `unlearned`, `original`, `retrained`: models, or where they are saved. The retrained one never
      saw what is to be forgotten; a sequence of several, trained from different seeds, says how
      much such models differ. Without it the set "holdout" stands for what a model that never knew
      would show, and the best verdict is "not recovered by these attacks".
    - `sets`: what is asked, by the names of `geffect.audit.sets.NAMES`, as for `sets_of`.
    - `batteries`: some of memorised, privacy, hidden, utility, and, with a `run`, geometry; all by
      default. What is not measured is not judged.
    - `thresholds`: where the verdict turns.

    Options:

    - `tokenizer`: of the models, or the folder of one; by default that of a model's folder.
    - `template`: whether its chat template is used.
    - `base`: the model that adapters are for, where it is not at the place that they name.
    - `device`: where models are loaded; by default cuda where there is one.
    - `budget`: "quick", "full", or a `Budget`.
    - `run`: the run file of the unlearning, recorded with its updates: then the battery geometry
      says how far these explain what was measured, in `geometry` of the report.
    - `checkpoints`: folders of models after some of its steps, eight or more: their metrics too.
    - `controls`: also builds models of which it is known whether they forgot, and says how they are
      read, in `controls` of the report.
    - `learning_rate`: that of the unlearning, from which attacks take theirs. By default one that
      moves each weight by half a per cent of their size a step, which the manifest tells.
    - `report`: told how far it is.

    No model is changed. Raises ValueError where there is neither a retrained model nor a holdout.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> models = [GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=32, n_layer=1,
    ...           n_head=1)) for _ in range(3)]
    >>> items = [{"input_ids": [1, x, y], "labels": [-100, x, y]} for x in (2, 3) for y in (4, 5)]
    >>> sets = {"forget": items[:2], "retain": items[2:]}
    >>> report = audit(*models, sets=sets, batteries=["memorised"])
    >>> report.verdict
    'undecided'
    """
    chosen = chosen_of(options)
    names = names_of(batteries, chosen)
    limits = thresholds or Thresholds()
    models = AuditModels(unlearned, original, retrained, chosen["base"], chosen["device"])
    read = _sets(sets, models, chosen)
    if retrained is None and HOLDOUT not in read:
        raise ValueError(
            "An audit should have a `retrained` model, or a set called `holdout` that no model has "
            "seen: without them nothing says what a model shows that never knew. Found neither. "
            "Pass one of them."
        )
    check_answered(read)
    check_readable(read, models)
    check_one_tokenizer(read, models)
    check_apart(read)
    tell: Report = chosen["report"] or (lambda what, done: None)
    started = time.monotonic()
    ordered = replace(read, sets={name: read[name].in_one_order() for name in read})
    items, manifest = measured(models, ordered, [n for n in names if n in BATTERIES], chosen)
    table = table_of(items, limits)
    told = {
        **_provenance(models, read),
        **manifest,
        "batteries": [*names],
        "run": None if chosen["run"] is None else str(chosen["run"].path),
        "thresholds": asdict(limits),
        "seconds": round(time.monotonic() - started, 1),
    }
    asked = read[FORGET]
    report = AuditReport(
        judged(table, limits),
        table,
        items,
        told,
        geometry=_geometry(models, read, items, chosen),
        controls=_controls(models, ordered, items, told, chosen) if chosen["controls"] else None,
        texts=dict(enumerate(zip(asked.questions, asked.answers, strict=True))),
    )
    tell("done", 1.0)
    return report


def measured(
    models: AuditModels, sets: AuditSets, names: Sequence[str], chosen: Mapping[str, Any]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The values of all items, and what a manifest tells of how they were found."""
    budget: Budget = chosen["budget"]
    report: Report = chosen["report"] or (lambda what, done: None)
    original = Original(models.loaded(ORIGINAL))
    if chosen["run"] is not None:
        check_run_of(chosen["run"], original.model)
    if predicts_next(original.model):
        check_labels(sets)
    rate = chosen["learning_rate"] or _rate_of(original.model)
    skipped: dict[str, str] = {}
    found: list[pd.DataFrame] = []
    described: dict[str, Any] = {}
    has_retrained = models.retrained is not None
    looks = len(models) + (len(CONTROLS) if chosen["controls"] else 0)
    with _naming(ORIGINAL):
        seconds = expected_seconds(original.model, sets, budget) * looks
    report(f"{ORIGINAL}: {_spelt(seconds)}", 0.0)
    for place, role in enumerate(models):
        model = original.model if role == ORIGINAL else models.loaded(role)
        described[role] = _described(models[role], model)
        looked = _Progress(report, role, place, len(models) + chosen["controls"], len(names))
        look = Look(role, model, sets, budget, rate, original, has_retrained, looked.tell, skipped)
        for name in names:
            looked.begin(name)
            with _naming(role):
                found += BATTERIES[name](look)
    if not found:
        raise ValueError(
            f"An audit should measure something. Found nothing that {', '.join(names)} could: "
            f"{'; '.join(skipped.values())}. Choose other batteries."
        )
    told = {
        "models": described,
        "budget": asdict(budget),
        "learning_rate": {"value": rate, "given": chosen["learning_rate"] is not None},
        "bootstrap": {"draws": DRAWS, "seed": 0, "subjects_from": FEWEST},
        "skipped": skipped,
    }
    items = pd.concat(found, ignore_index=True)
    several = [role for role in models if role not in ROLES]
    return (with_mean(items, several, RETRAINED) if several else items), told


def _naming(role: str) -> AbstractContextManager[None]:
    """A block whose errors say which model they are of."""
    return noting(f"It was found with the {role} model.")


def _geometry(
    models: AuditModels, sets: AuditSets, items: pd.DataFrame, chosen: Mapping[str, Any]
) -> Geometry | None:
    """What the run of the unlearning says, beside its checkpoints and the depth that was found."""
    run: Run | None = chosen["run"]
    if run is None:
        return None
    metrics = None
    if chosen["checkpoints"]:
        asked = sets_in(run, sets)
        metrics = checkpoint_metrics(chosen["checkpoints"], models.read, asked, sets.tokenizer)
    return Geometry.of(run, metrics, depths_in(items))


def _controls(
    models: AuditModels,
    sets: AuditSets,
    items: pd.DataFrame,
    manifest: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> pd.DataFrame:
    """How the audit reads its controls."""
    report: Report = chosen["report"] or (lambda what, done: None)
    original = Original(models.loaded(ORIGINAL))
    look = Look(
        ORIGINAL,
        original.model,
        sets,
        chosen["budget"],
        manifest["learning_rate"]["value"],
        original,
        models.retrained is not None,
        skipped=manifest["skipped"],
    )
    names = [name for name in manifest["batteries"] if name in BATTERIES]
    beyond = len(models) / (len(models) + 1)
    return Controlled(
        items,
        names,
        look,
        Thresholds(**manifest["thresholds"]),
        lambda what, done: report(f"controls: {what}", beyond + done * (1 - beyond)),
    ).table()


def expected_seconds(model: nn.Module, sets: AuditSets, budget: Budget) -> float:
    """About how long all batteries take with one model, from a forward of some forget items.

    A step of training counts as three forwards of its batch.
    """
    forget = sets[FORGET]
    some = [*forget.items[:TIMED]]
    evaluate_tokens(model, some)  # what is slow only once
    started = time.perf_counter()
    evaluate_tokens(model, some)
    each = (time.perf_counter() - started) / len(some)
    n, relearning = len(forget), budget.relearning
    runs = len(relearning.sources) * len(relearning.rates) * len(relearning.seeds)
    trained = max(relearning.steps) * relearning.batch * 3 + n * len(relearning.steps)
    others = sum(map(len, forget.alternatives))
    recognised = (len(budget.taught) + 1) * (others + 6 * max(budget.taught) * relearning.batch)
    kept = sum(min(len(sets[name]), budget.kept or len(sets[name])) for name in sets.kept)
    said = 24 * (n * (1 + budget.samples) + 2 * min(budget.said or n, len(sets[RETAIN])))
    layers = 40 if budget.layers else 2
    rounded = 4 * min(READ, len(sets[RETAIN]))  # by each quantiser, beside the forget set
    forwards = n * (20 + layers) + runs * trained + others + recognised + 2 * kept + said + rounded
    return each * forwards


def _spelt(seconds: float) -> str:
    """A time in words.

    >>> _spelt(30), _spelt(200)
    ('about 30 s', 'about 3 min')
    """
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


@dataclass
class _Progress:
    """How far all of it is, from how far a battery is with one model."""

    report: Report
    role: str
    place: int
    roles: int
    batteries: int
    begun: int = -1

    def begin(self, battery: str) -> None:
        """The next battery begins."""
        self.begun += 1
        self.tell(battery, 0.0)

    def tell(self, what: str, done: float) -> None:
        """So much of the battery that has begun is done."""
        share = (self.begun + done) / self.batteries
        self.report(f"{self.role}: {what}", (self.place + share) / self.roles)


def _sets(given: Mapping[str, Any], models: AuditModels, chosen: Mapping[str, Any]) -> AuditSets:
    if isinstance(given, AuditSets):
        return given
    positions = min(limits_of(models[role])[0] for role in models)
    tokenizer = chosen["tokenizer"]
    folders = [models[role] for role in models if kind_of(models[role]) in ("folder", "adapter")]
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = tokenizer_of([tokenizer])
    elif tokenizer is None and folders:
        try:
            tokenizer = tokenizer_of([f for f in folders if not isinstance(f, nn.Module)])
        except FileNotFoundError:
            tokenizer = None  # ready items need none
    return sets_of(given, tokenizer, template=chosen["template"], positions=positions)


def _rate_of(model: nn.Module) -> float:
    """A learning rate that moves a weight by a share of their size a step of AdamW."""
    squares = [
        (float(p.detach().float().square().sum()), p.numel())
        for p in model.parameters()
        if p.ndim > 1 and p.is_floating_point()
    ]
    if not squares or not sum(total for total, _ in squares):
        raise ValueError(
            "`learning_rate` should be given for a model without weights that it could be taken "
            f"from. Found none in `{type(model).__name__}`. Pass that of the unlearning."
        )
    total, count = np.sum(squares, axis=0)
    return float(f"{STEP_SHARE * (total / count) ** 0.5:.1e}")


def _described(source: Source, model: nn.Module) -> dict[str, Any]:
    """What a model is, in words that do not change with the machine."""
    parameters = [*model.parameters()]
    return {
        "name": named(source),
        "kind": form_of(source),
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": sorted({str(p.dtype).removeprefix("torch.") for p in parameters}),
        "device": str(parameters[0].device) if parameters else "",
    }


def _provenance(models: AuditModels, sets: AuditSets) -> dict[str, Any]:
    packages = ("geffect", "torch", "transformers", "numpy", "pandas")
    return {
        "versions": {package: version(package) for package in packages},
        "roles": {role: named(models[role]) for role in models},
        "sets": {name: _of_set(sets[name], sets) for name in sets},
        "template": bool(sets.template and getattr(sets.tokenizer, "chat_template", None)),
    }


def _of_set(of: AuditSet, sets: AuditSets) -> dict[str, Any]:
    data = [[[*column] for column in tokens_of(item)] for item in of.items]
    first = spelled(of.items[0], sets.tokenizer) if sets.tokenizer is not None else None
    return {
        "source": sets.sources.get(of.name),
        "items": len(of),
        "subjects": len({*of.subjects}),
        "sha256": sha256(repr(data).encode()).hexdigest(),
        "first": first,
    }
