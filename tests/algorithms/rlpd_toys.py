"""What tests of RLPD share: small policies, and rows of all kinds."""

from __future__ import annotations

import torch
from torch import nn

from algorithms.policies.base import INSTRUCTION
from algorithms.policies.registry import build
from algorithms.rlpd import Rlpd, RlpdConfig
from fleet.batch import Outcome
from fleet.robot import Source
from fleet.spec import STATE
from tests.batches import make_batch

B, H, A, GAMMA = 12, 4, 2, 0.9
SMALL = {"batch_size": B, "utd": 1, "num_critics": 3, "critic": {"width": 16, "num_layers": 2}, "reward": "environment"}
PARTS = ("critic", "policy", "temperature")


def make_policy(family="squashed", **changes):
    torch.manual_seed(0)
    config = {"reads": {STATE: [6]}, "action_dim": A, "horizon": H, "instruction_dim": 3, "width": 16, "num_layers": 1}
    policy = build(family, {**config, **changes})
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def make_rlpd(policy=None, data=None, **changes):
    policy = policy or make_policy()
    torch.manual_seed(1)
    algorithm = Rlpd(policy, RlpdConfig(**{**SMALL, "discount": GAMMA, **changes}), *([data] if data else []))
    with torch.no_grad():  # targets that differ from the critics
        for parameter in algorithm._target.module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return algorithm


def make_rows(seed=0, batch=B, horizon=H, action_dim=A, **fields):
    """Rows of all kinds: whole, terminal at 0 to H - 1, cut at 0 to H - 1."""
    g = torch.Generator().manual_seed(seed)
    kind, k = torch.arange(batch) % 3, torch.arange(batch) % horizon
    position = torch.arange(horizon)
    mask = (position <= k[:, None]) | (kind == 0)[:, None]

    def observe():
        return {STATE: torch.randn(batch, 6, generator=g), INSTRUCTION: torch.randn(batch, 3, generator=g)}

    given = {
        "rewards_BH": torch.randn(batch, horizon, generator=g) * mask,
        "mask_BH": mask,
        "terminated_BH": (position == k[:, None]) & (kind == 1)[:, None],
        "truncated_BH": (position == k[:, None]) & (kind == 2)[:, None],
        "terminated_B": kind == 1,
        "inside_at": {horizon: kind == 0},
        "steps_to_go_B": torch.where(kind == 0, 2 * horizon, k + 1),
        "outcome_B": torch.where(kind == 1, int(Outcome.SUCCESS), int(Outcome.FAILURE)),
        "source_B": torch.tensor([int(Source.DEMO), int(Source.POLICY), int(Source.OPERATOR)])[torch.arange(batch) // 3 % 3],
    }
    obs, after, actions = observe(), observe(), torch.rand(batch, horizon, action_dim, generator=g) * 2 - 1
    return make_batch(obs, actions, obs_at={horizon: after}, **{**given, **fields})


def mean_of(out):
    return out.sum / out.weight


class Says(nn.Module):
    """A critic that says ``value(actions_BHA)`` (K, B), whatever it sees."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, obs, actions_BHA, noise=None):
        return self.value(actions_BHA)


def always(*values):
    return Says(lambda actions_BHA: torch.tensor(values)[:, None].expand(-1, len(actions_BHA)))
