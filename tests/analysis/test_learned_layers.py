"""In which block facts were learned, as a loop over autograd finds it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from geffect import Recorder, open_run
from geffect.analysis import recommended_layers
from geffect.analysis.learned_layers import learned_in
from geffect.cli import layers
from geffect.risk import nll
from tests.utils import tiny
from tests.utils.command_line import Ask

STEPS = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of unlearning on a Llama of three blocks."""
    path = tmp_path_factory.mktemp("learned") / "run.h5"
    model = tiny.llama(0, layers=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, path, update=True) as recorder:
        for pair in tiny.pairs(STEPS):
            recorder.backward(
                objective={"forget": -1.0, "retain": 1.0},
                forget=lambda batch=pair["forget"]: nll(model, batch),
                retain=lambda batch=pair["retain"]: nll(model, batch),
            )
            optimizer.step()
            optimizer.zero_grad()
    return path


def test_it_is_the_log_ratio_of_a_loop_over_gradients(path: Path) -> None:
    model, pair = tiny.llama(0, layers=3), tiny.pairs(STEPS)[0]
    squares = {}
    for risk in ("forget", "retain"):
        model.zero_grad()
        nll(model, pair[risk]).backward()
        squares[risk] = [
            sum(
                float(matrix.weight.grad.double().square().sum())
                for matrix in (block.mlp.up_proj, block.mlp.gate_proj)
            )
            for block in model.model.layers
        ]
    found = learned_in(open_run(path))
    assert [*found] == ["layer 0", "layer 1", "layer 2"]
    np.testing.assert_allclose(
        [*found.values()], np.log(np.divide(squares["retain"], squares["forget"])), rtol=1e-4
    )


def test_a_recommendation_has_the_blocks_in_that_order(path: Path) -> None:
    run = open_run(path)
    chosen, found = recommended_layers(run), learned_in(run)
    assert chosen.learned == tuple(sorted(found, key=lambda layer: -found[layer]))
    told = chosen.table.set_index("layer")["learned"]
    assert told.dropna().to_dict() == pytest.approx(found)
    assert np.isnan(told["embedding"]) and np.isnan(told["head"])


def test_the_command_names_the_two_likeliest(path: Path, ask: Ask) -> None:
    first, second, _ = recommended_layers(open_run(path)).learned
    code, out, _ = ask("layers", path, "--recommend", 2)
    assert code == 0
    assert f"most likely {first} or {second}" in out.replace("\n", " ")


def test_no_block_is_named_where_all_would_be(
    path: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LIKELIEST", 3)
    code, out, _ = ask("layers", path, "--recommend", 2)
    assert code == 0 and "To train:" in out and "most likely" not in out


def test_a_run_without_retain_or_such_a_matrix_tells_nothing(unwatched: Path) -> None:
    assert learned_in(open_run(unwatched)) == {}
