"""Observations and actions on the scale that networks learn on. The numbers lie in buffers: they travel with the weights.

Shape suffixes: B batch, H chunk length, A action dims, S joined observation dims.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from algorithms.policies.statistics import Statistics, joined
from fleet.errors import PolicyError
from fleet.spec import ACTION, RobotSpec

MIN_STD = 1e-2  # features that hardly vary in the start data are divided by this at least
MAX_NORMALISED = 5.0  # what is far from the start data is clipped, so that it cannot blow up the output
STILL = 1e-6  # an action dimension whose range is below this does not move: it is shifted, not scaled
FAR = 2.0  # times the robot's range: actions that were trained on cannot be meant for a robot whose bounds they pass so far


def full_precision(like: Tensor) -> torch.autocast:
    """What is computed inside on the device of ``like`` is float32, also where the caller trains in another precision: sums of
    squares, densities and roundings to tokens would be of other numbers."""
    return torch.autocast(like.device.type, enabled=False)


class Normaliser(nn.Module):
    """Joins vector features and brings each element to mean 0, deviation 1, clipped to ``MAX_NORMALISED``.

    Args:
        shapes: Of the features, by name.
        select: Elements that are read of a flattened feature, by its name: the gripper alone, where a simulator's state holds
            the objects too. Features that are not named are read whole; an empty list leaves a feature out.

    Raises:
        PolicyError: ``select`` names another feature, or elements that it does not have.
    """

    mean_S: Tensor
    std_S: Tensor
    chosen_S: Tensor | None

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], select: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__()
        self.shapes = dict(shapes)
        chosen = _places(self.shapes, select or {})
        self.size = len(chosen)
        self.register_buffer("mean_S", torch.zeros(self.size))
        self.register_buffer("std_S", torch.ones(self.size))
        self.register_buffer("chosen_S", torch.tensor(chosen) if select else None, persistent=False)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one is missing, of another shape, or not finite."""
        mean, std = (torch.from_numpy(joined(statistics, self.shapes, what)) for what in ("mean", "std"))
        self.mean_S.copy_(self._choose(mean))
        self.std_S.copy_(self._choose(std)).clamp_(min=MIN_STD)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, S), in the dtype of the buffers.

        Raises:
            PolicyError: A feature is missing, or has another shape.
        """
        for name, shape in self.shapes.items():
            if name not in obs or obs[name].shape[1:] != shape:
                said = "is missing" if name not in obs else f"is {tuple(obs[name].shape[1:])}"
                raise PolicyError(f"{name!r} {said} in an observation", rule=f"the policy reads {name!r} of shape {shape}")
        if not self.size:
            return self.mean_S.new_zeros(len(next(iter(obs.values()))), 0)
        joined_BS = torch.cat([obs[name].flatten(1).to(self.mean_S.dtype) for name in self.shapes], 1)
        return ((self._choose(joined_BS) - self.mean_S) / self.std_S).clamp(-MAX_NORMALISED, MAX_NORMALISED)

    def _choose(self, joined: Tensor) -> Tensor:
        return joined if self.chosen_S is None else joined.index_select(-1, self.chosen_S.to(joined.device))


def _places(shapes: Mapping[str, tuple[int, ...]], select: Mapping[str, Sequence[int]]) -> list[int]:
    """Of the chosen elements among all joined ones."""
    for name in select:
        if name not in shapes:
            raise PolicyError(
                f"select names {name!r}, which the policy does not read", remedy=f"it reads the vectors {sorted(shapes)}"
            )
    places: list[int] = []
    start = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        wanted = [int(i) for i in select.get(name, range(size))]
        if any(not 0 <= i < size for i in wanted) or len(set(wanted)) < len(wanted):
            raise PolicyError(
                f"select[{name!r}] = {wanted}", rule=f"different elements of {size}, counted from 0 in the flattened feature"
            )
        places += [start + i for i in wanted]
        start += size
    return places


class ActionScale(nn.Module):
    """Maps the 1 % to 99 % range of the data's actions to [-1, 1], by dimension; the identity until statistics are set."""

    center_A: Tensor
    half_A: Tensor

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.register_buffer("center_A", torch.zeros(action_dim))
        self.register_buffer("half_A", torch.ones(action_dim))

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when those of "action" are missing, of another shape, or not finite."""
        shapes = {ACTION: (self.action_dim,)}
        low = torch.from_numpy(joined(statistics, shapes, "low"))
        high = torch.from_numpy(joined(statistics, shapes, "high"))
        half = (high - low) / 2
        self.center_A.copy_((high + low) / 2)
        self.half_A.copy_(torch.where(half > STILL, half, torch.ones_like(half)))

    def normalise(self, actions_BHA: Tensor) -> Tensor:
        """Robot's units -> about [-1, 1]. In float32."""
        return (actions_BHA.float() - self.center_A.float()) / self.half_A.float()

    def restore(self, scaled_BHA: Tensor) -> Tensor:
        """The reverse of ``normalise``, in float32."""
        return scaled_BHA.float() * self.half_A.float() + self.center_A.float()

    def check_robot(self, spec: RobotSpec) -> None:
        """Raises PolicyError when actions like those trained on lie far outside of what the robot accepts: another unit,
        another robot."""
        low, high = spec.action.low, spec.action.high
        if low is None or high is None:
            return
        reach = FAR * (high - low)
        first, last = (self.center_A - self.half_A).min().item(), (self.center_A + self.half_A).max().item()
        if first < low - reach or last > high + reach:
            raise PolicyError(
                f"the policy was trained on actions from {first:.4g} to {last:.4g}",
                rule=f"robot type {spec.robot_type!r} accepts 'action' from {low:.4g} to {high:.4g}, unit {spec.action.unit!r}",
                remedy="use a policy for this robot and its units",
            )
