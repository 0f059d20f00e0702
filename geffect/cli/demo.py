"""`geffect demo`: the embedded study, from nothing to a report."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for runs, figures and report.")
    ] = Path("runs/demo"),
    seeds: Annotated[str, typer.Option(help="Seeds, with commas between them.")] = "0",
    methods: Annotated[
        str,
        typer.Option(
            help="Some of ga,wga,npo,graddiff,npo+gd, with commas between them; "
            "all if left out, ga of a quick study."
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model and fewer runs.")] = False,
    all_variants: Annotated[
        bool, typer.Option("--all-variants", help="Every method in every variant.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
) -> None:
    """Train a small language model, unlearn a part of what it knows in several ways, and report.

    Nothing is downloaded. DIR then holds a run file for each method and variant, summary.json,
    equal_forgetting.csv, figures, and report.html, which opens offline.
    """
    from rich.console import Console

    from geffect.demo.study import Plan, run_study

    from .progress import shown
    from .report import study_report

    console = Console()
    try:
        plan = Plan(
            seeds=_whole_numbers(seeds),
            methods=tuple(methods.split(",")) if methods else (),
            quick=quick,
            all_variants=all_variants,
            workers=workers,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with shown(plan.weight, console) as report:
        summary = run_study(out, plan, report)
    (out / "report.html").write_text(study_report(summary, out), encoding="utf-8")
    # Not through rich, which would fold the lines of the table.
    typer.echo((out / "equal_forgetting.md").read_text(encoding="utf-8"))
    held = [finding["holds"] for finding in summary["findings"]]
    console.print(f"{sum(held)} of {len(held)} findings hold, as measured in this study:")
    for finding in summary["findings"]:
        mark = "[green]holds[/]   " if finding["holds"] else "[yellow]does not[/]"
        exceptions = f"; not for {', '.join(finding['except'])}" if finding["except"] else ""
        console.print(f"  {mark} {finding['claim']}{exceptions}", highlight=False, soft_wrap=True)
    seconds = summary["wall_seconds"]["total"]
    console.print(f"{seconds:.0f} s. Open {out / 'report.html'}", highlight=False, soft_wrap=True)


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(
            f"`--seeds` should be whole numbers with commas between them. Found `{text}`. "
            "Pass, say, --seeds 0,1,2."
        ) from error
