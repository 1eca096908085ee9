"""V-trace: golden values, its two limits, ends of episodes, padding."""

from __future__ import annotations

import pytest
import torch

from algorithms.vtrace import vtrace
from fleet.errors import ConfigError

NO = torch.zeros(1, 3, dtype=torch.bool)


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


GOLDEN = {
    "log_ratio_BT": row(2.0, 0.5, 1.0).log(),
    "rewards_BT": row(0.0, 0.0, 1.0),
    "values_BT": row(0.5, 0.4, 0.3),
    "next_values_BT": row(0.4, 0.3, 0.2),
    "terminated_BT": NO,
    "truncated_BT": NO,
    "mask_BT": ~NO,
}


def check(expected_target, expected_advantage, discount=0.9, **changes):
    target_BT, advantage_BT = vtrace(**{**GOLDEN, **changes}, discount=discount)
    torch.testing.assert_close(target_BT, row(*expected_target), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(advantage_BT, row(*expected_advantage), rtol=1e-6, atol=1e-12)


def test_golden_values():
    check((0.6579, 0.7310, 1.1800), (0.1579, 0.3310, 0.8800))


def test_of_the_same_policy_it_is_the_n_step_return():
    check((0.9558, 1.062, 1.18), (0.4558, 0.662, 0.88), log_ratio_BT=row(0.0, 0.0, 0.0))


def test_an_action_that_the_policy_would_never_take_teaches_nothing():
    check((0.5, 0.4, 0.3), (0.0, 0.0, 0.0), log_ratio_BT=row(-torch.inf, -torch.inf, -torch.inf))


def test_a_ratio_beyond_all_numbers_counts_as_the_clip():
    check((0.6579, 0.7310, 1.1800), (0.1579, 0.3310, 0.8800), log_ratio_BT=row(1e6, 0.5, 1.0).log() * row(1e6, 1, 1))


def test_a_terminated_episode_has_no_value_behind_it_and_a_cut_one_has():
    ends = torch.tensor([[False, True, False]])
    # Step 1 is the last of its episode: nothing of step 2 reaches it, and step 0 sees step 1's target.
    check((0.5 - 0.5 + 0.9 * 0.2, 0.2, 1.18), (-0.32, -0.2, 0.88), terminated_BT=ends)
    cut_target = 0.4 + 0.5 * (0.9 * 0.3 - 0.4)
    check((0.9 * cut_target, cut_target, 1.18), (0.9 * cut_target - 0.5, cut_target - 0.4, 0.88), truncated_BT=ends)


def test_padding_may_hold_anything():
    mask_BT = torch.tensor([[True, True, False]])
    garbage = {name: GOLDEN[name].clone() for name in ("log_ratio_BT", "rewards_BT", "values_BT", "next_values_BT")}
    for value_BT in garbage.values():
        value_BT[:, 2] = torch.nan
    target = 0.4 + 0.5 * (0.9 * 0.3 - 0.4)
    expected = (0.9 * target, target, 0.0), (0.9 * target - 0.5, target - 0.4, 0.0)
    check(*expected, mask_BT=mask_BT, **garbage)
    check(*expected, mask_BT=mask_BT, terminated_BT=torch.tensor([[False, False, True]]), **garbage)


def test_no_gradient_flows():
    values_BT = GOLDEN["values_BT"].clone().requires_grad_()
    assert not any(out.requires_grad for out in vtrace(**{**GOLDEN, "values_BT": values_BT}, discount=0.9))


@pytest.mark.parametrize(
    "setting", [{"discount": 1.1}, {"discount": 1.0, "rho_clip": 0.5}, {"discount": 1.0, "trace_clip": 0.0}]
)
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(ConfigError, match="rho_clip"):
        vtrace(**GOLDEN, **setting)
