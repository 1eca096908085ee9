"""Chunks of actions <-> tokens.

``bins`` (RT-2, arXiv 2307.15818; OpenVLA, arXiv 2406.09246): a token is one dimension of one step, rounded to one of V
evenly spaced levels.
``dct`` (after FAST, arXiv 2501.09747): a token is one coefficient of the orthonormal DCT-II along time of one dimension,
rounded to one of V levels; the K lowest frequencies are kept, so a smooth chunk takes K / H of the tokens.

Left out of FAST: byte-pair encoding. It makes the number of tokens depend on the chunk, so that decisions, their mask and their
log-probabilities would need padding; cutting the high frequencies shortens short chunks as much.

Shape suffixes: B batch, H chunk length, A action dims, K rows of the basis, T = K A tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from algorithms.policies.normalise import full_precision


class Codec(nn.Module):
    """Tokens lie time-major, or frequency-major with the lowest first: t = k A + a.

    Levels are spaced evenly over [-bound, bound], both ends included, so that a gripper's -1 and 1 are met exactly, and an odd
    V has a level at 0. What lies beyond becomes the end's token. ``bins``: bound 1 on the scale of ``ActionScale``, which ends
    at the data's 1 % and 99 % quantiles; no action beyond these can be said. ``dct``: bound sqrt(H), which no coefficient of
    a chunk within [-1, 1] exceeds (Parseval).

    Args:
        vocabulary: V, at least 2.
        num_frequencies: K of the DCT; 0: tokens are the steps themselves.
    """

    basis_KH: Tensor | None

    def __init__(self, horizon: int, action_dim: int, vocabulary: int, num_frequencies: int = 0) -> None:
        super().__init__()
        self._horizon, self._action_dim, self.vocabulary = horizon, action_dim, vocabulary
        self._num_rows = num_frequencies or horizon
        self.num_tokens = self._num_rows * action_dim
        self._bound = math.sqrt(horizon) if num_frequencies else 1.0
        self.step = 2 * self._bound / (vocabulary - 1)  # between two levels; rounding moves a value by half of it at most
        basis = dct_basis(horizon)[:num_frequencies] if num_frequencies else None
        self.register_buffer("basis_KH", basis, persistent=False)

    def encode(self, scaled_BHA: Tensor) -> Tensor:
        """(B, T), int64, of finite actions on the policy's scale."""
        with full_precision(scaled_BHA):  # in bfloat16 every sixth coefficient is a level off
            values_BKA = scaled_BHA.float() if self.basis_KH is None else self.basis_KH.float() @ scaled_BHA.float()
        return ((values_BKA.flatten(1) + self._bound) / self.step).round().clamp(0, self.vocabulary - 1).long()

    def decode(self, tokens_BT: Tensor) -> Tensor:
        """(B, H, A), float32, on the policy's scale; tokens may lie between levels (expectations)."""
        values_BKA = (tokens_BT.float() * self.step - self._bound).unflatten(1, (self._num_rows, self._action_dim))
        with full_precision(values_BKA):
            return values_BKA if self.basis_KH is None else self.basis_KH.float().mT @ values_BKA

    def mask(self, mask_BH: Tensor) -> Tensor:
        """(B, T), bool: the tokens that tell of these steps. With ``dct`` each token tells of all steps."""
        mask_BK = mask_BH.bool() if self.basis_KH is None else (mask_BH > 0).any(1, keepdim=True).expand(-1, self._num_rows)
        return mask_BK.repeat_interleave(self._action_dim, 1)


def dct_basis(size: int) -> Tensor:
    """(size, size): row k is the k-th orthonormal DCT-II vector, sqrt(2 / size) cos(pi k (h + 1/2) / size), row 0 constant."""
    order = torch.arange(size, dtype=torch.float64)
    basis = math.sqrt(2 / size) * torch.cos(math.pi / size * order[:, None] * (order + 0.5))
    basis[0] = math.sqrt(1 / size)
    return basis.float()


def filled(actions_BHA: Tensor, mask_BH: Tensor) -> Tensor:
    """Masked steps hold the valid action before them, or the first valid one, or 0 in a row without any."""
    valid_BH = mask_BH > 0
    place_BH = torch.arange(valid_BH.shape[1], device=valid_BH.device).expand_as(valid_BH)
    before_BH = torch.where(valid_BH, place_BH, -1).cummax(1).values
    first_B1 = valid_BH.int().argmax(1, keepdim=True)
    source_BH = torch.where(before_BH < 0, first_B1, before_BH)
    taken_BHA = actions_BHA.gather(1, source_BH[..., None].expand_as(actions_BHA))
    return torch.where(valid_BH.any(1)[:, None, None], taken_BHA, torch.zeros_like(taken_BHA))
