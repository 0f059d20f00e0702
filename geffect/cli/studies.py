"""The studies of `geffect demo` while they run, and what is said of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geffect.drafts import write_whole
from geffect.numbers import counted

from .options import Medium
from .terminal import say, say_marked, show

if TYPE_CHECKING:
    from rich.console import Console

    from geffect.demo.family_study import FamilyPlan
    from geffect.demo.plan import Plan
    from geffect.demo.pretrained import Pretrained


def run_study(out: Path, plan: "Plan", console: "Console") -> None:
    """Run the study, write its report, and say what was found."""
    from geffect.demo import study
    from geffect.demo.page import write_page
    from geffect.demo.tables import as_cells, tables
    from geffect.report import study_report

    from .progress import shown

    with shown(plan.weight, console) as report:
        summary = study.run_study(out, plan, report)
    write_whole(out / "report.html", study_report(summary, out))
    write_page(summary, out)
    headings, *rows = as_cells(tables(summary)[0].runs)
    whole = out / "equal_forgetting.csv"
    spare = _spare(headings, rows)
    show(console, headings, rows, names=headings[:2], spare=spare, whole=whole)
    held = [finding["holds"] for finding in summary["findings"]]
    say(console, f"{sum(held)} of {len(held)} findings hold, as measured in this study:")
    for finding in summary["findings"]:
        mark = ("holds   ", "green") if finding["holds"] else ("does not", "yellow")
        exceptions = f"; not for {', '.join(finding['except'])}" if finding["except"] else ""
        said = f"{finding['claim']}: {finding['measured']}{exceptions}"
        say_marked(console, *mark, said)
    seconds = summary["wall_seconds"]["total"]
    say(console, f"{seconds:.0f} s. Open {out / 'report.html'}")


def _spare(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The columns that may go, all but which run it is and what it kept, the first one first.

    Retain QA and learning rate may, where the rows are told apart without.

    >>> headings = ["method", "variant", "retain QA", "learning rate", "steps", "in", "out", "ES"]
    >>> _spare(headings, [("ga", "gru", "20", "1e-4"), ("ga", "gru", "70", "1e-4")])
    ['ES', 'learning rate']
    """
    from geffect.demo.columns import KEYS

    telling = [*range(len(KEYS))]
    for place in reversed(telling[2:]):
        others = [other for other in telling if other != place]
        if len({tuple(row[i] for i in others) for row in rows}) == len(rows):
            telling = others
    kept = len(KEYS) + 3  # the steps, and the loss of what should stay, inside and outside
    return [
        *headings[: kept - 1 : -1],
        *(headings[i] for i in range(len(KEYS)) if i not in telling),
    ]


def draw_paper(out: Path, plan: "Plan", console: "Console") -> None:
    """Make the runs behind the figures of the paper, draw them, and say which were made."""
    from geffect import open_run
    from geffect.demo.paper import FOLDER, run_paper, weight

    from .figures import made_of, write
    from .progress import shown

    with shown(weight(plan), console, "paper") as report:
        runs = run_paper(out, plan, report)
    made = made_of([open_run(path) for path in runs])
    written = write(made, out / FOLDER, Medium.COLUMN)
    say(console, *(one.said for one in made))
    say(console, f"{written} of {len(made)} figures of the paper in {out / FOLDER}")


def run_family(out: Path, plan: "FamilyPlan", console: "Console") -> None:
    """Run the study of the family, write its page, and say where that is."""
    from geffect.demo import family_study
    from geffect.demo.family_page import write_page

    from .progress import shown

    with shown(plan.weight, console) as report:
        summary = family_study.run_family(out, plan, report)
    say(console, f"{summary['wall_seconds']:.0f} s. Open {write_page(summary, out)}")


def say_memory(subject: "Pretrained", workers: int, console: "Console") -> None:
    """Say how much memory the study takes, and refuse it where there is less."""
    from geffect.demo import memory_estimate as memory

    estimate, there = memory.estimate(subject), memory.available(subject.device)
    needed = workers * sum(estimate.values())
    say(
        console,
        f"Memory: about {memory.gib(needed)} for {counted(workers, 'worker')}, "
        f"{memory.gib(there)} are free. Of each:",
    )
    for purpose, count in estimate.items():
        say(console, f"  {memory.gib(count):>9}  {purpose}")
    if subject.dtype != "float32" and subject.trained.lora is None:
        say(
            console,
            f"Weights in {subject.dtype} lose steps that are small beside them. Adapters (--lora "
            "RANK) are trained in float32.",
        )
    memory.check(needed, there)
