import pytest

from benchmarks import timing


@pytest.mark.parametrize(
    ("unit", "ours", "peer"), [("ms", 2.0, 6.0), ("us", 2000.0, 6000.0), ("images/s", 4000.0, 1333.0)]
)
def test_a_ratio_above_1_is_ours_being_faster(unit, ours, peer):
    row = timing.row("x", unit, [1.0, 2.0, 4.0], [3.0, 6.0, 12.0], images=8)
    assert (row["ours"], row["peer"], row["ratio"], row["spread"]) == (ours, peer, 3.0, "3.0 - 3.0")


def test_a_ratio_is_of_one_round():
    # The machine slows down by 10 in the second half: the ratio stays that of each round.
    row = timing.row("x", "ms", [1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0])
    assert row["ratio"] == 2


def test_what_was_not_measured_has_the_same_columns_and_its_reason():
    row = timing.missing("x", "ms", ModuleNotFoundError("No module named 'timm'\nand more"))
    assert list(row) == list(timing.row("x", "ms", [1.0], [1.0]))
    assert row["note"] == "ModuleNotFoundError: No module named 'timm'"
    assert timing.shown([row])[0]["ratio"] == "-"
