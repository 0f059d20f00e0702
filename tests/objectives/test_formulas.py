"""Every objective and regulariser against its formula, answer by answer.

Each answer is run alone, without padding, in float64; weights are detached where the formula says
so, and gradients are autograd's. Nothing is shared with what is tested but random draws.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geffect.data.collate import collate
from geffect.objectives import CATALOGUE, REGULARISERS, RMU, FrozenModel, named, options_of
from tests.utils import reference
from tests.utils import shallow as tiny
from tests.utils.sides import Item, items_of


class Answer:
    """What a model says of one answer: logits, log p, hidden states, and the summed NLL l of n."""

    def __init__(self, model: Any, item: Item) -> None:
        ids, labels = item["input_ids"], item["labels"]
        said = model(input_ids=ids[None], output_hidden_states=True)
        at = [i for i in range(1, len(ids)) if labels[i] != -100]
        self.n, self.y = len(at), labels[at]
        self.z = said.logits[0].double()[[i - 1 for i in at]]
        self.h = [states[0].double()[at] for states in said.hidden_states]
        self.log_p = self.z.log_softmax(-1).gather(1, self.y[:, None])[:, 0]
        self.l = -self.log_p.sum()


Answers = list[Answer]


class Said:
    """The answers of each side, now and before; options stand there as attributes."""

    def __init__(
        self,
        now: Mapping[str, Answers],
        before: Mapping[str, Answers],
        options: Mapping[str, Any],
    ) -> None:
        self.now, self.before = now, before
        for name, value in options.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"no option {name}")

    @property
    def log_p(self) -> Tensor:
        return torch.cat([a.log_p for a in self.now["forget"]])

    @property
    def p(self) -> Tensor:
        return self.log_p.detach().exp()

    @property
    def p_before(self) -> Tensor:
        return torch.cat([a.log_p for a in self.before["forget"]]).exp()

    def weighed(self, weight: Tensor) -> Tensor:
        return (weight * self.log_p).sum() / len(self.log_p)

    def nll(self, side: str) -> Tensor:
        return -torch.cat([a.log_p for a in self.now[side]]).mean()

    def lost(self, side: str) -> Tensor:
        pairs = zip(self.now[side], self.before[side], strict=True)
        return torch.stack([now.l - then.l.detach() for now, then in pairs])

    def preferred(self, margin: Tensor) -> Tensor:
        return -(2 / self.beta) * F.logsigmoid(self.beta * margin).mean()

    def each(self, value: Callable[[Answer], Tensor], side: str = "forget") -> Tensor:
        """The mean over tokens of something that an answer has of each of its tokens."""
        return torch.cat([value(a) for a in self.now[side] if a.n]).mean()

    def beside(self, value: Callable[[Answer, Answer], Tensor], side: str) -> Tensor:
        """The same beside what was said before."""
        pairs = zip(self.now[side], self.before[side], strict=True)
        return torch.cat([value(now, then) for now, then in pairs if now.n]).mean()

    def random(self) -> Tensor:
        """mean_k mean_s of the mean NLL of answers of other rows."""
        means = [
            torch.stack([a.l / a.n for a in self.now[f"forget.random{k + 1}"] if a.n]).mean()
            for k in range(self.answers)
        ]
        return torch.stack(means).mean()


def kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(softmax one || softmax other) of each token."""
    return (one.softmax(-1) * (one.log_softmax(-1) - other.log_softmax(-1))).sum(-1)


def state(answer: Answer, layer: float) -> Tensor:
    layers = len(answer.h) - 1
    return answer.h[max(1, math.floor(layer * layers)) if 0 < layer < 1 else int(layer)]


def adversarial(now: Answer, then: Answer) -> Tensor:
    others = then.z.clone()
    others[range(then.n), then.y] = -torch.inf
    return -now.z.log_softmax(-1)[range(now.n), others.argmax(-1)]


def lowered(now: Answer, then: Answer, beta: float) -> Tensor:
    taught = then.z.clone()
    taught[range(then.n), then.y] -= beta
    return -(taught.softmax(-1) * now.z.log_softmax(-1)).sum(-1)


def likeliest(answer: Answer, fraction: float) -> Tensor:
    count = max(1, math.floor(fraction * answer.n + 1e-9))
    return answer.log_p.sort(descending=True).values[:count]


def to_target(answer: Answer, said: Said) -> Tensor:
    found = state(answer, said.layer)
    rmu = RMU(seed=said.seed, normalize_target=said.normalize_target)
    return (found - said.coefficient * rmu.direction(found.shape[-1]).double()).square().mean(-1)


FORMULAS: dict[str, Callable[[Any], Tensor]] = {
    "ga": lambda s: s.log_p.mean(),
    "wga": lambda s: s.weighed(s.p**s.alpha),
    "npo": lambda s: s.preferred(s.lost("forget")),
    "tnpo": lambda s: s.weighed(
        2 * s.p**s.beta / (s.p**s.beta + s.p_before**s.beta + s.legacy_eps)
    ),
    "wtnpo": lambda s: s.weighed(
        2 * s.p ** (s.beta + s.alpha) / (s.p**s.beta + s.p_before**s.beta + s.legacy_eps)
    ),
    "graddiff": lambda s: s.log_p.mean() + s.weight * s.nll("retain"),
    "simnpo": lambda s: s.preferred(
        torch.stack([a.l / a.n - s.delta for a in s.now["forget"] if a.n])
    ),
    "rmu": lambda s: s.each(lambda a: to_target(a, s)),
    "pdu": lambda s: (
        s.each(lambda a: (a.z.amax(-1) - a.z.mean(-1)).square()) + s.dual * s.nll("retain")
    ),
    "adversarial-labels": lambda s: s.beside(adversarial, "forget"),
    "po": lambda s: s.nll("forget.alternate"),
    "dpo": lambda s: s.preferred(s.lost("forget") - s.lost("forget.alternate")),
    "idk-dpo": lambda s: s.preferred(s.lost("forget") - s.lost("forget.alternate")),
    "undial": lambda s: s.beside(lambda a, o: lowered(a, o, s.beta), "forget"),
    "satimp": lambda s: s.weighed(s.p**s.beta1 * (1 - s.p) ** s.beta2),
    "ceu": lambda s: s.each(lambda a: -torch.log1p(-a.log_p[s.skip :].exp())),
    "likelihood-control": lambda s: torch.stack(
        [(s.delta - a.l).clamp(min=0) for a in s.now["forget"]]
    ).mean(),
    "ga-capped": lambda s: s.each(lambda a: torch.where(a.log_p < -s.cap, -s.cap, a.log_p)),
    "ga-temperature": lambda s: s.each(
        lambda a: (a.z / s.temperature).log_softmax(-1)[range(a.n), a.y]
    ),
    "ga-lowest": lambda s: s.each(lambda a: likeliest(a, s.fraction)),
    "ssu-acquire": lambda s: s.nll("forget") + s.eps * s.random(),
    "sku": lambda s: (
        s.distortion * s.nll("forget")
        + s.disassociation * s.random()
        - s.divergence * s.beside(lambda a, o: kl(o.z, a.z), "retain")
    ),
}
"""By name, with what is said as the argument; labels that are drawn have tests of their own."""

ADDED: dict[str, Callable[[Any], Tensor]] = {
    "gd": lambda s: s.nll("retain"),
    "kl": lambda s: s.beside(lambda a, o: kl(o.z, a.z), "retain"),
    "rr": lambda s: s.beside(
        lambda a, o: (state(a, s.retain_layer) - state(o, s.retain_layer)).square().sum(-1),
        "retain",
    ),
    "proxy-kl": lambda s: s.beside(
        lambda a, o: kl(a.z / s.proxy_temperature, o.z / s.proxy_temperature), "retain"
    ),
}

CASES: list[tuple[str, dict[str, float | bool]]] = [
    *((name, {}) for name in FORMULAS),
    *((f"wga+{name}", {"weight": 3.0}) for name in ADDED),
    ("wga", {"alpha": 0.3}), ("npo", {"beta": 2.0}), ("tnpo", {"legacy_eps": 1e-5}),
    ("wtnpo", {"beta": 1.0, "alpha": 0.2}), ("graddiff", {"weight": 0.1}),
    ("simnpo", {"beta": 0.5, "delta": 1.0}), ("dpo", {"beta": 3.0}), ("undial", {"beta": 1.0}),
    ("rmu", {"layer": 0, "coefficient": 9.0, "normalize_target": True, "seed": 4}),
    ("pdu", {"dual": 7.5}), ("satimp", {"beta1": 0.0, "beta2": 2.0}), ("ceu", {"skip": 0}),
    ("likelihood-control", {"delta": 12.0}), ("ga-capped", {"cap": 3.5}),
    ("ga-temperature", {"temperature": 0.2}),
    ("ga-lowest", {"fraction": 0.29}), ("ssu-acquire", {"answers": 1, "eps": 2.0}),
    ("sku", {"answers": 2, "distortion": 0.5, "divergence": 3.0}),
    ("npo+proxy-kl", {"proxy_temperature": 0.5}), ("simnpo+rr", {"retain_layer": 0}),
]  # fmt: skip


def without_answer(item: Item) -> Item:
    if "labels" not in item:
        return {name: without_answer(inside) for name, inside in item.items()}
    return {**item, "labels": torch.full_like(item["labels"], -100)}


def one_row(items: list[Item]) -> dict[str, Any]:
    del items[1:]
    return collate(items)


def beside_a_row_without(items: list[Item]) -> dict[str, Any]:
    """A row without an answer, such as one that was cut off, weighs what the formula says."""
    items[1] = without_answer(items[1])
    return collate(items, padding_side="left")


BATCHES: dict[str, tuple[Callable[[list[Item]], dict[str, Any]], float, torch.dtype, float]] = {
    "left, and a row without an answer": (beside_a_row_without, 1.0, torch.float64, 1e-8),
    "one row": (one_row, 1.0, torch.float64, 1e-8),
    "sharp": (collate, 30.0, torch.float64, 1e-7),
    "a reference in bfloat16": (collate, 1.0, torch.bfloat16, 2e-2),
}
"""How rows become a batch, how sharp the model is, the type of the reference, and a tolerance."""


def by_answer(items: Mapping[str, list[Item]]) -> dict[str, list[Item]]:
    """Items of each side, and of each of the answers inside."""
    found: dict[str, list[Item]] = {}
    for side, rows in items.items():
        for row in rows:
            inside = row if "labels" not in row else {"original": row}
            for name, answer in inside.items():
                place = side if name == "original" else f"{side}.{name}"
                found.setdefault(place, []).append(answer)
    return found


@pytest.mark.parametrize("how", BATCHES)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_it_is_its_formula(name: str, options: dict[str, float | bool], how: str) -> None:
    batched, sharpness, dtype, tolerance = BATCHES[how]
    objective = named(name, options)
    model: nn.Module = tiny.gpt2().eval()
    with torch.no_grad():
        model.get_submodule("transformer.ln_f").weight.mul_(sharpness)
    known = copy.deepcopy(tiny.gpt2(1)).to(dtype).eval()
    items = items_of(objective, 4, seed=len(name))
    batch = {side: batched(rows) for side, rows in items.items()}
    sides = by_answer(items)
    now = {side: [Answer(model, row) for row in rows] for side, rows in sides.items()}
    with torch.no_grad():
        before = {side: [Answer(known, row) for row in rows] for side, rows in sides.items()}
    said = Said(now, before, options_of(objective))
    alone, _, added = name.partition("+")
    expected = FORMULAS[alone](said)
    if added:
        expected = expected + said.weight * ADDED[added](said)
    found = objective(model, batch, FrozenModel(known))
    assert found.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
    own, naive = (reference.flat(reference.gradient(model, loss)) for loss in (found, expected))
    assert (own - naive).norm() <= tolerance * max(float(naive.norm()), 1e-9)


def test_every_one_has_a_formula_here() -> None:
    assert {*FORMULAS} == {*CATALOGUE} - {"random-labels"} and {*ADDED} == {*REGULARISERS}
