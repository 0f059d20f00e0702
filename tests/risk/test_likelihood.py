"""Likelihoods and risks against a loop over tokens in float64."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration

from geffect import Rectifier
from geffect.objectives import NPO, FrozenModel, GradDiff, SharedForward, WeightedGradientAscent
from geffect.risk import (
    check_answers,
    log_likelihood,
    mean_nll,
    nll,
    risk_gradient,
    sequence_sum,
    token_log_probabilities,
)
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.architectures import batch_for, made

SIZES = {"labels alone": False, "decoder inputs too": True}


def answered(model: nn.Module, seed: int, *, decoder_inputs: bool = False) -> dict[str, Tensor]:
    batch = tiny.translation(seed)
    if decoder_inputs:
        of = model.prepare_decoder_input_ids_from_labels
        return {**batch, "decoder_input_ids": of(batch["labels"])}
    return batch


def naive_unshifted(model: Any, batch: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """log p of the labels of an encoder-decoder, each at its own position, one at a time."""
    logits = model(**batch).logits
    return [
        [
            torch.log_softmax(logits[row, position].double(), dim=-1)[label]
            for position, label in enumerate(labels)
            if label != -100
        ]
        for row, labels in enumerate(batch["labels"])
    ]


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_causal_model_is_scored_on_the_next_token(make: Any, padding: int) -> None:
    model, batch = make().double().eval(), tiny.batch(1, padding=padding)
    naive = reference.token_log_p(model, batch)
    log_p, scored = token_log_probabilities(model, batch)
    assert scored.sum() == sum(map(len, naive))
    for row, mask, expected in zip(log_p, scored, naive, strict=True):
        torch.testing.assert_close(row[mask], torch.stack(expected), rtol=1e-12, atol=1e-12)
        assert not row[~mask].any()
    torch.testing.assert_close(
        sequence_sum(log_p, scored), torch.stack([sum(row) for row in naive])
    )
    torch.testing.assert_close(nll(model, batch), reference.nll(model, batch))
    own = model(**batch).loss  # which it takes in float32
    torch.testing.assert_close(nll(model, batch), own.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [tiny.t5, tiny.bart])
@pytest.mark.parametrize("decoder_inputs", SIZES)
def test_an_encoder_decoder_is_scored_where_its_labels_are(make: Any, decoder_inputs: str) -> None:
    model = make().eval()
    batch = answered(model, 1, decoder_inputs=SIZES[decoder_inputs])
    naive = naive_unshifted(model, batch)
    log_p, scored = token_log_probabilities(model, batch)
    assert scored.tolist() == (batch["labels"] != -100).tolist()
    for row, mask, expected in zip(log_p, scored, naive, strict=True):
        torch.testing.assert_close(row[mask], torch.stack(expected), rtol=1e-12, atol=1e-12)
    own = model(**batch).loss
    torch.testing.assert_close(nll(model, batch), own, rtol=1e-12, atol=0)
    found = reference.gradient(model, nll(model, batch))
    for name, expected in reference.gradient(model, own).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_what_prophetnet_adds_to_its_own_loss_is_no_part_of_a_risk() -> None:
    config = ProphetNetConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=16, encoder_ffn_dim=16, num_encoder_layers=1,
        num_encoder_attention_heads=2, decoder_ffn_dim=16, num_decoder_layers=1,
        num_decoder_attention_heads=2, num_buckets=8, relative_max_distance=16,
        decoder_start_token_id=2, eps=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ProphetNetForConditionalGeneration(config).eval()
    batch = tiny.translation(1)
    exact = torch.stack([p for row in naive_unshifted(model, batch) for p in row])
    torch.testing.assert_close(nll(model, batch).double(), -exact.mean(), rtol=1e-6, atol=0)
    assert (model(**batch).loss - nll(model, batch)).abs() > 1e-4
    model.disable_ngram_loss, config.eps = True, 0.0
    torch.testing.assert_close(nll(model, batch), model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_in_padding_are_refused(side: str) -> None:
    """As where labels are a copy of padded tokens: two hidden ones in a row are no answer."""
    model, batch = tiny.llama().eval(), tiny.batch(1, rows=2, length=8)
    hidden = slice(0, 3) if side == "left" else slice(5, None)
    mask = torch.ones_like(batch["input_ids"])
    mask[1, hidden] = 0
    copied = {**batch, "attention_mask": mask, "labels": batch["input_ids"].clone()}
    with pytest.raises(ValueError, match=r"-100 where `attention_mask` hides .* Found 2 labels"):
        nll(model, copied)
    marked = {**copied, "labels": copied["labels"].masked_fill(mask == 0, -100)}
    one_end = {**marked, "labels": marked["labels"].clone()}
    if side == "right":  # a tokenizer that pads with the end of a text hides that too
        one_end["labels"][1, 5] = 3
    for right in (marked, one_end):
        expected = torch.stack([p for row in reference.token_log_p(model, right) for p in row])
        torch.testing.assert_close(nll(model, right), -expected.mean().float())


@pytest.mark.parametrize("make", [tiny.llama, tiny.t5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_in_padding_are_refused_where_no_mask_tells_of_it(make: Any, side: str) -> None:
    """Its token twice in a row up to an end: once it may be the end of an answer."""
    model, ids = make().eval(), torch.randint(3, 20, (2, 8))
    model.config.pad_token_id = 1
    name = "decoder_attention_mask" if make is tiny.t5 else "attention_mask"
    inside = ids.clone()
    inside[:, 3:6] = 1
    one_end = ids.clone()
    one_end[:, -1 if side == "right" else 0] = 1
    for right in (ids, inside, one_end):
        torch.testing.assert_close(
            nll(model, {"input_ids": ids, "labels": right}),
            nll(model, {"input_ids": ids, "labels": right, name: torch.ones_like(ids)}),
        )
    padded = ids.clone()
    padded[1, 6:] = padded[1, :2] = 1
    padded[1, slice(6) if side == "right" else slice(2, None)] = ids[1, 2]
    with pytest.raises(ValueError, match=rf"Found 1 that are its token, 1, .* no `{name}`"):
        nll(model, {"input_ids": padded, "labels": padded})
    assert nll(model, {"input_ids": padded, "labels": padded, name: torch.ones_like(ids)}) > 0
    marked = padded.masked_fill(padded == 1, -100)
    assert nll(model, {"input_ids": padded, "labels": marked}) > 0


def test_the_padding_of_a_decoder_is_told_by_its_own_mask() -> None:
    model, batch = tiny.t5().eval(), tiny.translation(1)
    labels = batch["labels"].masked_fill(batch["labels"] < 0, 5)
    length = batch["input_ids"].shape[1]
    of_inputs = torch.zeros(len(labels), length, dtype=torch.long)
    of_inputs[:, 0] = 1
    assert nll(model, {**batch, "labels": labels[:, :length], "attention_mask": of_inputs}) > 0
    mask = torch.ones_like(labels)
    mask[:, -2:] = 0
    with pytest.raises(ValueError, match=r"-100 where `decoder_attention_mask` hides"):
        nll(model, {**batch, "labels": labels, "decoder_attention_mask": mask})


@pytest.mark.parametrize("of", [nll, risk_gradient, mean_nll, token_log_probabilities])
def test_a_batch_without_rows_is_refused(of: Any) -> None:
    empty = {name: values[:0] for name, values in tiny.batch(1).items()}
    with pytest.raises(ValueError, match=r"should have a row at least\. Found none.* leave"):
        of(tiny.llama(), empty)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("last", [-100, 0, 5])
def test_labels_that_are_shifted_already_are_refused(rows: int, last: int) -> None:
    """As nanoGPT and the decoder of BART take them: the risk would be of the token behind."""
    batch = tiny.batch(1, rows=rows, length=12)
    own = batch["input_ids"].clone()
    shifted = torch.cat([own[:, 1:], torch.full((rows, 1), last)], dim=1)
    asked = [shifted.where(torch.arange(12) > first, torch.tensor(-100)) for first in (4, 8, 9)]
    for labels in (shifted, *asked):
        for ask in (nll, lambda model, b: check_answers(model, {"forget": b})):
            with pytest.raises(ValueError, match=r"should stand at their own tokens.* Found .* co"):
                ask(tiny.llama(), {**batch, "labels": labels})
    alike = torch.full((2, 9), 5)
    same = {"input_ids": alike, "attention_mask": torch.ones_like(alike), "labels": alike}
    other = own.where(torch.arange(12) % 3 > 0, torch.tensor(7))  # scored on another token
    for fine in (same, {**batch, "labels": own}, {**batch, "labels": other}):
        torch.testing.assert_close(nll(tiny.llama(), fine), reference.nll(tiny.llama(), fine))


@pytest.mark.parametrize("make", [tiny.t5, tiny.bart])
def test_an_objective_on_an_encoder_decoder_is_made_of_its_own_sums(make: Any) -> None:
    model, before = make(0).eval(), make(1).eval()
    pair = {"forget": answered(model, 1), "retain": answered(model, 2)}
    shared = SharedForward(model)
    value = GradDiff(NPO(beta=0.5))(shared, pair, FrozenModel(before))
    now, then = (
        torch.stack([-sum(row) for row in naive_unshifted(m, pair["forget"])])
        for m in (model, before)
    )
    expected = -4 * F.logsigmoid(0.5 * (now - then)).mean() + model(**pair["retain"]).loss
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


def test_likelihoods_are_float32_from_the_logits_of_half_precision_on() -> None:
    model, batch = tiny.llama().bfloat16(), tiny.batch(3, rows=4, length=24)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # unlikely tokens, whose sums bfloat16 rounds by 0.5
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    exact = torch.log_softmax(logits[:, :-1].double(), dim=-1)
    targets = batch["labels"][:, 1:]
    exact = exact.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    exact = exact * (targets != -100)
    log_p, scored = token_log_probabilities(model, batch)
    assert logits.dtype == torch.bfloat16 and log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.double(), exact, rtol=1e-5, atol=1e-5)
    sums = sequence_sum(log_p, scored)
    torch.testing.assert_close(sums.double(), exact.sum(dim=1), rtol=1e-6, atol=0)
    assert (sums.bfloat16().double() - exact.sum(dim=1)).abs().max() > 1e-2  # what was lost
    loss = nll(model, batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad.any() for p in model.parameters())


def test_a_preference_in_half_precision_is_the_one_of_its_float32_sums() -> None:
    before = tiny.llama(0).bfloat16()
    model = tiny.llama(0).bfloat16()
    pair = {"forget": tiny.batch(3, rows=4, length=24)}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))

    def sums(m: nn.Module) -> Tensor:
        logits = m(input_ids=pair["forget"]["input_ids"]).logits[:, :-1].double()
        labels = pair["forget"]["labels"][:, 1:]
        return F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=-100).sum(dim=1)

    with torch.no_grad():
        risen = sums(model) - sums(before)
        objective, then = NPO(beta=0.5), FrozenModel(before.eval())
        weights = objective.implicit_weights(model, pair, then)["weight"].double()
        value = objective(model, pair, then).double()
    torch.testing.assert_close(weights, 2 * torch.sigmoid(-0.5 * risen), rtol=1e-4, atol=0)
    torch.testing.assert_close(value, -4 * F.logsigmoid(0.5 * risen).mean(), rtol=1e-4, atol=0)


def test_float64_stays_and_half_precision_of_the_caller_is_not_asked() -> None:
    labels = torch.tensor([3, -100, 0])
    logits = torch.randn(3, 4, dtype=torch.float64)
    exact = log_likelihood(logits, labels)
    assert exact.dtype == torch.float64 and exact[1] == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = log_likelihood(logits.float(), labels)
    torch.testing.assert_close(cast.double(), exact, rtol=1e-5, atol=1e-6)


def empty(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def test_a_batch_without_answers_is_refused_before_a_gradient_is_taken() -> None:
    model = tiny.llama()
    forget, retain = empty(tiny.batch(1)), tiny.batch(2)
    says = r"`batch` should have an answer token.*Found none in 3 samples. Mark the answers"
    with pytest.raises(ValueError, match=says):
        Rectifier(model).backward(
            objective={"forget": -1.0}, forget=nll(model, forget), retain=nll(model, retain)
        )
    with pytest.raises(ValueError, match=says):
        WeightedGradientAscent()(model, {"forget": forget})


@pytest.mark.parametrize("side", ["forget", "retain"])
def test_the_side_of_a_pair_that_has_no_answer_is_named(side: str) -> None:
    pair = {"forget": tiny.batch(1), "retain": tiny.batch(2)}
    check_answers(tiny.llama(), pair)
    pair[side] = empty(pair[side])
    with pytest.raises(ValueError, match=f"`{side}` should have an answer token"):
        check_answers(tiny.llama(), pair)


def test_the_side_inside_of_a_side_is_named() -> None:
    forget = {"original": tiny.batch(1), "alternate": empty(tiny.batch(2))}
    with pytest.raises(ValueError, match=r"`forget\.alternate` should have an answer token"):
        check_answers(tiny.llama(), {"forget": forget, "retain": tiny.batch(3)})


def test_a_first_label_counts_where_the_decoder_is_asked_for_it() -> None:
    model = tiny.t5()
    batch = answered(model, 1)
    batch["labels"][:, 1:] = -100
    check_answers(model, {"forget": batch})
    torch.testing.assert_close(nll(model, batch), model(**batch).loss, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="should have an answer token"):
        check_answers(tiny.llama(), {"forget": batch})


def test_logits_of_other_positions_are_refused() -> None:
    batch = tiny.batch(1)
    batch["labels"] = batch["labels"][:, :-2]
    with pytest.raises(ValueError, match="should return logits for each position of `labels`"):
        nll(tiny.llama(), batch)


def test_a_model_that_puts_tokens_of_its_own_before_the_labels_is_refused() -> None:
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"no tokens of its own before them, as prompt tuning"):
        nll(get_peft_model(tiny.llama(), config), tiny.batch(1))


@pytest.mark.parametrize("name", ["mixtral", "qwen2 moe", "qwen3 moe"])
def test_the_balance_of_experts_is_no_part_of_a_risk(name: str) -> None:
    model, batch = made(name), batch_for(name, 1)
    expected = nll(model, batch)
    model.config.output_router_logits, model.router_aux_loss_coef = True, 100.0
    assert model(**batch).loss > expected + 10
    torch.testing.assert_close(nll(model, batch), expected)


@pytest.mark.parametrize("returned", ["a tuple", "a tensor"])
def test_a_model_without_logits_is_refused_by_its_name(returned: str) -> None:
    class Bare(nn.Linear):
        def forward(self, input_ids: Tensor) -> Any:
            logits = super().forward(input_ids[..., None].float())
            return logits if returned == "a tensor" else (logits,)

    with pytest.raises(ValueError, match=r"should return `.logits` .* Found none from `Bare`"):
        nll(Bare(1, 4), {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 3).long()})


@pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.int8])
def test_labels_may_be_whole_numbers_of_any_size(kind: torch.dtype) -> None:
    for model, batch in ((tiny.llama(), tiny.batch(0)), (tiny.t5(), tiny.translation(0))):
        narrow = {**batch, "labels": batch["labels"].to(kind)}
        assert torch.equal(nll(model.eval(), narrow), nll(model, batch))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (lambda x: x.where(x != -100, -1), "-100 where a token is not scored. Found -1, as in"),
        (lambda x: x.where(x != -100, tiny.VOCABULARY), "tokens that the model knows, below 23"),
        (lambda x: x.float(), "whole numbers, a token for each position. Found torch.float32"),
        (lambda x: x + 0j, "whole numbers, a token for each position. Found torch.complex64"),
        (lambda x: x.tolist(), "whole numbers, a token for each position. Found `list`"),
    ],
)
def test_labels_that_are_no_tokens_are_refused(labels: Any, says: str) -> None:
    batch = tiny.batch(0)
    with pytest.raises((ValueError, TypeError), match=says):
        nll(tiny.llama(), {**batch, "labels": labels(batch["labels"])})


class NeedsLabels(nn.Module):
    """A model that takes a loss of its own in each forward."""

    def __init__(self, missing: type[Exception] | None = None) -> None:
        super().__init__()
        self.inner, self.missing = tiny.llama(), missing
        self.config = self.inner.config

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        found = self.inner(input_ids=input_ids, **inputs)
        found.loss = F.cross_entropy(found.logits.flatten(0, 1), labels.flatten())
        if self.missing is not None:
            raise self.missing("of its own")
        return found


def test_a_model_whose_forward_needs_labels_is_told_so() -> None:
    said = (
        r"logits without being given `labels`.* Found `NeedsLabels`.* AttributeError, .* labels=N"
    )
    with pytest.raises(ValueError, match=said):
        nll(NeedsLabels().eval(), tiny.batch(1))
    with pytest.raises(AttributeError, match="flatten"):  # nor does it work with them
        nll(NeedsLabels(RuntimeError).eval(), tiny.batch(1))
