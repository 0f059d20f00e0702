"""Other labels in place of the true ones, against naive loops."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.data.collate import collate
from geffect.objectives import AdversarialLabels, FrozenModel, RandomLabels
from geffect.objectives.draws import STEP, drawn
from tests.utils import reference
from tests.utils import shallow as tiny


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def before() -> nn.Module:
    return tiny.gpt2(seed=1).eval()


def mixed(number: int) -> int:
    """One step of splitmix64, without its increment."""
    number %= 2**64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % 2**64
    return number ^ number >> 31


def drawn_one_by_one(row: dict[str, Tensor], vocabulary: int, seed: int) -> list[int]:
    """A token for each scored label of one row without padding."""
    scored = [i for i, label in enumerate(row["labels"].tolist()) if i and label != -100]
    tokens = row["input_ids"].tolist()[: scored[-1] + 1]
    key = sum(mixed(token + STEP * place) for place, token in enumerate(tokens, start=1)) % 2**64
    return [
        mixed(mixed(key ^ seed) + STEP * count) % 2**63 % vocabulary
        for count in range(1, len(scored) + 1)
    ]


def items(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(0, tiny.VOCABULARY, (4 + i,), generator=draw)
        labels = ids.clone()
        labels[:2] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_random_labels_against_a_loop(model: nn.Module, seed: int) -> None:
    rows = items(3)
    expected = torch.stack([
        -torch.log_softmax(model(input_ids=row["input_ids"][None]).logits[0, place], -1)[label]
        for row in rows
        for place, label in enumerate(drawn_one_by_one(row, tiny.VOCABULARY, seed), start=1)
    ]).mean()  # fmt: skip
    loss = RandomLabels(seed)(model, {"forget": collate(rows)})
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    grads = [reference.flat(reference.gradient(model, one)) for one in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_adversarial_labels_against_a_loop(model: nn.Module, before: nn.Module) -> None:
    batch = tiny.batch(3, padding=2)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, known = model(**inputs).logits, before(**inputs).logits
    losses = []
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            if place and label != -100:
                found = known[row, place - 1].tolist()
                others = [token for token in range(tiny.VOCABULARY) if token != label]
                other = max(others, key=found.__getitem__)
                losses.append(-torch.log_softmax(logits[row, place - 1], -1)[other])
    expected = torch.stack(losses).mean()
    loss = AdversarialLabels()(model, {"forget": batch}, FrozenModel(before))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    grads = [reference.flat(reference.gradient(model, one)) for one in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_the_most_likely_label_is_left_out_where_it_is_the_true_one() -> None:
    model, before = tiny.gpt2(), tiny.gpt2(seed=1).eval()
    batch = tiny.batch(3)
    logits = before(input_ids=batch["input_ids"]).logits
    batch["labels"][:, 1:] = logits[:, :-1].argmax(-1)
    second = batch | {"labels": batch["labels"].clone()}
    second["labels"][:, 1:] = logits[:, :-1].topk(2).indices[..., 1]
    loss = AdversarialLabels()(model, {"forget": batch}, FrozenModel(before))
    assert loss.item() == pytest.approx(reference.nll(model, second).item(), rel=1e-12)


def of_rows(batch: dict[str, Any]) -> list[list[int]]:
    """The draws at the scored places, row by row."""
    scored = (batch["labels"] != -100)[:, 1:]
    draws = drawn(lambda input_ids: None, batch, 50_000, seed=3)
    return [row[own].tolist() for row, own in zip(draws, scored, strict=True)]


def test_a_draw_is_of_the_row_alone() -> None:
    rows = items(4)
    apart = [of_rows(collate([row]))[0] for row in rows]
    assert of_rows(collate(rows)) == of_rows(collate(rows, padding_side="left")) == apart
    assert of_rows(collate(rows[::-1])) == apart[::-1]
    without_mask = {k: v for k, v in collate(rows).items() if k != "attention_mask"}
    assert of_rows(without_mask) == apart
    narrow = {k: v.int() for k, v in collate(rows).items()}
    assert of_rows(narrow) == apart
    assert len({tuple(own[:2]) for own in apart}) == len(rows)


def test_packed_rows_are_drawn_as_they_are_apart() -> None:
    rows = items(3)
    packed = {
        "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
        "labels": torch.cat([row["labels"] for row in rows])[None],
        "position_ids": torch.cat([torch.arange(len(row["labels"])) for row in rows])[None],
    }
    assert of_rows(packed) == [[token for row in rows for token in of_rows(collate([row]))[0]]]


def test_what_stands_behind_the_last_scored_token_is_not_read() -> None:
    (row,) = items(1)
    longer = {"input_ids": torch.cat([row["input_ids"], torch.tensor([7, 9])])}
    longer["labels"] = torch.cat([row["labels"], torch.tensor([-100, -100])])
    assert of_rows(collate([longer])) == of_rows(collate([row]))


def test_an_encoder_decoder_has_draws_too() -> None:
    model, batch = tiny.t5(), tiny.translation(0)
    draws = drawn(model, batch, 50_000, seed=0)
    assert draws.shape == batch["labels"].shape
    wider = {k: torch.nn.functional.pad(v, (0, 2)) for k, v in batch.items() if k != "labels"}
    wider["labels"] = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
    wider.setdefault("attention_mask", torch.nn.functional.pad(
        torch.ones_like(batch["input_ids"]), (0, 2)))  # fmt: skip
    assert torch.equal(drawn(model, wider, 50_000, seed=0)[:, : draws.shape[1]], draws)
    assert RandomLabels()(model, {"forget": batch}).isfinite()


def test_draws_are_uniform_and_of_their_seed() -> None:
    ids = torch.arange(40_000).reshape(400, 100)
    batch = {"input_ids": ids, "labels": ids}
    draws = drawn(lambda input_ids: None, batch, 20, seed=0)
    counts = draws.flatten().bincount(minlength=20)
    expected = draws.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi square of 19 degrees of freedom
    again = drawn(lambda input_ids: None, batch, 20, seed=1)
    assert (draws == again).double().mean() == pytest.approx(0.05, abs=0.01)


def test_drawing_leaves_the_random_numbers_of_training_alone(model: nn.Module) -> None:
    state = torch.get_rng_state()
    RandomLabels()(model, {"forget": tiny.batch(0)})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed", [-1, 1.0, True, "0", 2**63])
def test_what_is_no_seed_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"`seed` of RandomLabels should be .* Found .* Pass"):
        RandomLabels(seed)
