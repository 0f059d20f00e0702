"""Effects of samples and of tokens as tidy tables."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from geffect import Recorder, open_run
from geffect.analysis import SAMPLES, TOKENS, as_columns, instances, kept, tokens
from geffect.analysis.base import column_of
from geffect.effects import InstanceEffects, direction
from geffect.gradients import Vector
from geffect.groups import By
from geffect.scores import SAYS, score_of
from tests.utils import reference
from tests.utils.effects import gradients, inner, made, sums_of_log_p, uneven

# --- tables


RISKS = ("retain", "forget")


@pytest.fixture(scope="module")
def measured() -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Vector]]:
    """A model, batches, and the directions of two risks."""
    model = made("gpt2", torch.float64)
    along = {risk: direction(model, [uneven(i)]) for i, risk in enumerate(RISKS, start=1)}
    return model, [uneven(3), uneven(4, rows=2)], along


@pytest.fixture(scope="module")
def naive(measured: Any) -> list[float]:
    """The effect of each sample on each risk, by a backward pass of its own."""
    model, batches, along = measured
    return [
        float(inner(gradients(model, s), along[risk]).sum())
        for risk in RISKS
        for batch in batches
        for s in sums_of_log_p(model, batch)
    ]


@pytest.mark.parametrize("by", ["parameter", "layer", "group", "model", lambda p: p.module])
def test_instances_are_a_tidy_table(measured: Any, naive: list[float], by: By) -> None:
    model, batches, along = measured
    table = instances(model, batches, along, by)
    assert list(table.columns) == ["sample", column_of(by), "risk", "value", *SAYS]
    assert list(table["risk"].cat.categories) == list(RISKS)
    one = instances(model, batches, along["forget"], by)
    assert list(one.columns) == ["sample", column_of(by), "value", *SAYS]
    pd.testing.assert_series_equal(
        one["value"], table.query("risk == 'forget'")["value"].reset_index(drop=True)
    )
    found = table.groupby(["risk", "sample"], observed=True)["value"].sum().to_numpy()
    np.testing.assert_allclose(found, naive, rtol=1e-9)


def test_layers_of_instances_stand_in_network_order(measured: Any) -> None:
    model, batches, along = measured
    table = instances(model, batches, along["forget"])
    assert list(table["layer"].cat.categories) == [
        "embedding+head", "embedding", "layer 0", "layer 1", "final norm"
    ]  # fmt: skip
    with InstanceEffects(model, along["forget"]) as effects:
        torch.stack(sums_of_log_p(model, batches[0])).sum().backward()
    model.zero_grad()
    assert effects.layers == list(table["layer"].cat.categories)
    np.testing.assert_allclose(
        table["value"].to_numpy().reshape(5, 5)[:3], effects.by_layer.numpy(), rtol=1e-9
    )


def test_tokens_add_up_to_instances(measured: Any) -> None:
    model, batches, along = measured
    table = tokens(model, batches, along)
    assert list(table.columns) == ["sample", "position", "token", "p", "risk", "value", *SAYS]
    assert score_of(table) == score_of(instances(model, batches, along))
    sums = table.groupby(["risk", "sample"], observed=True)["value"].sum()
    whole = instances(model, batches, along, "model")
    whole = whole.set_index(["risk", "sample"])["value"]
    np.testing.assert_allclose(sums, whole.loc[sums.index], rtol=1e-9)
    first = table.query("sample == 0 and risk == 'forget'")
    labels = batches[0]["labels"][0]
    assert first["position"].tolist() == torch.nonzero(labels[1:] != -100).flatten().add(1).tolist()
    assert first["token"].tolist() == labels[first["position"].tolist()].tolist()
    log_p = torch.stack(reference.token_log_p(model, batches[0])[0]).detach()
    np.testing.assert_allclose(first["p"], log_p.exp(), rtol=1e-12)
    one = tokens(model, batches, along["forget"])
    assert list(one.columns) == ["sample", "position", "token", "p", "value", *SAYS]


class Words:
    """A tokenizer that, as sentence pieces do, drops the space in front of what stands alone."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join("s" if i % 3 == 0 else f" w{i}" for i in ids).strip()


def test_tokens_have_the_text_that_they_add(measured: Any) -> None:
    model, batches, along = measured
    ids = tokens(model, batches, along["forget"])
    texts = tokens(model, batches, along["forget"], tokenizer=Words())
    expected = ["s" if i % 3 == 0 else f" w{i}" for i in ids["token"]]
    assert texts["token"].tolist() == expected
    pd.testing.assert_frame_equal(texts.drop(columns="token"), ids.drop(columns="token"))


def test_no_samples_are_refused(measured: Any) -> None:
    model, _, along = measured
    for table in (instances, tokens):
        with pytest.raises(ValueError, match=r"`batches` .*should .* Found .* Pass one"):
            table(model, [], along)


def test_tables_are_kept_with_a_run_and_come_back(measured: Any, tmp_path: Path) -> None:
    model, batches, along = measured
    made_here = {
        SAMPLES: instances(model, batches, along, "group"),
        TOKENS: tokens(model, batches, along, tokenizer=Words()),
    }
    plain = nn.Linear(2, 1)
    with Recorder(plain, tmp_path / "run.h5") as recorder:
        recorder.backward(objective=plain(torch.ones(2)).sum())
        for name, table in made_here.items():
            recorder.keep_table(name, as_columns(table))
    run = open_run(tmp_path / "run.h5")
    for name, table in made_here.items():
        back = kept(run, name)
        assert score_of(back) == score_of(table)
        pd.testing.assert_frame_equal(back[table.columns], table, check_dtype=False)
