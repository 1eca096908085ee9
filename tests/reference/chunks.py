"""Windows in which chunks go on, end and are cut, and what a buffer of n-step transitions would say of them."""

from __future__ import annotations

import torch

from tests.batches import make_batch

STATE, STATE_DIM, ACTION_DIM, NUM = "observation.state", 3, 2, 48


def numbers(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def windows(horizon):
    """A third of the windows goes on, a third ends with a terminal step, and with several steps a third is cut."""
    row_B, position_H = torch.arange(NUM), torch.arange(horizon)
    kind_B, last_B = row_B % (3 if horizon > 1 else 2), 1 + row_B % max(horizon - 1, 1)
    last_B = torch.where(kind_B == 0, horizon - 1, last_B.clamp(max=horizon - 1))
    mask_BH = position_H <= last_B[:, None]
    at_end_BH = position_H == last_B[:, None]
    return make_batch(
        {STATE: numbers(NUM, STATE_DIM, seed=1)},
        numbers(NUM, horizon, ACTION_DIM, seed=2).clamp(-1.5, 1.5),
        mask_BH=mask_BH,
        obs_at={horizon: {STATE: numbers(NUM, STATE_DIM, seed=3)}},
        inside_at={horizon: kind_B == 0},
        rewards_BH=numbers(NUM, horizon, seed=4) * mask_BH,
        terminated_BH=at_end_BH & (kind_B == 1)[:, None],
        truncated_BH=at_end_BH & (kind_B == 2)[:, None],
    )


def as_n_step(batch, scale, discount):
    """Actions on [-1, 1] (NUM, H * A), ends, rewards and discounts of what follows, (NUM, 1) each: row by row, and not by our
    code. ``scale``: the ActionScale of a policy or critic."""
    horizon, samples = batch.mask_BH.shape[1], []
    for row in range(NUM):
        num = int(batch.mask_BH[row].sum())
        ends, goes_on = bool(batch.terminated_BH[row].any()), bool(batch.inside_at[horizon][row])
        counted = num if ends or goes_on else num - 1  # the observation behind a cut is in no log
        reward = sum(discount**i * float(batch.rewards_BH[row, i]) for i in range(counted))
        actions_HA = torch.stack([batch.actions_BHA[row, min(i, num - 1)] for i in range(horizon)])
        samples.append((scale.normalise(actions_HA).flatten(), float(ends), reward, discount**counted))
    actions, ends, rewards, discounts = zip(*samples, strict=True)
    return torch.stack(actions), *(torch.tensor(column)[:, None] for column in (ends, rewards, discounts))
