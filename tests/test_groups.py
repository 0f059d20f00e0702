"""What values are summed over: depth groups of any depth, with and without towers."""

from collections import Counter

import pytest
from torch import nn

from geffect.groups import LABELS, label_of
from geffect.layers import Parameter, describe


def stack(depth: int) -> nn.ModuleDict:
    """A tower with one tensor in each place."""
    return nn.ModuleDict(
        {
            "embed_tokens": nn.Linear(1, 1, False),
            "layers": nn.ModuleList(
                nn.ModuleDict({"mlp": nn.Linear(1, 1, False)}) for _ in range(depth)
            ),
            "norm": nn.LayerNorm(1, bias=False),
        }
    )


def groups(model: nn.Module, by: str) -> dict[str, int]:
    return dict(Counter(map(label_of(by), describe(model))))


@pytest.mark.parametrize(
    ("depth", "thirds", "tens"),
    [
        (6, (2, 2, 3), {"layers 0-9": 7}),
        (22, (8, 7, 8), {"layers 0-9": 10, "layers 10-19": 10, "layers 20+": 3}),
        (24, (8, 8, 9), {"layers 0-9": 10, "layers 10-19": 10, "layers 20+": 5}),
        (32, (11, 11, 11), {"layers 0-9": 10, "layers 10-19": 10, "layers 20+": 13}),
    ],
)
def test_the_final_norm_is_in_the_last_depth_group(
    depth: int, thirds: tuple[int, ...], tens: dict[str, int]
) -> None:
    model = nn.ModuleDict({"model": stack(depth), "lm_head": nn.Linear(1, 1, False)})
    around = {"embedding": 1, "head": 1}
    paper = dict(zip(("shallow", "middle", "deep"), thirds, strict=True))
    assert groups(model, "paper") == paper | around
    assert groups(model, "code") == tens | around


def test_towers_have_depth_groups_of_their_own() -> None:
    model = nn.ModuleDict({"encoder": stack(3), "decoder": stack(12)})
    assert groups(model, "code") == {
        "encoder embedding": 1, "encoder layers 0-9": 4,
        "decoder embedding": 1, "decoder layers 0-9": 10, "decoder layers 10-19": 3,
    }  # fmt: skip
    assert groups(model, "paper")["decoder deep"] == 5
    assert groups(model, "tower") == {"encoder": 5, "decoder": 14}


def test_a_norm_without_layers_stands_for_itself() -> None:
    norm = Parameter("norm.weight", "final norm", "final norm", -1, "norm", (2,), "float32", ())
    assert label_of("code")(norm) == "final norm"


def test_a_function_is_a_group_and_another_word_is_refused() -> None:
    assert label_of(str.upper)("a") == "A"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"one of {', '.join(LABELS)}, or a function.*'towers'"):
        label_of("towers")


@pytest.mark.parametrize("name", [None, float("nan")])
def test_a_function_that_names_no_group_is_told(name: object) -> None:
    by = label_of(lambda parameter: name if parameter.layer == "head" else "rest")
    kept, unnamed = (
        Parameter(f"{layer}.weight", layer, layer, 0, "", (2,), "float32", ())
        for layer in ("layer 0", "head")
    )
    assert by(kept) == "rest"
    with pytest.raises(ValueError, match=rf"Found `{name}` for `head\.weight`"):
        by(unnamed)
