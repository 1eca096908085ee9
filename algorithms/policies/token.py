"""Token policy: the chunk as a sentence of discrete tokens, said by a transformer that looks at the observation.

codec (token_codec.py): what a token means; decoding (token_decoding.py): in which order tokens are said, and their density;
head (token_head.py): the network that all share.

Shape suffixes: B batch, H chunk length, A action dims, T tokens, V vocabulary, N tokens of the observation, F width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from algorithms.policies.base import ADVANTAGE, INSTRUCTION, Chunk, PolicySpec
from algorithms.policies.normalise import ActionScale, full_precision
from algorithms.policies.observation import EncoderConfig, ObservationEncoder
from algorithms.policies.statistics import Statistics
from algorithms.policies.token_codec import Codec, filled
from algorithms.policies.token_decoding import Autoregressive, Decoding, Diffusion, Parallel
from algorithms.policies.token_head import Predictor, TokenHead
from fleet.errors import PolicyError

DECODINGS = ("autoregressive", "parallel", "diffusion")
CODECS = ("bins", "dct")


@dataclasses.dataclass
class TokenConfig:
    reads: Mapping[str, tuple[int, ...]]
    """Observation features by LeRobot's names, with shapes; cameras too."""
    action_dim: int
    """A."""
    horizon: int = 8
    """H, actions in a chunk."""
    instruction_dim: int = 32
    """E, size of obs["instruction"]; 0 for a policy of one task."""
    advantage: bool = False
    """Whether it reads the condition "advantage", and can be guided by it."""
    decoding: str = "parallel"
    """autoregressive (T small passes), parallel (one pass) or diffusion (``num_rounds`` passes)."""
    codec: str = "bins"
    """bins: a token by step and dimension; dct: a token by frequency and dimension."""
    num_bins: int = 127
    """V, levels of a token; an odd number has one at the middle of the range. Tens of demonstrations want about 31."""
    num_frequencies: int = 0
    """Of dct: the lowest so many are kept; 0: half of them. FAST's scale of 10 is about num_bins = 20 sqrt(H)."""
    num_rounds: int = 8
    """R, of diffusion."""
    remask: float = 0.25
    """Of diffusion: share of the tokens of earlier rounds that each round masks again; 0: none."""
    temperature: float = 1.0
    """Logits are divided by it where tokens are drawn, and in their log-probability."""
    soft_decode: bool = False
    """Of parallel: without noise, act gives the expected value of each token, not the likeliest; it records the nearest."""
    blur: float = 0.0
    """Deviation, in tokens, of the target distribution of the imitation loss; 0: the true token alone. Tens of demonstrations
    want about 0.75 (as HL-Gauss, arXiv 2403.03950)."""
    width: int = 128
    """F, of all transformer blocks."""
    num_heads: int = 4
    """Of attention."""
    encoder_layers: int = 1
    """Blocks over the tokens of the observation."""
    num_layers: int = 2
    """Blocks over the tokens of the action."""
    vision: str = "cnn"
    """See ``EncoderConfig``."""
    shift_pixels: int = 4
    """See ``EncoderConfig``."""
    select: Mapping[str, list[int]] = dataclasses.field(default_factory=dict)
    """See ``EncoderConfig``."""


class TokenPolicy(nn.Module):
    """See the header. Implements ``algorithms.policies.base.Policy``; a decision is a token, T of them in a chunk."""

    Config = TokenConfig

    def __init__(self, config: TokenConfig) -> None:
        super().__init__()
        self.check(config)
        reads = {name: tuple(int(n) for n in shape) for name, shape in sorted(config.reads.items())}
        conditions: dict[str, tuple[int, ...]] = {INSTRUCTION: (config.instruction_dim,)} if config.instruction_dim else {}
        if config.advantage:
            conditions[ADVANTAGE] = ()
        num_frequencies = 0 if config.codec == "bins" else config.num_frequencies or -(-config.horizon // 2)
        self.codec = Codec(config.horizon, config.action_dim, config.num_bins, num_frequencies)
        self.decoding = _decoding(config, self.codec.num_tokens)
        self._temperature, self._blur, self._soft = config.temperature, config.blur, config.soft_decode
        replay = {self.decoding.record_name: self.decoding.record_shape}
        self.spec = PolicySpec(reads, conditions, config.action_dim, config.horizon, replay, density=True)
        encoder = EncoderConfig(
            config.width, config.encoder_layers, config.num_heads, config.vision, config.shift_pixels, config.select
        )
        self.encoder = ObservationEncoder(self.spec, encoder)
        self.scale = ActionScale(config.action_dim)
        self.head = TokenHead(
            self.codec.num_tokens,
            config.num_bins,
            1 if self.decoding.causal else config.action_dim,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            causal=self.decoding.causal,
        )
        self.advantage = nn.Embedding(3, config.width) if config.advantage else None

    @staticmethod
    def check(config: TokenConfig) -> None:
        """Raises PolicyError naming the setting that is out of its range."""
        sizes = ("action_dim", "horizon", "width", "num_heads", "encoder_layers", "num_layers", "num_rounds")
        rules = {name: (getattr(config, name) >= 1, "is at least 1") for name in sizes}
        rules |= {
            "reads": (bool(config.reads), "is not empty"),
            "decoding": (config.decoding in DECODINGS, f"is one of {', '.join(DECODINGS)}"),
            "codec": (config.codec in CODECS, f"is one of {', '.join(CODECS)}"),
            "instruction_dim": (config.instruction_dim >= 0, "is at least 0"),
            "num_bins": (2 <= config.num_bins <= 4096, "is 2 to 4096"),
            "num_frequencies": (0 <= config.num_frequencies <= config.horizon, "is 0 to horizon"),
            "remask": (0 <= config.remask < 1, "is in [0, 1)"),
            "temperature": (0 < config.temperature < math.inf, "is above 0"),
            "blur": (0 <= config.blur < math.inf, "is at least 0"),
            "soft_decode": (config.decoding == "parallel" or not config.soft_decode, "is for decoding = parallel"),
            "width": (
                config.num_heads >= 1 and config.width >= 1 and config.width % config.num_heads == 0,
                "divides by num_heads",
            ),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise PolicyError(f"token policy with {name} = {getattr(config, name)!r}", rule=f"{name} {rule}")

    def set_statistics(self, statistics: Mapping[str, Statistics]) -> None:
        """Of observations, and of actions: their quantiles are the ends of the levels."""
        self.encoder.set_statistics(statistics)
        self.scale.set_statistics(statistics)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Uniform: "draw" (B, T), or (B, R, T) for diffusion, and "mask" (B, 1 + T) of its loss; how images are shifted."""
        return {**self.decoding.noise(batch_size, generator), **self.encoder.noise(batch_size, generator)}

    def act(self, obs: Mapping[str, Tensor], noise: Mapping[str, Tensor] | None = None, guidance: float = 1.0) -> Chunk:
        """The likeliest tokens (of diffusion: by round), or a sample if ``noise`` is given.

        log_prob_BT is there with noise only, and not where two passes were blended (``guidance`` neither 0 nor 1, with the
        condition "advantage"): ``log_prob`` is that of the policy itself. With guidance 0 it is that of absent advantages.
        """
        with full_precision(self.scale.center_A):
            if guidance == 0:
                obs = {name: value for name, value in obs.items() if name != ADVANTAGE}
            blended = self.advantage is not None and guidance not in (0, 1)
            predict = self._predictor(obs, guidance if blended else None)
            log_prob_BT = None
            if noise is None and self._soft:
                chance_BTV = predict(predict.nothing()).softmax(-1)
                tokens_BT = chance_BTV @ torch.arange(self.codec.vocabulary, device=chance_BTV.device).float()
                record = tokens_BT.round()
            else:
                draw = None if noise is None else noise["draw"].to(self.scale.center_A.device)
                record = self.decoding.decode(predict, self._temperature, draw)
                tokens_BT = self.decoding.tokens(record)
                if noise is not None and not blended:
                    log_prob_BT = self.decoding.log_prob(predict, self._temperature, record)
            assert predict.last is not None
            # A token is always a number: logits that are not would act unseen.
            broken_B11 = 0 * predict.last.flatten(1).sum(1)[:, None, None]
            actions_BHA = self.scale.restore(self.codec.decode(tokens_BT)) + broken_B11
        return Chunk(actions_BHA, log_prob_BT, {self.decoding.record_name: record.int()})

    def log_prob(self, obs: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
        """(B, T): of the tokens in ``chunk.replay``, at the temperature that act draws with.

        Raises:
            PolicyError: The replay column is missing, of another size, or holds no tokens of this policy.
        """
        with full_precision(self.scale.center_A):
            return self.decoding.log_prob(self._predictor(obs), self._temperature, self._record(chunk))

    def decision_mask(self, chunk: Chunk, mask_BH: Tensor) -> Tensor:
        """bins: the tokens of these steps. dct: all tokens where any step is, since each tells of all steps."""
        return self.codec.mask(mask_BH)

    def imitation_loss(
        self, obs: Mapping[str, Tensor], chunk: Chunk, mask_BH: Tensor, noise: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """(B,): cross-entropy, averaged over the tokens of valid steps; 0 where none is valid.

        Masked steps count as the valid action before them (or the first one): as the context of later tokens, and with dct
        as part of the chunk whose frequencies are learnt. Diffusion without noise: from nothing known, all at once.
        """
        target_BHA = filled(chunk.actions_BHA.float(), mask_BH)
        tokens_BT = self.codec.encode(torch.nan_to_num(self.scale.normalise(target_BHA)))
        moved = {} if noise is None else {name: value.to(tokens_BT.device) for name, value in noise.items()}
        predict = self._predictor(obs, noise=noise)
        loss_B = self.decoding.loss(predict, tokens_BT, self.codec.mask(mask_BH), moved, self._blur)
        return loss_B + 0 * target_BHA.sum((1, 2))  # an action that is not finite has no token: the loss says so

    def embed(self, obs: Mapping[str, Tensor]) -> Tensor:
        """(B, F): mean over the observation's tokens."""
        return self.encoder(obs).mean(1)

    def _predictor(self, obs: Mapping[str, Tensor], guidance: float | None = None, noise: Any = None) -> Predictor:
        observed_BNF = self.encoder(obs, noise)
        if self.advantage is not None:
            given_B = obs.get(ADVANTAGE, torch.zeros(len(observed_BNF), device=observed_BNF.device))
            kinds = [(given_B > 0).long() - (given_B < 0).long()]
            kinds += [] if guidance is None else [torch.zeros_like(kinds[0])]
            parts = [torch.cat([observed_BNF, self.advantage(kind_B + 1)[:, None]], 1) for kind_B in kinds]
            observed_BNF = torch.cat(parts)
        return Predictor(self.head, self.head.memory(observed_BNF), guidance)

    def _record(self, chunk: Chunk) -> Tensor:
        name, shape = self.decoding.record_name, self.decoding.record_shape
        record = chunk.replay.get(name)
        num_rows = len(chunk.actions_BHA)
        if record is None or record.numel() != num_rows * math.prod(shape):
            said = "is missing" if record is None else f"has shape {tuple(record.shape)}"
            raise PolicyError(
                f"replay column {name!r} {said}",
                rule=f"the token policy's log_prob reads it, {shape} for each of {num_rows} rows",
                remedy="record it with the chunk, and ask for it in BatchNeeds.replay",
            )
        record = record.reshape(num_rows, *shape).to(self.scale.center_A.device).long()
        highest = self.head.unknown if len(shape) == 2 else self.head.unknown - 1
        if record.numel() and (int(record.min()) < 0 or int(record.max()) > highest):
            raise PolicyError(
                f"replay column {name!r} holds {int(record.min())} to {int(record.max())}",
                rule=f"tokens of this policy are 0 to {highest}",
                remedy="use chunks that a policy with the same num_bins proposed",
            )
        return record


def _decoding(config: TokenConfig, num_tokens: int) -> Decoding:
    if config.decoding == "diffusion":
        return Diffusion(num_tokens, config.num_rounds, config.remask)
    return Autoregressive(num_tokens) if config.decoding == "autoregressive" else Parallel(num_tokens)
