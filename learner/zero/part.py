"""One part of an algorithm and its DeepSpeed engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import Batch, LossOutput, Part
from algorithms.policies.registry import published
from fleet.errors import ConfigError
from learner.engine import LossFunction, LossModule, trainable
from learner.main import EngineConfig
from learner.ranks import Ranks
from learner.zero.loss import TotalLoss
from learner.zero.state import Shares

ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD)
LEFT_BY_STAGE_3 = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_external_params", "_original_parameters")
BUCKET = 50_000_000  # elements that are exchanged at once; DeepSpeed holds a buffer of as many
WHOLE_BELOW = 100_000  # smaller parameters are whole on every rank in stage 3 too, between updates
HELD = -1  # stands among the modules that use a parameter, so that DeepSpeed does not take it away


class ZeroPart:
    """One part and its DeepSpeed engine. ``trained``: its trained parameters by name. ``sharded``: all its parameters."""

    def __init__(self, name: str, part: Part, config: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        import deepspeed

        module = part.module
        self.trained, self.sharded = trainable(module), list(module.parameters())
        num_trained = sum(p.numel() for p in self.trained.values())
        self.stage = stage_of(config, num_trained)
        base = part.make_optimizer(self.trained.values())
        _check(name, self.stage, base, self.trained.values())
        names = {id(p): key for key, p in self.trained.items()}
        groups = [[names[id(p)] for p in group["params"]] for group in base.param_groups]
        shapes = {key: value.shape for key, value in published(module).items()}
        fixed = {p: p.detach().to("cpu", copy=True) for p in self.sharded if not p.requires_grad}
        lower = config.dtype == "bfloat16" and self.stage > 0
        exact = {key: value.to("cpu", copy=True) for key, value in published(module).items()} if lower else {}
        self._total = TotalLoss(LossModule(name, module, config.dtype), self.trained, self.stage, ranks)
        settings = _deepspeed_config(config, self.stage, num_trained, device)
        self.engine, self._zero, *_ = deepspeed.initialize(model=self._total, optimizer=base, config=settings)
        self._always: list[nn.Parameter] = []
        if self.stage:
            # The scale is set here; what DeepSpeed does about it is to print a line when a step is not made.
            self._zero._update_scale = lambda has_overflow=False: None
        if self.stage == 3:
            own = list(module.parameters(recurse=False))  # which the module's methods use at any time
            for p in own:
                deepspeed.zero.register_external_parameter(self._total, p)
            self._always = list(dict.fromkeys([*own, *(p for p in self.sharded if _persists(p))]))
            self.hold(self._always)
        self._hooks = [
            owner.register_forward_pre_hook(_meet_weights, with_kwargs=True)
            for owner in module.modules()
            if any(p.dtype == torch.bfloat16 for p in owner.parameters(recurse=False))
        ]
        self._shares = Shares(name, module, self.stage, self.trained, shapes, fixed, groups, base, self._zero, device, ranks)
        if exact:  # DeepSpeed has made its float32 weights of bfloat16 ones
            self.load_weights(exact)

    def forward(self, loss: LossFunction, micro: Batch, factor: float, last: bool) -> LossOutput:
        """The loss of some rows; ranks exchange gradients in the backward pass of the ``last`` ones."""
        self.engine.set_gradient_accumulation_boundary(last)
        total = self.engine(loss, micro, factor)
        if last:
            self._total.unused = None
        out, self._total.out = self._total.out, None
        assert out is not None  # its forward has just been run
        return dataclasses.replace(out, sum=total)

    def step(self, divisor: float) -> float:
        """Divides the gradients, clips and changes the weights, unless a gradient is not finite. Returns the norm before
        clipping."""
        if self.stage == 0:
            gradients = [p.grad for p in self.trained.values() if p.grad is not None]
            for gradient in gradients:
                gradient.div_(divisor)
            norm = float(nn.utils.get_total_norm(gradients))
            if math.isfinite(norm):
                self.engine.step()
            else:
                self.engine.zero_grad()
            return norm
        self._zero.override_loss_scale(divisor)
        try:
            applied = self._run_step()
            return float(self.engine.get_global_grad_norm()) if applied else float("inf")
        finally:
            self._zero.override_loss_scale(1.0)

    def skip(self) -> None:
        """Drops the gradients."""
        if self.stage == 0:
            return self.engine.zero_grad()
        # DeepSpeed drops gradients itself where it takes their norm for an overflow, and nowhere else.
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        overflow = torch.tensor(-1.0)
        setattr(self._zero, name, lambda: [overflow] if self.stage == 3 else overflow)
        try:
            self._run_step()
        finally:
            delattr(self._zero, name)

    def _run_step(self) -> bool:
        """Whether it was a step; if not, nothing has changed, DeepSpeed's counters included."""
        counters = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
        before = {name: getattr(self.engine, name) for name in counters}
        self.engine.step()
        applied: bool = self.engine.was_step_applied()
        if not applied:
            for name, value in before.items():
                setattr(self.engine, name, value)
        self._forget_gradients()
        if self.stage == 3:
            self.hold(self._always)
        return applied

    def _forget_gradients(self) -> None:
        """DeepSpeed would take the old gradient of a parameter that the next loss does not use."""
        zero = self._zero
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        for flat, _ in self._shares.flats():
            if flat.grad is not None:
                flat.grad.zero_()
        for old in getattr(zero, "accumulated_grads_in_cpu", {}).values():
            old.zero_()

    def hold(self, parameters: list[nn.Parameter]) -> None:
        """Makes parameters of a stage 3 part whole until ``let_go`` or the next step."""
        if parameters:
            parameters[0].all_gather(param_list=parameters)  # type: ignore[attr-defined]
        for p in parameters:
            p.ds_active_sub_modules.add(HELD)  # type: ignore[attr-defined]

    def let_go(self) -> None:
        """Shards all parameters again but those that are always whole."""
        always = {id(p) for p in self._always}
        rest = [p for p in self.sharded if id(p) not in always]
        for p in rest:
            p.ds_active_sub_modules.discard(HELD)  # type: ignore[attr-defined]
        if rest:
            rest[0].partition(param_list=rest)  # type: ignore[attr-defined]

    def weights(self) -> dict[str, Tensor]:
        """See Shares."""
        return self._shares.weights()

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """See Shares."""
        self._shares.load_weights(saved)
        if self.stage == 3:
            self.hold(self._always)

    def state(self) -> dict[str, Any]:
        """See Shares."""
        return self._shares.state()

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """See Shares."""
        self._shares.load_state(saved)

    def close(self) -> None:
        """Makes the module a plain one, with whole float32 parameters: new objects."""
        module, device = self._shares.module, self._shares.device
        whole = {name: value.to(device) for name, value in self._shares.whole().items()}
        plain = {p: nn.Parameter(whole[name], p.requires_grad) for name, p in module.named_parameters()}
        for hook in self._hooks:
            hook.remove()
        self.engine.destroy()
        for owner in module.modules():
            owner._parameters = {key: p if p is None else plain[p] for key, p in owner._parameters.items()}
            for key in [key for key in owner.__dict__ if key.startswith("ds_") or key in LEFT_BY_STAGE_3]:
                delattr(owner, key)


def stage_of(config: EngineConfig, num_trained: int) -> int:
    """The stage of a part with so many trained parameters."""
    if num_trained < config.shard_above:
        return 0
    return 2 if config.zero_stage == 1 and config.dtype == "bfloat16" else config.zero_stage


def _check(name: str, stage: int, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    if stage and type(optimizer) not in ELEMENTWISE:
        raise ConfigError(
            f"engine.zero_stage = {stage} with {type(optimizer).__name__} for part {name!r}",
            rule=f"a sharded optimizer looks at each element alone: {', '.join(cls.__name__ for cls in ELEMENTWISE)}",
            remedy="engine.zero_stage=0, or engine.name=ddp",
        )
    other = sorted({str(p.dtype) for p in parameters} - {"torch.float32"})
    if stage and other:
        raise ConfigError(
            f"engine.zero_stage = {stage} with parameters of {', '.join(other)} in part {name!r}",
            rule="parameters are float32; engine.dtype says what they are trained in",
        )


def _persists(p: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps a parameter whole after each step."""
    return bool(p.ds_persist)  # type: ignore[attr-defined]


def _meet_weights(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Before a module with bfloat16 weights is called outside of autocast: its inputs become bfloat16 too."""
    weight = next(module.parameters(recurse=False))
    if torch.is_autocast_enabled(weight.device.type):
        return None

    def cast(value: Any) -> Any:
        return value.to(weight.dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value

    return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}


def _deepspeed_config(config: EngineConfig, stage: int, num_trained: int, device: torch.device) -> dict[str, Any]:
    bucket = min(BUCKET, num_trained + num_trained % 2)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": WHOLE_BELOW,
        # It replaces torch's own linear function, everywhere and for good, to save memory on a GPU.
        "memory_efficient_linear": device.type == "cuda",
    }
    if stage and config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,  # DeepSpeed's default is 1.0
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bool(stage) and config.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},
    }
