"""Questions with the answers of other rows."""

from typing import Any

import pytest
import torch

from geffect.data.collate import collate
from geffect.data.others import WithOthers, among_others, others
from geffect.objectives import CATALOGUE, answers_of, check_sides


def rows(count: int) -> list[dict[str, list[int]]]:
    """Item i is the question [100 + i, i] and the answer [200 + i] * (i + 1)."""
    return [
        {
            "input_ids": [100 + i, i, *[200 + i] * (i + 1)],
            "labels": [-100, -100, *[200 + i] * (i + 1)],
        }
        for i in range(count)
    ]


def answered_by(item: Any) -> int:
    """Which item an answer is of."""
    (answer,) = set(item["labels"]) - {-100}
    return int(answer) - 200


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_each_question_gets_answers_of_others(seed: int) -> None:
    items = rows(6)
    answered = WithOthers(items, others(3), seed=seed)
    for i in range(len(answered)):
        found = answered[i]
        assert found["original"] == items[i] and list(found) == ["original", *others(3)]
        whose = [answered_by(found[name]) for name in others(3)]
        assert len(set(whose)) == 3 and i not in whose
        for name, j in zip(others(3), whose, strict=True):
            assert found[name] == {
                "input_ids": [100 + i, i, *[200 + j] * (j + 1)],
                "labels": [-100, -100, *[200 + j] * (j + 1)],
            }


def test_draws_follow_from_the_seed_and_the_place() -> None:
    items = rows(30)
    one, same, other = (WithOthers(items, others(3), seed=seed) for seed in (1, 1, 2))
    found = [[x[i] for i in range(30)] for x in (one, same, other)]
    assert found[0] == found[1] != found[2]
    assert one[7] == found[0][7] and one[-23] == found[0][7]


def test_every_other_item_is_drawn_about_as_often() -> None:
    counts = torch.zeros(5)
    for seed in range(2000):
        counts[answered_by(WithOthers(rows(5), ["random1"], seed=seed)[2]["random1"])] += 1
    assert counts[2] == 0 and counts.sum() == 2000
    expected = torch.tensor([500.0, 500, 0, 500, 500])
    assert (counts - expected).abs().max() < 90  # four standard deviations of 500 are 78


def test_few_others_are_taken_again() -> None:
    answered = WithOthers(rows(3), others(5))
    for i in range(3):
        whose = [answered_by(answered[i][name]) for name in others(5)]
        assert set(whose) == {0, 1, 2} - {i} and whose[:2] == whose[2:4]


def test_one_item_has_no_others() -> None:
    with pytest.raises(ValueError, match=r"Items should be two or more .* Found 1. Pass"):
        WithOthers(rows(1), others(1))


def test_padding_of_an_item_is_no_part_of_it() -> None:
    items = rows(4)
    plain = WithOthers(items, others(2))
    for side in ("right", "left"):
        batch = collate(items, padding_side=side)  # type: ignore[arg-type]
        padded = [{k: v[i] for k, v in batch.items() if k != "position_ids"} for i in range(4)]
        found = WithOthers(padded, others(2))
        for i in range(4):
            assert all(found[i][name] == plain[i][name] for name in others(2))


def test_answers_that_are_there_stay() -> None:
    items = [{"original": row, "alternate": row} for row in rows(3)]
    found = WithOthers(items, ["alternate", "random1"])[0]
    assert list(found) == ["original", "alternate", "random1"]
    assert found["alternate"] is items[0]["alternate"]


def test_rows_are_cut_off_or_refused() -> None:
    short = WithOthers(rows(9), others(8), max_length=4)
    assert max(len(short[0][name]["input_ids"]) for name in others(8)) == 4
    long = WithOthers(rows(9), others(8), positions=4)
    with pytest.raises(ValueError, match=r"of another one should have at most"):
        long[0]


@pytest.mark.parametrize(
    "changed",
    [
        {"pixel_values": [1.0]},
        {"labels": [-100, -100, -100]},
        {"labels": [1, -100, -100]},
        {"labels": [-100, 5]},
    ],
)
def test_what_cannot_be_joined_is_refused(changed: dict[str, list[float]]) -> None:
    items: list[Any] = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} | changed] * 2
    with pytest.raises(ValueError, match=r"Items should have .* answers of others. Found .* Pass"):
        WithOthers(items, others(1))[0]


def test_a_question_that_fills_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Found none\. Pass a larger `max_length`"):
        WithOthers(rows(3), others(1), max_length=2)[0]


def test_the_names_are_those_of_the_objectives() -> None:
    assert among_others(answers_of(CATALOGUE["sku"], "forget")) == others(5)
    assert among_others(["random0", "random", "random1x", "alternate"]) == ()
    items = [WithOthers(rows(3), answers_of(CATALOGUE["ssu-acquire"], "forget"))[0]]
    check_sides(CATALOGUE["ssu-acquire"], {"forget": items[0], "retain": rows(1)[0]}, add="")
