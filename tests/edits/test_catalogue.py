"""What holds of every edit of the catalogue."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from geffect import record_edit
from geffect.analysis import edited, predicted_change
from geffect.edits import CATALOGUE, Edit, as_edit, named, options_of
from geffect.edits.table import page
from geffect.layers import trainable
from geffect.risk import mean_nll
from tests.utils import tiny


def other_of(model: nn.Module) -> nn.Module:
    """Another model of the same kind."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return other


def answered(seed: int, rows: int = 3) -> dict[str, torch.Tensor]:
    """A batch whose last token is what the other model says, so that it knows something."""
    batch = tiny.batch(seed, rows=rows)
    with torch.no_grad():
        logits = other_of(tiny.gpt2())(batch["input_ids"]).logits
    for column in ("input_ids", "labels"):
        batch[column][:, -1] = logits[:, -2].argmax(dim=-1)
    return batch


QUICK = {"newton": {"scale": 300.0, "steps": 15}}
"""Options of edits whose defaults take long."""

SETS = {"forget": [tiny.batch(1, rows=2), tiny.batch(2)], "retain": [answered(5, rows=4)]}


def data_of(edit: Edit, model: nn.Module) -> dict[str, Any]:
    """What an edit asks for."""
    return {
        **{name: SETS[name] for name in edit.sets},
        **dict.fromkeys(edit.states, other_of(model)),
    }


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_is_taken_back_to_the_bit(name: str) -> None:
    model, edit = tiny.gpt2(), named(name, QUICK.get(name))
    data = data_of(edit, model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    displacement = edit.displacement(model, data)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt), edit.change(model, data) as change:
        assert any(change.touched.values())
        assert change.displacement.keys() == displacement.keys()
        assert all(torch.equal(change.displacement[n], d) for n, d in displacement.items())
        raise KeyboardInterrupt
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    made = edit.apply(model, data)
    assert not all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    made.revert()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("name", CATALOGUE)
def test_its_effects(name: str, tmp_path: Path) -> None:
    """e_R(eps D)/eps is the slope of the risk along D, and layers add up to the model."""
    model, edit = tiny.gpt2(), named(name, QUICK.get(name))
    change = edit.change(model, data_of(edit, model))
    run = record_edit(model, change, tmp_path / "run.h5", risks=SETS, edit=edit)
    table = edited(run)
    now = {n: p.detach().clone() for n, p in trainable(model).items()}
    eps = 1e-5
    for risk, batches in SETS.items():
        sides = []
        for sign in (-1.0, 1.0):
            with torch.no_grad():
                for n, d in change.displacement.items():
                    trainable(model)[n].copy_(now[n] + sign * eps * d)
            sides.append(mean_nll(model, batches))
        with torch.no_grad():
            for n, p in trainable(model).items():
                p.copy_(now[n])
        own = table[table["risk"] == risk].set_index("layer")["predicted"]
        central = (sides[0] - sides[1]) / (2 * eps)
        assert own["model"] == pytest.approx(central, rel=1e-5, abs=1e-9)
        layers = predicted_change(run, "parameter").query(f"risk == '{risk}'")["value"]
        assert own.drop(index="model").sum() == pytest.approx(own["model"], rel=1e-10)
        assert layers.sum() == pytest.approx(own["model"], rel=1e-10)
    told = run.manifest["edit"]
    assert told["name"] == type(edit).__name__
    assert told["options"] == json.loads(json.dumps(options_of(edit)))


@pytest.mark.parametrize("name", CATALOGUE)
def test_what_it_asks_for_is_named(name: str) -> None:
    edit = CATALOGUE[name]
    for needed in (*edit.sets, *edit.states):
        model = tiny.llama()
        data = {n: d for n, d in data_of(edit, model).items() if n != needed}
        with pytest.raises(ValueError, match=f"Pass `{needed}` as well"):
            edit.change(model, data)


def test_names_and_options() -> None:
    assert as_edit("ssd") == named("ssd") == CATALOGUE["ssd"] == as_edit(CATALOGUE["ssd"])
    assert options_of(named("ssd", {"fraction": 0.5}))["fraction"] == 0.5
    with pytest.raises(ValueError, match="Did you mean `negation`"):
        named("negatoin")
    with pytest.raises(ValueError, match=r"among those it has: `alpha`. Found `beta`"):
        named("negation", {"beta": 1.0})


@pytest.mark.parametrize("name", CATALOGUE)
def test_it_says_where_its_formula_is_from(name: str) -> None:
    assert CATALOGUE[name].source


def test_the_page_lists_the_catalogue() -> None:
    on_disk = Path(__file__).parents[2] / "docs" / "edits.md"
    assert on_disk.read_text(encoding="utf-8") == page(), "python -m geffect.edits.table"
