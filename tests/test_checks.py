"""One voice for errors and warnings."""

import warnings

import numpy as np

import kerastrip


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
