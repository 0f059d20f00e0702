"""Likelihoods that are kept: those of the model for the same row however it is batched, or none."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect.data.collate import collate
from geffect.objectives import NPO, FrozenModel, Likelihoods
from geffect.trainers import UnlearningTrainer
from tests.utils import reference, unlearning_runs
from tests.utils import shallow as tiny

ROWS: list[dict[str, Any]] = [
    {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}
    for ids in ([3, 5, 7, 9], [4, 6, 8], [3, 5, 7, 9, 11, 2], [5, 5, 5, 1])
]


def rows(*places: int, **options: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = collate([ROWS[place] for place in places], **options)
    return found


def of_model(model: nn.Module, *batches: dict[str, Tensor]) -> tuple[FrozenModel, Likelihoods]:
    frozen = FrozenModel(model.eval())
    return frozen, Likelihoods(frozen, batches or [rows(0, 1, 2), rows(3)])


@pytest.mark.parametrize("places", [(0, 1, 2), (3,), (2, 0), (1, 3), (1,), (0, 0, 3)], ids=str)
def test_rows_are_known_however_they_are_batched(places: tuple[int, ...]) -> None:
    model = tiny.gpt2()
    frozen, kept = of_model(model)
    batch = rows(*places)
    found = kept.log_probabilities(batch)
    torch.testing.assert_close(found, frozen.log_probabilities(batch), atol=1e-12, rtol=1e-12)
    naive = [torch.stack(sample) for sample in reference.token_log_p(model, batch)]
    torch.testing.assert_close(found[batch["labels"][:, 1:] != -100], torch.cat(naive).detach())
    assert not found.requires_grad


def test_rows_that_are_padded_on_the_left_are_known_by_their_positions() -> None:
    frozen = FrozenModel(tiny.gpt2().eval())
    kept = Likelihoods(frozen, [rows(0, 1, 2, padding_side="left")])
    batch = rows(1, 0, padding_side="left")
    torch.testing.assert_close(kept.log_probabilities(batch), frozen.log_probabilities(batch))


@pytest.mark.parametrize("sides", [("left", "right"), ("right", "left")], ids=str)
def test_a_token_that_is_predicted_from_padding_belongs_to_it(sides: tuple[str, str]) -> None:
    """All tokens are scored: on the left that is one more, and none may slip into another row."""
    frozen = FrozenModel(tiny.gpt2().eval())

    def padded(side: str, *rows: list[int]) -> dict[str, Tensor]:
        whole = [{"input_ids": row, "labels": row} for row in rows]
        found: dict[str, Tensor] = collate([*whole, ROWS[2]], padding_side=side)
        mask = found["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        labels = found["input_ids"].masked_fill(mask == 0, -100)  # as other collators have them
        batch = found | {"position_ids": positions, "labels": labels}
        return {name: column[:-1] for name, column in batch.items()}

    batch = [padded(side, [3, 5, 7], [4, 6, 8]) for side in sides]
    kept = Likelihoods(frozen, [batch[0]])
    assert torch.equal(kept.log_probabilities(batch[0]), frozen.log_probabilities(batch[0]))
    with pytest.raises(ValueError, match="2 of 2 that are not"):
        kept.log_probabilities(batch[1])


def test_of_an_encoder_decoder_every_label_is_predicted() -> None:
    frozen, batch = FrozenModel(tiny.t5().eval()), tiny.translation(3)
    kept = Likelihoods(frozen, [batch])
    assert torch.equal(kept.log_probabilities(batch), frozen.log_probabilities(batch))
    one = {name: column[1:2] for name, column in batch.items()}
    torch.testing.assert_close(kept.log_probabilities(one), frozen.log_probabilities(one))


def test_of_several_answers_the_original_is_asked_for() -> None:
    frozen = FrozenModel(tiny.gpt2().eval())
    side = {"original": rows(0, 1), "alternate": rows(2, 3)}
    kept = Likelihoods(frozen, [side])
    torch.testing.assert_close(
        kept.log_probabilities(side), frozen.log_probabilities(side["original"])
    )
    torch.testing.assert_close(
        kept.log_probabilities(rows(3, 2)), frozen.log_probabilities(rows(3, 2))
    )


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny.batch(5),
        lambda: rows(0) | {"labels": torch.tensor([[-100, 5, 7, 9]])},
        lambda: rows(0) | {"input_ids": torch.tensor([[3, 5, 7, 8]])},
        lambda: rows(0) | {"attention_mask": torch.tensor([[0, 1, 1, 1]])},
        lambda: rows(0) | {"position_ids": torch.tensor([[1, 2, 3, 4]])},
        lambda: rows(0) | {"position_ids": torch.arange(4).expand(3, 1, 4)},
        lambda: rows(0) | {"pixel_values": torch.ones(1, 3, 2, 2)},
        lambda: rows(0) | {"use_cache": False},
        lambda: rows(0, 1, padding_side="left"),
        lambda: {name: column.roll(1, 0) for name, column in rows(0, 1).items() if name != "labels"}
        | {"labels": rows(0, 1)["labels"]},
    ],
    ids=[
        "another row", "another question", "another token", "less is attended", "positions",
        "three positions", "an image", "an option", "the left", "labels of others",
    ],
)  # fmt: skip
def test_what_is_another_row_is_refused(other: Callable[[], dict[str, Any]]) -> None:
    _, kept = of_model(tiny.gpt2())
    with pytest.raises(ValueError, match=r"rows whose likelihoods are kept.* Found \d of \d that"):
        kept.log_probabilities(other())


def test_an_image_may_be_of_any_row() -> None:
    """As many patches as rows by chance: none is taken for that of a row."""
    frozen = FrozenModel(lambda pixel_values, **ids: tiny.gpt2().eval()(**ids))
    batch = rows(0, 3) | {"pixel_values": torch.rand(2, 5)}
    kept = Likelihoods(frozen, [batch])
    assert torch.equal(kept.log_probabilities(batch), frozen.log_probabilities(batch))
    swapped = {**batch, "pixel_values": batch["pixel_values"].flip(0)}
    with pytest.raises(ValueError, match="2 of 2 that are not"):
        kept.log_probabilities(swapped)


def test_only_likelihoods_are_kept() -> None:
    _, kept = of_model(tiny.gpt2())
    with pytest.raises(ValueError, match=r"should give logits. Found Likelihoods"):
        kept.logits(rows(0))
    with pytest.raises(ValueError, match=r"should give hidden states. Found Likelihoods"):
        kept.hidden_states(rows(0))


@pytest.mark.parametrize("model", [tiny.gpt2, tiny.llama], ids=["float64", "float32"])
def test_a_file_gives_them_back(tmp_path: Path, model: Callable[[], nn.Module]) -> None:
    _, kept = of_model(model())
    kept.save(tmp_path / "original.safetensors")
    again = Likelihoods.load(tmp_path / "original.safetensors")
    batch = rows(3, 1, 2)
    assert torch.equal(again.log_probabilities(batch), kept.log_probabilities(batch))
    assert repr(again) == repr(kept) == "Likelihoods(4 rows, 9 tokens)"
    assert [file.name for file in tmp_path.iterdir()] == ["original.safetensors"]


def test_no_file_is_replaced_unasked(tmp_path: Path) -> None:
    _, kept = of_model(tiny.gpt2())
    path = tmp_path / "original.safetensors"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match=r"should not exist yet. Found .* overwrite=True"):
        kept.save(path)
    with pytest.raises(FileExistsError, match=r"Found .*, which is none\. Choose another name"):
        kept.save(path, overwrite=True)
    assert path.read_text() == "mine"
    path.unlink()
    kept.save(path)
    path.write_bytes(path.read_bytes()[:-3])
    kept.save(path, overwrite=True)
    assert repr(Likelihoods.load(path)) == repr(kept)
    notes, link = tmp_path / "notes.txt", tmp_path / "link"
    notes.write_text("See geffect.objectives.Likelihoods")
    with pytest.raises(FileExistsError, match="which is none"):
        kept.save(notes, overwrite=True)
    link.symlink_to(path)
    _, fewer = of_model(tiny.gpt2(), rows(0))
    fewer.save(link, overwrite=True)
    assert link.is_symlink() and repr(Likelihoods.load(path)) == repr(fewer)


def test_a_damaged_file_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    _, kept = of_model(tiny.gpt2())
    path = tmp_path / "original.safetensors"
    kept.save(path)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        try:
            found = Likelihoods.load(path)
        except ValueError as error:
            assert "should be a file that Likelihoods.save wrote. Found" in str(error)
        else:  # a space of its header
            assert repr(found) == repr(kept)
            assert torch.equal(found.log_probabilities(rows(0)), kept.log_probabilities(rows(0)))
    path.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="is none, or is damaged"):
        Likelihoods.load(path)


def test_a_trainer_needs_no_model_beside_its_own(tmp_path: Path) -> None:
    losses = []
    for saved in (False, True):
        model = tiny.llama()
        frozen = FrozenModel.copied(model)
        Likelihoods(frozen, [rows(0, 1, 2, 3)]).save(tmp_path / f"{saved}.safetensors")
        before = Likelihoods.load(tmp_path / f"{saved}.safetensors") if saved else frozen
        trainer = UnlearningTrainer(
            model,
            unlearning_runs.arguments(tmp_path, max_steps=4),
            objective=NPO(beta=0.5),
            forget=ROWS,
            retain=ROWS[::-1],
            reference=before,
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 4


def test_a_column_of_rows_is_none_of_tokens_for_its_width() -> None:
    """As wide as the rows are long, by chance: nothing of it is cut off as padding."""
    frozen = FrozenModel(
        lambda features, **ids: SimpleNamespace(
            logits=tiny.gpt2().eval()(**ids).logits + features[:, None, -1:] * torch.arange(23.0)
        )
    )
    batch = rows(0, 1) | {"features": torch.zeros(2, 4)}
    kept = Likelihoods(frozen, [batch])
    torch.testing.assert_close(kept.log_probabilities(batch), frozen.log_probabilities(batch))
    other = {**batch, "features": torch.zeros(2, 4).index_fill_(1, torch.tensor([3]), 1.0)}
    with pytest.raises(ValueError, match="2 of 2 that are not"):
        kept.log_probabilities(other)


def test_what_is_no_list_of_batches_and_no_file_is_one_clear_error(tmp_path: Path) -> None:
    frozen, kept = of_model(tiny.gpt2())
    with pytest.raises(TypeError, match=r"should be a list of batches.*Found one batch"):
        Likelihoods(frozen, rows(0))
    with pytest.raises(ValueError, match=r"should be a file that Likelihoods.save wrote.*a folder"):
        Likelihoods.load(tmp_path)
    none = {name: column[:0] for name, column in rows(0).items()}
    assert kept.log_probabilities(none).shape == (0, 3)
