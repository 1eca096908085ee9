"""What happens to the parameters in one update: backward, sum over micro-batches, clipping, optimizer.

``Engine`` is all that the loop knows. ``TorchEngine`` is the plain one, for one process and one device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from algorithms.base import Algorithm, Batch, LossOutput
from fleet.errors import LearnerError

LossFunction = Callable[[str, Batch], LossOutput]
Timed = Callable[[str], AbstractContextManager[None]]
AnyBatch = TypeVar("AnyBatch", bound=Batch)


def untimed(what: str) -> AbstractContextManager[None]:
    """For who does not want to know how long something takes."""
    return nullcontext()


class Engine(Protocol):
    """Owns the optimizers of an algorithm's parts. With several ranks every method but ``per_sample`` is called by all of
    them together; results are the same on every rank."""

    def update(self, part: str, loss: LossFunction, batch: Batch, timed: Timed = untimed) -> dict[str, float]:
        """One update of one part: the loss summed over micro-batches and ranks, divided by the weight summed alike, both
        times ``batch.shard_weight``. Every other part is frozen meanwhile.

        Args:
            batch: The rows of this rank.
            timed: Makes a context for "forward", "backward" and "optimizer".

        Returns:
            ``loss``, ``grad_norm``, ``weight`` and the algorithm's stats, of all ranks. ``grad_norm`` is before clipping.

        Raises:
            LearnerError: The loss or a gradient is not finite, on every rank alike; nothing has been changed then. Or
                there is not enough memory; the remedy names the settings that help.
        """
        ...

    def per_sample(self, part: str) -> Tensor:
        """Losses of this rank's samples of the part's last batch (B,), before that update; float32 on the CPU."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every part's parameters are whole on this rank and may be read: for averages, targets and releases."""
        ...

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Parameters (float32 where the engine keeps them so) and buffers of each part by name: whole, on the CPU where they
        had to be put together, else the live ones."""
        ...

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes what ``weights`` of any engine returned.

        Raises:
            LearnerError: It belongs to other parts, or has other names or shapes.
        """
        ...

    def state(self) -> dict[str, Any]:
        """State of the optimizers by part and parameter name: tensors and plain data, the same for every engine."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state`` of any engine returned.

        Raises:
            LearnerError: It belongs to other parts or parameters.
        """
        ...


class TorchEngine:
    """Plain torch.

    Args:
        algorithm: Its parts and frozen modules are moved to ``device``; frozen ones stop requiring gradients.
        micro_batch: Samples in one backward pass; 0 for the whole batch.
        max_grad_norm: Gradients are scaled down to this norm; 0 for no limit.
    """

    def __init__(self, algorithm: Algorithm, *, device: torch.device, micro_batch: int = 0, max_grad_norm: float = 0.0) -> None:
        self._micro_batch, self._max_norm = micro_batch, max_grad_norm or float("inf")
        for module in algorithm.frozen.values():
            module.to(device).requires_grad_(False)
        self._modules = {name: part.module.to(device) for name, part in algorithm.parts.items()}
        # Read once: while one part is updated the others are frozen, and this says what to thaw afterwards.
        self._trained = {name: _trainable(module) for name, module in self._modules.items()}
        self._optimizers = {name: part.make_optimizer(self._trained[name].values()) for name, part in algorithm.parts.items()}
        self._per_sample: dict[str, list[Tensor]] = {}
        self._others = {
            name: [
                p
                for other in self._trained
                if other != name
                for p in self._trained[other].values()
                if not _holds(self._trained[name], p)
            ]
            for name in self._trained
        }

    def update(self, part: str, loss: LossFunction, batch: Batch, timed: Timed = untimed) -> dict[str, float]:
        """See Engine."""
        optimizer, parameters = self._optimizers[part], list(self._trained[part].values())
        optimizer.zero_grad(set_to_none=True)
        for other in self._others[part]:
            other.requires_grad_(False)
        try:
            sums = self._backward(part, loss, batch)
        finally:
            for other in self._others[part]:
                other.requires_grad_(True)
        if sums is None:
            return {"loss": 0.0, "weight": 0.0}
        total, weight, stats = sums
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(weight)
        norm = nn.utils.clip_grad_norm_(parameters, self._max_norm)
        names = ["loss", "grad_norm", "weight", *stats]
        # One transfer for all numbers: on a GPU each one alone would wait for the device.
        values = torch.stack([total / weight, norm, weight, *stats.values()]).tolist()
        numbers = dict(zip(names, values, strict=True))
        if not all(abs(numbers[name]) < float("inf") for name in ("loss", "grad_norm")):
            optimizer.zero_grad(set_to_none=True)
            raise LearnerError(
                f"part {part!r} has loss {numbers['loss']} and gradient norm {numbers['grad_norm']}",
                rule="loss and gradients are finite",
                remedy="look for broken data, or lower the learning rate; the weights are as before this step",
            )
        optimizer.step()
        return numbers

    def _backward(self, part: str, loss: LossFunction, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """Sums loss, weight and stats over the micro-batches; None when nothing in the batch has weight."""
        total, weight = torch.zeros(()), torch.zeros(())
        stats: dict[str, Tensor] = {}
        per_sample = self._per_sample[part] = []
        for micro, share in micro_batches(batch, self._micro_batch):
            out = loss(part, micro)
            out.sum.backward()
            per_sample.append(out.per_sample_B.detach())
            total = total.to(out.sum.device) + out.sum.detach().float()
            weight = weight.to(out.sum.device) + out.weight.detach().float()
            for name, value in out.stats.items():
                part_of_it = value.detach().float().to(out.sum.device) * share
                stats[name] = stats[name] + part_of_it if name in stats else part_of_it
        return (total, weight, stats) if float(weight) > 0 else None

    def per_sample(self, part: str) -> Tensor:
        """See Engine. Copied when it is asked for."""
        return torch.cat(self._per_sample[part]).float().cpu()

    def gathered(self) -> AbstractContextManager[None]:
        """See Engine."""
        return nullcontext()

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """See Engine. The tensors are the live ones."""
        return {name: module.state_dict() for name, module in self._modules.items()}

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """See Engine."""
        for name, module in self._modules.items():
            try:
                module.load_state_dict(weights[name])
            except (KeyError, RuntimeError) as error:
                raise LearnerError(f"part {name!r} does not fit: {error}"[:500], rule="same modules, same shapes") from None

    def state(self) -> dict[str, Any]:
        """See Engine. The tensors are the live ones."""
        return {name: _optimizer_state(optimizer, self._trained[name]) for name, optimizer in self._optimizers.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See Engine."""
        if set(state) != set(self._optimizers):
            raise LearnerError(
                f"a checkpoint has optimizers of {sorted(state)}", rule=f"this algorithm trains {sorted(self._optimizers)}"
            )
        for name, optimizer in self._optimizers.items():
            _load_optimizer(optimizer, self._trained[name], state[name], name)


def micro_batches(batch: AnyBatch, size: int) -> Iterator[tuple[AnyBatch, float]]:
    """Slices of a batch along B, each with its share of the whole. Every tensor of the batch has B first."""
    total = len(batch.actions_BHA)
    if size <= 0 or size >= total:
        yield batch, 1.0
        return
    for begin in range(0, total, size):
        rows = slice(begin, min(begin + size, total))
        yield _rows(batch, rows), (rows.stop - begin) / total


def _rows(batch: AnyBatch, rows: slice) -> AnyBatch:
    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows]
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    return dataclasses.replace(batch, **{f.name: cut(getattr(batch, f.name)) for f in dataclasses.fields(batch)})


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _holds(parameters: Mapping[str, nn.Parameter], wanted: nn.Parameter) -> bool:
    return any(p is wanted for p in parameters.values())


def _optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    names = {id(p): name for name, p in parameters.items()}
    groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    return {"state": {names[id(p)]: dict(s) for p, s in optimizer.state.items()}, "groups": groups}


def _load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any], part: str
) -> None:
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if [n for group in saved["groups"] for n in group["params"]] != order:
        raise LearnerError(
            f"a checkpoint has other parameters in part {part!r}", rule="a run goes on with the modules that it began with"
        )
    index = {name: i for i, name in enumerate(order)}
    groups = [{**g, "params": [index[n] for n in g["params"]]} for g in saved["groups"]]
    optimizer.load_state_dict({"state": {index[n]: dict(s) for n, s in saved["state"].items()}, "param_groups": groups})
