"""What happens to the parameters in one update: the contract, and what all engines are made of.

``Engine`` is all that the loop knows. An engine wraps the loss, not the policy: ``LossModule`` holds a part's module and calls
the algorithm inside its ``forward``, so algorithms may call any method of a module and never see how it is trained.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from algorithms.base import Batch, LossOutput
from algorithms.policies.registry import load_published
from fleet.errors import LearnerError, PolicyError
from learner.ranks import Ranks

LossFunction = Callable[[str, Batch], LossOutput]
Timed = Callable[[str], AbstractContextManager[None]]
Parameters = Mapping[str, nn.Parameter]
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
            batch: The rows of this rank, at least one.
            timed: Makes a context for "forward", "backward" and "optimizer".

        Returns:
            ``loss``, ``grad_norm``, ``weight`` and the algorithm's stats, of all ranks. ``grad_norm`` is before clipping.

        Raises:
            LearnerError: The loss or a gradient is not finite, on every rank alike; nothing has been changed then.
            OutOfMemory: There is not enough memory; the remedy names the settings that help.
        """
        ...

    def per_sample(self, part: str) -> Tensor:
        """Losses of this rank's samples of the part's last batch (B,), before that update; float32 on the CPU."""
        ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every part's parameters are whole on this rank and may be read: for averages, targets and releases."""
        ...

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Parameters (float32 where the engine keeps them so) and buffers of each part by name, without modules that are
        frozen for good: whole, on the CPU where they had to be put together, else the live ones."""
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

    def close(self) -> None:
        """Gives the modules back as they were, with the weights of now. For the end, and before another engine takes one of
        them; nothing else may be called afterwards."""
        ...


class LossModule(nn.Module):
    """A part's loss as a module: what DDP and DeepSpeed wrap.

    Args:
        part: Its name.
        module: The part's module, the only one in here.
        dtype: "bfloat16": the loss runs under autocast.
    """

    def __init__(self, part: str, module: nn.Module, dtype: str = "float32") -> None:
        super().__init__()
        self.module, self._part, self._autocast = module, part, dtype == "bfloat16"

    def forward(self, loss: LossFunction, micro: Batch, factor: float = 1.0) -> LossOutput:
        """The algorithm's loss of some rows, everything in it times ``factor``; all stats are pairs of a sum and its weight.
        Only ``sum`` carries gradients."""
        kind = micro.actions_BHA.device.type
        # No cache: in torch before 2.11 a weight that was used under no_grad first (a target, say) gets no gradient then.
        with torch.autocast(kind, torch.bfloat16, enabled=self._autocast, cache_enabled=False):
            out = loss(self._part, micro)
        total = out.sum if factor == 1.0 else out.sum * factor
        if not total.requires_grad:  # nothing here is trained on, but the other ranks wait for this one's gradient
            total = total + 0.0 * next(p for p in self.module.parameters() if p.requires_grad).sum()
        rows = len(micro.actions_BHA) * factor
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        for name, value in out.stats.items():
            top, bottom = value if isinstance(value, tuple) else (value * rows, torch.full_like(value, rows))
            scale = factor if isinstance(value, tuple) else 1.0
            stats[name] = (top.detach() * scale, bottom.detach() * scale)
        return LossOutput(total, out.weight.detach() * factor, out.per_sample_B.detach(), stats)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@contextmanager
def training_only(part: str, trained: Mapping[str, Parameters]) -> Iterator[None]:
    """Freezes the parameters of all other parts, except for those that ``part`` shares with them.

    An actor's loss runs through a critic: left trainable, the critic would collect gradients of the wrong loss, which ZeRO-1
    then adds to its own without an error.

    Args:
        trained: Trained parameters of each part, by name.
    """
    own = {id(p) for p in trained[part].values()}
    others = [p for other, parameters in trained.items() if other != part for p in parameters.values() if id(p) not in own]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def num_micro_batches(num_rows: int, micro_batch: int, ranks: Ranks) -> int:
    """Backward passes in one update, the same on all ranks: as many as the rank with most rows needs. An exchange between
    the ranks where ``micro_batch`` is not 0 (all rows at once)."""
    if not micro_batch:
        return 1
    most = num_rows if ranks.size == 1 else int(ranks.gather([num_rows]).max())
    return max(-(-most // micro_batch), 1)


def split_micro(batch: AnyBatch, num: int) -> Iterator[tuple[AnyBatch, int]]:
    """Cuts a batch along B into ``num`` slices of nearly the same size; every tensor of the batch has B first.

    Yields:
        A slice and its number of rows. Where there are fewer rows than slices some come with 0: they hold the first row, to
        be taken times nothing, since a collective call in a forward pass needs all ranks.
    """
    total = len(batch.actions_BHA)
    for i in range(num):
        begin, end = i * total // num, (i + 1) * total // num
        if num == 1:
            yield batch, total
        elif begin < end:
            yield take_rows(batch, slice(begin, end)), end - begin
        else:
            yield take_rows(batch, slice(0, 1)), 0


def take_rows(batch: AnyBatch, rows: slice | Tensor) -> AnyBatch:
    """Some rows of a batch: a view for a slice, a copy for numbers of rows."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[rows]
        return {k: cut(v) for k, v in value.items()} if isinstance(value, dict) else value

    return dataclasses.replace(batch, **{f.name: cut(getattr(batch, f.name)) for f in dataclasses.fields(batch)})


class Numbers:
    """Sums of what the losses of an update said, in float64 on the device. Adding waits for no device.

    ``changed_buffers``: number of ranks on which the loss changed the module's buffers.
    """

    def __init__(self, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.loss, self.weight, self.changed_buffers = zero, zero, zero
        self.stats: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, out: LossOutput) -> None:
        """Adds what a LossModule returned."""
        self.loss, self.weight = self.loss + out.sum.detach(), self.weight + out.weight
        for name, value in out.stats.items():
            old = self.stats.get(name, (0.0, 0.0))
            self.stats[name] = (old[0] + value[0].double(), old[1] + value[1].double())

    def divisor(self) -> Tensor:
        """The weight that losses and gradients are divided by; 1 where nothing has weight."""
        return torch.where(self.weight > 0, self.weight, torch.ones_like(self.weight))

    def read(self, norm: Tensor) -> dict[str, float]:
        """``loss``, ``grad_norm``, ``weight`` and the stats, each divided by its weight; a stat without weight is 0.

        One transfer for all numbers: on a GPU each one alone would wait for the device.
        """
        means = [top / torch.where(bottom > 0, bottom, torch.ones_like(bottom)) for top, bottom in self.stats.values()]
        values = torch.stack([self.loss / self.divisor(), norm.double(), self.weight, *means]).tolist()
        return dict(zip(("loss", "grad_norm", "weight", *self.stats), values, strict=True))


class RankSums:
    """Adds the numbers of all ranks up, in one exchange. The names of a part's stats are agreed on in its first update; a
    rank may lack some of them in any update, but not have new ones."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._names = ranks, dict[str, list[str]]()

    def __call__(self, part: str, numbers: Numbers) -> Numbers:
        """The same Numbers on all ranks.

        Raises:
            LearnerError: A stat has a name that no rank had before.
        """
        if self._ranks.size == 1:
            return numbers
        if part not in self._names:
            names = [json.loads(data) for data in self._ranks.gather_bytes(json.dumps([*numbers.stats]).encode())]
            self._names[part] = list(dict.fromkeys(name for rank in names for name in rank))
        names = self._names[part]
        if not set(numbers.stats) <= set(names):
            raise LearnerError(
                f"part {part!r} has stats {sorted(numbers.stats)}", rule=f"the first update had {sorted(names)}, on any rank"
            )
        zero = torch.zeros_like(numbers.loss)
        pairs = [value for name in names for value in numbers.stats.get(name, (zero, zero))]
        sums = torch.stack([numbers.loss, numbers.weight, numbers.changed_buffers, *pairs])
        dist.all_reduce(sums)
        total = Numbers(sums.device)
        total.loss, total.weight, total.changed_buffers = sums[:3]
        total.stats = {name: (sums[3 + 2 * i], sums[4 + 2 * i]) for i, name in enumerate(names)}
        return total


def require_finite(part: str, numbers: Mapping[str, float], suspects: Callable[[], list[str]], dtype: str = "float32") -> None:
    """Checks that loss and gradient norm are finite.

    Args:
        suspects: Says what may have been the cause; asked only then, on all ranks.
        dtype: ``engine.dtype``.

    Raises:
        LearnerError: They are not; names the features, rows or parameters.
    """
    if not (math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
        found = suspects() or ["inputs and weights are finite and of usual size"]
        lower = ", or engine.dtype=float32" if dtype == "bfloat16" else ""
        raise LearnerError(
            f"part {part!r} has loss {numbers['loss']} and gradient norm {numbers['grad_norm']}: {'; '.join(found)}"[:1500],
            rule="loss and gradients are finite",
            remedy=f"leave broken episodes out (`fleet data exclude`), or lower the learning rate{lower}; "
            "the weights are as before this step",
        )


def load_modules(modules: Mapping[str, nn.Module], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Loads each part's module from tensors by name.

    Raises:
        LearnerError: A part is missing or has other names or shapes.
    """
    for name, module in modules.items():
        try:
            load_published(module, weights[name])
        except (KeyError, PolicyError) as error:
            said = error.what if isinstance(error, PolicyError) else "there is no such part"
            raise LearnerError(f"part {name!r} does not fit: {said}"[:500], rule="same modules, same shapes") from None


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Any]:
    """State of an optimizer by parameter name: {"kind": name of its class, "state": {name: {key: value}}, "groups": [{...,
    "params": [names]}]}. The tensors are the live ones."""
    names = {id(p): name for name, p in parameters.items()}
    groups = [{**g, "params": [names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]
    state = {names[id(p)]: dict(s) for p, s in optimizer.state.items()}
    return {"kind": type(optimizer).__name__, "state": state, "groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, parameters: Parameters, saved: Mapping[str, Any], part: str) -> None:
    """The reverse of ``optimizer_state``; what it takes is copied. Learning rates and other settings stay those of
    ``optimizer``: they follow from the configuration, which may have changed, and from the algorithm's own state.

    Raises:
        LearnerError: It is of other parameters, or of another kind.
    """
    names = {id(p): name for name, p in parameters.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    require_same_optimizer(saved, optimizer, order, part)
    index = {name: i for i, name in enumerate(order)}
    groups = [{**g, "params": [index[names[id(p)]] for p in g["params"]]} for g in optimizer.param_groups]
    state = {index[n]: {k: _copied(v) for k, v in entries.items()} for n, entries in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def require_same_parts(saved: Mapping[str, Any], parts: Iterable[str]) -> None:
    """Raises LearnerError when saved optimizers are of other parts."""
    if set(saved) != set(parts):
        raise LearnerError(f"a checkpoint has optimizers of {sorted(saved)}", rule=f"this algorithm trains {sorted(parts)}")


def require_same_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, order: Sequence[str], part: str) -> None:
    """Raises LearnerError when a saved optimizer is of another kind or other parameters, or has them in another order."""
    if saved["kind"] != type(optimizer).__name__:
        raise LearnerError(
            f"part {part!r} is trained with {type(optimizer).__name__}, but the checkpoint's optimizer is {saved['kind']}",
            rule="a run goes on with the optimizer that it began with",
            remedy="put the setting back, or start a new run",
        )
    if [n for group in saved["groups"] for n in group["params"]] != list(order):
        raise LearnerError(
            f"a checkpoint has other parameters in part {part!r}", rule="a run goes on with the modules that it began with"
        )
