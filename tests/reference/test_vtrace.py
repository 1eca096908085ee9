"""Our V-trace against torchrl's and rlax's, on sequences in which episodes end."""

from __future__ import annotations

import pytest
import torch

from algorithms.vtrace import vtrace

DISCOUNT = 31 / 32  # exact in 32 bits, to which torchrl rounds it
NUM, LENGTH = 16, 12


def sequences():
    """Episodes end in the midst of some rows; values behind a step are those of the next step inside an episode."""
    draw = torch.Generator().manual_seed(3)
    values_BT = torch.randn(NUM, LENGTH + 1, generator=draw, dtype=torch.float64)
    ends_BT = torch.rand(NUM, LENGTH, generator=draw) < 0.2
    cut_BT = ends_BT & (torch.rand(NUM, LENGTH, generator=draw) < 0.5)
    behind_BT = torch.where(cut_BT, torch.randn(NUM, LENGTH, generator=draw, dtype=torch.float64), values_BT[:, 1:])
    assert (cut_BT & ends_BT).any() and (ends_BT & ~cut_BT).any()
    return {
        "log_ratio_BT": 0.7 * torch.randn(NUM, LENGTH, generator=draw, dtype=torch.float64),
        "rewards_BT": torch.randn(NUM, LENGTH, generator=draw, dtype=torch.float64),
        "values_BT": values_BT[:, :-1],
        "next_values_BT": behind_BT,
        "terminated_BT": ends_BT & ~cut_BT,
        "truncated_BT": cut_BT,
        "mask_BT": torch.ones(NUM, LENGTH, dtype=torch.bool),
    }


@pytest.mark.parametrize(("rho_clip", "trace_clip"), [(1.0, 1.0), (2.0, 1.0), (1.5, 0.8)])
def test_against_torchrl(rho_clip, trace_clip):
    functional = pytest.importorskip("torchrl.objectives.value.functional")
    data = sequences()
    ended_BT = data["terminated_BT"] | data["truncated_BT"]
    log_mu_BT, with_feature = torch.zeros(NUM, LENGTH, dtype=torch.float64), lambda value_BT: value_BT[..., None]
    values = (data["log_ratio_BT"], log_mu_BT, data["values_BT"], data["next_values_BT"], data["rewards_BT"])
    advantage_BT1, target_BT1 = functional.vtrace_advantage_estimate(
        DISCOUNT,
        *map(with_feature, (*values, ended_BT, data["terminated_BT"])),
        rho_thresh=rho_clip,
        c_thresh=trace_clip,
    )
    ours = vtrace(**data, discount=DISCOUNT, rho_clip=rho_clip, trace_clip=trace_clip)
    torch.testing.assert_close(ours, (target_BT1[..., 0], advantage_BT1[..., 0]))


@pytest.mark.parametrize("rho_clip", [1.0, 2.0])
def test_against_rlax(rho_clip):
    """rlax has no time limits (a discount of 0 is an end), so all ends are terminations here."""
    rlax = pytest.importorskip("rlax")
    data = sequences()
    data["terminated_BT"], data["truncated_BT"] = (
        data["terminated_BT"] | data["truncated_BT"],
        torch.zeros_like(data["mask_BT"]),
    )
    data["next_values_BT"] = torch.cat([data["values_BT"][:, 1:], data["next_values_BT"][:, -1:]], 1)
    target_BT, advantage_BT = vtrace(**data, discount=DISCOUNT, rho_clip=rho_clip)
    discounts_BT = DISCOUNT * ~data["terminated_BT"]
    for row in range(NUM):
        out = rlax.vtrace_td_error_and_advantage(
            *(data[name][row].numpy() for name in ("values_BT", "next_values_BT", "rewards_BT")),
            discounts_BT[row].double().numpy(),
            data["log_ratio_BT"][row].exp().numpy(),
            clip_rho_threshold=rho_clip,
            clip_pg_rho_threshold=rho_clip,
        )
        theirs = [torch.tensor(value.tolist(), dtype=torch.float64) for value in (out.errors, out.pg_advantage)]
        torch.testing.assert_close([(target_BT - data["values_BT"])[row], advantage_BT[row]], theirs)
