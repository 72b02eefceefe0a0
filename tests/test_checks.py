"""One voice for errors and warnings."""

import warnings

import numpy as np
import pytest

import kerastrip
from kerastrip import _checks


@pytest.mark.parametrize(
    ("check", "accepted", "refused", "error"),
    [
        (_checks.text, ["", "a"], [None, b"a", 3], TypeError),
        (_checks.boolean, [True, False], [1, None, np.True_], TypeError),
        (_checks.integer, [3, np.uint8(3)], [True, np.True_, 3.0, "3"], TypeError),
        (_checks.integer64, [2**63 - 1, -(2**63)], [2**63, -(2**63) - 1], ValueError),
        (_checks.number, [3, np.float32(0.5)], [True, "3", None], TypeError),
        (_checks.number, [1e300], [float("nan"), float("inf")], ValueError),
    ],
)
def test_a_check_gives_the_value_back_or_names_the_argument(
    check, accepted, refused, error
):
    for value in accepted:
        assert check("size", value) == value
    for value in refused:
        with pytest.raises(error, match=r"Invalid value for `size`: expected .* rece"):
            check("size", value)


def test_a_warning_points_at_the_line_of_the_user():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kerastrip.PKSampler(
            np.zeros((9, 2)),
            [0, 0, 0, 0, 1, 1, 1, 1, 2],
            classes_per_batch=2,
            samples_per_class=2,
        )
    (warning,) = caught
    assert "left out: 2" in str(warning.message)
    assert warning.filename == __file__
