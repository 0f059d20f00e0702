"""Models of which it is known whether they forgot: an audit reads each of them right.

On the quick models of the study, one seed; `tests/utils/controls.py` does the same on full ones.
"""

from typing import Any

import pandas as pd
import pytest

from geffect.audit.beside import Beside
from geffect.audit.verdict import Verdict, judged
from geffect.demo.audited import audited_sets
from geffect.demo.config import QUICK
from tests.utils.audits import OF_CONTROLS
from tests.utils.controls import CONTROLS, RATE, Subject
from tests.utils.fixtures import Study

PLAIN = ("remembers", "broken")
"""What is told without attacks, which come after it."""

IN_THE_SUITE = [name for name in CONTROLS if name != "npo+gd"]
"""One is like another, and takes time."""


@pytest.fixture(scope="module")
def subject(quick_study: Study) -> Subject:
    return Subject.of(quick_study.out / "models", 0, QUICK)


@pytest.fixture(scope="module")
def beside(subject: Subject) -> Beside:
    sets = audited_sets(subject.corpus, subject.tokenizer)
    chosen = ("memorised", "hidden", "utility")
    return Beside(subject.original, subject.retrained, sets, RATE, OF_CONTROLS, chosen)


@pytest.fixture(scope="module")
def asked_alone(subject: Subject) -> Beside:
    """Without attacks, which what is broken or remembers does not need."""
    sets = audited_sets(subject.corpus, subject.tokenizer)
    chosen = ("memorised", "utility")
    return Beside(subject.original, subject.retrained, sets, RATE, OF_CONTROLS, chosen)


@pytest.fixture(scope="module")
def made(subject: Subject) -> dict[str, Any]:
    return {name: CONTROLS[name][0](subject) for name in IN_THE_SUITE}


@pytest.fixture(scope="module")
def found(
    made: dict[str, Any], beside: Beside, asked_alone: Beside
) -> dict[str, tuple[Verdict, pd.DataFrame]]:
    return {
        name: (asked_alone if CONTROLS[name][1] in PLAIN else beside).audited(model)
        for name, model in made.items()
    }


@pytest.mark.parametrize(("name", "verdict"), [(n, CONTROLS[n][1]) for n in IN_THE_SUITE])
def test_every_control_is_read_right(
    name: str, verdict: str, found: dict[str, tuple[Verdict, pd.DataFrame]]
) -> None:
    assert found[name][0].verdict == verdict, found[name][0].sentence


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("head only", "decoder swap"),
        ("int4 cells", "rounding to int4"),
        ("name rows", "recognition, other facts shown for 20 steps"),
    ],
)
def test_what_is_hidden_is_found_where_it_is(
    name: str, attack: str, found: dict[str, tuple[Verdict, pd.DataFrame]]
) -> None:
    assert found[name][0].attack == attack


def test_hidden_models_pass_all_that_is_asked_directly(
    found: dict[str, tuple[Verdict, pd.DataFrame]],
) -> None:
    for name in ("head only", "int4 cells", "name rows"):
        table = found[name][1]
        direct = table[(table["battery"] == "direct share") & (table["model"] == "unlearned")]
        assert (direct["value"] < 0.25).all(), name


def test_other_quantisers_do_not_bring_back_what_int4_does(
    found: dict[str, tuple[Verdict, pd.DataFrame]],
) -> None:
    table = found["int4 cells"][1]
    own = table[(table["battery"] == "recoverable share") & (table["model"] == "unlearned")]
    shares = own.set_index("metric")["value"]
    assert shares["rounding to int4"] > 0.95
    assert abs(shares["rounding to int8"]) < 0.1


def test_the_order_of_rows_and_the_models_decide(
    subject: Subject, made: dict[str, Any], found: dict[str, tuple[Verdict, pd.DataFrame]]
) -> None:
    verdict, table = found["int4 cells"]
    assert judged(table.sample(frac=1, random_state=0)) == verdict
    swapped = Beside(
        made["int4 cells"],
        subject.retrained,
        audited_sets(subject.corpus, subject.tokenizer),
        RATE,
        OF_CONTROLS,
        ("memorised", "utility"),
    )
    assert swapped.audited(subject.original)[0].verdict == "remembers"
