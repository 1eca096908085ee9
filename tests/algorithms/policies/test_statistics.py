"""Statistics against numpy's own, and what is refused."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from algorithms.policies.statistics import Statistics, joined
from fleet.errors import PolicyError


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num=st.integers(1, 40), width=st.integers(1, 3))
def test_weighted_statistics_are_numpys(data, num, width):
    values = data.draw(arrays(np.float64, (num, width), elements=st.floats(-1e3, 1e3, width=32)))
    weights = data.draw(arrays(np.float64, num, elements=st.integers(1, 5)))
    found = Statistics.of(values, weights)
    repeated = np.repeat(values, weights.astype(int), axis=0)  # a weight of 3 is a step that was seen three times
    np.testing.assert_allclose(found.mean, repeated.mean(0), atol=1e-9)
    np.testing.assert_allclose(found.std, repeated.std(0), atol=1e-7)
    for q, quantile in ((0.01, found.low), (0.99, found.high)):
        np.testing.assert_array_equal(quantile, np.quantile(repeated, q, axis=0, method="inverted_cdf"))
    np.testing.assert_array_equal((found.min, found.max), (values.min(0), values.max(0)))


def test_quantiles_leave_outliers_out_and_constants_have_no_deviation():
    values = np.concatenate([np.linspace(-1, 1, 998), [500.0, -500.0]])[:, None] * [1.0, 0.0]
    found = Statistics.of(values)
    assert found.low[0] == pytest.approx(-0.98, abs=0.01) and found.high[0] == pytest.approx(0.98, abs=0.01)
    assert (found.min[0], found.max[0]) == (-500, 500)
    assert found.std[1] == 0 and found.low[1] == found.high[1] == found.mean[1] == 0


def test_matrices_keep_their_shape_and_steps_without_weight_do_not_count():
    values = np.arange(12.0).reshape(3, 2, 2)
    found = Statistics.of(values, np.array([0.0, 1.0, 0.0]))
    np.testing.assert_array_equal(found.mean, values[1])
    assert found.low.shape == (2, 2) and (found.low == values[1]).all()


def test_what_does_not_fit_is_refused_by_name():
    good = Statistics.of(np.ones((4, 2)))
    assert joined({"a": good, "b": good}, {"b": (2,), "a": (2,)}, "mean").tolist() == [1, 1, 1, 1]
    with pytest.raises(PolicyError, match="'b' are missing"):
        joined({"a": good}, {"a": (2,), "b": (2,)}, "mean")
    with pytest.raises(PolicyError, match=r"'a' have mean of shape \(2,\).*shape \(3,\)"):
        joined({"a": good}, {"a": (3,)}, "mean")
    with pytest.raises(PolicyError, match="'a' have std"):
        joined({"a": dataclasses.replace(good, std=np.array([1.0, np.inf]))}, {"a": (2,)}, "std")
