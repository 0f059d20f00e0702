"""A family of six in the files of EDU-RELAT, small enough to be learned in a second."""

import json
from pathlib import Path
from typing import Any

from geffect.evaluation import Rule, Triple, close, minimal_sets

NAMES = ("Adam", "Berta", "Carl", "Dora", "Emil", "Flora")
MALE = (True, False, True, False, True, False)

FACTS: tuple[Triple, ...] = (
    (2, "father", 0), (2, "mother", 1), (3, "father", 0), (0, "child", 2), (0, "child", 3),
    (1, "child", 2), (2, "sister", 3), (0, "wife", 1), (4, "sister", 5), (5, "brother", 4),
)  # fmt: skip

RULES = (
    Rule(((0, "wife", 1),), (1, "husband", 0)),
    Rule(((0, "child", 1),), (1, "father", 0)),
    Rule(((0, "father", 1),), (1, "child", 0)),
    Rule(((0, "father", 1), (2, "father", 1)), (0, "sister", 2)),
    Rule(((0, "brother", 1),), (1, "sister", 0)),
    Rule(((0, "wife", 1), (0, "child", 2)), (1, "child", 2)),
)
WOMEN, MEN = ("wife", "mother", "sister"), ("husband", "father", "brother")


def write_family(folder: Path) -> Path:
    """The folder, with all files."""
    folder.mkdir(parents=True, exist_ok=True)
    closure = close(FACTS, RULES, allowed)
    targets = [
        {
            "target_index": index,
            "fact_id": fact,
            "relation": FACTS[fact][1],
            "minimal_sets": minimal_sets(closure, fact, range(10)),
        }
        for index, fact in enumerate((0, 3, 6))
    ]
    for name, rows in {
        "people": [{"gender": "male" if male else "female"} for male in MALE],
        "relationships": [
            {"subject": a, "relation": r, "object": b, **asked(f"Who is {NAMES[b]} to", a, r)}
            for a, r, b in FACTS
        ],
        "biographies": [
            {"person": person, **asked(f"What is the {what} of", person, answer)}
            for person in range(len(NAMES))
            for what, answer in (("job", f"baker {person % 2}"), ("year", f"19{person}0"))
        ],
        "rules": [{"body": rule.body, "head": rule.head} for rule in RULES],
    }.items():
        numbered = [{"id": index, **row} for index, row in enumerate(rows)]
        (folder / f"{name}.json").write_text(json.dumps(numbered), encoding="utf-8")
    (folder / "targets.json").write_text(json.dumps(targets), encoding="utf-8")
    return folder


def asked(what: str, person: int, answer: str) -> dict[str, Any]:
    return {"qa_main": {"question": f"{what} {NAMES[person]}?", "answer": answer}}


def allowed(triple: Triple) -> bool:
    subject, relation, other = triple
    fits = relation not in (WOMEN if MALE[other] else MEN)
    married = relation not in ("husband", "wife") or MALE[subject] == (relation == "wife")
    return subject != other and fits and married
