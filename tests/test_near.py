"""Names that were probably meant, and names that only look like them."""

import pytest

from geffect.near import is_slip, meant
from geffect.sources import check_risks


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_every_slip_of_one_letter_is_one_and_every_other_word_is_none(name: str) -> None:
    for place in range(len(name)):
        assert is_slip(name[:place] + name[place + 1 :], name)
        assert is_slip(name[:place] + "x" + name[place:], name)
        assert not is_slip(name[:place] + "x" + name[place + 1 :], name)
    for other in (name, f"{name}s", f"{name}_general", f"{name}2", "world", "", f"un{name}"):
        assert not is_slip(other, name)


@pytest.mark.parametrize("probe", ["forgte", "Forget", "retian", "reatin", "RETAIN", "foorget"])
def test_a_misspelt_probe_is_refused_at_the_start(probe: str) -> None:
    with pytest.raises(ValueError, match=rf"Found `{probe}`\. Did you mean `(forget|retain)`\?"):
        check_risks("probes", {probe: [], "world": []})


def test_what_is_far_from_all_is_no_guess() -> None:
    assert meant("sun", ["forget", "retain"]) == ""
    assert meant("OBJECTIVE", ["objective", "retain"]) == " Did you mean `objective`?"
