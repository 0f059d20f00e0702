"""Relearning: against a loop with a copy, and that the model ends as it was."""

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer, LlamaForCausalLM

from geffect.audit.relearning import (
    QUICK,
    SOURCES,
    RelearningBudget,
    as_attacks,
    curve,
    nll_of_items,
    relearning,
    summary,
    taught,
    teach,
)
from geffect.audit.shares import recoverable_share
from geffect.data.collate import collate
from geffect.data.examples import example
from geffect.demo.config import QUICK as QUICK_STUDY
from geffect.demo.corpus import generate
from geffect.risk import nll
from tests.utils import tiny
from tests.utils.architectures import ARCHITECTURES
from tests.utils.models import bits

SHORT = RelearningBudget(steps=(1, 3), rates=(0.5,), seeds=(0, 1), batch=4)
ONE = RelearningBudget(steps=(1, 2), rates=(1.0,), seeds=(0,), sources=("benign",), batch=4)
RATE = 1e-2


def items(seed: int, count: int) -> list[dict[str, Any]]:
    """Questions of two to four tokens, with answers of two to five."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        question, answer = draw.randint(2, 4), draw.randint(2, 5)
        ids = [draw.randrange(3, tiny.VOCABULARY) for _ in range(question + answer)]
        made.append({"input_ids": ids, "labels": [-100] * question + ids[question:]})
    return made


FORGET, RETAIN = items(0, 7), items(1, 10)


def naive(
    model: nn.Module, taught: list[Any], asked: list[Any], rate: float, seed: int
) -> dict[int, list[float]]:
    """NLL of each asked item after each number of steps, by a loop on a copy."""
    student = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    draw, queue, found = torch.Generator().manual_seed(seed), [], {}
    size = min(4, len(taught))
    for step in range(1, 4):
        if len(queue) < size:
            queue = torch.randperm(len(taught), generator=draw).tolist()
        chosen, queue = sorted(queue[:size]), queue[size:]
        student.zero_grad()
        nll(student, collate([taught[i] for i in chosen])).backward()
        optimizer.step()
        with torch.no_grad():
            found[step] = [nll(student, collate([item])).item() for item in asked]
    return found


def test_a_loop_on_a_copy_finds_the_same() -> None:
    model = tiny.llama()
    table = relearning(model, FORGET, RETAIN, learning_rate=RATE, budget=SHORT)
    assert len(table) == (2 + 1 + 2) * 3 * 7  # half of 7 is one batch, which has no order
    parts = {
        "benign": [(RETAIN, range(7))],
        "half": [(FORGET[1::2], range(0, 7, 2)), (FORGET[0::2], range(1, 7, 2))],
        "full": [(FORGET, range(7))],
    }
    for source, seed in (("benign", 0), ("benign", 1), ("half", 0), ("full", 1)):
        chosen = table[(table["source"] == source) & (table["seed"] == seed)]
        run = chosen.set_index(["step", "item"])["value"]
        for given, asked in parts[source]:
            right = naive(model, given, [FORGET[i] for i in asked], RATE / 2, seed)
            for step in (1, 3):
                got = [run[step, item] for item in asked]
                assert got == pytest.approx(right[step], rel=2e-5), source
    before = table[table["step"] == 0].groupby("item")["value"].unique()
    assert [x.item() for x in before] == pytest.approx(list(nll_of_items(model, FORGET)))


def test_padding_of_items_changes_nothing() -> None:
    """Of a model that counts positions; nothing predicts the first token of a row."""
    rows = [*RETAIN[:5], {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    padded = [
        {
            "input_ids": [0] * left + row["input_ids"] + [0],
            "labels": [-100] * left + row["labels"] + [-100],
            "attention_mask": [0] * left + [1] * len(row["labels"]) + [0],
        }
        for left, row in enumerate(rows)
    ]
    found, expected = (
        relearning(tiny.gpt2(), FORGET, given, learning_rate=RATE, budget=ONE)
        for given in (padded, rows)
    )
    assert found["value"].tolist() == pytest.approx(expected["value"].tolist())


def test_a_copy_of_a_copy_ends_at_the_same_bits() -> None:
    one = tiny.llama()
    other = copy.deepcopy(one)
    teach(one, RETAIN, steps=3, learning_rate=RATE, batch=4, seed=2)
    optimizer = torch.optim.AdamW(other.parameters(), lr=RATE, weight_decay=0.0)
    draw = torch.Generator().manual_seed(2)
    queue = [x for _ in range(2) for x in torch.randperm(10, generator=draw).tolist()[:8]]
    for start in (0, 4, 8):
        other.zero_grad()
        nll(other, collate([RETAIN[i] for i in sorted(queue[start : start + 4])])).backward()
        optimizer.step()
    assert bits(one) == bits(other)


def test_of_an_adapter_the_merged_weights_are_taught() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(tiny.llama(), config)
    before = bits(adapted)
    merged = copy.deepcopy(adapted).merge_and_unload()
    student = taught(adapted, RETAIN, steps=3, learning_rate=RATE)
    teach(merged, RETAIN, steps=3, learning_rate=RATE)
    assert bits(student) == bits(merged)
    assert bits(adapted) == before
    plain = tiny.llama()
    copied = taught(plain, RETAIN, steps=3, learning_rate=RATE)
    assert bits(plain) == bits(tiny.llama()) and bits(copied) != bits(plain)
    found = relearning(adapted, FORGET, RETAIN, learning_rate=RATE, budget=ONE)
    again = relearning(copy.deepcopy(adapted).merge_and_unload(), FORGET, RETAIN,
                       learning_rate=RATE, budget=ONE)  # fmt: skip
    assert found.equals(again)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_ends_as_it_was(error: type[BaseException] | None) -> None:
    model = tiny.llama(tied=True, dropout=0.5).train()
    model.model.norm.weight.requires_grad_(False)
    model(**tiny.batch(0)).loss.backward()
    model.register_buffer("seen", torch.zeros(2))
    before = bits(model)
    grads = {
        name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None
    }
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def report(done: int, total: int) -> None:
        if error is not None and done == 2:
            raise error

    def attack() -> pd.DataFrame:
        return relearning(model, FORGET, RETAIN, learning_rate=RATE, budget=ONE, report=report)

    if error is None:
        assert attack().equals(attack())
    else:
        with pytest.raises(error):
            attack()
    assert bits(model) == before
    for name, p in model.named_parameters():
        assert p.requires_grad == required[name]
        assert (p.grad is None) == (name not in grads)
        assert p.grad is None or (p.grad is grads[name][0] and torch.equal(p.grad, grads[name][1]))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1] and np.random.get_state()[1].tolist() == drawn[2]


def test_frozen_weights_are_trained_like_all_others() -> None:
    model = tiny.llama()
    right = relearning(model, FORGET, RETAIN, learning_rate=RATE, budget=ONE)
    model.requires_grad_(False)
    with torch.no_grad():
        assert relearning(model, FORGET, RETAIN, learning_rate=RATE, budget=ONE).equals(right)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_are_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    whole = tiny.llama()
    half = copy.deepcopy(whole).to(dtype)
    moved = []
    for model in (whole, half):
        before = nll_of_items(model, FORGET).mean()
        # A step is less than half of the last place of most weights.
        teach(model, FORGET, steps=20, learning_rate=3e-5)
        moved.append(before - nll_of_items(model, FORGET).mean())
    assert moved[0] > 0.01
    assert moved[1] == pytest.approx(moved[0], rel=0.5)


def test_an_adapter_is_trained_as_if_it_was_merged() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2)
    before = bits(model)
    found = relearning(model, FORGET, RETAIN, learning_rate=RATE, budget=ONE)
    merged = copy.deepcopy(model).merge_and_unload()
    right = relearning(merged, FORGET, RETAIN, learning_rate=RATE, budget=ONE)
    assert found["value"].tolist() == pytest.approx(right["value"].tolist(), rel=1e-5)
    assert bits(model) == before


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "mamba", "t5", "bart"])
def test_architectures(name: str) -> None:
    model = ARCHITECTURES[name].build()
    before = bits(model)
    budget = RelearningBudget(steps=(1, 8), rates=(1.0,), seeds=(0,), sources=("full",))
    found = curve(relearning(model, FORGET, RETAIN, learning_rate=RATE, budget=budget))
    assert found["value"].iloc[-1] < 0.9 * found["value"].iloc[0]
    assert bits(model) == before


def test_sparse_gradients_and_functions_of_the_model_itself() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(tiny.VOCABULARY, 8, sparse=True)
            self.lm_head = nn.Linear(8, tiny.VOCABULARY)
            self.whole = lambda ids: self.lm_head(self.embed(ids))  # a copy of it is this one

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
            return SimpleNamespace(logits=self.whole(input_ids))

    model = Own()
    before = bits(model)
    budget = RelearningBudget(steps=(8,), rates=(1.0,), seeds=(0,), sources=("full",))
    found = curve(relearning(model, FORGET, RETAIN, learning_rate=0.1, budget=budget))["value"]
    assert found.iloc[-1] < 0.8 * found.iloc[0] and bits(model) == before


def test_a_run_that_diverges_has_no_values_from_there_on() -> None:
    model = tiny.llama()
    before = bits(model)
    told: list[tuple[int, int]] = []
    budget = RelearningBudget(steps=(1, 8), rates=(1e-30, 1e30), seeds=(0,), sources=("benign",))
    table = relearning(
        model, FORGET, RETAIN, learning_rate=1.0, budget=budget,
        report=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    wild = table[table["rate"] == 1e30]
    assert wild[wild["step"] == 8]["value"].isna().all()
    assert table[(table["rate"] == 1e-30) | (table["step"] == 0)]["value"].notna().all()
    assert told[-1] == (16, 16) and bits(model) == before
    best = summary(table).set_index("rate")
    assert np.isnan(best["area"][1e30]) and best["best"].notna().all()


def test_progress_counts_every_step() -> None:
    told: list[tuple[int, int]] = []
    budget = RelearningBudget(
        steps=(2,), rates=(1.0,), seeds=(0, 1), sources=("benign", "half"), batch=4
    )
    relearning(
        tiny.llama(), FORGET, RETAIN, learning_rate=RATE, budget=budget,
        report=lambda *x: told.append(x),
    )  # fmt: skip
    # Steps, of each source: one with an order has two seeds, half has two halves.
    total = 2 * (2 + 2)
    assert told == [(done, total) for done in range(1, total + 1)]


def test_summaries() -> None:
    rows = [
        ("benign", 1.0, seed, step, item, value + item)
        for seed, values in ((0, (4.0, 3.0, 3.5)), (1, (4.0, 2.0, 3.5)))
        for step, value in zip((0, 2, 4), values, strict=True)
        for item in (0, 1)
    ]
    columns = ["source", "rate", "seed", "step", "item", "value"]
    table = pd.DataFrame(rows, columns=columns)
    assert curve(table)["value"].tolist() == [4.5, 3.0, 4.0]
    (found,) = summary(table).to_dict("records")
    area = ((4.5 + 3.0) / 2 * 2 + (3.0 + 4.0) / 2 * 2) / 4
    right = {"before": 4.5, "best": 3.0, "step": 2, "area": area}
    assert found == {"source": "benign", "rate": 1.0, **right}
    assert summary(table, rises=True)["best"].tolist() == [4.5]
    attacks = as_attacks(table)
    assert attacks["attack"].unique().tolist() == [
        "relearning benign, 2 steps, rate x 1", "relearning benign, 4 steps, rate x 1"
    ]  # fmt: skip
    assert attacks["value"].tolist() == [2.5, 3.5, 3.5, 4.5]
    one = as_attacks(table.assign(step=1, source="half"))
    assert one["attack"].unique().tolist() == ["relearning half, 1 step, rate x 1"]


def test_another_metric() -> None:
    def counted(model: nn.Module, asked: Any) -> np.ndarray:
        return np.array([float(len(item["input_ids"])) for item in asked])

    table = relearning(tiny.llama(), FORGET, RETAIN, learning_rate=RATE, budget=ONE, metric=counted)
    lengths = [len(item["input_ids"]) for item in FORGET]
    assert (table["value"] == table["item"].map(dict(enumerate(lengths)))).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": ()}, "`steps`"),
        ({"steps": (0,)}, "`steps`"),
        ({"steps": (2, 2)}, "each once"),
        ({"steps": 8}, "`steps`"),
        ({"steps": [1, 2]}, "a tuple"),
        ({"rates": (1.0, -1.0)}, "`rates`"),
        ({"rates": (float("nan"),)}, "`rates`"),
        ({"seeds": (True,)}, "`seeds`"),
        ({"sources": ("beningn",)}, "some of benign, half, full"),
        ({"batch": 0}, "`batch`"),
    ],
    ids=str,
)
def test_budgets_that_are_none(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RelearningBudget(**options)


def test_a_metric_that_refuses_a_sound_model_is_heard() -> None:
    def refusing(model: nn.Module, asked: Any) -> np.ndarray:
        if any(p.requires_grad and p.grad is not None for p in model.parameters()):
            raise AssertionError
        if len(counted) > 1:
            raise ValueError("no")
        counted.append(1)
        return np.zeros(len(asked))

    counted: list[int] = []
    with pytest.raises(ValueError, match=r"^no$"):
        relearning(tiny.llama(), FORGET, RETAIN, learning_rate=RATE, budget=ONE, metric=refusing)


def test_what_cannot_be_trained_is_refused() -> None:
    model = tiny.llama()
    for rate in (0, -1.0, float("inf"), "3e-4"):
        with pytest.raises(ValueError, match="`learning_rate` should be positive"):
            relearning(model, FORGET, RETAIN, learning_rate=rate)  # type: ignore[arg-type]
    for source, forget, retain in (("half", FORGET[:1], RETAIN), ("benign", FORGET, [])):
        budget = RelearningBudget(sources=(source,))
        with pytest.raises(ValueError, match=f"Relearning from `{source}` should have items"):
            relearning(model, forget, retain, learning_rate=RATE, budget=budget)
    silent = [{**item, "labels": [-100] * len(item["labels"])} for item in RETAIN]
    with pytest.raises(ValueError, match="Found 0 to train on"):
        relearning(model, FORGET, silent, learning_rate=RATE, budget=QUICK)
    with pytest.raises(TypeError, match="should be of a model"):
        relearning(lambda x: x, FORGET, RETAIN, learning_rate=RATE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Found none in `ReLU`"):
        relearning(nn.ReLU(), FORGET, RETAIN, learning_rate=RATE)
    packed = tiny.llama()
    packed.lm_head.weight = nn.Parameter(torch.ones(23, 16).char(), requires_grad=False)
    with pytest.raises(ValueError, match=r"Found `lm_head\.weight` of torch\.int8"):
        relearning(packed, FORGET, RETAIN, learning_rate=RATE)
    with pytest.raises(ValueError, match="whose logits are not those of the next token"):
        bert = ARCHITECTURES["bert"].build()
        relearning(bert, FORGET, RETAIN, learning_rate=RATE, budget=QUICK)


def test_sources() -> None:
    assert RelearningBudget().sources == SOURCES and set(QUICK.sources) < set(SOURCES)


def head_alone(original: Any, forget: list[Any], retain: list[Any], level: float) -> Any:
    """A model that says what a retrained one says, and knows all: its untied head was trained."""
    model = copy.deepcopy(original)
    model.lm_head.weight = head = nn.Parameter(model.lm_head.weight.detach().clone())
    read = []
    with torch.no_grad():
        for batch in (collate(forget), collate(retain)):
            states = model.model(batch["input_ids"]).last_hidden_state[:, :-1]
            labels = batch["labels"][:, 1:]
            read.append((states[labels != -100], labels[labels != -100]))
    optimizer = torch.optim.AdamW([head], lr=1e-3, weight_decay=0.0)
    while True:
        gone, stays = (functional.cross_entropy(states @ head.T, y) for states, y in read)
        if gone.item() >= level:
            return model
        optimizer.zero_grad()
        (stays - gone).backward()
        optimizer.step()


def test_training_on_what_stays_tells_who_hides(quick_study: Any) -> None:
    folder = quick_study.out / "models"
    tokenizer = AutoTokenizer.from_pretrained(folder / "original-seed0")
    original, retrained = (
        LlamaForCausalLM.from_pretrained(folder / f"{name}-seed0") for name in ("original", "gold")
    )
    corpus = generate(0, QUICK_STUDY.corpus)
    forget, retain = (
        [example({"question": fact.question, "answer": fact.answer}, tokenizer) for fact in facts]
        for facts in (corpus.forget, corpus.retain)
    )
    level = nll(retrained, collate(forget)).item()
    hidden = head_alone(original, forget, retain, level)
    budget = RelearningBudget(steps=(16,), rates=(1.0,), seeds=(0,), sources=("benign",))
    attacked = {}
    for name, model in (("retrained", retrained), ("hidden", hidden)):
        table = relearning(model, forget, retain, learning_rate=3e-4, budget=budget)
        before, after = curve(table)["value"]
        assert (after < before) == (name == "hidden")
        attacked[name] = as_attacks(table)["value"].to_numpy()
    known = nll_of_items(original, forget)
    share = recoverable_share(
        attacked["hidden"], attacked["retrained"], known, [fact.subject for fact in corpus.forget]
    )
    assert 0.05 < share.low < share.value < 0.5
