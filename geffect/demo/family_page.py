"""The page of a study of the family, as Markdown, from its summary.json."""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from geffect.correlation import Correlation, correlation
from geffect.drafts import write_whole
from geffect.numbers import percent
from geffect.scores import PER_TOKEN
from geffect.text import in_markdown

from .family import END, GROUPS, LIVES, LOST, MINIMAL, NEAR, REST
from .page import markdown

NAME = "edu_relat.md"

POINTS = {LOST: "target lost", END: "end"}

CLAIMS = (
    (MINIMAL, "recall", "the effect on the minimal set predicts recall"),
    (NEAR, "recall", "the effect on facts one rule instance away predicts recall"),
    (REST, "accuracy_relationships", "the effect on the rest predicts accuracy"),
    (LIVES, "accuracy_biographies", "the effect on biographies predicts their accuracy"),
)
"""Of which group, what of the evaluator, and the claim."""

EXPECTED = {"recall": -1, "accuracy_relationships": 1, "accuracy_biographies": 1}
"""The sign of a correlation that agrees with the claim."""

DATA = """\
The data are the fictitious family of arXiv 2410.15153: 400 relationships, 300 facts of
biographies, rules that deduce relationships from others, and targets with their minimal sets.
"""

LEARNED = """\
A Llama of {layers} layers and width {hidden} learns all facts by heart. It then answers
{relationships} of the relationships and {biographies} of the biographies right.
"""

LEARNT = "relationships", "biographies"

HOW = """\
A fact that follows from others is not gone while they are left. A **minimal set** of a target is a
set of facts, itself among them, after whose deletion it no longer follows, and of which each is
needed. **Recall** is the largest share of a minimal set that is no longer answered.
**Accuracy** is the share of everything outside of that set which still is.

Every target is unlearned by itself, by gradient ascent on its one question, until it does not
follow from what the model still answers, or until the last step. Two moments are looked at: where
the target itself is not answered any more, and the end.

**Effects** are predicted changes e = -<grad R, displacement> of every applied step, summed over
the steps: in {unit}, positive where the risk falls. R is the risk of a group of facts:
the minimal set without the target, the other facts that one rule instance holds together with the
target (near), {sampled} of the other relationships (rest), and {sampled} biographies.
"""

READ = """\
A claim holds where the whole interval has the sign that it says: a risk that rises has a negative
effect, so that is a negative correlation for recall, and a positive one for accuracy. Two things
enter by construction. The target itself is in its minimal set, so that recall is at least one over
the size of the set once it is lost. And runs that have succeeded stop, so that those with the
lowest recall at the end are those that went on longest.
"""

RESTORED = """\
Of the relationships {altered} get a false word for an answer, and the model that has learned the
family learns those by heart: theta_k. A method then unlearns them: theta_u. The clean model
theta_c is known here, and so is how much of the way back each method goes. The cosine is
cos(theta_u - theta_k, theta_c - theta_k), the residual |theta_u - theta_c| / |theta_k - theta_c|.
A method is not told the true answers. GradDiff retains questions that were not altered. Of every
step it is said whether, by its predicted changes, the false facts are forgotten alone or the true
ones regained as well.
"""


def family_page(summary: Mapping[str, Any]) -> str:
    """The page of a study from what its summary.json holds."""
    config, learned = summary["config"], summary["learned"]
    packages = ", ".join(f"{name} {number}" for name, number in summary["versions"].items())
    return (
        "\n\n".join(
            part.rstrip()
            for part in (
                "# Deep unlearning on EDU-RELAT",
                "`geffect demo --data edu_relat --data-folder DIR` wrote this page. Do not edit "
                f"it. Seed {summary['seed']}; {packages}.",
                DATA,
                "## What is done",
                LEARNED.format(
                    **config["subject"],
                    **{what: percent(learned[what], ".1f") for what in LEARNT},
                ),
                HOW.format(unit=PER_TOKEN, sampled=config["sampled"]),
                "## Do effects predict what goes",
                _claims(summary["targets"]),
                _few(summary["targets"]),
                "## Effects, layer by layer",
                "Means over the targets, summed over the steps to the end.",
                _layers(summary["targets"]),
                "## Effects, step by step",
                "Means over the targets that take the step, summed over layers.",
                _by_step(summary["targets"]),
                "## Gradients and rules",
                _cosines(summary["cosines"], config["width"]),
                "## The targets",
                _targets(summary["targets"]),
                "## Restoration",
                RESTORED.format(altered=config["altered"]),
                _restored(summary["restored"]),
                _recovery(summary["restored"]),
            )
            if part
        )
        + "\n"
    )


def write_page(summary: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a study into its folder."""
    path = out / NAME
    write_whole(path, family_page(summary))
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of a study of the family again, from its summary."""
    parser = argparse.ArgumentParser(
        prog="python -m geffect.demo.family_page", description=main.__doc__
    )
    parser.add_argument("study", type=Path, help="the folder of the study")
    out = parser.parse_args(arguments).study
    write_page(json.loads((out / "summary.json").read_text(encoding="utf-8")), out)


def claims(targets: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, Correlation, bool]]:
    """Every claim at every point: what it says, where, its correlation, and whether it holds.

    It holds where the whole interval has the sign that it says.
    """
    for group, score, claim in CLAIMS:
        for point, said in POINTS.items():
            pairs = [
                (summed(target, group, point), target["points"][point][score])
                for target in targets
                if point in target["points"] and group in target["groups"]
            ]
            found = correlation([a for a, _ in pairs], [b for _, b in pairs])
            sign = EXPECTED[score]
            yield claim, said, found, sign * found.low > 0 and sign * found.high > 0


def summed(target: Mapping[str, Any], group: str, point: str, layer: str | None = None) -> float:
    """The effect on a group, over all steps to a point, of a layer or of the model."""
    last = target["points"][point]["step"]
    return math.fsum(
        effect["value"]
        for effect in target["effects"]
        if effect["risk"] == group and effect["step"] <= last and layer in (None, effect["layer"])
    )


def _claims(targets: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for claim, point, found, holds in claims(targets):
        known = not math.isnan(found.low)
        lines.append(
            [
                claim,
                point,
                f"{found.count}",
                _number(found.r, "+.2f"),
                f"{found.low:+.2f} to {found.high:+.2f}" if known else "none",
                "holds" if holds else "not shown" if known else "no variation",
            ]
        )
    headings = ["claim", "looked at", "targets", "Pearson's r", "95 % interval", "verdict"]
    return markdown(headings, lines)


def _few(targets: Sequence[Mapping[str, Any]]) -> str:
    deep = sum(target["points"][END]["succeeded"] for target in targets)
    lost = sum(LOST in target["points"] for target in targets)
    return f"Of {len(targets)} targets {lost} were lost and {deep} unlearned deeply. {READ}"


def _layers(targets: Sequence[Mapping[str, Any]]) -> str:
    layers = list(dict.fromkeys(effect["layer"] for effect in targets[0]["effects"]))
    lines = [
        [
            in_markdown(layer),
            *(
                _mean(summed(t, group, END, layer) for t in targets if group in t["groups"])
                for group in GROUPS
            ),
        ]
        for layer in layers
    ]
    return markdown(["layer", *GROUPS], lines)


def _by_step(targets: Sequence[Mapping[str, Any]]) -> str:
    steps = sorted({effect["step"] for target in targets for effect in target["effects"]})

    def of(target: Mapping[str, Any], group: str, step: int) -> float:
        return math.fsum(
            e["value"] for e in target["effects"] if e["risk"] == group and e["step"] == step
        )

    lines = []
    for step in steps:
        taking = [t for t in targets if t["points"][END]["step"] >= step]
        cells = [
            _mean(of(t, group, step) for t in taking if group in t["groups"]) for group in GROUPS
        ]
        lines.append([str(step), str(len(taking)), *cells])
    return markdown(["step", "targets", *GROUPS], lines)


def _cosines(cosines: Mapping[str, Any], width: int) -> str:
    lines = [
        [str(row["distance"]), str(row["pairs"]), f"{row['cosine']:+.4f}"]
        for row in cosines["rows"]
    ]
    table = markdown(["rule instances between", "pairs", "mean cosine"], lines)
    return (
        "The gradients of the risk of every single relationship in the learned model, from "
        f"sketches of {width} numbers: their cosine, by how many rule instances lie between the "
        f"two facts.\n\n{table}\nSpearman's correlation of cosine and distance over all pairs: "
        f"{_number(cosines['r'], '+.3f')}, {_number(cosines['low'], '+.3f')} to "
        f"{_number(cosines['high'], '+.3f')} (95 %, facts drawn anew)."
    )


def _targets(targets: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for target in targets:
        for name, said in POINTS.items():
            point = target["points"].get(name)
            if point is None:
                continue
            lines.append(
                [
                    str(target["target"]),
                    in_markdown(target["relation"]),
                    str(len(target["minimal_set"])),
                    said,
                    str(point["step"]),
                    f"{point['recall']:.2f}",
                    f"{point['accuracy_relationships']:.3f}",
                    f"{point['accuracy_biographies']:.3f}",
                    "yes" if point["succeeded"] else "no",
                    f"{summed(target, MINIMAL, name):+.3f}",
                ]
            )
    headings = [
        "fact", "relation", "set", "looked at", "step", "recall", "relationships", "biographies",
        "deeply", "effect on the set",
    ]  # fmt: skip
    return markdown(headings, lines)


def _restored(restored: Sequence[Mapping[str, Any]]) -> str:
    states = {
        "clean": restored[0]["states"]["clean"],
        "corrupted": restored[0]["states"]["corrupted"],
    }
    states |= {f"unlearned by {r['method']}": r["states"]["unlearned"] for r in restored}
    lines = [
        [
            in_markdown(name),
            *(percent(state[f"answers_{answer}"], ".1f") for answer in ("true", "false", "others")),
            *(f"{state[f'log_p_{answer}']:.2f}" for answer in ("true", "false", "third")),
        ]
        for name, state in states.items()
    ]
    headings = [
        "model", "true answers", "false answers", "others right",
        "log p true", "log p false", "log p another word",
    ]  # fmt: skip
    steps = [
        [
            in_markdown(r["method"]),
            str(len(r["effects"])),
            *(
                str(sum(e["verdict"] == verdict for e in r["effects"]))
                for verdict in ("restorative", "forget-only", "neither")
            ),
        ]
        for r in restored
    ]
    verdicts = markdown(["method", "steps", "restorative", "forget-only", "neither"], steps)
    return f"{markdown(headings, lines)}\n{verdicts}"


def _recovery(restored: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            in_markdown(layer),
            *(
                f"{_number(r['recovery'][layer]['cosine'], '+.3f')}, "
                f"{_number(r['recovery'][layer]['residual'], '.3f')}"
                for r in restored
            ),
        ]
        for layer in restored[0]["recovery"]
    ]
    return "Recovery, cosine and residual:\n\n" + markdown(
        ["layer", *(in_markdown(r["method"]) for r in restored)], lines
    )


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{math.fsum(found) / len(found):+.4f}" if found else "none"


def _number(value: float | None, form: str) -> str:
    return "none" if value is None or math.isnan(value) else format(value, form)


if __name__ == "__main__":
    main()
