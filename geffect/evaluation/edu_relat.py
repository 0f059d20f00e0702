"""EDU-RELAT, the facts of a fictitious family with rules that deduce some from others."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .closure import Closure, Rule, Triple, close

MALE = ("husband", "uncle", "father", "brother", "nephew")
FEMALE = ("wife", "aunt", "mother", "sister", "niece")
FILES = ("people.json", "relationships.json", "biographies.json", "rules.json", "targets.json")


@dataclass(frozen=True)
class Asked:
    """A fact as it is asked for, about the person `subject`."""

    subject: int
    question: str
    answer: str


@dataclass(frozen=True)
class Target:
    """A relationship to be unlearned deeply, and a sample of the minimal sets that do it."""

    fact: int
    relation: str
    minimal_sets: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Family:
    """The data: relationships as triples and as questions, biographies, rules, and targets.

    Facts are numbered by their place in `relationships`. `is_male` is by person.
    """

    is_male: tuple[bool, ...]
    triples: tuple[Triple, ...]
    relationships: tuple[Asked, ...]
    biographies: tuple[Asked, ...]
    rules: tuple[Rule, ...]
    targets: tuple[Target, ...]

    @cached_property
    def closure(self) -> Closure:
        """All that follows from the relationships."""
        return close(self.triples, self.rules, self.allowed)

    @property
    def relations(self) -> tuple[str, ...]:
        """The words that answer for a relationship, by the alphabet."""
        return tuple(sorted({relation for _, relation, _ in self.triples}))

    def allowed(self, triple: Triple) -> bool:
        """Whether a triple is between two people whose genders fit its relation."""
        subject, relation, other = triple
        fits = subject != other
        fits &= self.is_male[other] or relation not in MALE
        fits &= not self.is_male[other] or relation not in FEMALE
        if relation in ("husband", "wife"):
            fits &= self.is_male[subject] == (relation == "wife")
        return fits


def read(folder: str | os.PathLike[str]) -> Family:
    """The family in a folder of EDU-RELAT as JSON files.

    - `folder`: has people.json, relationships.json, biographies.json, rules.json, targets.json.

    Raises FileNotFoundError where the folder lacks one of them, ValueError where one holds
    something else. Data and rules: Wu et al., arXiv 2410.15153.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        found = f"no {', '.join(missing)} in it" if folder.is_dir() else "no folder there"
        raise FileNotFoundError(
            f"The folder of EDU-RELAT should have {', '.join(FILES)}. Found {found}: `{folder}`. "
            "Pass the folder that holds the data as JSON."
        )
    people = _parsed(folder / "people.json", lambda p: (p["id"], _is_male(p["gender"])))
    relationships = _parsed(
        folder / "relationships.json",
        lambda f: (
            f["id"],
            (_number(f["subject"]), str(f["relation"]), _number(f["object"])),
            Asked(_number(f["subject"]), *_asked(f)),
        ),
    )
    biographies = _parsed(
        folder / "biographies.json", lambda f: (f["id"], Asked(_number(f["person"]), *_asked(f)))
    )
    rules = _parsed(
        folder / "rules.json",
        lambda r: (r["id"], Rule(tuple(map(_atom, r["body"])), _atom(r["head"]))),
    )
    targets = _parsed(
        folder / "targets.json",
        lambda t: (
            t["target_index"],
            Target(_number(t["fact_id"]), t["relation"], tuple(map(_set, t["minimal_sets"]))),
        ),
    )
    family = Family(
        is_male=tuple(p[1] for p in people),
        triples=tuple(f[1] for f in relationships),
        relationships=tuple(f[2] for f in relationships),
        biographies=tuple(f[1] for f in biographies),
        rules=tuple(r[1] for r in rules),
        targets=tuple(t[1] for t in targets),
    )
    _check(family, folder)
    return family


def _parsed(path: Path, row: Callable[[Any], Any]) -> list[Any]:
    """What `row` makes of each entry of a file, whose own number comes first."""
    try:
        found = [row(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise _wrong(path, f"`{type(error).__name__}: {error}`") from error
    if not found or [entry[0] for entry in found] != list(range(len(found))):
        raise _wrong(path, f"{len(found)} entries that are not numbered from 0 in their order")
    return found


def _is_male(gender: str) -> bool:
    return {"male": True, "female": False}[gender]


def _asked(fact: Any) -> tuple[str, str]:
    question, answer = fact["qa_main"]["question"], fact["qa_main"]["answer"]
    if not (isinstance(question, str) and isinstance(answer, str) and answer.strip()):
        raise ValueError("a question without an answer")
    return question, answer


def _atom(atom: Any) -> Triple:
    first, relation, second = atom
    return _number(first), str(relation), _number(second)


def _set(facts: Any) -> tuple[int, ...]:
    return tuple(sorted(set(map(_number, facts))))


def _number(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} for a number")
    return value


def _check(family: Family, folder: Path) -> None:
    """Numbers of people and facts are those of people and facts."""
    people, facts = range(len(family.is_male)), range(len(family.triples))
    if len(set(family.triples)) < len(facts):
        raise _wrong(folder / "relationships.json", "a triple twice")
    for subject, _, other in family.triples:
        if subject not in people or other not in people:
            raise _wrong(folder / "relationships.json", f"a person {subject} or {other}, of none")
    for asked in family.biographies:
        if asked.subject not in people:
            raise _wrong(folder / "biographies.json", f"a person {asked.subject}, of none")
    for target in family.targets:
        for chosen in target.minimal_sets:
            if target.fact not in chosen or not {*chosen} <= {*facts}:
                raise _wrong(folder / "targets.json", f"{chosen} for the target {target.fact}")
        if not target.minimal_sets:
            raise _wrong(folder / "targets.json", f"no minimal set of the target {target.fact}")


def _wrong(path: Path, found: str) -> ValueError:
    return ValueError(
        f"`{path}` should be a file of EDU-RELAT as JSON. Found {found}. Take the file from the "
        "data as they were published."
    )
