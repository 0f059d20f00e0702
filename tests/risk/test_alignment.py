"""Which label a position predicts, and the models that are refused."""

import copy
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

from geffect.objectives import SharedForward
from geffect.risk import nll, predicts_next, token_log_probabilities
from tests.utils import shallow as tiny

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip

XLM: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "emb_dim": 16, "n_layers": 1, "n_heads": 2}


def bidirectional_llama() -> nn.Module:
    config = LlamaConfig(**SMALL)
    config.is_causal = False
    return LlamaForCausalLM(config)


REFUSED = {
    "masked": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "other head": lambda: BertForTokenClassification(BertConfig(**SMALL)),
    "no decoder": lambda: BertLMHeadModel(BertConfig(**SMALL)),
    "no decoder, other family": lambda: ElectraForCausalLM(ElectraConfig(**SMALL)),
    "permutations": lambda: XLNetLMHeadModel(
        XLNetConfig(vocab_size=tiny.VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24)
    ),
    "told not to be causal": bidirectional_llama,
    "not told to be causal": lambda: XLMWithLMHeadModel(XLMConfig(**XLM)),
    "not told to be causal, its kin": lambda: FlaubertWithLMHeadModel(FlaubertConfig(**XLM)),
    "told to look both ways": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, use_bidirectional_attention=True)
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_sees_what_it_is_asked_for_is_refused_by_its_class(name: str) -> None:
    model = REFUSED[name]()
    found = rf"Found `{type(model).__name__}`.*(AutoModelForCausalLM|Load a causal model)"
    with pytest.raises(ValueError, match=found):
        nll(model, tiny.batch(0))


CAUSAL = {
    "Llama": tiny.llama,
    "GPT-2": tiny.gpt2,
    "a family whose configs call no model a decoder": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL)
    ),
    "BERT as a decoder": lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
    "the decoder of BART": lambda: BartForCausalLM(tiny.bart().config),
    "XLM that is told to be": lambda: XLMWithLMHeadModel(XLMConfig(**XLM, causal=True)),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_predicts_the_next_label_and_sees_no_later_one(name: str) -> None:
    model = CAUSAL[name]().eval()
    assert predicts_next(model)
    ids = tiny.batch(0)["input_ids"]
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % tiny.VOCABULARY
    with torch.no_grad():
        a, b = (model(input_ids=x).logits[:, :-1] for x in (ids, other))
    torch.testing.assert_close(a, b)


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q", "q_proj", "query"]))


WRAPPERS = {
    "none": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": partial(torch.compile, backend="eager"),
    "adapter": adapted,
    "shared forward": SharedForward,
    "all of them": lambda model: SharedForward(
        nn.DataParallel(torch.compile(adapted(model), backend="eager"))
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_inside_of_a_wrapper_is_what_counts(wrapper: str) -> None:
    wrapped = WRAPPERS[wrapper]
    assert predicts_next(wrapped(tiny.llama()))
    assert not predicts_next(wrapped(tiny.t5()))
    with pytest.raises(ValueError, match="Found `BertForMaskedLM`"):
        predicts_next(wrapped(REFUSED["masked"]()))


class Encoder(nn.Module):
    """A transformer of torch's own, whose mask may have been forgotten."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.embed, self.head = (
            nn.Embedding(tiny.VOCABULARY, 16), nn.Linear(16, tiny.VOCABULARY),
        )  # fmt: skip
        self.body = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        x = self.body(self.embed(input_ids), src_mask=mask if self.masked else None)
        return SimpleNamespace(logits=self.head(x))


class Translator(nn.Module):
    """An encoder-decoder of torch's own, whose mask may have been forgotten."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.config, self.masked = SimpleNamespace(is_encoder_decoder=True), masked
        self.embed = nn.Embedding(tiny.VOCABULARY, 16)
        self.body = nn.Transformer(16, 2, 1, 1, 24, batch_first=True)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        if decoder_input_ids is None:
            decoder_input_ids = begun(labels)
        mask = nn.Transformer.generate_square_subsequent_mask(decoder_input_ids.shape[1])
        asked = self.embed(decoder_input_ids)
        x = self.body(self.embed(input_ids), asked, tgt_mask=mask if self.masked else None)
        return SimpleNamespace(logits=x @ self.embed.weight.T)


class Drops(nn.Module):
    """Experts of limited capacity, for which the tokens of all rows come one after the other."""

    def __init__(self, *, by_position: bool) -> None:
        super().__init__()
        self.by_position = by_position
        self.embed, self.router = nn.Embedding(tiny.VOCABULARY, 16), nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, tiny.VOCABULARY) for _ in range(2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        flat = (x.transpose(0, 1) if self.by_position else x).flatten(0, 1)
        whose, logits = self.router(flat).argmax(dim=-1), []
        for i, expert in enumerate(self.experts):
            mine = whose == i
            fits = mine & (mine.cumsum(dim=0) <= 6)
            logits.append(expert(flat) * fits[:, None])
        rows, length = input_ids.shape
        shape = (length, rows, -1) if self.by_position else (rows, length, -1)
        found = torch.stack(logits).sum(dim=0).view(shape)
        return SimpleNamespace(logits=found.transpose(0, 1) if self.by_position else found)


def begun(labels: torch.Tensor) -> torch.Tensor:
    """What a decoder is told: the labels, each one place later."""
    return nn.functional.pad(labels[:, :-1].clamp(min=0), (1, 0), value=1)


SEEING = {
    "a mask that was forgotten": (lambda: Encoder(masked=False), tiny.batch),
    "questions that go both ways, of which none was told": (
        lambda: CpmAntForCausalLM(
            CpmAntConfig(
                vocab_size=tiny.VOCABULARY, hidden_size=16, num_attention_heads=2, dim_head=8,
                dim_ff=24, num_hidden_layers=1, prompt_length=2, prompt_types=4, segment_types=4,
            )
        ),
        lambda seed: {k: x for k, x in tiny.batch(seed).items() if k != "attention_mask"},
    ),
    "a mask of a decoder that was forgotten": (lambda: Translator(masked=False), tiny.translation),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_a_model_that_sees_the_token_it_is_asked_for_is_refused(name: str) -> None:
    make, batch = SEEING[name]
    torch.manual_seed(0)
    model = make()
    says = rf"`{type(model).__name__}` should predict each token unseen.* Found that its logits"
    for _ in range(2):
        with pytest.raises(ValueError, match=says):
            nll(model, batch(0))


def counted(model: nn.Module) -> list[bool]:
    """Whether gradients are enabled, in each forward of the model."""
    calls: list[bool] = []
    forward = model.forward

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    model.forward = called
    return calls


def test_a_model_that_does_not_see_it_is_run_twice_more_and_once_afterwards() -> None:
    model = Encoder(masked=True)
    calls = counted(model)
    nothing = tiny.batch(0)
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    token_log_probabilities(model, nothing)  # which proves nothing, and is not run twice
    assert calls == [True]
    nll(model, tiny.batch(0))
    nll(model, tiny.batch(0))
    assert calls == [True, False, False, True, True]


def test_a_head_of_zeros_hides_nothing_for_later() -> None:
    torch.manual_seed(0)
    model = Encoder(masked=False)
    learned = copy.deepcopy(model.head)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert nll(model, tiny.batch(0)).item() == pytest.approx(math.log(tiny.VOCABULARY))
    model.head = learned
    with pytest.raises(ValueError, match="should predict each token unseen"):
        nll(model, tiny.batch(0))


def test_a_model_that_takes_not_every_token_is_asked_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As models of images do, which count their placeholders: these may be next to an answer."""
    model, expected = Encoder(masked=True).eval(), Encoder(masked=True).eval()
    expected.load_state_dict(model.state_dict())
    own, forward = torch.tensor([[1, 2, 9]]), model.forward

    def counting(input_ids: torch.Tensor, **others: Any) -> Any:
        if not torch.isin(input_ids, own).all():
            raise ValueError("a placeholder without its image")
        return forward(input_ids, **others)

    monkeypatch.setattr(model, "forward", counting)
    labels = torch.tensor([[-100, -100, 9]])
    batch = {"input_ids": own, "labels": labels, "attention_mask": torch.ones_like(own)}
    assert torch.equal(nll(model, batch), nll(expected, batch))


def test_hooks_see_the_forwards_that_were_asked_for() -> None:
    model, seen = Encoder(masked=True), []

    def note(*_: Any) -> None:
        seen.append(torch.is_grad_enabled())

    handles = [
        register(note)
        for register in (
            model.embed.register_forward_hook,
            model.body.register_forward_pre_hook,
            nn.modules.module.register_module_forward_hook,
        )
    ]
    calls = counted(model)
    nll(model, tiny.batch(0))
    for handle in handles:
        handle.remove()
    assert calls == [False, False, True]
    assert len(seen) > 3 and all(seen)
    assert not (model.embed._forward_hooks or nn.modules.module._global_forward_hooks)


def test_hooks_of_a_model_whose_head_is_zero_see_the_same() -> None:
    """It is looked at again each time, since zeros do not tell what it sees."""
    model, seen = tiny.llama(), []
    nn.init.zeros_(model.lm_head.weight)
    model.model.norm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    for _ in range(2):
        nll(model, tiny.batch(0))
    assert seen == [True, True]


def test_a_model_that_hooks_make_causal_is_looked_at_with_them() -> None:
    def mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        causal = nn.Transformer.generate_square_subsequent_mask(args[0].shape[1])
        return args, {**kwargs, "src_mask": causal}

    torch.manual_seed(0)
    model, expected = Encoder(masked=False).eval(), Encoder(masked=True).eval()
    model.body.register_forward_pre_hook(mask, with_kwargs=True)
    own = nll(model, tiny.batch(0))
    expected.load_state_dict(model.state_dict())
    assert torch.equal(own, nll(expected, tiny.batch(0)))


@pytest.mark.parametrize("masked", [True, False])
def test_a_model_that_runs_by_its_hooks_alone_is_looked_at_with_them(masked: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(masked=masked)
    model.embed.register_forward_hook(lambda _, args, states: states.view(*args[0].shape, 16))
    embed = model.embed.forward
    model.embed.forward = lambda ids: embed(ids).flatten()
    if masked:
        assert nll(model, tiny.batch(0)).isfinite()
    else:
        with pytest.raises(ValueError, match="should predict each token unseen"):
            nll(model, tiny.batch(0))


def test_a_decoder_is_looked_at_by_its_inputs_too() -> None:
    batch = tiny.translation(0)
    for inputs in (batch, {**batch, "decoder_input_ids": begun(batch["labels"])}):
        nll(Translator(masked=True), inputs)
        with pytest.raises(ValueError, match="should predict each token unseen"):
            nll(Translator(masked=False), inputs)


def test_a_decoder_that_is_told_nothing_is_looked_at_by_the_next_batch() -> None:
    torch.manual_seed(0)
    batch = tiny.translation(0)
    short = {**batch, "labels": batch["labels"][:, :1]}
    for further in ({}, {"decoder_input_ids": begun(short["labels"])}):
        model = Translator(masked=False)
        nll(model, {**short, **further})  # is told the place to begin alone
        for name in further:
            further[name] = begun(batch["labels"])
        with pytest.raises(ValueError, match="should predict each token unseen"):
            nll(model, {**batch, **further})


def prefixed(seed: int) -> dict[str, torch.Tensor]:
    """Questions whose tokens see each other, before answers that do not."""
    batch = tiny.batch(seed)
    return {**batch, "token_type_ids": (batch["labels"] != -100).long()}


def paligemma() -> nn.Module:
    parts = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    text = {**parts, "model_type": "gemma", "vocab_size": tiny.VOCABULARY, "head_dim": 8}
    sight = {**parts, "model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4}
    config = PaliGemmaConfig(
        text_config={**text, "num_key_value_heads": 1}, vision_config=sight, projection_dim=16,
        image_token_index=tiny.VOCABULARY - 1,
    )  # fmt: skip
    return PaliGemmaForConditionalGeneration(config)


def test_a_prefix_language_model_is_told_what_is_a_question() -> None:
    torch.manual_seed(0)
    model, batch = paligemma(), prefixed(0)
    expected = model(**{name: x for name, x in batch.items() if name != "labels"}).logits
    own = nn.functional.cross_entropy(
        expected[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    torch.testing.assert_close(nll(model, batch), own)
    del batch["token_type_ids"]
    with pytest.raises(ValueError, match="such as `token_type_ids`"):
        nll(model, batch)


class Shifting(nn.Module):
    """A causal model that puts its inputs so many places later, as one that is given its labels."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.inner, self.places = tiny.llama(), places

    def forward(self, input_ids: torch.Tensor) -> Any:
        later = nn.functional.pad(input_ids, (self.places, 0))[:, : input_ids.shape[1]]
        return self.inner(input_ids=later)


@pytest.mark.parametrize(("places", "answer"), [(0, 3), (0, 8), (1, 3), (1, 8), (2, 5), (2, 8)])
def test_a_model_that_shifts_its_inputs_is_refused(places: int, answer: int) -> None:
    """Its logits at a token predict that very token; they would be scored on the next one."""
    ids = tiny.batch(1, length=9)["input_ids"]
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 9 - answer, -100)}
    model = Shifting(places)
    if not places:
        torch.testing.assert_close(nll(model, batch), nll(model.inner, batch))
        return
    with pytest.raises(ValueError, match=r"`Shifting` should predict .* the one that follows"):
        nll(model, batch)


class Signs(nn.Module):
    """Signs of running means, in which one token among many may change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(tiny.VOCABULARY, 8), nn.Linear(8, tiny.VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embed(input_ids).cumsum(dim=1).sign()))


def test_a_token_that_is_rounded_away_is_not_one_that_comes_late() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        ids = tiny.batch(seed, length=12)["input_ids"]
        assert nll(Signs(), {"input_ids": ids, "labels": ids}).isfinite()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by_position", [False, True])
def test_rows_that_meet_in_experts_are_no_tokens_that_are_seen(
    by_position: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    assert nll(Drops(by_position=by_position), tiny.batch(seed, rows=4)).isfinite()


class Padded(nn.Module):
    """Padding sees all tokens, as kernels let it where a mask leaves it nothing else to see."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(tiny.VOCABULARY, 16), nn.Linear(16, tiny.VOCABULARY)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        seen = x.where(attention_mask[..., None] > 0, x.mean(dim=1, keepdim=True))
        return SimpleNamespace(logits=self.head(seen))


def test_what_padding_sees_is_nothing_that_is_asked() -> None:
    torch.manual_seed(0)
    batch = tiny.batch(0)
    batch["attention_mask"][:, :3] = 0
    for first in (3, 4):  # asked of padding, and of the first token
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :first] = -100
        assert nll(Padded(), batch).isfinite()


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_what_padding_sees_under_a_mask_of_pairs_is_nothing_that_is_asked(
    kind: torch.dtype,
) -> None:
    """A query that may see nothing sees everything alike under a mask that is added."""
    torch.manual_seed(0)
    model, batch = LlamaForCausalLM(LlamaConfig(**SMALL)), tiny.batch(0)
    batch["labels"][:, :-3] = -100
    batch["attention_mask"][:, :3] = 0  # the longest answer has padding before its question
    expected = nll(model, batch)
    before = torch.ones(batch["labels"].shape[1:] * 2, dtype=torch.bool).tril()
    pairs = before & batch["attention_mask"].bool()[:, None, None, :]
    lowest = torch.finfo(torch.float32).min
    mask = pairs if kind == torch.bool else torch.zeros(pairs.shape).masked_fill(~pairs, lowest)
    torch.testing.assert_close(nll(model, {**batch, "attention_mask": mask}), expected)


@pytest.mark.parametrize("never", [-torch.inf, torch.finfo(torch.float32).min])
def test_tokens_that_are_never_said_hide_nothing(never: float) -> None:
    torch.manual_seed(0)

    class Masked(Encoder):
        def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
            logits = super().forward(*args, **kwargs).logits
            return SimpleNamespace(logits=logits + torch.tensor([0.0] * 21 + [never] * 2))

    batch = tiny.batch(0)
    batch["labels"] = batch["labels"].where(batch["labels"] < 21, -100)
    assert nll(Masked(masked=True), batch).isfinite()
    with pytest.raises(ValueError, match="should predict each token unseen"):
        nll(Masked(masked=False), batch)


def test_the_look_leaves_no_trace() -> None:
    model = Encoder(masked=True).train()  # with dropout
    state = torch.get_rng_state()
    nll(model, tiny.batch(0)).backward()
    ends = torch.get_rng_state(), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.set_rng_state(state)
    nll(model, tiny.batch(0)).backward()  # which is not looked at again
    assert torch.equal(torch.get_rng_state(), ends[0])
    assert all(map(torch.equal, (p.grad for p in model.parameters()), ends[1]))


def everywhere(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under a mask that hides nothing."""
    rows, length = batch["input_ids"].shape
    return {**batch, "attention_mask": torch.zeros(rows, 1, length, length)}


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_that_is_seen_among_many_is_found_whatever_the_precision(kind: torch.dtype) -> None:
    """One token of a hundred changes logits by less than half precision may round."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).to(kind)
    batch = tiny.batch(0, rows=1, length=100)
    batch["labels"][:, :-1] = -100
    with torch.no_grad():
        logits = [
            model(**{**everywhere(batch), "input_ids": ids, "labels": None}).logits[:, 98]
            for ids in (batch["input_ids"], batch["input_ids"].index_fill(1, torch.tensor(99), 3))
        ]
    change = (logits[0] - logits[1]).abs().max() / logits[0].max()
    assert 0 < change < math.sqrt(torch.finfo(torch.bfloat16).eps)
    with pytest.raises(ValueError, match="should predict each token unseen"):
        nll(model, {**everywhere(batch)})
    assert nll(model, batch).isfinite()


class Rounds(Encoder):
    """Logits are rounded in steps that the largest of the batch decides."""

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        logits = super().forward(*args, **kwargs).logits
        step = logits.abs().max() / 60
        return SimpleNamespace(logits=(logits / step).round() * step)


def test_what_rows_round_of_each_other_is_no_token_that_is_seen() -> None:
    again = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = Rounds(masked=True).bfloat16()
        calls = counted(model)
        assert nll(model, tiny.batch(seed, rows=1)).isfinite()
        again.append(len(calls) > 3)  # where logits have changed, rows are looked at beside twins
    assert any(again) and not all(again)


def test_a_look_keeps_no_keys_and_values() -> None:
    model = tiny.llama().train()
    model.gradient_checkpointing_enable()
    kept, forward = [], model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        kept.append((torch.is_grad_enabled(), output.past_key_values is not None))
        return output

    model.forward = noting
    nll(model, tiny.batch(0))
    assert kept == [(False, False), (False, False), (True, False)]
