"""Between the fleet's batches and LeRobot's: its own processors, and statistics that travel with the weights.

Shape suffixes: B batch, H chunk length, A action dims.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import DeviceProcessorStep, NormalizerProcessorStep, RenameObservationsProcessorStep
from lerobot.processor.normalize_processor import UnnormalizerProcessorStep
from torch import Tensor, nn

from algorithms.policies.base import TEXT, PolicySpec
from algorithms.policies.normalise import MIN_STD, STILL
from algorithms.policies.statistics import Statistics, joined
from algorithms.policies.text import texts_in
from fleet.errors import PolicyError
from fleet.spec import ACTION

# LeRobot's names of statistics, by its mode of normalisation, and ours.
MODES = {"IDENTITY": {}, "MEAN_STD": {"mean": "mean", "std": "std"}, "MIN_MAX": {"min": "min", "max": "max"}}
MODES["QUANTILES"] = {"q01": "low", "q99": "high"}
# Of images in [0, 1]: those that LeRobot's training takes for datasets, too.
IMAGES = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "min": (0.0,) * 3, "max": (1.0,) * 3}


class Processors(nn.Module):
    """LeRobot's processors of one policy. Their statistics lie in buffers, named after LeRobot's feature and statistic.

    Args:
        config: LeRobot's.
        rename: LeRobot's name of a feature by ours, where they differ.

    Raises:
        PolicyError: A mode of normalisation is not supported, or a tokenizer cannot be had.
    """

    def __init__(self, config: Any, spec: PolicySpec, rename: Mapping[str, str]) -> None:
        super().__init__()
        self._config, self._spec, self._rename = config, spec, dict(rename)
        self._kept: dict[str, tuple[str, str]] = {}  # name of the buffer -> feature, statistic
        for name, feature in {**config.input_features, **config.output_features}.items():
            mode = config.normalization_mapping.get(feature.type.value, "IDENTITY")
            if str(getattr(mode, "value", mode)) not in MODES:
                raise PolicyError(f"policy.normalization_mapping of {name!r} is {mode}", rule=f"one of {sorted(MODES)}")
            for statistic in MODES[str(getattr(mode, "value", mode))]:
                self._keep(name, statistic, feature)
        self._before, self._after = make_processors(config, self._rename)
        for pipeline in (self._before, self._after):  # tensors are where the policy is
            pipeline.steps = [step for step in pipeline.steps if not isinstance(step, DeviceProcessorStep)]

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Raises PolicyError when one is missing, of another shape, or not finite."""
        ours = {theirs: name for name, theirs in self._rename.items()}
        wanted = {name: shape for name, shape in self._spec.vectors.items()} | {ACTION: (self._spec.action_dim,)}
        for name, shape in wanted.items():  # also of features that are not normalised
            joined(statistics, {name: shape}, "mean")
        for buffer, (feature, statistic) in self._kept.items():
            name = ours.get(feature, feature)
            if name in wanted:
                getattr(self, buffer).copy_(self._usable(statistics, name, wanted[name], statistic))

    def load_statistics(self, found: Mapping[str, Tensor]) -> list[str]:
        """Takes those of a checkpoint, named "feature.statistic"; features that have none, or of another size, are returned."""
        lacking = set()
        for buffer, (feature, statistic) in self._kept.items():
            value, own = found.get(f"{feature}.{statistic}"), getattr(self, buffer)
            if value is not None and value.shape == own.shape:
                own.copy_(value)
            elif own.dim() == 1:  # images have a mean and deviation that fits them all
                lacking.add(feature)
        return sorted(lacking)

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """By feature, as LeRobot holds them."""
        found: dict[str, dict[str, Tensor]] = {}
        for buffer, (feature, statistic) in self._kept.items():
            found.setdefault(feature, {})[statistic] = getattr(self, buffer)
        return found

    def before(self, obs: Mapping[str, Tensor], actions_BHA: Tensor | None = None) -> dict[str, Any]:
        """A batch that LeRobot's policy takes; actions are normalised.

        Raises:
            PolicyError: A feature is missing or has another shape, or the instruction is missing.
        """
        batch: dict[str, Any] = {}
        for name, shape in {**self._spec.reads, **self._spec.conditions}.items():
            if name not in obs or obs[name].shape[1:] != shape:
                said = "is missing" if name not in obs else f"is {tuple(obs[name].shape[1:])}"
                raise PolicyError(f"{name!r} {said} in an observation", rule=f"the policy reads {name!r} of shape {shape}")
        for name in self._spec.reads:
            image = name in self._spec.images
            batch[name] = obs[name].permute(0, 3, 1, 2).float() / 255 if image else obs[name].float()
        if TEXT in self._spec.conditions:
            batch["task"] = texts_in(obs[TEXT])
        if actions_BHA is not None:
            batch[ACTION] = actions_BHA.float()
        self._synchronise()
        done = self._before(batch)
        return {name: value for name, value in done.items() if isinstance(value, Tensor)}

    def after(self, actions_BHA: Tensor) -> Tensor:
        """The robot's units, in float32."""
        self._synchronise()
        restored_BHA: Tensor = self._after(actions_BHA.float())
        return restored_BHA

    def _keep(self, name: str, statistic: str, feature: Any) -> None:
        buffer = f"{name}.{statistic}".replace(".", "/")
        if feature.type.value == "VISUAL":
            if statistic not in IMAGES:
                raise PolicyError(f"images are normalised by {statistic!r}", rule=f"one of {sorted(IMAGES)}")
            value = torch.tensor(IMAGES[statistic]).reshape(-1, 1, 1)
        else:
            first = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}[statistic]
            value = torch.full(tuple(feature.shape), first)
        self.register_buffer(buffer, value)
        self._kept[buffer] = (name, statistic)

    def _usable(self, statistics: Mapping[str, Statistics], name: str, shape: tuple[int, ...], statistic: str) -> Tensor:
        """A statistic by LeRobot's name. What hardly varies is shifted, not blown up: LeRobot divides by what it is given."""
        least = STILL if name == ACTION else MIN_STD

        def of(what: str) -> Tensor:
            return torch.from_numpy(joined(statistics, {name: shape}, what)).reshape(shape)

        if statistic in ("mean", "std"):
            value = of(statistic)
            still = torch.ones_like(value) if name == ACTION else torch.full_like(value, MIN_STD)
            return torch.where(value > least, value, still) if statistic == "std" else value
        low, high = (of(what) for what in (("low", "high") if statistic in ("q01", "q99") else ("min", "max")))
        centre, half = (low + high) / 2, (high - low) / 2
        half = torch.where(half > least, half, torch.ones_like(half))
        return centre - half if statistic in ("q01", "min") else centre + half

    def _synchronise(self) -> None:
        """The steps' statistics are what the buffers hold now: these are loaded, averaged, and moved to devices."""
        state = {f"{feature}.{name}": getattr(self, buffer) for buffer, (feature, name) in self._kept.items()}
        for step in (*self._before.steps, *self._after.steps):
            if isinstance(step, NormalizerProcessorStep | UnnormalizerProcessorStep):
                step.load_state_dict(state)


def make_processors(config: Any, rename: Mapping[str, str], statistics: Any = None) -> tuple[Any, Any]:
    """LeRobot's pipelines before and after a policy, from LeRobot's names or from ours.

    Raises:
        PolicyError: A tokenizer is neither in a folder nor in the hub's cache.
    """
    try:
        before, after = make_pre_post_processors(config, dataset_stats=statistics)
    except OSError as error:
        raise PolicyError(
            f"the tokenizer of {config.type!r} cannot be had: {str(error).splitlines()[0]}",
            rule="whoever builds the policy has its tokenizer",
            remedy="let this machine download it once, or name a local folder",
        ) from None
    for step in before.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            step.rename_map = dict(rename)
    return before, after


def as_numpy(statistics: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, np.ndarray]]:
    """On the CPU, for LeRobot's files."""
    return {name: {key: value.cpu().numpy() for key, value in inner.items()} for name, inner in statistics.items()}
