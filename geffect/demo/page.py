"""The page of a study: settings, findings and every table, as Markdown."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd

from geffect.correlation import Correlation
from geffect.drafts import write_whole
from geffect.numbers import counted, percent
from geffect.text import in_markdown

from .columns import COLUMNS, KEYS, OF_AN_AUDIT
from .edits import DISRUPTION, EDITS
from .findings import findings
from .hiding import asks_what_hides, compares_with_hiding
from .methods import EQUAL, FEW, METHODS, OF_ALL, every_objective, in_one_picture
from .plan import IN_A_LOOK, QUICK_METHODS
from .scale_table import agreement, g_effects
from .scale_table import as_markdown as scales_as_markdown
from .scales import SCALES
from .tables import Row, as_markdown, compared, rows, tables

NAME = "study.md"

LOWEST = {
    "retain_nll": "lowest retain NLL inside",
    "retain_heldout_authors_nll": "lowest outside",
    "world_nll": "lowest world facts NLL",
}
NEAREST = {
    "forget_es": "forget ES nearest to gold",
    "recognition_taught": "recognition after the others are taught nearest to gold",
}
"""What variants are compared by: a loss that should be low, or a value that gold has too."""

SINGLE = (
    "step",
    "retain_nll",
    "retain_heldout_authors_nll",
    "world_nll",
    "forget_es",
    "recognition_taught",
)
"""The columns whose single seeds are shown."""

MASKED = {"stepped": "of coordinates a step", "overlap": "overlap from step to step"}
"""What is said of the masks of a lesson."""

HOW = """\
Methods and variants forget at different speeds, so they are compared **at equal forgetting**:
where the forget loss of a run first reaches that of the *gold* model, which was trained the
same way without the data. Values are interpolated between the two steps around that point. A
run that does not reach it has no values, and the number of seeds that did stands behind the
steps.

- **retain QA**: how many questions feed the retain gradient. With fewer, more authors are
  outside.
- **inside, outside**: the retain loss on questions that feed the retain gradient, and on those
  of authors that never do. A rule can win the first and lose the second.
- **ES**: extraction strength, the share of the answer that the model completes by itself.
- **paraphrases**: the forget loss on questions in words that no step has seen.
- **names relearned**: the forget loss on one half of the forget set after a few steps on the other
  half. Most of it is names and templates, so it does not tell hiding from forgetting: a model that
  hides facts may well have more of it than one that never saw them.
- **others taught**: recognition, the share of other values of an attribute that the true one beats,
  after the other facts of the same authors were taught. It is 0.5 for a model that never saw the
  fact; above gold means that it was hidden. Read 0.1 above gold as hidden, less as chance.
- **recognition, retain text, strongest, savings**: the same before that; after training on retain
  text alone; after the strongest of the attacks that teach the others, of several rates and
  lengths; and after a few steps on the very facts. **value NLL** is the loss of the values alone.
- **violating steps**: the share of applied updates of the whole run that oppose the running
  average of a retain gradient.

Losses are in nats per token. Tables show means over seeds.
"""

AUDITED = """\
A quick [audit](audit.md) attacks each unlearned model at the level, and the gold model in the same
way. **Comes back (benign)** is by 48 steps of training on what should stay, **decoder swap** by the
original's last norm and head, **int4** by rounding, **strongest attack** by whichever of all brings
most back and is certain to: each a share of what the original knows beyond the gold model, 0 for a
model that forgot as deeply as retraining does and 1 for the original. The **verdict** is that of
the audit. Where seeds differ, how many say so stands behind it. Values are of the step after the
level.
"""

EDITED = """\
An edit trains nothing: it changes the parameters of the original at once. Its strength, one of its
options, is found by bisection, so that the forget loss is that of the gold model. It looks at all
questions inside, and at none outside. *Other model* is the one that an edit takes something from:
that of SKU or SSU, say, before what it has learned is taken away. At equal disruption an edit is
as strong as a KL of {disruption} nats per token takes, from the predictions of before, on the
answers inside.
"""

SCALED = """\
The G-effect e of a risk, <grad R, grad L_u>, does not compare between losses that are sums and
losses that are means. Three of its forms do, and stand here side by side, up to where a run reaches
the level, else of the whole run:

- **cos**: of the angle between the gradients of the risk and of the objective, a mean over steps.
- **e / length**: nats per token for each unit of length of a step, a mean over steps.
- **e of the applied updates**: -<grad R, D>, by how much the risk falls to first order, in nats
  per token, all steps together. Negative for the forget risk is forgetting, for the retain risk
  damage.

**Forget rise over retain change** is how much the forget risk rises for each nat by which the
retain risk changes, both to first order. The objective of an edit is its displacement, at the
original model: where first order says little, its numbers say little too.
"""

PICTURE = """\
![Retain loss outside over forget loss, a panel a variant, a line a method](figures/comparison.png)

*The retain loss of authors outside the retain gradient over the forget loss, of one seed: along
each run by variant, and along rising strengths of each edit. Names stand where the forget loss is
that of the retrained model. Lower is better.*
"""

HIDDEN = """\
![Retain loss outside over recognition, a point a variant](figures/recognition.png)

*The retain loss of authors outside the retain gradient over the recognition of forgotten facts once
the others of the same authors were taught, where a run reaches the forget loss of the retrained
model; means over seeds. The retrained model is what to reach: the corner below, on the left.*
"""

ELSEWHERE = """\
This study is of one small model that has memorised its data. It also runs on a
pretrained model, and leaves the same page in its folder:

```sh
geffect demo --model DIR --seeds 0,1,2 --all-variants --out runs/pretrained
geffect demo --model DIR --lora 8
geffect demo --model DIR --layers 10..19
```

`DIR` is a folder as `save_pretrained` leaves it, or a GGUF file (extra `gguf`). The memory it
takes is said first. For averages and batch sizes other than those of the study, pass another
`UnlearningConfig(ema=..., retain_batch=...)` to `geffect.demo.unlearning.unlearn`.
"""


def write_page(summary: Mapping[str, Any], out: Path) -> None:
    """Write the page of a study into its folder."""
    write_whole(out / NAME, study_page(summary))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a study again, with the findings that its numbers give today."""
    parser = argparse.ArgumentParser(prog="python -m geffect.demo.page", description=main.__doc__)
    parser.add_argument("study", type=Path, help="the folder of the study")
    out = parser.parse_args(arguments).study
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    said = findings(summary["runs"], summary["further_runs"], summary["gold"])
    write_page({**summary, "findings": said}, out)


def study_page(summary: Mapping[str, Any]) -> str:
    """The page of a study from what its summary.json holds."""
    config = summary["config"]
    runs = [*summary["runs"], *summary["further_runs"]]
    edits = summary.get("edits", ())
    main, *further = tables(summary)
    feeds = list(main.runs.groupby("retain_feed", sort=False))
    sections = [
        _title(summary),
        f"`{command(summary)}` wrote this page. Do not edit it.",
        f"{counted(len(runs), 'run')}{' and ' + counted(len(edits), 'edit') if edits else ''} "
        f"with {_seeds(summary)}; "
        f"{', '.join(f'{package} {number}' for package, number in summary['versions'].items())}.",
        *_missing(summary),
        "## What is done",
        f"{in_markdown(config['subject'])} "
        f"Authors to be forgotten: {config['recipe']['corpus']['forget']}. "
        f"Every step takes {config['batch']['forget']} forget and {config['batch']['retain']} "
        f"retain questions and {config['optimizer']}. The running average of the retain gradients "
        f"weighs the new one by {config['ema']}. {_objectives(runs)}".rstrip(),
        HOW,
        *([AUDITED] if config.get("audit") else []),
        _variants(config["variants"]),
        *([EDITED.format(disruption=DISRUPTION), _edits(config["edits"], edits)] if edits else []),
        "## What is found",
        "Each sentence is tested against the numbers of this study.",
        "\n".join(_finding(finding) for finding in summary["findings"]),
        "## Which variant is best",
        "The best variant of each method, by the mean over seeds, among those that reached the "
        "level in every seed.",
        best(compared({**summary, "edits": []}, "at_level", EQUAL, FEW)),
        f"## {main.heading}",
        *([PICTURE] if in_one_picture(summary) else []),
        *([HIDDEN] if asks_what_hides(summary) else []),
        *[
            f"### {feed} questions feed the retain gradient\n\n{as_markdown(t)}"
            for feed, t in feeds
        ],
        *([_folded("Each seed", _single(rows(main.runs)))] if len(summary["seeds"]) > 1 else []),
        *[f"## {table.heading}\n\n{as_markdown(table.runs, table.shown)}" for table in further],
        *_scales(summary),
        "## On your model",
        ELSEWHERE,
    ]
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def command(summary: Mapping[str, Any]) -> str:
    """The command line of a study, from its summary.

    >>> run = {"method": "ga", "variant": "plain"}
    >>> config = {"quick": True, "recipe": {}, "options": {}}
    >>> command({"seeds": [0], "config": config, "runs": [run], "further_runs": []})
    'geffect demo --seeds 0 --quick'
    """
    config, recipe = summary["config"], summary["config"]["recipe"]
    trained = recipe.get("trained") or {}
    methods = list(dict.fromkeys(run["method"] for run in summary["runs"]))
    small = config["quick"] or "source" in recipe
    named = config.get("named", ())
    every = not named and {run["variant"] for run in summary["runs"]} > set(IN_A_LOOK)
    edits = list(dict.fromkeys(edit["method"] for edit in summary.get("edits", ())))
    layers, rank = trained.get("layers"), trained.get("lora")
    if edits == [*EDITS] and tuple(named) == OF_ALL and tuple(methods) == every_objective():
        methods, named, edits = ["all"], (), []
    options = {
        "--model DIR": "source" in recipe,
        f"--layers {'..'.join(map(str, layers or ()))}": layers,
        f"--lora {rank}": rank,
        f"--seeds {','.join(map(str, summary['seeds']))}": True,
        f"--methods {','.join(methods)}": methods != list(QUICK_METHODS if small else METHODS),
        **{f"--objective-option {o}={value}": True for o, value in config["options"].items()},
        "--quick": config["quick"],
        f"--variants {','.join(named)}": named,
        f"--edits {','.join(edits)}": edits,
        "--all-variants": every,
        "--controls": summary["further_runs"],
        "--audit": config.get("audit"),
    }
    return " ".join(["geffect demo", *(option for option, given in options.items() if given)])


def _objectives(runs: Sequence[Mapping[str, Any]]) -> str:
    """The options of the methods that have some."""
    having = {run["method"]: run["options"] for run in runs if run["options"]}
    given = [
        f"{method} {', '.join(f'{o} {value}' for o, value in options.items())}"
        for method, options in having.items()
    ]
    return f"Options of the objectives: {'; '.join(given)}." if given else ""


def best(runs: pd.DataFrame) -> str:
    """The best variants of each method and feed, from the table of all of them."""
    by = runs.groupby(list(KEYS), sort=False, dropna=False)
    means = by[[*LOWEST, *NEAREST]].mean()[by["reached_level"].all()].reset_index()
    found: list[dict[str, Any]] = [
        dict(zip(means.columns, row, strict=True)) for row in means.to_numpy()
    ]
    gold = {row["retain_feed"]: row for row in found if row["method"] == "gold"}
    rivals: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in found:
        if row["method"] != "gold":
            rivals.setdefault((row["method"], row["retain_feed"]), []).append(row)
    lines = []
    for (method, feed), variants in rivals.items():
        cells = [in_markdown(method), str(feed)]
        for name in (*LOWEST, *NEAREST):
            aim = 0.0 if name in LOWEST else gold[feed][name]
            least = min(variants, key=lambda row: abs(row[name] - aim))
            cells.append(
                f"{in_markdown(least['variant'])} ({COLUMNS[name][1].format(least[name])})"
            )
        lines.append(cells)
    return markdown(["method", "retain QA", *LOWEST.values(), *NEAREST.values()], lines)


def _variants(variants: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        [
            in_markdown(name),
            variant["summary"],
            f"{variant['learning_rate']:g}",
            ", ".join(f"`{option}={value!r}`" for option, value in variant["options"].items()),
        ]
        for name, variant in variants.items()
    ]
    return markdown(["variant", "what is stepped", "learning rate", "of `Rectifier`"], lines)


def _edits(edits: Mapping[str, Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> str:
    """Each edit, its options and what its mask leaves, and the strength that each seed took."""
    lines = []
    for name, edit in edits.items():
        own = [run for run in made if run["method"] == name]
        found = [
            "not reached" if run["at_level"] is None else f"{run['at_level']['strength']:.3g}"
            for run in own
        ]
        options = [f"`{option}={value!r}`" for option, value in edit["options"].items()]
        options += [
            f"{' / '.join(percent(run[key], '.3g') for run in having)} {said}"
            for key, said in MASKED.items()
            if (having := [run for run in own if run.get(key) is not None])
        ]
        lines.append(
            [
                in_markdown(name), edit["summary"], ", ".join(options), edit["strength"],
                " / ".join(found),
            ]
        )  # fmt: skip
    return markdown(["edit", "what is done", "options", "strength", "at the level"], lines)


def _scales(summary: Mapping[str, Any]) -> list[str]:
    """The G-effects of a study beside each other, where it has them."""
    table = g_effects(summary)
    if table.empty:
        return []
    said = "; ".join(
        f"{SCALES[scale]} {found.r:.2f} ({_interval(found)}{found.count} runs)"
        for scale, found in agreement(table).items()
        if found.r == found.r
    )
    told = f"Rank correlation of the retaining effect with the retain loss outside: {said}."
    heading = "## G-effects on common scales"
    return [heading, SCALED, *([told] if said else []), scales_as_markdown(table)]


def _interval(found: Correlation) -> str:
    """That of a correlation, where there is one: as of few runs, or ranks alike, there is none."""
    return "" if isnan(found.low) else f"{found.low:.2f} to {found.high:.2f}, "


def _finding(finding: Mapping[str, Any]) -> str:
    exceptions = f" Not for {', '.join(finding['except'])}." if finding["except"] else ""
    verdict = "Holds" if finding["holds"] else "Does not hold"
    return f"- **{verdict}**: {finding['claim']}: {finding['measured']}.{exceptions}"


def _single(found: Iterable[Row]) -> str:
    shown = [*found]
    names = (*SINGLE, *(name for name in OF_AN_AUDIT if shown and name in shown[0].values))
    lines = [
        [
            *map(in_markdown, row.keys.values()),
            *(" / ".join(row.values[name].single) for name in names),
        ]
        for row in shown
    ]
    headings = [heading for heading, _ in (*KEYS.values(), *(COLUMNS[name] for name in names))]
    return markdown(headings, lines)


def _missing(summary: Mapping[str, Any]) -> list[str]:
    """What a study that is reported so far lacks."""
    whole = summary.get("whole") or {"runs": 0, "of": 0}
    if whole["runs"] == whole["of"]:
        return []
    return [
        f"**The study is not whole**: {whole['runs']} of {whole['of']} runs and edits are through. "
        "What is missing stands in no table, and no mean over seeds has it in it."
    ]


def _title(summary: Mapping[str, Any]) -> str:
    if in_one_picture(summary):
        return "# The study of all methods"
    if compares_with_hiding(summary):
        return "# The study of what hides"
    return "# The study of relearned copies" if asks_what_hides(summary) else "# The study"


def _seeds(summary: Mapping[str, Any]) -> str:
    numbers = ", ".join(map(str, summary["seeds"]))
    return f"seed{'s' if len(summary['seeds']) > 1 else ''} {numbers}"


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n</details>"


def markdown(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    shown = [headings, ["---"] * len(headings), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown) + "\n"


if __name__ == "__main__":
    main()
