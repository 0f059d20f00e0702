"""The study of the family: learn it, unlearn targets deeply, restore what was altered."""

import json
import math
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from geffect.drafts import write_whole
from geffect.evaluation.edu_relat import read

from .family import FamilyConfig, spread
from .family_jobs import Forgetting, Learning, Relating, Restoring
from .jobs import Kept
from .workers import Job, OnProgress, working

FORMAT = 1
METHODS = ("ga", "npo", "graddiff")
"""What restores: whether false facts are unlearned alone, or true ones retained beside."""


@dataclass(frozen=True)
class FamilyPlan:
    """What a study of the family runs, from the data in a folder."""

    data: Path
    seed: int = 0
    workers: int = 2
    resume: bool = False
    overwrite: bool = False
    config: FamilyConfig = field(default_factory=FamilyConfig)

    def jobs(self, out: Path) -> tuple[Job, list[Job]]:
        """The job that comes first, and all others."""
        of = (out, self.data, self.seed, self.config)
        return Learning(*of), [
            Relating(*of),
            *(Restoring(*of, method) for method in METHODS),
            *(Forgetting(*of, target) for target in spread(read(self.data), self.config.targets)),
        ]

    @property
    def weight(self) -> float:
        """How much work the plan is, in targets."""
        first, others = self.jobs(Path())
        return sum(job.weight for job in (first, *others))


def run_family(out: Path, plan: FamilyPlan, report: OnProgress) -> dict[str, Any]:
    """Run the plan and leave the model, run files, results and summary.json in `out`.

    One seed gives one set of numbers. Returns what summary.json holds. A folder that holds results
    is refused unless the plan says to `resume` or to `overwrite` them.
    """
    first, others = plan.jobs(out)  # data that are not there are told before a folder is made
    started = time.perf_counter()
    claim(out, plan)
    with working(plan.workers, report) as run:
        (learned,) = run([Kept(first, out / "results", plan.resume)])
        results = run([Kept(job, out / "results", plan.resume) for job in others])
    split = 1 + len(METHODS)
    summary: dict[str, Any] = {
        "format": FORMAT,
        "data": "edu_relat",
        "versions": {p: version(p) for p in ("geffect", "torch", "transformers", "tokenizers")},
        "seed": plan.seed,
        "config": asdict(plan.config),
        "learned": learned,
        "cosines": results[0],
        "restored": results[1:split],
        "targets": results[split:],
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    summary = _strict(summary)
    text = json.dumps(summary, indent=1, allow_nan=False)
    write_whole(out / "summary.json", text + "\n")
    return summary


def _strict(value: Any) -> Any:
    """The value as JSON has it for others too: a number that is none is null."""
    if isinstance(value, dict):
        return {key: _strict(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inside) for inside in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def claim(out: Path, plan: FamilyPlan) -> None:
    """Make the folders of a study, where no other is that it would replace unasked."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(
            f"The folder of a study should be a folder, or not exist. Found the file `{out}`. "
            "Choose another name."
        )
    found = [out / "summary.json", out / "edu_relat.md", *(out / "results").glob("*.json")]
    found = [file for file in found if file.exists()]
    if found and not (plan.resume or plan.overwrite):
        raise FileExistsError(
            f"The folder of a study should hold none yet. Found `{found[0]}`. Pass --resume to go "
            "on with it, --overwrite to replace it, or choose another folder."
        )
    if found and not _is_of_family(out):
        raise FileExistsError(
            f"The folder should hold a study of the family. Found another study in `{out}`. Choose "
            "another folder."
        )
    if plan.overwrite:
        for file in found:
            file.unlink()
    for folder in ("runs", "models", "results"):
        (out / folder).mkdir(parents=True, exist_ok=True)


def _is_of_family(out: Path) -> bool:
    """Whether the results in a folder are those of a family, as far as they were written."""
    if (out / "summary.json").exists():
        try:
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        except ValueError:
            return False
        return isinstance(summary, dict) and summary.get("data") == "edu_relat"
    names = {file.name for file in (out / "results").glob("*.json")}
    return any(name.startswith("family-seed") for name in names)
