"""Near misses of names: found where case or padding alone differ, and nowhere else."""

import pytest

from gaitfast.names import lookalikes, near, plain


@pytest.mark.parametrize(
    ("a", "b"),
    [("001", "1"), ("NM-01", "nm-1"), (" 0075", "75"), ("camid01_videoid2", "camid1_videoid02"), ("000", "0")],
)
def test_names_that_look_alike(a, b):
    assert plain(a) == plain(b) and lookalikes([a, b, "other"]) == [sorted([a, b])]


@pytest.mark.parametrize(
    ("a", "b"), [("10", "1"), ("00001train", "00001"), ("nm-01", "nm-10"), ("100", "1"), ("1-0", "10")]
)
def test_names_that_do_not(a, b):
    assert plain(a) != plain(b) and lookalikes([a, b]) == []


def test_near_misses_are_of_missing_names_only():
    assert near(["001", "2", "9"], ["001", "1", "002"]) == [("2", "002")]
    assert near(["nm-01"], ["nm-01", "NM-01"]) == []
