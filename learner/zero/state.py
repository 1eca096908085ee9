"""Weights and optimizer state of one part by parameter name, whole, out of the shares of the ranks and back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.registry import published
from fleet.errors import LearnerError
from learner.engine import load_optimizer, optimizer_state, require_same_optimizer
from learner.ranks import Ranks

SHARED_STATE = ("step", "mu_product")  # optimizer state that is one number for all elements


@dataclasses.dataclass
class Shares:
    """What a rank has of one part.

    Args:
        name: Of the part.
        trained: Its trained parameters by name.
        shapes: Of what is learnt and kept (``published``) when it was whole.
        fixed: Parameters that are not trained, and their whole values as they were before any bfloat16.
        groups: Names by parameter group of the optimizer.
        base: The part's own optimizer; in a sharded part it steps flat tensors, see ``flats``.
        zero: DeepSpeed's, around it.
    """

    name: str
    module: nn.Module
    stage: int
    trained: Mapping[str, nn.Parameter]
    shapes: Mapping[str, torch.Size]
    fixed: dict[nn.Parameter, Tensor]
    groups: list[list[str]]
    base: torch.optim.Optimizer
    zero: Any
    device: torch.device
    ranks: Ranks

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters in float32, and buffers, by name, without modules that are frozen for good."""
        return self._whole_of(published(self.module, keep_vars=True))

    def whole(self) -> dict[str, Tensor]:
        """The same of everything in the module."""
        return self._whole_of(self.module.state_dict(keep_vars=True))

    def _whole_of(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        whole: dict[int, Tensor] = {}
        named: dict[str, Tensor] = {}
        for name, value in state.items():
            if isinstance(value, nn.Parameter):
                if id(value) not in whole:
                    whole[id(value)] = self._whole(value)
                value = whole[id(value)]
            named[name] = value.detach()
        return named

    def _whole(self, p: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if p in self.fixed:
            return self.fixed[p]
        value: Tensor = p.detach().clone() if self.stage == 0 else safe_get_full_fp32_param(p)
        return value.cpu()

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Takes what ``weights`` returned."""
        wrong = sorted(set(saved) ^ set(self.shapes)) or [k for k, v in saved.items() if v.shape != self.shapes[k]]
        if wrong:
            raise LearnerError(f"part {self.name!r} does not fit: {', '.join(wrong)}"[:500], rule="same modules, same shapes")
        if self.stage == 3:
            self.zero._partition_all_parameters()
        with torch.no_grad():
            for name, value in published(self.module, keep_vars=True).items():
                if isinstance(value, nn.Parameter) and value in self.fixed:
                    self.fixed[value].copy_(saved[name])
                elif isinstance(value, nn.Parameter) and self.stage:
                    self._set(value, saved[name])
                else:
                    value.copy_(saved[name])
        self._weights_changed()

    def _set(self, p: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Writes this rank's share of a float32 parameter, or of its optimizer state ``key``."""
        from deepspeed import utils

        value = value.to(self.device, torch.float32)
        if self.stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(p, value)
            else:
                utils.safe_set_full_optimizer_state(p, value, key)
            return
        size = p.ds_tensor.numel()  # type: ignore[attr-defined]
        whole = nn.functional.pad(value.flatten(), (0, size * self.ranks.size - value.numel()))
        mine = whole[size * self.ranks.rank :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(p, mine)
        else:
            utils.safe_set_local_optimizer_state(p, mine, key)

    def _weights_changed(self) -> None:
        """Brings what the forward pass uses in line with the float32 parameters."""
        import deepspeed

        if self.stage in (1, 2):
            self.zero.update_lp_params()
        elif self.stage == 3:
            for i in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(i)
        # Does nothing with parameters that are not sharded.
        with deepspeed.zero.GatheredParameters([*self.fixed], modifier_rank=0), torch.no_grad():
            for p, value in self.fixed.items():
                p.copy_(value)

    def flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The flat tensors that a sharded optimizer steps, each with the parameters that it holds a share of."""
        zero = self.zero
        if self.stage == 3:
            return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))

    def state(self) -> dict[str, Any]:
        """See ``learner.engine.optimizer_state``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.stage:
            return optimizer_state(self.base, self.trained)
        names = {p: name for name, p in self.trained.items()}
        state: dict[str, dict[str, Any]] = {}
        for flat, parameters in self.flats():
            for key, value in self.base.state.get(flat, {}).items():
                cut = isinstance(value, Tensor) and value.shape == flat.shape
                for p in parameters:
                    own = safe_get_full_optimizer_state(p, key).cpu() if cut else copy.deepcopy(value)
                    state.setdefault(names[p], {})[key] = own
        groups = [{**group, "params": names} for group, names in zip(self.base.param_groups, self.groups, strict=True)]
        return {"kind": type(self.base).__name__, "state": state, "groups": groups}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Takes what ``state`` of any engine returned."""
        if not self.stage:
            return load_optimizer(self.base, self.trained, saved, self.name)
        require_same_optimizer(saved, self.base, [name for group in self.groups for name in group], self.name)
        names, state = {p: name for name, p in self.trained.items()}, saved["state"]
        self.base.state.clear()
        for flat, parameters in self.flats():
            entries = [state[names[p]] for p in parameters if names[p] in state]
            # One counter of steps stands for all of them; a parameter that no loss used has none, or a smaller one.
            for key, value in max(entries, key=lambda entry: float(entry.get("step", 0)), default={}).items():
                shared = key in SHARED_STATE or not isinstance(value, Tensor)
                self.base.state[flat][key] = copy.deepcopy(value) if shared else torch.zeros_like(flat)
        if self.stage < 3 and self.base.state:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
        for p, name in names.items():
            for key, value in state.get(name, {}).items():
                if isinstance(value, Tensor) and key not in SHARED_STATE:
                    self._set(p, value, key)
