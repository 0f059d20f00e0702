"""The limits that a configuration tells, wherever it stands."""

import sys
from types import SimpleNamespace

import pytest
from torch import nn

from geffect.risk.limits import POSITIONS, VOCABULARY, limit_in, positions_of, vocabulary_of
from tests.utils import tiny


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_a_model_tells_its_limits_also_inside_of_others(make: type) -> None:
    model = make()
    told = model.config.max_position_embeddings, model.config.vocab_size
    for outer in (model, nn.DataParallel(model)):
        assert (positions_of(outer), vocabulary_of(outer)) == told


def test_of_a_multimodal_model_they_are_those_of_its_text() -> None:
    text = SimpleNamespace(max_position_embeddings=32, vocab_size=9)
    model = nn.Linear(1, 1)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    assert (positions_of(model), vocabulary_of(model)) == (32, 9)


def test_where_nothing_is_told_there_is_no_limit() -> None:
    model = nn.Linear(1, 1)
    assert positions_of(model) == vocabulary_of(model) == sys.maxsize
    config = SimpleNamespace(vocab_size="many")
    assert (
        limit_in(config, VOCABULARY) is limit_in(config, POSITIONS) is limit_in(None, "x") is None
    )
