"""Options: what goes together, what is refused, and how a rectifier shows them."""

import copy
import inspect
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geffect import Rectifier, projection
from geffect.projection import (
    SAGO,
    Elementwise,
    Rule,
    Salient,
    State,
    a_gem,
    blur,
    gru,
    nearest,
    off_span,
    orthogonal,
    pcgrad,
)


def test_a_rule_for_one_retain_gradient_refuses_several() -> None:
    for rule in (gru, a_gem, orthogonal, pcgrad, blur, SAGO()):
        with pytest.raises(ValueError, match=r"should be given one retain gradient .* Take|Add"):
            Rectifier(nn.Linear(2, 1), rule, protect=("retain", "world"))
    for rule in (nearest, off_span):
        Rectifier(nn.Linear(2, 1), rule, protect=("retain", "world"))


def test_rules_that_look_at_lengths_are_refused_in_update_space() -> None:
    model = nn.Linear(2, 1)
    for rule in (pcgrad, blur, SAGO()):
        with pytest.raises(
            ValueError, match=r"length of the retain gradient.* Found .* Pass space"
        ):
            Rectifier(model, rule, space="update")
        Rectifier(model, rule)
    for rule in (gru, orthogonal, a_gem, off_span, nearest):
        Rectifier(model, rule, space="update")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protect": ()}, r"`protect` should be a sequence .* Found"),
        ({"protect": ("objective",)}, r"`protect` should be a sequence .* Found"),
        ({"protect": ("retain", "retain")}, r"`protect` should be a sequence .* Found"),
        ({"rule": "gru"}, r"`rule` should be a function .* Found 'gru'. Pass one"),
        ({"ema": True}, r"`ema` of Rectifier should be above 0"),
        ({"ema_start": "nought"}, r"`ema_start` should be one of first, zero\. Found"),
        ({"select": True}, r"`select` of Rectifier should be above 0"),
        ({"correction": "retain_adam"}, r'`correction` should be "retain" in gradient space'),
        ({"part": "forget", "space": "update"}, r'`part` should be "total" in update space'),
        ({"rule": SAGO(), "scope": "layer"}, r'should go with scope="model"'),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rectifier(nn.Linear(2, 1), **options)


def test_a_rectifier_shows_what_it_was_asked_for() -> None:
    model = nn.Linear(2, 1)
    shown = "protect=('retain',), scope='model', space='gradient', ema=0.8)"
    assert repr(Rectifier(model)) == f"Rectifier(rule=gru, {shown}"
    assert repr(Rectifier(model, lambda K: K[..., 0])) == f"Rectifier(rule=<lambda>, {shown}"
    said = repr(
        Rectifier(
            model, SAGO(0.5), protect="world", part="forget", select=0.1, ema=1.0,
            state=State(torch.bfloat16), measure_update=True,
        )
    )  # fmt: skip
    assert said == (
        "Rectifier(rule=SAGO(alpha=0.5, prefer_retain=False), protect=('world',), scope='model', "
        "space='gradient', part='forget', ema=1.0, select=0.1, measure_update=True, "
        "state=State(dtype=torch.bfloat16, device=None))"
    )
    assert "select=Salient(fraction=0.2)" in repr(Rectifier(model, select=Salient(0.2)))
    assert "correction='retain_adam'" in repr(
        Rectifier(model, space="update", correction="retain_adam")
    )


@pytest.mark.parametrize("name", sorted(projection.__all__))
def test_no_signature_or_name_holds_an_address(name: str) -> None:
    thing = getattr(projection, name)
    said = [repr(thing) if isinstance(thing, Rule) else "", str(inspect.signature(thing))]
    methods = inspect.getmembers(thing, inspect.isfunction) if inspect.isclass(thing) else []
    said += [str(inspect.signature(method)) for _, method in methods]
    assert not [text for text in said if " at 0x" in text]


class Half(Elementwise):
    """A rule that makes the two gradients one, and says so."""

    adds_retain = True

    def __call__(self, u: Tensor, retain: Sequence[Tensor]) -> Tensor:
        return u + 0.5 * sum(retain)


def total(K: Tensor) -> Tensor:
    """The weights of the sum."""
    return torch.ones_like(K[..., 0])


@pytest.mark.parametrize("rule", [Half(), Rule(total, adds_retain=True)], ids=["Half", "total"])
def test_a_rule_of_ones_own_declares_what_it_adds(rule: Any) -> None:
    with pytest.raises(
        ValueError, match=r"length of the retain gradient.* Found .*(Half|total).* Pass space"
    ):
        Rectifier(nn.Linear(2, 1), rule, space="update")
    weights = []
    for part in ("total", "forget"):
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        f, r = model(torch.tensor([1.0, 0.0])).sum(), model(torch.tensor([0.0, 1.0])).sum()
        rectifier = Rectifier(model, rule, part=part, ema=1.0)  # type: ignore[arg-type]
        rectifier.backward(objective={"forget": -1.0, "retain": 3.0}, forget=f, retain=r)
        weights.append(model.weight.grad.flatten().tolist())
    alpha = 0.5 if isinstance(rule, Half) else 1.0
    assert weights == [[-1.0, 3.0 + alpha], [-1.0, alpha]]  # once, where it is taken out before


def test_a_function_counts_as_one_that_adds_nothing_and_is_not_tried_out() -> None:
    def rule(K: Tensor) -> Tensor:
        raise AssertionError("asked before there was a step")

    rectifier = Rectifier(nn.Linear(2, 1), rule, space="update", protect=("retain", "world"))
    assert not rectifier._options.adds_retain
    assert rectifier.options["rule"] == "rule"
    assert not Rectifier(nn.Linear(2, 1), total)._options.adds_retain


def test_weights_for_too_few_gradients_are_refused() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(2)
    rectifier = Rectifier(model, lambda K: K[..., 0, :2], protect=("retain", "world"))
    said = r"as many weights as there are gradients, 3\. Found 2 from <lambda>\. Give"
    with pytest.raises(ValueError, match=said):
        rectifier.backward(objective=-model(x).sum(), retain=model(x).sum(), world=model(-x).sum())


ONES = ["gru", "a_gem", "orthogonal", "pcgrad", "blur", "SAGO"]


@pytest.mark.parametrize("name", [*ONES, "nearest", "off_span"])
def test_rules_say_of_themselves_what_holds(name: str) -> None:
    """Asked about retain gradients of two lengths, and about two of them."""
    rule = getattr(projection, name)
    rule = rule if isinstance(rule, Rule) else rule()
    u, r = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([-2.0, 0.0, 1.0])

    def made(*retain: Tensor) -> Tensor:
        if isinstance(rule, Elementwise):
            return rule(u, retain)
        rows = torch.stack([u, *retain])
        return rule(rows @ rows.T) @ rows

    same = torch.allclose(made(r), made(2 * r)) and torch.allclose(made(-r), made(-2 * r))
    assert rule.adds_retain is not same
    assert rule.one_retain is (name in ONES)
    if rule.one_retain:
        with pytest.raises(ValueError, match=rf"`{name}` should be given one retain gradient"):
            made(r, r)
    else:
        made(r, r)


def test_rules_travel_by_their_names() -> None:
    assert pickle.loads(pickle.dumps(gru)) is gru and copy.deepcopy(nearest) is nearest
    assert inspect.getdoc(gru) and inspect.getdoc(gru).startswith("GRU:")  # type: ignore[union-attr]
