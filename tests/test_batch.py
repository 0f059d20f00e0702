"""Packed rows: answers are told apart, or refused where each row counts as one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DataCollatorWithFlattening, Gemma2Config, Gemma2ForCausalLM

from geffect.batch import first_in_text, is_packed, side_of
from geffect.data.collate import collate
from geffect.effects import direction, sample_effects, token_effects
from geffect.objectives import (
    NPO,
    TNPO,
    UNDIAL,
    FrozenModel,
    GradDiff,
    Objective,
    SimNPO,
    WeightedGradientAscent,
    nll,
)
from geffect.risk import check_answers, scored_tokens
from tests.utils import tiny
from tests.utils.architectures import made

IDS = torch.randint(0, tiny.VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "labels": IDS}
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS]


def packed() -> dict[str, Tensor]:
    """The answers in one row, as padding-free training has them."""
    return dict(DataCollatorWithFlattening()(ROWS))


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "objective",
    [GradDiff(), WeightedGradientAscent(2.0), TNPO()],
    ids=lambda objective: type(objective).__name__,
)
def test_means_over_tokens_are_those_of_padded_rows(objective: Objective, cache: bool) -> None:
    model, before = tiny.llama(), FrozenModel(tiny.llama(1).eval())
    model.config.use_cache = before.model.config.use_cache = cache
    pairs: list[Any] = [{"forget": b, "retain": b} for b in (packed(), PADDED)]
    found, expected = (objective(model, pair, before) for pair in pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll(model, packed()), nll(model, PADDED), rtol=1e-5, atol=1e-6)


LOOKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "NPO": lambda m, b: NPO()(m, {"forget": b}, FrozenModel.copied(m)),
    "weights of NPO": lambda m, b: NPO().implicit_weights(m, {"forget": b}, FrozenModel.copied(m)),
    "SimNPO": lambda m, b: SimNPO()(m, {"forget": b}),
    "weights of SimNPO": lambda m, b: SimNPO().implicit_weights(m, {"forget": b}),
    "count of NPO": lambda m, b: NPO().reductions["forget"].count(m, b),
    "count of SimNPO": lambda m, b: SimNPO().reductions["forget"].count(m, b),
    "samples": lambda m, b: sample_effects(m, [b], {"a": direction(m, [b])}),
    "tokens": lambda m, b: token_effects(m, b, direction(m, [b])),
}


@pytest.mark.parametrize("look", LOOKS)
def test_rows_of_several_answers_are_refused_where_each_counts_as_one(look: str) -> None:
    model = tiny.llama().eval()
    LOOKS[look](model, PADDED)
    with pytest.raises(ValueError, match=r"one answer a row for .* Pass an answer a row, padded"):
        LOOKS[look](model, packed())
    with pytest.raises(ValueError, match="one answer a row"):
        LOOKS[look](model, {"original": packed(), "alternate": packed()})


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "mixtral"])
def test_texts_of_a_row_are_kept_apart(name: str) -> None:
    model = made(name)
    torch.testing.assert_close(nll(model, packed()), nll(model, PADDED), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["falcon", "opt", "bloom", "mamba", "mamba2", "llama"])
def test_a_model_whose_texts_see_each_other_is_refused(name: str) -> None:
    model = made(name)
    batch = packed()
    if name == "llama":  # which keeps them apart, and goes by a mask where there is one
        nll(model, batch)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    says = rf"`{type(model).__name__}` should keep the texts of a packed row apart. .* Pass a text"
    for look in (nll, lambda m, b: WeightedGradientAscent()(m, {"forget": b})):
        with pytest.raises(ValueError, match=says):
            look(model, batch)
    nll(model, PADDED)


def by_kind_of_layer(sees: Tensor, window: int) -> dict[str, Tensor]:
    """The masks that Gemma takes by the kinds of its layers, of those of which tokens see which."""
    near = sees & ~torch.ones_like(sees).tril(-window)
    return {
        name: torch.zeros(1, 1, *kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min)
        for name, kept in {"full_attention": sees, "sliding_attention": near}.items()
    }


def gemma() -> nn.Module:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4,
        )
    )  # fmt: skip


def test_a_mask_for_each_kind_of_layer_is_that_of_a_model_which_makes_it() -> None:
    model = gemma()
    masks = by_kind_of_layer(torch.ones(6, 6, dtype=torch.bool).tril(), window=4)
    batch: Any = {**PADDED, "attention_mask": {n: x.expand(3, 1, 6, 6) for n, x in masks.items()}}
    assert not is_packed(batch)
    pairs: list[Any] = [{"forget": b, "retain": b} for b in (batch, PADDED)]
    for objective in (GradDiff(), NPO(), SimNPO(), UNDIAL()):
        check_answers(model, pairs[0])
        before = FrozenModel.copied(model)
        found, expected = (objective(model, pair, before) for pair in pairs)
        torch.testing.assert_close(found, expected)
    along = direction(model, [PADDED])
    found, expected = (sample_effects(model, [b], {"a": along})["a"] for b in (batch, PADDED))
    torch.testing.assert_close(found, expected)


def test_masks_for_each_kind_of_layer_tell_texts_apart_or_join_them() -> None:
    model, batch = gemma(), packed()
    text = torch.arange(18) // 6
    earlier = torch.ones(18, 18, dtype=torch.bool).tril()
    apart, joined = (
        {**batch, "attention_mask": by_kind_of_layer(sees, window=4)}
        for sees in (earlier & (text[:, None] == text), earlier)
    )
    del apart["position_ids"]
    assert is_packed(apart) and not is_packed({**joined, "position_ids": None})
    apart["position_ids"] = batch["position_ids"]
    torch.testing.assert_close(nll(model, apart), nll(model, PADDED))
    with pytest.raises(ValueError, match="should keep the texts of a packed row apart"):
        nll(model, joined)


def test_chunks_of_a_text_are_no_texts() -> None:
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    chunks = torch.arange(6) // 3
    masks = {"full_attention": seen, "chunked_attention": seen & (chunks[:, None] == chunks)}
    batch: Any = {**PADDED, "attention_mask": {n: x[None, None] for n, x in masks.items()}}
    assert not is_packed(batch)


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, 6, 6, device="cpu")
    for mask in (blocks, {"full_attention": blocks}):
        with pytest.raises(TypeError, match="should be a tensor, or a tensor for each kind of la"):
            nll(gemma(), {**PADDED, "attention_mask": mask})


def test_a_mask_that_joins_texts_is_refused_after_one_that_keeps_them_apart() -> None:
    model, batch = made("llama"), packed()
    text = torch.arange(18) // 6
    earlier = torch.ones(18, 18, dtype=torch.bool).tril()
    masks = [
        torch.zeros(1, 1, 18, 18).masked_fill(~x, -1e9)
        for x in (earlier & (text[:, None] == text), earlier)
    ]
    apart, joined = ({**batch, "attention_mask": mask} for mask in masks)
    torch.testing.assert_close(nll(model, apart), nll(model, PADDED), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="should keep the texts of a packed row apart"):
        nll(model, joined)


LABELS = [[-100, 5, 6, -100, 7, 8]]
BLOCKS = np.kron(np.eye(2, dtype=bool), np.ones((3, 3), dtype=bool))
PACKINGS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": [[0, 1, 2, 0, 1, 2]]},
    "positions of three kinds": {"position_ids": [[[0, 1, 2, 0, 1, 2]]] * 3},
    "positions that go on": {"position_ids": [[4, 5, 6, 2, 3, 4]]},
    "positions that jump": {"position_ids": [[0, 1, 2, 10, 11, 12]]},
    "numbers of sequences from 0": {"seq_idx": [[0, 0, 0, 1, 1, 1]]},
    "numbers in the mask": {"attention_mask": [[1, 1, 1, 2, 2, 2]]},
    "numbers of sequences": {"seq_idx": [[1, 1, 1, 2, 2, 2]]},
    "ends": {"cu_seq_lens_q": [0, 3, 6]},
    "ends of another kernel": {"cu_seqlens": [[0, 3, 6]]},
    "ends that are padded": {"cu_seq_lens_q": [0, 3, 6, 6]},
    "a mask of blocks": {"attention_mask": np.tril(BLOCKS)[None, None]},
    "what a mask of blocks adds": {"attention_mask": np.where(np.tril(BLOCKS), 0, -1e9)[None]},
    "blocks that look ahead": {"attention_mask": BLOCKS[None, None]},
}
SINGLE: dict[str, dict[str, Any]] = {
    "nothing": {},
    "positions": {"position_ids": [[0, 1, 2, 3, 4, 5]]},
    "positions of images": {"position_ids": [[[0, 1, 1, 1, 2, 3]], [[0, 1, 1, 2, 2, 3]]]},
    "padding on the right": {
        "position_ids": [[0, 1, 2, 0, 0, 0]], "labels": [[-100, 5, 6, -100, -100, -100]],
    },
    "padding on the left": {
        "position_ids": [[1, 1, 0, 1, 2, 3]], "labels": [[-100, -100, -100, 5, 6, 7]],
        "attention_mask": [[0, 0, 1, 1, 1, 1]],
    },
    "padding with positions, and a hidden end": {
        "position_ids": [[0, 1, 2, 3, 0, 0]], "labels": [[-100, 5, 6, 7, 2, -100]],
        "attention_mask": [[1, 1, 1, 1, 0, 0]],
    },
    "positions that jump, and a mask of the user's": {
        "position_ids": [[0, 3, 5, 6, 9, 11]], "attention_mask": [[1, 1, 1, 1, 1, 1]],
    },
    "a hole in the mask": {"attention_mask": [[1, 1, 0, 0, 1, 1]]},
    "one text": {"cu_seq_lens_q": [0, 6]},
    "a mask of what came before": {"attention_mask": np.tri(6, dtype=bool)[None, None]},
    "what such a mask adds": {"attention_mask": np.where(np.tri(6), 0, -np.inf)[None, None]},
    "a mask with slopes": {"attention_mask": (np.tri(6) - 1.0)[None, None]},
    "a window": {"attention_mask": np.tri(6, dtype=bool) & ~np.tri(6, k=-2, dtype=bool)},
    "a mask with padding on the left": {
        "labels": [[-100, -100, -100, 5, 6, 7]],
        "attention_mask": (np.tri(6, dtype=bool) & (np.arange(6) > 1))[None, None],
    },
    "an answer behind a packed question": {
        "position_ids": [[0, 1, 2, 0, 1, 2]], "labels": [[-100, -100, -100, -100, 7, 8]],
    },
}  # fmt: skip


def tensors(columns: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in {"labels": LABELS, **columns}.items()}


@pytest.mark.parametrize("kind", PACKINGS)
def test_answers_in_a_row_are_told_by_what_says_so(kind: str) -> None:
    assert is_packed(tensors(PACKINGS[kind]))


@pytest.mark.parametrize("kind", SINGLE)
def test_one_answer_in_a_row_is_one(kind: str) -> None:
    assert not is_packed(tensors(SINGLE[kind]))


def test_packed_items_are_not_joined_by_the_mask_of_a_batch() -> None:
    ids = [5, 6, 7, 8]
    item = {"input_ids": ids, "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]}
    batch = collate([item])
    assert is_packed(batch) and batch["position_ids"].tolist() == [[0, 1, 0, 1]]
    with pytest.raises(ValueError, match=r"`LlamaForCausalLM` should keep the texts .* apart"):
        nll(tiny.llama(), batch)


@pytest.mark.parametrize(
    ("pair", "name", "says"),
    [
        ({"forget": {"labels": 1}}, "retain", "`retain` among them. Found forget. Pass"),
        ({"forget": {"labels": 1}}, "forget.alternate", "`forget.alternate` among them. Found"),
        ({"forget": {"original": {"labels": 1}}}, "forget.third", r"Found forget\.original\. Pass"),
        ({"labels": 1}, "forget", "Found one batch"),
        ({}, "forget.third", "Found none"),
    ],
)
def test_a_side_that_is_not_there_is_named(pair: Any, name: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        side_of(pair, name)


TEXTS = [row[: 6 - i].tolist() for i, row in enumerate(IDS)]
ONE_ROW = [token for text in TEXTS for token in text]
POSITIONS = [place for text in TEXTS for place in range(len(text))]


def in_blocks() -> Tensor:
    text = torch.tensor([i for i, tokens in enumerate(TEXTS) for _ in tokens])
    return (text[:, None] == text).tril()[None, None]


def padded_left(**columns: int) -> dict[str, Any]:
    """The texts behind padding, every token labelled, and columns with what pads them."""
    masks = [[0] * (6 - len(text)) + [1] * len(text) for text in TEXTS]
    tokens = [[0] * (6 - len(text)) + text for text in TEXTS]
    places = [[columns.get("position_ids", 0)] * (6 - len(t)) + [*range(len(t))] for t in TEXTS]
    labels = [[-100] * (6 - len(text)) + text for text in TEXTS]
    of_places = {"position_ids": places} if columns else {}
    return {"input_ids": tokens, "labels": labels, "attention_mask": masks, **of_places}


WHOLE: dict[str, dict[str, Any]] = {
    "a row by positions": {"input_ids": [ONE_ROW], "position_ids": [POSITIONS]},
    "a row by a mask": {
        "input_ids": [ONE_ROW], "position_ids": [POSITIONS], "attention_mask": in_blocks(),
    },
    "a row with a text of one token": {
        "input_ids": [[9, *ONE_ROW]], "position_ids": [[0, *POSITIONS]],
    },
    "a row that counts from one": {
        "input_ids": [[9, *ONE_ROW]], "position_ids": [[1, *(1 + p for p in POSITIONS)]],
    },
    "padding on the left": padded_left(),
    "padding on the left, positions of 0": padded_left(position_ids=0),
    "padding on the left, positions of 1": padded_left(position_ids=1),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_the_first_token_of_a_text_is_not_scored(kind: str) -> None:
    """Every token is labelled; none of another text, and no padding, predicts the first of one."""
    batch = {name: torch.as_tensor(value) for name, value in WHOLE[kind].items()}
    batch.setdefault("labels", batch["input_ids"])
    model = tiny.llama().eval()
    alone = [
        model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)[range(len(text) - 1), text[1:]]
        for text in TEXTS
    ]
    torch.testing.assert_close(nll(model, batch), -torch.cat(alone).mean(), rtol=1e-5, atol=1e-6)
    assert int(scored_tokens(model, batch).sum()) == sum(len(text) - 1 for text in TEXTS)


def test_numbers_of_texts_tell_them_apart_across_padding() -> None:
    mask = [[1, 1, 1, 0, 0, 2, 2, 2]]
    labels = [[-100, 5, 6, -100, -100, 7, 8, 9]]
    batch = {"labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}
    assert is_packed(batch)
    assert first_in_text(batch).nonzero()[:, 1].tolist() == [0, 5]
