"""Which items of several sets meet in an epoch."""

import pytest

from geffect.data.pairs import Pairing, Pairs


def test_every_item_has_its_turn() -> None:
    sizes = (6, 10, 4)
    epochs = []
    pairing = Pairing(sizes, seed=1)
    for pairing.epoch in range(5):
        epochs.append(list(pairing))
    columns = [list(zip(*epoch, strict=True)) for epoch in epochs]
    assert all(sorted(forget) == list(range(6)) for forget, _, _ in columns)
    assert columns[0][0] != columns[1][0]
    for which in (1, 2):  # drawn without replacement, over the ends of epochs
        drawn = [place for column in columns for place in column[which]]
        for start in range(0, len(drawn) - sizes[which] + 1, sizes[which]):
            assert sorted(drawn[start : start + sizes[which]]) == list(range(sizes[which]))
    again = Pairing(sizes, seed=1)
    again.epoch = 3
    assert list(again) == epochs[3]
    assert list(Pairing(sizes, seed=2)) != epochs[0]


def test_sets_of_one_size_do_not_move_together() -> None:
    pairing = Pairing((20, 20), seed=0)
    assert sum(forget == retain for forget, retain in pairing) < 5


def test_a_set_has_items() -> None:
    with pytest.raises(ValueError, match=r"at least one\. Found none in retain"):
        Pairs({"forget": [{"input_ids": [1], "labels": [1]}], "retain": []})
