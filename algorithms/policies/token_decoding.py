"""Three ways from logits to the tokens of a chunk, each with its density and its loss.

``autoregressive`` (RT-2, OpenVLA): one token after the other, each given those before it. The density is exact.
``parallel`` (OpenVLA-OFT, arXiv 2502.19645, with discrete tokens): all in one pass, independent given the observation. Exact.
``diffusion`` (Discrete Diffusion VLA, arXiv 2508.20072): in R rounds, the surest places first, see ``Diffusion``.

Shape suffixes: B batch, T tokens, V vocabulary, R rounds.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from algorithms.policies.token_head import KeysValues, Predictor


class Decoding(Protocol):
    """``record``: what of a drawn chunk its density depends on, of shape (B, *record_shape); the policy's replay column."""

    causal: bool
    record_name: str
    record_shape: tuple[int, ...]

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """Uniform numbers in [0, 1): "draw" for ``decode``, others for ``loss``."""
        ...

    def decode(self, predict: Predictor, temperature: float, draw: Tensor | None) -> Tensor:
        """A record: tokens drawn with ``draw`` of the noise, or the likeliest ones where it is None."""
        ...

    def tokens(self, record: Tensor) -> Tensor:
        """(B, T), the chunk's tokens."""
        ...

    def log_prob(self, predict: Predictor, temperature: float, record: Tensor) -> Tensor:
        """(B, T), by token."""
        ...

    def loss(self, predict: Predictor, tokens_BT: Tensor, valid_BT: Tensor, noise: dict[str, Tensor], blur: float) -> Tensor:
        """(B,): ``cross_entropy`` over valid tokens. What others hold must not matter but as context."""
        ...


class Parallel:
    """See the header."""

    causal = False
    record_name = "replay.tokens"

    def __init__(self, num_tokens: int) -> None:
        self.record_shape: tuple[int, ...] = (num_tokens,)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"draw": torch.rand(batch_size, *self.record_shape, generator=generator)}

    def decode(self, predict: Predictor, temperature: float, draw: Tensor | None) -> Tensor:
        return pick(predict(predict.nothing()) / temperature, draw)

    def tokens(self, record: Tensor) -> Tensor:
        return record

    def log_prob(self, predict: Predictor, temperature: float, record: Tensor) -> Tensor:
        return log_prob_of(predict(self._inputs(predict, record)) / temperature, record)

    def loss(self, predict: Predictor, tokens_BT: Tensor, valid_BT: Tensor, noise: dict[str, Tensor], blur: float) -> Tensor:
        return cross_entropy(predict(self._inputs(predict, tokens_BT)), tokens_BT, valid_BT, blur)

    def _inputs(self, predict: Predictor, tokens_BT: Tensor) -> Tensor:
        return predict.nothing()


class Autoregressive(Parallel):
    """Drawn one by one with cached keys and values; the density is that of one pass over all tokens, which rounds otherwise by
    some 1e-6: ``act`` takes it from there too."""

    causal = True

    def decode(self, predict: Predictor, temperature: float, draw: Tensor | None) -> Tensor:
        tokens_BT, cache = predict.nothing(), list[KeysValues]()
        token_B = tokens_BT[:, 0]
        for t in range(tokens_BT.shape[1]):
            token_B = pick(predict.step(token_B, t, cache) / temperature, None if draw is None else draw[:, t])
            tokens_BT[:, t] = token_B
        return tokens_BT

    def _inputs(self, predict: Predictor, tokens_BT: Tensor) -> Tensor:
        return tokens_BT


class Diffusion:
    """Masked discrete diffusion. Trained to say masked tokens from the others; decoded in R rounds.

    A round: one pass; at the places whose distributions are the surest (largest probability) tokens are drawn, until as many
    are known as the cosine schedule says (MaskGIT, arXiv 2202.04200); then the share ``remask`` of the tokens of earlier
    rounds, those that had the least probability when drawn, is masked again and so drawn anew with more context. Places are
    chosen before tokens are drawn, thus no draw is thrown away unseen, and how many are masked does not depend on the row.
    After the last round all are known.

    Density: which places a round draws or masks follows from what was drawn before, so the record, the state after each round,
    has the probability prod over rounds and places drawn of p(token | state before). ``log_prob`` is its logarithm by place; a
    place drawn twice counts both. For other weights theta' than those that acted, it is the density of the tokens in the
    recorded order: E_behaviour[ratio] = 1 for every theta', since each factor has the mean 1 given the past. It is no density
    of theta' choosing its own order: orders that theta' would prefer are not weighed, and the gradient leaves out how the order
    depends on the weights. Close weights choose the same order but where two places are about equally sure.

    Another difference from Discrete Diffusion VLA: it masks again by thresholds on a token's present confidence; a pass with
    the token visible was not trained to give one, and the number would depend on the row.
    """

    causal = False
    record_name = "replay.chain"

    def __init__(self, num_tokens: int, num_rounds: int, remask: float) -> None:
        self.record_shape: tuple[int, ...] = (num_rounds, num_tokens)
        self._counts = counts(num_tokens, num_rounds, remask)

    def noise(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        draw = torch.rand(batch_size, *self.record_shape, generator=generator)
        return {"draw": draw, "mask": torch.rand(batch_size, 1 + self.record_shape[1], generator=generator)}

    def decode(self, predict: Predictor, temperature: float, draw: Tensor | None) -> Tensor:
        tokens_BT = predict.nothing()
        chance_BT = torch.zeros(tokens_BT.shape, device=tokens_BT.device)  # of each known token, when it was drawn
        chain = []
        for r, (num_drawn, num_masked) in enumerate(self._counts):
            logits_BTV = predict(tokens_BT) / temperature
            known_BT = tokens_BT != predict.head.unknown
            sure_BT = logits_BTV.log_softmax(-1).amax(-1).masked_fill(known_BT, -torch.inf)
            drawn_BT = top(sure_BT, num_drawn)
            picked_BT = pick(logits_BTV, None if draw is None else draw[:, r])
            tokens_BT = torch.where(drawn_BT, picked_BT, tokens_BT)
            chance_BT = torch.where(drawn_BT, log_prob_of(logits_BTV, picked_BT), chance_BT)
            again_BT = top((-chance_BT).masked_fill(~known_BT, -torch.inf), num_masked)
            tokens_BT = tokens_BT.masked_fill(again_BT, predict.head.unknown)
            chain.append(tokens_BT)
        return torch.stack(chain, 1)

    def tokens(self, record: Tensor) -> Tensor:
        return record[:, -1]

    def log_prob(self, predict: Predictor, temperature: float, record: Tensor) -> Tensor:
        unknown, before_BT = predict.head.unknown, predict.nothing()
        total_BT = torch.zeros(before_BT.shape, device=before_BT.device)
        for after_BT in record.unbind(1):
            drawn_BT = (before_BT == unknown) & (after_BT != unknown)
            log_prob_BT = log_prob_of(predict(before_BT) / temperature, after_BT.masked_fill(~drawn_BT, 0))
            total_BT = total_BT + torch.where(drawn_BT, log_prob_BT, 0.0)
            before_BT = after_BT
        return total_BT

    def loss(self, predict: Predictor, tokens_BT: Tensor, valid_BT: Tensor, noise: dict[str, Tensor], blur: float) -> Tensor:
        """Over the valid tokens that ``noise["mask"]`` masks: a share cos(pi u / 2) of them, at least one; all without noise.
        Tokens that are not valid are always masked."""
        masked_BT = ~valid_BT
        if "mask" in noise:
            num_valid_B1 = valid_BT.sum(1, keepdim=True)
            share_B1 = torch.cos(noise["mask"][:, :1] * (math.pi / 2))
            rank_BT = noise["mask"][:, 1:].masked_fill(~valid_BT, 2.0).argsort(1).argsort(1)
            masked_BT = masked_BT | (rank_BT < (share_B1 * num_valid_B1).ceil())
        else:
            masked_BT = torch.ones_like(valid_BT)
        logits_BTV = predict(tokens_BT.masked_fill(masked_BT, predict.head.unknown))
        return cross_entropy(logits_BTV, tokens_BT, valid_BT & masked_BT, blur)


def counts(num_tokens: int, num_rounds: int, remask: float) -> list[tuple[int, int]]:
    """By round, how many tokens are drawn, and how many of those that were known before are masked again; none in the last.

    After round r the share 1 - cos(pi (r + 1) / (2 R)) was known before masking again.
    """
    plan, known = [], 0
    for r in range(num_rounds):
        goal = math.ceil(num_tokens * (1 - math.cos(math.pi / 2 * (r + 1) / num_rounds)) - 1e-9)
        again = int(remask * known + 0.5) if r + 1 < num_rounds else 0
        plan.append((goal - known, again))
        known = goal - again
    return plan


def top(score_BT: Tensor, number: int) -> Tensor:
    """(B, T), bool: the places of the ``number`` largest scores of each row."""
    chosen_BT = torch.zeros(score_BT.shape, dtype=torch.bool, device=score_BT.device)
    return chosen_BT.scatter_(1, score_BT.topk(number, 1).indices, True)


def pick(logits: Tensor, uniform: Tensor | None) -> Tensor:
    """Tokens (...) of logits (..., V): where the cumulative probability passes ``uniform`` (...), or the likeliest."""
    if uniform is None:
        return logits.argmax(-1)
    cumulative = logits.softmax(-1).cumsum(-1)
    reached = uniform[..., None] * cumulative[..., -1:]  # the sum is 1 but for rounding
    return torch.searchsorted(cumulative, reached, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)


def log_prob_of(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """(B, T)."""
    return logits_BTV.log_softmax(-1).gather(-1, tokens_BT[..., None])[..., 0]


def cross_entropy(logits_BTV: Tensor, tokens_BT: Tensor, valid_BT: Tensor, blur: float) -> Tensor:
    """(B,): mean over the valid tokens, 0 where none is valid.

    Args:
        blur: The target is a normal distribution over tokens with this deviation, in tokens, around the true one; 0: it alone.
    """
    if blur:
        token_V = torch.arange(logits_BTV.shape[-1], device=logits_BTV.device)
        target_BTV = (-0.5 * ((token_V - tokens_BT[..., None]) / blur) ** 2).softmax(-1)
        loss_BT = -(target_BTV * logits_BTV.log_softmax(-1)).sum(-1)
    else:
        loss_BT = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(tokens_BT)
    return (loss_BT * valid_BT).sum(1) / valid_BT.sum(1).clamp(min=1)
