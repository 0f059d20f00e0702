"""G-effects on common scales, from the gradients and the update of a loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from geffect import Recorder, Run
from geffect.demo.scale_table import agreement, as_markdown, g_effects, write
from geffect.demo.scales import REMOVED, on_common_scales
from tests.utils import reference, tiny


def flat(vector: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten().double() for part in vector.values()])


@pytest.mark.parametrize("until", [None, 1.25, 3.0])
def test_the_scales_are_those_of_a_loop(until: float | None, tmp_path: Path) -> None:
    model, path = tiny.llama(), tmp_path / "run.h5"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shares = [1.0] * 3 if until is None else [min(1.0, max(0.0, until - i)) for i in range(3)]
    cosines: dict[str, list[float]] = {"forget": [], "retain": []}
    lengths: dict[str, list[float]] = {"forget": [], "retain": []}
    fallen = {"forget": 0.0, "retain": 0.0}
    with Recorder(model, path, update=True) as recorder:
        for pair, share in zip(tiny.pairs(3), shares, strict=True):
            own = {
                risk: flat(reference.gradient(model, reference.nll(model, pair[risk])))
                for risk in fallen
            }
            before = flat({n: p.detach().clone() for n, p in model.named_parameters()})
            recorder.backward(
                objective={"forget": -1.0, "retain": 0.5},
                **{risk: reference.nll(model, pair[risk]) for risk in fallen},
            )
            optimizer.step()
            optimizer.zero_grad()
            moved = flat({n: p.detach() for n, p in model.named_parameters()}) - before
            objective = 0.5 * own["retain"] - own["forget"]
            for risk, gradient in own.items():
                e = float(gradient @ objective)
                cosines[risk].append(e / float(gradient.norm() * objective.norm()))
                lengths[risk].append(e / float(objective.norm()))
                fallen[risk] -= share * float(gradient @ moved)
    found = on_common_scales(path, until)
    for risk in fallen:
        assert found[f"cosine_{risk}"] == pytest.approx(
            np.average(cosines[risk], weights=shares), rel=1e-4
        )
        assert found[f"per_length_{risk}"] == pytest.approx(
            np.average(lengths[risk], weights=shares), rel=1e-4
        )
        assert found[f"of_updates_{risk}"] == pytest.approx(fallen[risk], rel=1e-3)
    assert found[REMOVED] == pytest.approx(-fallen["forget"] / abs(fallen["retain"]), rel=1e-3)


def test_what_is_not_defined_is_none(example_run: Callable[..., Run]) -> None:
    run = example_run(update=True)
    assert on_common_scales(Path(run.path), 0.0) == {
        **dict.fromkeys(("cosine_forget", "cosine_retain"), None),
        **dict.fromkeys(("per_length_forget", "per_length_retain"), None),
        **dict.fromkeys(("of_updates_forget", "of_updates_retain"), 0.0),
        REMOVED: None,
    }


def row(method: str, seed: int, effect: float, outside: float | None) -> dict[str, Any]:
    scales = ("cosine", "per_length", "of_updates")
    names = [f"{scale}_{risk}" for scale in scales for risk in ("forget", "retain")]
    return {
        "method": method, "variant": "plain", "seed": seed,
        "at_level": None if outside is None else {"retain_heldout_authors_nll": outside},
        "g_effects": {**dict.fromkeys(names, effect), REMOVED: None},
    }  # fmt: skip


def test_the_table_has_means_and_says_whether_effects_tell_the_loss(tmp_path: Path) -> None:
    runs = [row("ga", 0, -1.0, 0.4), row("ga", 1, -3.0, 0.6), row("po", 0, -2.0, 0.5)]
    runs += [row("sku", 0, -9.0, None), {**row("old", 0, 0.0, 0.0), "g_effects": None}]
    summary = {"runs": runs, "edits": [row("ssd", 0, -4.0, 0.7)]}
    table = g_effects(summary)
    assert table["method"].tolist() == ["ga", "ga", "po", "sku", "ssd"]
    lines = as_markdown(table).splitlines()
    assert lines[2] == "| ga | plain | -2 | -2 | -2 | -2 | -2 | -2 |  |"
    found = agreement(table)
    # Of the four that reached the level: the lower the effect, the higher the loss.
    assert {(c.r, c.count) for c in found.values()} == {(-1.0, 4)}
    write(summary, tmp_path)
    assert (tmp_path / "g_effects.md").read_text() == as_markdown(table)
    assert len((tmp_path / "g_effects.csv").read_text().splitlines()) == 6
    write({"runs": []}, tmp_path / "none")
