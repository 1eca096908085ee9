"""HG-DAgger in a fleet: imitate the demonstrations and what operators do when they take over.

    loss = sum_b w_b n_b l_b / sum_b w_b n_b         over windows b of demonstrations and operators' steps

l_b: the policy's imitation loss of a window, averaged over its n_b valid actions. With w = 1 that is HG-DAgger (arXiv
1810.02890). A window is of one kind of label: it ends where somebody else takes over.

As in SOP (arXiv 2601.03044) everything streams into one buffer, one policy serves all tasks, and operators' steps get a
stated share of each batch (uniform replay lets whichever is larger drown the other): one half (``mixture: fixed``), or the
share that follows from the losses of both sides, by task (``adaptive``, SOP's; its coefficient is not published, so the
fixed half, within its clip range [0.2, 0.8], is the default).

The policy's own steps are targets only with ``autonomous: successful``: those of episodes that ended well, never what came
just before a takeover, since that is what the operator had to end. ``weighting`` says how much each kind of label counts
(``algorithms/weighting.py``: Sirius, IWR); these two weigh the policy's own steps as well, those before a takeover by little
(Sirius) or like all others (IWR).

Added: windows cut by an episode's end or a hand-back are filled with their last valid action (``fill_ends``); those that end
because an operator takes over are not: the policy did not stop there.

Left out of HG-DAgger: the doubt threshold learnt from an ensemble, because here an operator decides when to take over.
Left out of SOP: weights that change only between episodes (here they change between chunks).

Shape suffixes: B batch, H chunk length, A action dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part, noise_of
from algorithms.ema import Ema
from algorithms.policies.base import Chunk
from algorithms.weighting import KIND_NAMES, WEIGHTINGS, Kind, KindWeights, cut_before_takeover, kind_of, wanted_parts
from algorithms.windows import fill_with_last_action
from fleet.batch import Adaptive, BatchNeeds, Filter, Outcome
from fleet.errors import ConfigError
from fleet.robot import Source


@dataclasses.dataclass
class HgDaggerConfig:
    start_learning_rate: float = 1e-3
    """AdamW's learning rate in the first ``start_steps``, on demonstrations alone or nearly so."""
    start_steps: int = 2000
    """Steps of the start."""
    learning_rate: float = 5e-4
    """Learning rate afterwards, while the data grows."""
    weight_decay: float = 1e-2
    """AdamW's decoupled weight decay."""
    batch_size: int = 256
    """B, windows a step."""
    operator_share: float = 0.5
    """Fraction of a batch from operators' steps. Demonstrations have what is left; who has no data leaves it all to the
    others."""
    mixture: str = "fixed"
    """``fixed``: the shares that are stated. ``adaptive``: whichever side has the higher loss gets more, by task (SOP)."""
    adaptive_alpha: float = 1.5
    """SOP's coefficient of the loss on online steps; above 1 it favours them."""
    autonomous: str = "none"
    """``none``, or ``successful``: the policy's own steps of episodes that ended with success are imitated too."""
    autonomous_share: float = 0.25
    """Fraction of a batch from the policy's own steps, if any; with an adaptive mixture they have no share of their own."""
    pre_intervention_steps: int = 15
    """Of the policy's steps, those so shortly before a takeover are no example of what to do."""
    weighting: str = "none"
    """``none``, ``sirius`` or ``iwr``: how much labels count. The last two need ``autonomous: successful``."""
    ema_decay: float = 0.995
    """Of the average that acts; 0 publishes the newest weights."""
    max_staleness: int = 0
    """Releases by which the policy behind a step may be older than the newest one; 0: no bound."""
    fill_ends: bool = True
    """Whether windows that an episode's end or a hand-back cuts are filled with their last valid action."""
    seed: int = 0
    """Of whatever noise the policy's loss draws."""


class HgDagger:
    """Implements ``algorithms.base.Algorithm`` with one part, "policy"."""

    name = "hg_dagger"
    Config = HgDaggerConfig

    def __init__(self, policy: Any, config: HgDaggerConfig, data: DataFacts = NO_FACTS) -> None:
        _check(config)
        self.config, self._policy, self._step = config, policy, 0
        self._ema = Ema(policy, config.ema_decay)
        self._optimizer: torch.optim.Optimizer | None = None
        self._weights = KindWeights(config.weighting, data.tasks)
        self._seen: set[str] = set()
        self.advice = ""
        self.parts = {"policy": Part(policy, self._make_optimizer)}
        self.frozen: dict[str, nn.Module] = {}
        self.needs = _needs(config, policy.spec.horizon, tuple(policy.spec.reads))

    def prepare(self, batch: Batch) -> Batch:
        """Windows of one kind of label, and their weights as ``weight_B``."""
        whole = fill_with_last_action(batch) if self.config.fill_ends else batch
        cut = cut_before_takeover(whole, self.config.pre_intervention_steps)
        weight_B = cut.weight_B * self._weights.of(cut.task_B, self._kind_of(cut))
        return dataclasses.replace(cut, weight_B=weight_B)

    def loss(self, part: str, micro: Batch) -> LossOutput:
        """The mean over all valid actions of the batch, as ``weight_B`` says."""
        noise = noise_of(self._policy, micro, self.config.batch_size, self.config.seed, self._step)
        mask_BH = micro.mask_BH.float()
        loss_B = self._policy.imitation_loss(micro.obs, Chunk(micro.actions_BHA), mask_BH, noise)
        num_valid_B, kind_B = mask_BH.sum(-1), self._kind_of(micro)
        weight_B = micro.weight_B * num_valid_B
        stats: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
        for kind, name in zip(Kind, KIND_NAMES, strict=True):
            of_kind_B = num_valid_B * (kind_B == kind)
            stats[f"loss_{name}"] = ((loss_B * of_kind_B).sum(), of_kind_B.sum())
            stats[f"drawn_{name}"] = (of_kind_B.sum(), num_valid_B.sum())
            stats[f"counts_{name}"] = ((weight_B * (kind_B == kind)).sum(), weight_B.sum())
        stats |= self._weights.stats(micro.task_B, kind_B, num_valid_B)
        return LossOutput((loss_B * weight_B).sum(), weight_B.sum(), loss_B.detach(), stats)

    def after_step(self, step: int, stats: Mapping[str, float]) -> None:
        """``step`` counts from 0."""
        self._ema.update(step)
        self._step = step + 1
        self._set_learning_rate()
        self._weights.update(stats)
        self._seen |= {name for name in KIND_NAMES if stats.get(f"drawn_{name}", 0.0) > 0}
        self.advice = self._advice()

    def acting(self) -> nn.Module:
        """The moving average."""
        return self._ema.module

    def state_dict(self) -> dict[str, Any]:
        kinds = {"seen": sorted(self._seen), "parts": self._weights.state_dict()}
        return {"step": self._step, "ema": self._ema.state_dict(), **kinds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._seen = int(state["step"]), set(state["seen"])
        self._ema.load_state_dict(state["ema"])
        self._weights.load_state_dict(state["parts"])
        self._set_learning_rate()

    def _kind_of(self, batch: Batch) -> Tensor:
        return kind_of(batch, self.config.pre_intervention_steps)

    def _advice(self) -> str:
        if "operator" not in self._seen:
            return "no operator step yet: it clones what else there is, and learns from corrections once somebody takes over"
        if self.config.autonomous != "none" and not self._seen & {"policy", "before_takeover"}:
            return "no successful episode of the policy's own yet: it learns from demonstrations and operators alone"
        if self._weights.without:
            return (
                f"weighting {self.config.weighting} has no weights for {', '.join(self._weights.without)}: demonstrations are "
                "about half of what is drawn and leave nothing to the policy's own steps; labels count alike there"
            )
        return ""

    def _set_learning_rate(self) -> None:
        for group in self._optimizer.param_groups if self._optimizer else ():
            group["lr"] = self._learning_rate()

    def _learning_rate(self) -> float:
        in_start = self._step < self.config.start_steps
        return self.config.start_learning_rate if in_start else self.config.learning_rate

    def _make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        self._optimizer = torch.optim.AdamW(parameters, lr=self._learning_rate(), weight_decay=self.config.weight_decay)
        return self._optimizer


def _needs(config: HgDaggerConfig, horizon: int, reads: tuple[str, ...]) -> BatchNeeds:
    own = config.autonomous != "none"
    online = (Source.OPERATOR, Source.POLICY) if own else (Source.OPERATOR,)
    return BatchNeeds(
        config.batch_size,
        horizon,
        reads,
        {(source,): share for source, share in _shares(config).items() if share},
        takeover_within=config.pre_intervention_steps + horizon - 1 if own else 0,
        filter=Filter(
            outcomes=(Outcome.SUCCESS,) if own else (),
            outcomes_of=(Source.POLICY,) if own else (),
            before_takeover=config.pre_intervention_steps if own and config.weighting == "none" else 0,
            max_version_age=config.max_staleness or None,
        ),
        adaptive=Adaptive(online, (Source.DEMO,), config.adaptive_alpha) if config.mixture == "adaptive" else None,
    )


def _shares(config: HgDaggerConfig) -> dict[Source, float]:
    """Of a batch; they sum up to 1."""
    own = config.autonomous_share if config.autonomous != "none" else 0.0
    return {Source.DEMO: 1 - config.operator_share - own, Source.OPERATOR: config.operator_share, Source.POLICY: own}


def _check(config: HgDaggerConfig) -> None:
    shares = _shares(config)
    rules = {
        "ema_decay": (0 <= config.ema_decay < 1, "0 <= ema_decay < 1"),
        "batch_size": (config.batch_size >= 1, "batch_size >= 1"),
        "max_staleness": (config.max_staleness >= 0, "max_staleness >= 0"),
        "mixture": (config.mixture in ("fixed", "adaptive"), "mixture is fixed or adaptive"),
        "adaptive_alpha": (config.adaptive_alpha > 0, "adaptive_alpha > 0"),
        "autonomous": (config.autonomous in ("none", "successful"), "autonomous is none or successful"),
        "autonomous_share": (config.autonomous_share > 0, "autonomous_share > 0; what switches it off is autonomous"),
        "operator_share": (config.operator_share > 0 and shares[Source.DEMO] > 0, "above 0; with autonomous_share below 1"),
        "pre_intervention_steps": (config.pre_intervention_steps >= 0, "pre_intervention_steps >= 0"),
        "weighting": (config.weighting in WEIGHTINGS, f"weighting is one of {', '.join(WEIGHTINGS)}"),
    }
    for name, (holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"hg_dagger has {name} {getattr(config, name)!r}", rule=rule)
    if config.weighting == "none":
        return
    if config.autonomous == "none" or config.mixture != "fixed":
        raise ConfigError(
            f"hg_dagger has weighting {config.weighting!r} with autonomous {config.autonomous!r}, mixture {config.mixture!r}",
            rule="weights are of the policy's own steps too, and an adaptive mixture is another rule for the same",
            remedy="autonomous: successful, mixture: fixed",
        )
    demo, operator, own = shares.values()
    if wanted_parts(config.weighting, [demo, own / 2, own / 2, operator]) is None:
        raise ConfigError(
            f"hg_dagger has weighting {config.weighting!r} with {demo:.3f} of each batch from demonstrations",
            rule="below 0.498: half of the weight is the operators', and something remains for the policy's own steps",
            remedy="a larger operator_share or autonomous_share",
        )
