"""Flow-matching policy: a chunk of actions is denoised in a few steps (pi0, arXiv 2410.24164), looking at the observation.

    imitation   E ||v(x_t, t, o) - (e - x_0)||^2,  x_t = (1 - t) x_0 + t e,  x_0 the chunk scaled to about [-1, 1]
    acting      x from t = 1 (noise) to t = 0 in K Euler steps

``act`` without noise starts from one draw that lies in the weights. With noise and ``noise_level`` a = 0 it starts from the
noise, and there is no density. With a > 0 steps are drawn (flow_sde.py): those of all steps, or of one step a chunk that is
drawn too (pi_RL, arXiv 2510.25889). What was drawn is recorded in ``replay.chain``; its density is by transition and action,
T = transitions x H, transitions first.

"advantage" (RECAP, arXiv 2511.14759) is one more condition: v = v_absent + guidance (v_given - v_absent).

With ``max_delay`` D > 0 a chunk continues d <= D actions that are decided already (training-time RTC, arXiv 2512.05964):
they stay clean, at time 0, while the others are denoised; the loss is of the others.

Shape suffixes: B batch, H chunk length, A action dims, D actions of a prefix, K steps, T decisions, F width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import ADVANTAGE, DELAY, PREFIX, Chunk
from algorithms.policies.flow_config import CHAIN, INDEX, PREFIXED, FlowConfig, check_flow, flow_spec
from algorithms.policies.flow_head import FlowHead, by_number, by_time
from algorithms.policies.flow_sde import log_normal, normal_kl, sde_step, sigmas, times
from algorithms.policies.normalise import ActionScale, full_precision
from algorithms.policies.observation import EncoderConfig, ObservationEncoder
from algorithms.policies.statistics import Statistics
from fleet.errors import PolicyError

Flow = Callable[[Tensor, Tensor], tuple[Tensor, "Tensor | None"]]  # x_BHA, when_B -> velocity, second output of the head


class FlowPolicy(nn.Module):
    """See the header. Implements ``algorithms.policies.base.Policy``."""

    Config = FlowConfig
    check = staticmethod(check_flow)
    start_HA: Tensor

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        check_flow(config)
        self._config = config
        self.spec, self.num_steps = flow_spec(config), config.num_steps
        tokens = (config.width, config.encoder_layers, config.num_heads)
        encoder = EncoderConfig(*tokens, config.vision, config.shift_pixels, config.select)
        self.encoder = ObservationEncoder(self.spec, encoder)
        sizes = (config.horizon, config.action_dim, config.width, config.num_layers, config.num_heads)
        self.head = FlowHead(*sizes, spread=config.noise_kind == "learned")
        self.scale = ActionScale(config.action_dim)
        self.advantage = nn.Embedding(3, config.width) if config.advantage else None  # absent, positive, negative
        if self.advantage is not None:
            nn.init.normal_(self.advantage.weight, std=0.02)
        start = torch.randn(config.horizon, config.action_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("start_HA", start)

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of observations and of "action"."""
        self.encoder.set_statistics(statistics)
        self.scale.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Standard normal "start" (B, H, A); where there is a density, "steps" (B, J, H, A) of the J transitions that are
        drawn, with "index" (B,) where one is; of the loss "time" (B,) in [0, 1) and "delay" (B,); what moves images."""
        config, shape = self._config, (self.spec.horizon, self.spec.action_dim)
        noise = {
            "start": torch.randn(batch_size, *shape, generator=generator),
            "time": torch.rand(batch_size, generator=generator),
        }
        if config.max_delay:
            noise["delay"] = torch.randint(0, config.max_delay + 1, (batch_size,), generator=generator)
        if self.spec.density:
            noise["steps"] = torch.randn(batch_size, self._num_drawn, *shape, generator=generator)
        if INDEX in self.spec.replay:
            noise["index"] = torch.randint(0, config.num_steps, (batch_size,), generator=generator)
        return {**noise, **self.encoder.noise(batch_size, generator)}

    def act(self, obs: Mapping[str, Tensor], noise: Any = None, guidance: float = 1.0) -> Chunk:
        """See ``Policy.act``. Without noise there is no log-probability and nothing to replay. Guided chunks have no
        log-probability either: they are not draws of what ``log_prob`` is the density of.

        Raises:
            PolicyError: The prefix has another shape, or is longer than ``max_delay``.
        """
        with self.exact():
            batch = len(next(iter(obs.values())))
            prefix_BHA, fixed_BH = self._prefix(obs, batch)
            start_BHA = self.start_HA.float().repeat(batch, 1, 1) if noise is None else self._here(noise["start"])
            drawn = noise if self.spec.density else None
            clean_BHA = None if prefix_BHA is None else self.scale.normalise(prefix_BHA)
            flow = self.flow(obs, fixed_BH, guidance, by_step=True)
            states, laws = self._integrate(flow, start_BHA, drawn, clean_BHA, fixed_BH)
            chunk = Chunk(_inpaint(self.scale.restore(states[-1]), prefix_BHA, fixed_BH))
            if drawn is not None:
                index_BJ = self._record(chunk, states, drawn, fixed_BH)
                if self.advantage is None or guidance == 1:
                    mean_BJHA, std_BJHA = (_rows(torch.stack(parts, 1), index_BJ) for parts in zip(*laws, strict=True))
                    chunk.log_prob_BT = _log_prob(chunk.replay[CHAIN], mean_BJHA, std_BJHA, fixed_BH)
        return chunk

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, J H): log density of each transition that was drawn, by action, summed over A; 0 for actions of the prefix. See
        ``Policy.log_prob``; the prefix comes from the chunk, not from ``obs``."""
        with self.exact():
            mean_BJHA, std_BJHA = self.transitions(obs, chunk)
            return _log_prob(self._replayed(chunk, CHAIN), mean_BJHA, std_BJHA, self._fixed(chunk))

    def transitions(self, obs: Mapping[str, Tensor], chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, J, H, A), on the scale of the chain, of the transitions that were drawn.

        Raises:
            PolicyError: The policy has no density, or a replay column is missing.
        """
        if not self.spec.density:
            raise PolicyError(
                "a flow policy without noise_level has no density",
                rule="log-probabilities need steps that are drawn",
                remedy="set noise_level above 0, or noise_kind=learned",
            )
        with self.exact():
            chain_BJHA, batch = self._replayed(chunk, CHAIN), len(chunk.actions_BHA)
            index_BJ = torch.arange(self.num_steps, device=chain_BJHA.device).expand(batch, -1)
            if INDEX in self.spec.replay:
                index_BJ = self._replayed(chunk, INDEX).long()
            flow = self.flow(obs, self._fixed(chunk), by_step=True)
            laws = [self._step(flow, chain_BJHA[:, j], index_BJ[:, j])[1:] for j in range(self._num_drawn)]
            return torch.stack([mean for mean, _ in laws], 1), torch.stack([std for _, std in laws], 1)

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """Each drawn transition of an action is a decision; those of the prefix are none."""
        fixed_BH = self._fixed(chunk) if self.spec.density else None
        return (mask_BH if fixed_BH is None else mask_BH * ~fixed_BH).repeat(1, self._num_drawn)

    def imitation_loss(self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Any = None) -> Tensor:
        """(B,): squared error of the velocity at a random time, averaged over A and the valid actions behind the prefix
        that was drawn. Actions that are not valid are not looked at."""
        if noise is None:
            raise PolicyError(
                "a flow policy's loss was asked for without noise", rule="it is an expectation over noise and time"
            )
        valid_BH = mask_BH > 0
        # Masked actions may be padded with anything, NaN included.
        target_BHA = self.scale.normalise(torch.where(valid_BH[..., None], chunk.actions_BHA, 0.0))
        noise_BHA, time_B = self._here(noise["start"]), self._here(noise["time"])
        if self._config.time_sampling == "beta":
            time_B = 0.001 + 0.999 * time_B ** (2 / 3)  # the quantile function of Beta(1.5, 1)
        fixed_BH, x_BHA = None, target_BHA + time_B[:, None, None] * (noise_BHA - target_BHA)
        seen_BH = valid_BH | ~valid_BH.any(1, keepdim=True)  # attention needs something to look at
        if self._config.max_delay:
            delay_B = torch.minimum(self._here(noise["delay"]), valid_BH.sum(1) - 1)  # something is left to be learnt
            fixed_BH = torch.arange(self.spec.horizon, device=x_BHA.device) < delay_B[:, None]
            x_BHA, valid_BH = _inpaint(x_BHA, target_BHA, fixed_BH), valid_BH & ~fixed_BH
        v_BHA, _ = self.flow(obs, fixed_BH, 1.0, noise, seen_BH)(x_BHA, time_B)
        error_BH = ((v_BHA - (noise_BHA - target_BHA)) ** 2).mean(-1) * valid_BH
        return error_BH.sum(1) / valid_BH.sum(1).clamp(min=1)

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): mean of the observation's tokens."""
        features_BF: Tensor = self.encoder(obs).mean(1)
        return features_BF

    def flow(
        self,
        obs: Mapping[str, Tensor],
        fixed_BH: Tensor | None = None,
        guidance: float = 1.0,
        augment: Any = None,
        seen_BH: Tensor | None = None,
        by_step: bool = False,
    ) -> Flow:
        """(x_BHA, time_B) -> (velocity, second output of the head) for these observations.

        Args:
            fixed_BH: bool, actions that are clean: their time is 0.
            augment: Noise that moves images, while training.
            seen_BH: bool, actions that others may look at; None: all.
            by_step: The function takes numbers of steps instead of times, and is cheaper (``by_number``).
        """
        memory = self.head.memory(self.encoder(obs, augment))
        kind_B = torch.zeros(len(memory[0][0]), dtype=torch.long, device=self.start_HA.device)  # absent
        if self.advantage is not None and ADVANTAGE in obs:
            kind_B = (obs[ADVANTAGE] > 0) + 2 * (obs[ADVANTAGE] < 0).long()
        given = (self.head, fixed_BH, self.advantage)
        ask = by_number(*given, self.num_steps) if by_step else by_time(*given)

        def velocity(x_BHA: Tensor, when_B: Tensor) -> tuple[Tensor, Tensor | None]:
            if self.advantage is None or guidance == 1:
                return self.head(x_BHA, ask(when_B, kind_B), memory, seen_BH)
            absent_BHA, spread_BHA = self.head(x_BHA, ask(when_B, torch.zeros_like(kind_B)), memory, seen_BH)
            if guidance == 0:
                return absent_BHA, spread_BHA
            v_BHA, spread_BHA = self.head(x_BHA, ask(when_B, kind_B), memory, seen_BH)
            return absent_BHA + guidance * (v_BHA - absent_BHA), spread_BHA

        return velocity

    def exact(self) -> torch.autocast:
        """What is integrated is float32."""
        return full_precision(self.start_HA)

    @property
    def _num_drawn(self) -> int:
        """J."""
        return 1 if self._config.stochastic == "one" else self.num_steps

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.start_HA.device)

    def _integrate(
        self, flow: Flow, x_BHA: Tensor, drawn: Any, clean_BHA: Tensor | None, fixed_BH: Tensor | None
    ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The K + 1 states from x at t = 1 on, and mean and deviation of each step where some are ``drawn``."""
        states, laws = [_inpaint(x_BHA, clean_BHA, fixed_BH)], []
        for k in range(self.num_steps):
            x_BHA, mean_BHA, std_BHA = self._step(flow, states[-1], torch.full((len(x_BHA),), k, device=x_BHA.device))
            if drawn is not None:
                laws.append((mean_BHA, std_BHA))
                drawn_BHA = mean_BHA + std_BHA * self._here(drawn["steps"][:, min(k, self._num_drawn - 1)])
                here_B = self._here(drawn["index"]) == k if "index" in drawn else torch.ones_like(x_BHA[:, 0, 0]).bool()
                x_BHA = torch.where(here_B[:, None, None], drawn_BHA, x_BHA)
            states.append(_inpaint(x_BHA, clean_BHA, fixed_BH))
        return states, laws

    def _record(self, chunk: Chunk, states: list[Tensor], drawn: Any, fixed_BH: Tensor | None) -> Tensor:
        """Fills the replay columns, and says which steps (B, J) were drawn."""
        chain_BKHA = torch.stack(states, 1)
        index_BJ = torch.arange(self.num_steps, device=chain_BKHA.device).expand(len(chain_BKHA), -1)
        if "index" in drawn:
            index_BJ = chunk.replay[INDEX] = self._here(drawn["index"])[:, None]
            chain_BKHA = _rows(chain_BKHA, torch.cat([index_BJ, index_BJ + 1], 1))
        chunk.replay[CHAIN] = chain_BKHA
        if fixed_BH is not None:
            chunk.replay[PREFIXED] = fixed_BH.sum(1, keepdim=True)
        return index_BJ

    def _step(self, flow: Flow, x_BHA: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From x at the step ``index_B`` of each row: where the ODE leads, and mean and deviation of a drawn step."""
        num_steps = self.num_steps
        time_B = times(num_steps).float().to(x_BHA.device)[index_B]
        v_BHA, spread_BHA = flow(x_BHA, index_B)
        ode_BHA = x_BHA - v_BHA / num_steps
        if spread_BHA is not None:
            low, high = (math.log(std) for std in self._config.noise_std)
            return ode_BHA, ode_BHA, (low + (high - low) * (spread_BHA.tanh() + 1) / 2).exp()
        sigma_B = sigmas(num_steps, self._config.noise_level).float().to(x_BHA.device)[index_B]
        mean_BHA, std_B11 = sde_step(x_BHA, v_BHA, time_B[:, None, None], 1 / num_steps, sigma_B[:, None, None])
        return ode_BHA, mean_BHA, std_B11.expand_as(mean_BHA)

    def _prefix(self, obs: Mapping[str, Tensor], batch: int) -> tuple[Tensor | None, Tensor | None]:
        """The prefix (B, H, A), robot's units, and where it counts (B, H); None where there cannot be one."""
        max_delay, shape = self.spec.max_delay, (batch, self.spec.max_delay, self.spec.action_dim)
        delay_B, most = torch.zeros(batch), 0
        if DELAY in obs:  # a copy from the device, which chunks without a prefix do not wait for
            delay_B = obs[DELAY]
            least, most = int(delay_B.min()), int(delay_B.max())
            seen = tuple(obs[PREFIX].shape) if PREFIX in obs else None
            if least < 0 or most > max_delay or (most > 0 and seen != shape):
                raise PolicyError(
                    f"{DELAY!r} is {most if least >= 0 else least}, {PREFIX!r} has shape {seen}",
                    rule=f"0 to {max_delay} actions (max_delay) of a prefix count, and it has shape {shape}",
                    remedy="train with a larger max_delay" if most > max_delay else "",
                )
        if not max_delay:
            return None, None
        prefix_BHA = torch.zeros(batch, self.spec.horizon, self.spec.action_dim, device=self.start_HA.device)
        if most:
            prefix_BHA[:, :max_delay] = self._here(obs[PREFIX])
        return prefix_BHA, torch.arange(self.spec.horizon, device=prefix_BHA.device) < self._here(delay_B)[:, None]

    def _fixed(self, chunk: Chunk) -> Tensor | None:
        """(B, H): the prefix of a chunk that was drawn."""
        if PREFIXED not in self.spec.replay:
            return None
        delay_B1 = self._replayed(chunk, PREFIXED)
        return torch.arange(self.spec.horizon, device=delay_B1.device) < delay_B1

    def _replayed(self, chunk: Chunk, column: str) -> Tensor:
        """(B, *shape); a learner's columns may be flat."""
        if column not in chunk.replay:
            raise PolicyError(
                f"the chunk has no column {column!r}",
                rule=f"log-probabilities of this flow policy need {sorted(self.spec.replay)}",
                remedy="ask for them in BatchNeeds.replay; chunks that were not drawn have none",
            )
        return self._here(chunk.replay[column]).reshape(-1, *self.spec.replay[column])


def transition_kl(policy: FlowPolicy, reference: FlowPolicy, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
    """(B, T): exact KL(policy || reference) of each decision of a chunk that was drawn; 0 for its prefix. The reference has no
    gradient."""
    mean_BJHA, std_BJHA = policy.transitions(obs, chunk)
    with torch.no_grad():
        other_mean_BJHA, other_std_BJHA = reference.transitions(obs, chunk)
    return _decisions(normal_kl(mean_BJHA, std_BJHA, other_mean_BJHA, other_std_BJHA), policy._fixed(chunk))


def _log_prob(chain_BKHA: Tensor, mean_BJHA: Tensor, std_BJHA: Tensor, fixed_BH: Tensor | None) -> Tensor:
    return _decisions(log_normal(chain_BKHA[:, 1:], mean_BJHA, std_BJHA), fixed_BH)


def _decisions(value_BJHA: Tensor, fixed_BH: Tensor | None) -> Tensor:
    """(B, T): summed over A, 0 in the prefix."""
    value_BJH = value_BJHA.sum(-1)
    return (value_BJH if fixed_BH is None else torch.where(fixed_BH[:, None], 0.0, value_BJH)).flatten(1)


def _inpaint(x_BHA: Tensor, clean_BHA: Tensor | None, fixed_BH: Tensor | None) -> Tensor:
    return x_BHA if clean_BHA is None or fixed_BH is None else torch.where(fixed_BH[..., None], clean_BHA, x_BHA)


def _rows(value_BKHA: Tensor, index_BJ: Tensor) -> Tensor:
    return value_BKHA.gather(1, index_BJ[..., None, None].expand(-1, -1, *value_BKHA.shape[2:]))
