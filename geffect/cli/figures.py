"""`geffect figures`: the figures of the G-effect paper, from run files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geffect.drafts import write_whole
from geffect.numbers import counted, is_number

from .options import Medium, check_output, choice
from .paper_figures import Kind, PaperFigure, figures
from .terminal import say, terminal

if TYPE_CHECKING:
    import pandas as pd

    from geffect import Run
    from geffect.analysis import Setting

KINDS = (".pdf", ".png", ".csv")
"""What is written of each figure: twice the picture, and its numbers."""

SEED = "seed"
"""The column that tells the runs of a setting apart; pictures make lines with bands of it."""

CALLED = {"coefficient": "c"}
"""What options are called in a figure, where that is not their own name."""


@dataclass(frozen=True)
class Given:
    """A run, with the setting that its file tells, and what that is called where it is listed."""

    run: "Run"
    setting: "Setting"
    file: str


@dataclass(frozen=True)
class Made:
    """A figure and the runs that it is of; without a table it was not made, because of `why`."""

    figure: PaperFigure
    runs: Sequence[Given] = ()
    table: "pd.DataFrame | None" = None
    why: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)  # why, by the file

    @property
    def said(self) -> str:
        """One line that tells of it."""
        if self.table is None:
            return f"{self.figure.name}: not made: {self.why}"
        less = "".join(f"; not of {file}: {why}" for file, why in self.left_out.items())
        files = ", ".join(given.file for given in self.runs)
        pooled = f", {self.figure.over_seeds}" if SEED in self.table else ""
        return f"{self.figure.name}: {self.figure.shows}{pooled}, from {files}{less}"


def command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run files (.h5).")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="The folder to write to; made if it is not there."
        ),
    ],
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="Those of arXiv 2502.19301: 1 and 3 to 7, the regularisers, the inverse "
            "confidence and table 1.",
        ),
    ] = False,
    place: Annotated[
        Medium,
        choice("--style", Medium, "Where they are to stand, which sets their width", "PLACE"),
    ] = Medium.COLUMN,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace figures that are in the folder.")
    ] = False,
) -> None:
    """Draw the figures of the G-effect paper from run files, as PDF and PNG with their numbers.

    A figure is made where the runs have what it needs: their files tell the objective and its
    options. One line each says which figure was made of which runs, or why it was not.
    """
    if not paper:
        raise typer.BadParameter(
            "`geffect figures` should be told which figures. Found no --paper. Pass --paper, or "
            "draw single scores with geffect plot."
        )
    from geffect import open_run

    if output.exists() and not output.is_dir():
        raise typer.BadParameter(
            f"`--output` should be a folder. Found the file `{output}`. Choose another name."
        )
    made = made_of([open_run(path) for path in runs])
    output.mkdir(parents=True, exist_ok=True)
    for one in made:
        if one.table is not None:
            for kind in KINDS:
                check_output(output / f"{one.figure.name}{kind}", overwrite=overwrite)
    written = write(made, output, place)
    say(terminal(), *(one.said for one in made), f"{written} of {len(made)} figures in {output}")


def made_of(runs: Sequence["Run"]) -> list[Made]:
    """Each figure of the paper, as far as the runs have what it needs."""
    from geffect.analysis import setting
    from geffect.report.read import check_once, names

    check_once(runs)
    files = [f"{name}{run.path.suffix}" for name, run in zip(names(runs), runs, strict=True)]
    given = [Given(run, setting(run), file) for run, file in zip(runs, files, strict=True)]
    return [_made(figure, given) for figure in figures()]


def write(made: Sequence[Made], folder: Path, place: Medium) -> int:
    """Write the figures that were made into a folder, and say how many those are."""
    from geffect import plots
    from geffect.plots import paper
    from geffect.plots.figures import save

    there = [one for one in made if one.table is not None]
    for one in there:
        draw = getattr(paper, one.figure.name.replace("-", "_"))
        with plots.style(place.value):
            figure = draw(one.table)
            for kind in (".pdf", ".png"):
                save(figure, folder / f"{one.figure.name}{kind}", dpi=300)
        assert one.table is not None
        write_whole(folder / f"{one.figure.name}.csv", one.table.to_csv(index=False))
    return len(there)


def _made(figure: PaperFigure, given: Sequence[Given]) -> Made:
    """The figure from those of the runs that are of its kind."""
    of_kind = [one for one in given if figure.kind.holds(one.setting)]
    plain = [one for one in of_kind if not one.setting.rectified]
    if figure.rectified:
        plain = plain or of_kind
    wanted = plain if figure.mixed else _alike(plain)
    if not wanted:
        return Made(figure, why=_why(figure.kind, given, of_kind))
    tables: list[tuple[Given, pd.DataFrame]] = []
    lacking = {}
    for one in wanted:
        if not all(figure.beside(there.setting, one.setting) for there, _ in tables):
            continue
        try:
            tables.append((one, figure.table(one.run)))
        except ValueError as error:
            lacking[one.file] = str(error)
    if not tables:
        (file, why), *others = lacking.items()
        and_more = f" The same goes for {counted(len(others), 'run')} more." if others else ""
        return Made(figure, why=f"{file}: {why}{and_more}")
    tables = _by_options(tables)
    runs = [one for one, _ in tables]
    return Made(figure, runs, _stacked(figure, tables), left_out=lacking)


def _by_options(
    tables: Sequence[tuple[Given, "pd.DataFrame"]],
) -> list[tuple[Given, "pd.DataFrame"]]:
    """The tables of an objective by its options, smaller ones first; objectives as they came."""
    came: dict[str, int] = {}
    for one, _ in tables:
        came.setdefault(one.setting.name, len(came))

    def place(told: tuple[Given, "pd.DataFrame"]) -> tuple[int, list[tuple[bool, Any]]]:
        setting = told[0].setting
        options = setting.options.values()
        values = [(False, of) if is_number(of) else (True, str(of)) for of in options]
        return came[setting.name], values

    return sorted(tables, key=place)


def _why(kind: Kind, given: Sequence[Given], of_kind: Sequence[Given]) -> str:
    """Why no run will do, and what to record."""
    if of_kind:
        return f"a rectifier changed the steps of {kind.words}. Record one without a rectifier."
    return f"of {counted(len(given), 'run')} none is {kind.words}. Record one with {kind.record}."


def _alike(given: Sequence[Given]) -> list[Given]:
    """The runs without a regulariser, where there are some: one would change what is compared."""
    return [one for one in given if one.setting.regulariser is None] or [*given]


def _stacked(figure: PaperFigure, tables: Sequence[tuple[Given, "pd.DataFrame"]]) -> "pd.DataFrame":
    """The tables below one another, told apart by their settings, and in these by their seeds."""
    import pandas as pd

    from geffect.scores import stack

    names = labels([one for one, _ in tables], figure.told)
    of_setting: dict[str, list[pd.DataFrame]] = {}
    for name, (one, table) in zip(names, tables, strict=True):
        of_seed = table.assign(seed=one.setting.seed) if len({*names}) < len(names) else table
        of_setting.setdefault(name, []).append(of_seed)
    joined = {name: pd.concat(own, ignore_index=True) for name, own in of_setting.items()}
    return stack(joined, "setting")


def labels(given: Sequence[Given], told: Sequence[str] = ()) -> list[str]:
    """A name for each run: its objective where they differ in it, and options.

    Options are those that are told whatever they are, and those in which runs of one objective
    differ. Runs of one setting and as many seeds share a name; others have their seeds or files
    in it.
    """
    settings = [one.setting for one in given]
    one_name = len({own.name for own in settings}) == 1
    names = []
    for own in settings:
        others = [other.options for other in settings if other.name == own.name]
        said = [
            f"{CALLED.get(name, name)} {_value(value)}"
            for name, value in own.options.items()
            if name in told or any(other.get(name) != value for other in others)
        ]
        names.append(", ".join(said if one_name and said else [own.name, *said]))
    kept = {name for name in names if _are_seeds(names, settings, name)}
    for more in (_seed, lambda one: one.run.name, lambda one: str(one.run.path)):
        count = Counter(name for name in names if name not in kept)
        names = [
            ", ".join(filter(None, [name, more(one)])) if count[name] > 1 else name
            for name, one in zip(names, given, strict=True)
        ]
    return names


def _are_seeds(names: Sequence[str], settings: Sequence["Setting"], name: str) -> bool:
    """Whether the runs of a name have each a seed of its own, and differ in nothing else."""
    seeds = [own.seed for other, own in zip(names, settings, strict=True) if other == name]
    return None not in seeds and len({*seeds}) == len(seeds)


def _seed(one: Given) -> str:
    return "" if one.setting.seed is None else f"seed {one.setting.seed}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
