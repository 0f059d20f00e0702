"""The embedded study: train, unlearn in every method and variant, compare at equal forgetting."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from geffect.drafts import write_whole

from . import scale_table
from .edits import EDIT, EDITS
from .findings import findings
from .jobs import KINDS, Drawing, Editing, Kept, Probing, Reading, Training, Unlearning
from .methods import (
    ADAMW,
    EQUAL,
)
from .plan import Plan
from .tables import TABLES, write_tables
from .workers import Job, OnProgress, working

FORMAT = 1

J = TypeVar("J", bound=Job)

PAGES = (
    "study.md",
    "report.html",
    *(f"{name}.{kind}" for name in (*TABLES, scale_table.NAME) for kind in ("csv", "md")),
)
"""The files in the folder of a study, beside its summary, that are made of its results."""


def run_study(out: Path, plan: Plan, report: OnProgress) -> dict[str, Any]:
    """Run the plan and leave run files, models, figures, summary and tables in `out`.

    The same seed gives the same numbers. Returns what summary.json holds. A folder that holds a
    study is refused unless the plan says to `resume` or to `overwrite` it. An interrupt ends the
    processes at once: what `whole` counts is there for the next study to go on from.
    """
    clock = _Clock()
    if plan.so_far and not (out / "results").is_dir():
        raise FileNotFoundError(
            f"A study that is reported so far should be in its folder. Found none in `{out}`. "
            "Choose its folder, or begin it without --so-far."
        )
    claim(out, plan)
    with working(plan.workers, report, plan.threads) as run:
        with clock.stage("train"):
            training = _asked(_training(out, plan), out, plan)
            trained: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
            for job, measured in zip(training, run(_kept(training, out, plan)), strict=True):
                trained[job.kind][str(job.seed)] = measured
            probing = _asked(_probing(out, plan), out, plan)
            for attack, probed in zip(probing, run(_kept(probing, out, plan)), strict=True):
                trained[attack.kind][str(attack.seed)] |= probed
            run(_kept(_asked(_reading(out, plan), out, plan), out, plan))
        with clock.stage("unlearn"):
            after = _asked(_after(out, plan, trained["gold"]), out, plan)
            found = run(_kept(after, out, plan))
        edits = [run for run in found if run["variant"] == EDIT]
        compared = [run for run in found if run["part"] == EQUAL and run["variant"] != EDIT]
        further = [run for run in found if run["part"] != EQUAL]
        if not compared:
            raise ValueError(
                "A study should have a run to report. Found none that is whole. Go on with it by "
                "--resume."
            )
        seeds = [seed for seed in plan.seeds if str(seed) in trained["gold"]]
        summary = {
            "format": FORMAT,
            "versions": {p: version(p) for p in ("geffect", "torch", "transformers", "tokenizers")},
            "seeds": seeds,
            "whole": {"runs": len(found), "of": len(plan.seeds) * (plan.jobs - plan.audit)},
            "config": _config(plan),
            "wall_seconds": {},
            **trained,
            "runs": compared,
            "further_runs": further,
            "edits": edits,
            "findings": findings(
                _complete(compared, seeds), _complete(further, seeds), trained["gold"]
            ),
        }
        with clock.stage("figures"):
            from . import figures

            run([Drawing(out, name, summary) for name in figures.names(summary, out)])
    write_tables(summary, out)
    scale_table.write(summary, out)
    summary["wall_seconds"] = {"total": clock.total(), "stages": clock.stages}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def whole(out: Path, plan: Plan) -> tuple[int, int]:
    """How many jobs of the plan have a result in `out` that a study would go on from, of how many.

    Figures and tables are not counted: they take seconds.
    """
    before = _kept(_before(out, plan), out, plan)
    # How far a run goes is read from the gold model of its seed.
    after = _kept([*_reading(out, plan), *_after(out, plan, _gold(before))], out, plan)
    there = sum(kept.found() is not None for kept in (*before, *after))
    return there, len(before) + len(plan.seeds) * plan.jobs


def claim(out: Path, plan: Plan) -> None:
    """Makes the folders of a study, where there is none that it would replace unasked."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(
            f"The folder of a study should be a folder, or not exist. Found the file `{out}`. "
            "Choose another name."
        )
    results = list((out / "results").glob("*.json"))
    summary = out / "summary.json"
    others = [file for file in results if not _has(file, {"job", "result"})]
    others += [summary] if summary.exists() and not _has(summary, {"runs", "findings"}) else []
    if not (results or summary.exists()):
        others += [out / name for name in PAGES if (out / name).exists()]
    if others:
        raise FileExistsError(
            "The folder of a study should hold no other files with the names that it writes. "
            f"Found `{others[0]}`, of no study. Choose another folder, or move that away."
        )
    if (results or summary.exists()) and not (plan.resume or plan.overwrite):
        raise FileExistsError(
            f"The folder of a study should hold none yet. Found one in `{out}`. Pass "
            "--resume to go on with it, --overwrite to replace it, or choose another folder."
        )
    if plan.resume:
        _check_same(out, plan, {file.stem for file in results})
    if plan.overwrite:
        for file in (*results, summary, *(out / name for name in PAGES)):
            file.unlink(missing_ok=True)
    for folder in ("runs", "models", "figures", "results"):
        (out / folder).mkdir(parents=True, exist_ok=True)


def _has(file: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys, as a study writes it."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and keys <= found.keys()


def _check_same(out: Path, plan: Plan, found: set[str]) -> None:
    """Refuse a plan that would go on with another study: what that has must be part of it."""
    before = _kept(_before(out, plan), out, plan)
    names = {
        f"{name}-seed{seed}"
        for seed in plan.seeds
        for name in (
            *(spec.name for spec in plan.specs()),
            *(f"edit-{edit}" for edit in plan.edits),
            *(["audit"] if plan.audit else []),
        )
    }
    foreign = found - names - {kept.name for kept in before}
    after = _kept([*_reading(out, plan), *_after(out, plan, _gold(before))], out, plan)
    foreign |= {kept.name for kept in (*before, *after) if kept.other}
    if foreign:
        raise ValueError(
            "A study to go on with should have the seeds, methods, options and model of the one "
            f"in `{out}`, or more of them. Found a result of another: "
            f"{', '.join(sorted(foreign)[:3])}{', ...' if len(foreign) > 3 else ''}. Repeat its "
            "options, pass --overwrite, or choose another folder."
        )


def _gold(before: Sequence[Kept]) -> dict[str, Any]:
    """What the gold models that are kept have measured, by seed."""
    return {
        str(kept.job.seed): result
        for kept in before
        if isinstance(kept.job, Training)
        and kept.job.kind == "gold"
        and (result := kept.found()) is not None
    }


def _before(out: Path, plan: Plan) -> list[Job]:
    """What is measured of the models that others are held against."""
    return [*_training(out, plan), *_probing(out, plan)]


def _training(out: Path, plan: Plan) -> list[Training]:
    return [Training(out, seed, kind, plan.studied) for seed in plan.seeds for kind in KINDS]


def _probing(out: Path, plan: Plan) -> list[Probing]:
    """The attacks on the models of each seed, for a plan that compares others with them so."""
    if not plan.probed:
        return []
    return [Probing(out, seed, kind, plan.studied) for seed in plan.seeds for kind in KINDS]


def _reading(out: Path, plan: Plan) -> list[Reading]:
    """What an audit needs of the models of each seed."""
    return [Reading(out, seed, plan.studied) for seed in plan.seeds] if plan.audit else []


def _unlearning(out: Path, plan: Plan, gold: Mapping[str, Mapping[str, float]]) -> list[Unlearning]:
    """The runs of the seeds whose gold model is known."""
    return [
        Unlearning(
            out,
            seed,
            spec,
            plan.variant(spec),
            {name: gold[str(seed)][name] for name in plan.levels(spec)},
            plan.studied,
            plan.audit,
        )
        for seed in plan.seeds
        if str(seed) in gold
        for spec in plan.specs()
    ]


def _editing(out: Path, plan: Plan, gold: Mapping[str, Mapping[str, float]]) -> list[Editing]:
    """The edits of the seeds whose gold model is known."""
    return [
        Editing(
            out, seed, name, EDITS[name], gold[str(seed)]["forget_nll"], plan.studied, plan.audit
        )
        for seed in plan.seeds
        if str(seed) in gold
        for name in plan.edits
    ]


def _after(out: Path, plan: Plan, gold: Mapping[str, Mapping[str, float]]) -> list[Job]:
    """What is done once the models are trained."""
    return [*_unlearning(out, plan, gold), *_editing(out, plan, gold)]


def _complete(runs: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The runs of settings that every seed has: claims compare seed by seed."""

    def setting(run: Mapping[str, Any]) -> tuple[Any, ...]:
        names = ("part", "method", "variant", "learning_rate", "retain_feed")
        return tuple(run[name] for name in names)

    counts = Counter(map(setting, runs))
    return [run for run in runs if counts[setting(run)] == len(seeds)]


def _asked(jobs: Sequence[J], out: Path, plan: Plan) -> list[J]:
    """The jobs to be done; of a study that is reported so far, those that are done."""
    if not plan.so_far:
        return [*jobs]
    kept = _kept(jobs, out, plan)
    return [job for job, of in zip(jobs, kept, strict=True) if of.found() is not None]


def _kept(jobs: Sequence[Job], out: Path, plan: Plan) -> list[Kept]:
    return [Kept(job, out / "results", plan.resume) for job in jobs]


def _config(plan: Plan) -> dict[str, Any]:
    subject = plan.studied
    unlearning = subject.unlearning
    return {
        "quick": plan.quick,
        "subject": subject.described,
        "recipe": asdict(subject),  # type: ignore[call-overload]
        "ema": unlearning.ema,
        "options": dict(plan.options),
        "named": list(plan.named),
        "audit": plan.audit,
        "optimizer": ADAMW,
        "batch": {"forget": unlearning.forget_batch, "retain": unlearning.retain_batch},
        "most_steps": unlearning.most_steps,
        "edits": {name: EDITS[name].described() for name in plan.edits},
        "variants": {spec.variant: plan.variant(spec).described() for spec in plan.specs()},
    }


@dataclass
class _Clock:
    """Wall seconds since the start, and of the stages that have ended."""

    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[name] = round(time.perf_counter() - start, 2)

    def total(self) -> float:
        return round(time.perf_counter() - self.started, 2)
