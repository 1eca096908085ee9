"""ZeRO 0 to 3 (arXiv 1910.02054) by DeepSpeed: ranks share optimizer state, gradients and weights among them.

Each part is a DeepSpeed engine of its own over the part's LossModule. DeepSpeed makes means over ranks of what is summed here;
its loss scale, set between the last backward pass and the step, turns them into the mean over the summed weight. DeepSpeed's
checkpoints are pickles and are not used: weights and optimizer state are put together by parameter name.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from algorithms.base import Algorithm, Batch, LossOutput, Part
from fleet.errors import ConfigError, LearnerError
from learner.engine import (
    LossFunction,
    LossModule,
    Numbers,
    RankSums,
    Timed,
    load_optimizer,
    num_micro_batches,
    optimizer_state,
    require_finite,
    require_same_parameters,
    require_same_parts,
    split_micro,
    trainable,
    training_only,
    untimed,
)
from learner.main import EngineConfig
from learner.memory import memory_errors
from learner.modules import prepare_module
from learner.ranks import Ranks

ELEMENTWISE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SGD)
BUCKET = 50_000_000  # elements that are exchanged at once; DeepSpeed holds a buffer of as many
SHARED_STATE = ("step", "mu_product")  # optimizer state that is one number for all elements
LEFT_BY_STAGE_3 = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "_external_params", "_original_parameters")
WHOLE_BELOW = 100_000  # smaller parameters are whole on every rank in stage 3 too, between updates
HELD = -1  # stands among the modules that use a parameter, so that DeepSpeed does not take it away


class DeepSpeedEngine:
    """Implements ``learner.engine.Engine``.

    With bfloat16, parts that are sharded have bfloat16 weights, and float32 ones beside them which the optimizer changes and
    which ``weights`` returns; stage 1 is then carried out as stage 2, since DeepSpeed's own stage 1 keeps a whole float32
    gradient on every rank. Parts that are not sharded (stage 0) keep float32 weights.

    ``prepare`` and ``after_step`` may call the trained modules, without gradients. A parameter that no loss used has a gradient
    of zero: unlike with plain torch, momentum and weight decay go on.

    Args:
        algorithm: Its parts and frozen modules are moved to ``device``; frozen ones stop requiring gradients. From here on the
            parts' modules belong to this engine, until ``close``.
        config: Its name is not looked at.

    Raises:
        ConfigError: A part cannot be trained so.
    """

    def __init__(self, algorithm: Algorithm, config: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        _start(device, ranks)
        for module in algorithm.frozen.values():
            module.to(device).requires_grad_(False)
        self._modules = {name: part.module.to(device) for name, part in algorithm.parts.items()}
        for module in self._modules.values():
            prepare_module(module, config)
        self._parts = {name: _ZeroPart(name, part, config, device, ranks) for name, part in algorithm.parts.items()}
        self._trained: dict[str, Mapping[str, nn.Parameter]] = {name: part.trained for name, part in self._parts.items()}
        self._sum_over_ranks = RankSums(ranks)
        self._per_sample: dict[str, list[Tensor]] = {}

    def update(self, part: str, loss: LossFunction, batch: Batch, timed: Timed = untimed) -> dict[str, float]:
        """See Engine."""
        zero = self._parts[part]
        with memory_errors(self._config, self._ranks, len(batch.actions_BHA)):
            with training_only(part, self._trained):
                numbers = self._backward(part, loss, batch, timed)
            with timed("optimizer"):
                numbers = self._sum_over_ranks(part, numbers)
                weight, total = float(numbers.weight), float(numbers.loss)
                wanted = weight > 0 and math.isfinite(weight) and math.isfinite(total)
                norm = 0.0 if weight == 0 else math.nan
                if wanted:
                    norm = zero.step(weight / self._ranks.size)
                else:
                    zero.skip()
                read = numbers.read(torch.tensor(norm, device=self._device))
                require_finite(part, read)
        return read

    def _backward(self, part: str, loss: LossFunction, batch: Batch, timed: Timed) -> Numbers:
        """Gradients of the summed loss, and what the losses said."""
        numbers, zero = Numbers(self._device), self._parts[part]
        per_sample = self._per_sample[part] = []
        num = num_micro_batches(len(batch.actions_BHA), self._config.micro_batch, self._ranks)
        for i, (micro, rows) in enumerate(split_micro(batch, num)):
            with timed("forward"):
                out = zero.forward(loss, micro, batch.shard_weight if rows else 0.0, last=i == num - 1)
            with timed("backward"):
                zero.engine.backward(out.sum, scale_wrt_gas=False)
            numbers.add(out)
            per_sample.append(out.per_sample_B[:rows])
        return numbers

    def per_sample(self, part: str) -> Tensor:
        """See Engine. Copied when it is asked for."""
        return torch.cat(self._per_sample[part]).float().cpu()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See Engine. In a sharded part with bfloat16 they are the bfloat16 ones. The trained modules may be called in here."""
        parts = [part for part in self._parts.values() if part.stage == 3]
        for part in parts:
            part.hold(part.sharded)
        try:
            yield
        finally:
            for part in parts:
                part.let_go()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See Engine. Parameters are copies on the CPU."""
        return {name: part.weights() for name, part in self._parts.items()}

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See Engine."""
        for name, part in self._parts.items():
            part.load_weights(weights.get(name, {}))

    def state(self) -> dict[str, Any]:
        """See Engine. The tensors are copies on the CPU."""
        return {name: part.state() for name, part in self._parts.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Engine."""
        require_same_parts(state, self._parts)
        for name, part in self._parts.items():
            part.load_state(state[name])

    def close(self) -> None:
        """Gives the modules back as plain ones, with whole float32 parameters (new objects). Call it on all ranks before
        another algorithm or engine is made of the same modules."""
        for part in self._parts.values():
            part.close()


class _Total(nn.Module):
    """What DeepSpeed wraps: it looks for tensors in what a module takes and returns, so only the summed loss goes through.

    Up to stage 1 a parameter that the loss did not use gets a gradient of zeros, as ranks exchange the gradients they have.
    From stage 2 on they exchange while the backward pass runs, in its order, so all must use the same parameters.
    """

    def __init__(self, inner: LossModule, trained: Mapping[str, nn.Parameter], stage: int, ranks: Ranks) -> None:
        super().__init__()
        self.inner = inner
        self.out: LossOutput | None = None
        self._trained, self._stage, self._ranks = trained, stage, ranks
        self.unused: list[str] | None = None  # in the update's micro-batches so far; None before the first

    def forward(self, loss: LossFunction, micro: Batch, factor: float) -> Tensor:
        self.out = out = self.inner.forward(loss, micro, factor)  # past its hooks: it has no parameters of its own
        used = _used(out.sum)
        unused = [name for name, p in self._trained.items() if id(p) not in used]
        total: Tensor = out.sum
        if self._stage >= 2:
            self._require_alike(unused)
        elif unused:
            total = _WithZeros.apply(total, *(self._trained[name] for name in unused))
        return total

    def _require_alike(self, unused: list[str]) -> None:
        before, self.unused = self.unused if self.unused is not None else unused, unused
        differ = before != unused
        table = self._ranks.gather([differ, zlib.crc32(json.dumps(unused).encode())])
        if differ or (table != table[0]).any():
            everybody = [before, *(json.loads(data) for data in self._ranks.gather_bytes(json.dumps(unused).encode()))]
            names = [name for name in self._trained if 0 < sum(name in one for one in everybody) < len(everybody)]
            raise LearnerError(
                f"a loss uses {', '.join(names)} in some rows only"[:400],
                rule="from stage 2 on a loss uses the same parameters on all ranks and in all micro-batches",
                remedy="engine.zero_stage=1, or engine.name=ddp",
            )


class _WithZeros(torch.autograd.Function):
    """Leaves a total as it is; the gradient of every parameter is zeros."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], *(torch.zeros_like(p) for p in ctx.parameters)


def _used(total: Tensor) -> set[int]:
    """``id`` of each parameter that a loss depends on."""
    seen, todo, found = set(), [total.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [function for function, _ in node.next_functions]
    return found


class _ZeroPart:
    """One part and its DeepSpeed engine. ``trained``: its trained parameters by name. ``sharded``: all its parameters."""

    def __init__(self, name: str, part: Part, config: EngineConfig, device: torch.device, ranks: Ranks) -> None:
        import deepspeed

        self._name, self._module, self._device, self._ranks = name, part.module, device, ranks
        self.trained = trainable(part.module)
        self.sharded = list(part.module.parameters())
        self._shapes = {key: value.shape for key, value in part.module.state_dict().items()}
        self._fixed = {p: p.detach().clone() for p in self.sharded if not p.requires_grad}
        num_trained = sum(p.numel() for p in self.trained.values())
        self._always: list[nn.Parameter] = []
        self.stage = config.zero_stage if num_trained >= config.shard_above else 0
        if self.stage == 1 and config.dtype == "bfloat16":
            self.stage = 2
        optimizer = part.make_optimizer(self.trained.values())
        self._check(optimizer)
        names = {id(p): key for key, p in self.trained.items()}
        self._groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._total = _Total(LossModule(name, part.module, config.dtype), self.trained, self.stage, ranks)
        self.engine, *_ = deepspeed.initialize(
            model=self._total, optimizer=optimizer, config=_deepspeed_config(config, self.stage, num_trained, device)
        )
        self._optimizer, self._base = self.engine.optimizer, optimizer
        # The scale is set here; what DeepSpeed does about it is to print a line when a step is not made.
        self._optimizer._update_scale = lambda has_overflow=False: None
        if self.stage < 3:
            for p, value in self._fixed.items():
                p.data = value  # they are not trained, so bfloat16 would lose what float32 has
        else:
            own = list(part.module.parameters(recurse=False))  # which the module's methods use at any time
            for p in own:
                deepspeed.zero.register_external_parameter(self._total, p)
            self._always = own + [p for p in self.sharded if p.ds_persist and all(p is not q for q in own)]  # type: ignore[attr-defined]
            self.hold(self._always)
        self._hooks = [
            module.register_forward_pre_hook(_meet_weights, with_kwargs=True)
            for module in part.module.modules()
            if any(p.dtype == torch.bfloat16 for p in module.parameters(recurse=False))
        ]

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        if self.stage and type(optimizer) not in ELEMENTWISE:
            raise ConfigError(
                f"engine.zero_stage = {self.stage} with {type(optimizer).__name__} for part {self._name!r}",
                rule=f"a sharded optimizer looks at each element alone: {', '.join(cls.__name__ for cls in ELEMENTWISE)}",
                remedy="engine.zero_stage=0, or engine.name=ddp",
            )
        other = sorted({str(p.dtype) for p in self.trained.values()} - {"torch.float32"})
        if self.stage and other:
            raise ConfigError(
                f"engine.name = 'deepspeed' with parameters of {', '.join(other)} in part {self._name!r}",
                rule="parameters are float32; engine.dtype says what they are trained in",
            )

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
        self._optimizer.override_loss_scale(divisor)
        try:
            applied = self._run_step()
            return float(self.engine.get_global_grad_norm()) if applied else float("inf")
        finally:
            self._optimizer.override_loss_scale(1.0)

    def skip(self) -> None:
        """Drops the gradients."""
        if self.stage == 0:
            return self.engine.zero_grad()
        # DeepSpeed drops gradients itself where it takes their norm for an overflow, and nowhere else.
        name = "_get_norm_groups" if self.stage == 3 else "scaled_global_norm"
        overflow = torch.tensor(-1.0)
        setattr(self._optimizer, name, lambda: [overflow] if self.stage == 3 else overflow)
        try:
            self._run_step()
        finally:
            delattr(self._optimizer, name)

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
        zero = self._optimizer
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        for flat, _ in self._flats():
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
        """Whole parameters in float32, and buffers, by name."""
        whole: dict[int, Tensor] = {}
        named: dict[str, Tensor] = {}
        for name, value in self._module.state_dict(keep_vars=True).items():
            if isinstance(value, nn.Parameter):
                if id(value) not in whole:
                    whole[id(value)] = self._whole(value)
                value = whole[id(value)]
            named[name] = value.detach()
        return named

    def _whole(self, p: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if p in self._fixed:
            return self._fixed[p]
        value: Tensor = p.detach().clone() if self.stage == 0 else safe_get_full_fp32_param(p)
        return value.cpu()

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Takes what ``weights`` returned."""
        wrong = sorted(set(saved) ^ set(self._shapes)) or [k for k, v in saved.items() if v.shape != self._shapes[k]]
        if wrong:
            raise LearnerError(f"part {self._name!r} does not fit: {', '.join(wrong)}"[:500], rule="same modules, same shapes")
        if self.stage == 3:
            self._optimizer._partition_all_parameters()
        with torch.no_grad():
            for name, value in self._module.state_dict(keep_vars=True).items():
                if value in self._fixed:
                    self._fixed[value].copy_(saved[name])
                elif isinstance(value, nn.Parameter) and self.stage:
                    self._set(value, saved[name])
                else:
                    value.copy_(saved[name])
        self._weights_changed()

    def _set(self, p: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Writes this rank's share of a float32 parameter, or of its optimizer state ``key``."""
        from deepspeed import utils

        value = value.to(self._device, torch.float32)
        if self.stage < 3:
            if key is None:
                utils.safe_set_full_fp32_param(p, value)
            else:
                utils.safe_set_full_optimizer_state(p, value, key)
            return
        size = p.ds_tensor.numel()  # type: ignore[attr-defined]
        whole = nn.functional.pad(value.flatten(), (0, size * self._ranks.size - value.numel()))
        mine = whole[size * self._ranks.rank :][:size]
        if key is None:
            utils.safe_set_local_fp32_param(p, mine)
        else:
            utils.safe_set_local_optimizer_state(p, mine, key)

    def _weights_changed(self) -> None:
        """Brings what the forward pass uses in line with the float32 parameters."""
        import deepspeed

        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            for i in range(len(self._optimizer.fp16_groups)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(i)
            with deepspeed.zero.GatheredParameters([*self._fixed], modifier_rank=0), torch.no_grad():
                for p, value in self._fixed.items():
                    p.copy_(value)
            self.hold(self._always)

    def _flats(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """The flat tensors that a sharded optimizer steps, each with the parameters that it holds a share of."""
        zero = self._optimizer
        if self.stage == 3:
            return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True))
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True))

    def state(self) -> dict[str, Any]:
        """See ``learner.engine.optimizer_state``."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.stage:
            return optimizer_state(self._base, self.trained)
        names = {p: name for name, p in self.trained.items()}
        state: dict[str, dict[str, Any]] = {}
        for flat, parameters in self._flats():
            for key, value in self._base.state.get(flat, {}).items():
                cut = isinstance(value, Tensor) and value.shape == flat.shape
                for p in parameters:
                    own = safe_get_full_optimizer_state(p, key).cpu() if cut else copy.deepcopy(value)
                    state.setdefault(names[p], {})[key] = own
        groups = [{**group, "params": names} for group, names in zip(self._base.param_groups, self._groups, strict=True)]
        return {"state": state, "groups": groups}

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Takes what ``state`` of any engine returned."""
        if not self.stage:
            return load_optimizer(self._base, self.trained, saved, self._name)
        require_same_parameters(saved, [name for group in self._groups for name in group], self._name)
        for group, old in zip(self._base.param_groups, saved["groups"], strict=True):
            group.update({key: value for key, value in old.items() if key != "params"})
        names, state = {p: name for name, p in self.trained.items()}, saved["state"]
        self._base.state.clear()
        for flat, parameters in self._flats():
            entries = [state[names[p]] for p in parameters if names[p] in state]
            # One counter of steps stands for all of them; a parameter that no loss used has none, or a smaller one.
            for key, value in max(entries, key=lambda entry: float(entry.get("step", 0)), default={}).items():
                shared = key in SHARED_STATE or not isinstance(value, Tensor)
                self._base.state[flat][key] = copy.deepcopy(value) if shared else torch.zeros_like(flat)
        if self.stage < 3 and self._base.state:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()
        for p, name in names.items():
            for key, value in state.get(name, {}).items():
                if isinstance(value, Tensor) and key not in SHARED_STATE:
                    self._set(p, value, key)

    def close(self) -> None:
        """See DeepSpeedEngine."""
        whole = {name: value.to(self._device) for name, value in self.weights().items()}
        plain = {value: nn.Parameter(whole[name], value.requires_grad) for name, value in self._named()}
        for hook in self._hooks:
            hook.remove()
        self.engine.destroy()
        for module in self._module.modules():
            module._parameters = {key: p if p is None else plain[p] for key, p in module._parameters.items()}
            for key in [key for key in module.__dict__ if key.startswith("ds_") or key in LEFT_BY_STAGE_3]:
                delattr(module, key)

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        """All parameters by name; one that has several names comes once."""
        return list(self._module.named_parameters())


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


def _start(device: torch.device, ranks: Ranks) -> None:
    """Makes DeepSpeed use the processes that have met already, one GPU each, and say nothing but warnings.

    Nothing is compiled: its shared memory exchange on the CPU would take minutes.
    """
    os.environ.update(DS_ACCELERATOR=device.type, LOCAL_RANK=str(device.index or 0))
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.size))
    import deepspeed

    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.handlers.clear()  # it writes to stdout
    logger.propagate = True
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ZERO_SUPPORTED_OPTIMIZERS.extend(set(ELEMENTWISE) - set(ZERO_SUPPORTED_OPTIMIZERS))  # others are refused here
    # It calls exchanges by their former names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not dist.is_initialized():
        backend, store = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False)
