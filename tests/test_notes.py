"""What errors say beyond a sentence."""

import pickle

import pytest

from geffect.notes import OfArgument


@pytest.mark.parametrize("choose", ["", "layer"])
def test_an_error_of_an_argument_says_the_same_in_another_process(choose: str) -> None:
    error = OfArgument("by", "be larger. Found a layer.", choose)
    there = pickle.loads(pickle.dumps(error))
    assert str(there) == str(error) and (there.argument, there.choose) == ("by", choose)
    assert there.said_of("`--by`", "--by {}") == error.said_of("`--by`", "--by {}")
    assert ("Choose" in str(error)) == bool(choose)
