"""Each option of each objective, told on the command line."""

from types import SimpleNamespace
from typing import Any

import pytest

from geffect.cli.fields import GIVEN
from geffect.cli.objectives import objective_of
from geffect.objectives import CATALOGUE, REGULARISERS, named, options_of

TEXTS = {
    "alpha": "0.3", "answers": "2", "beta": "0.7", "beta1": "0", "beta2": "2.5", "cap": "9",
    "coefficient": "20", "delta": "0.25", "disassociation": "1", "distortion": "0.5",
    "divergence": "2", "dual": "3", "epsilon": "0.5", "eps": "1.5", "fraction": "0.29",
    "layer": "1", "legacy": "true", "legacy_eps": "1e-5", "legacy_kl": "True",
    "legacy_mask": "true", "normalize_target": "true", "proxy_temperature": "4",
    "retain_layer": "0.5", "rise": "0.2", "seed": "7", "skip": "0", "step": "0.5",
    "temperature": "1.5", "warmup": "3", "weight": "20",
}  # fmt: skip
"""A text for each option of the catalogue that is not its default."""

NAMES = [*CATALOGUE, *(f"ga+{name}" for name in REGULARISERS)]


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name in NAMES for option in options_of(named(name))]
)
def test_it_is_what_the_text_says(name: str, option: str) -> None:
    context: Any = SimpleNamespace(meta={GIVEN: {option: TEXTS[option]}})
    found, default = options_of(objective_of(context, name)), options_of(named(name))
    value = found[option]
    assert value is True if TEXTS[option].lower() == "true" else value == float(TEXTS[option])
    assert value != default[option]
    assert {**found, option: None} == {**default, option: None}
    assert default[option] is None or type(value) is type(default[option])
