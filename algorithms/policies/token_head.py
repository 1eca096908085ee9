"""The transformer over action tokens that all ways of decoding share.

Shape suffixes: B batch, T tokens, V vocabulary, P places of the transformer, G tokens a place, F width, N tokens of the
observation.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from algorithms.policies.transformer import Attention, Block

KeysValues = tuple[Tensor, Tensor]  # (B, heads, M, F / heads) each


class TokenHead(nn.Module):
    """Action tokens, of which some are not known, look at each other and at the observation; each gets logits.

    Args:
        num_together: G, tokens that share a place of the transformer: it reads the sum of their embeddings and says logits for
            each. One place for all dimensions of a step is G times cheaper than one each. 1 for a causal head.
        causal: The place t sees the tokens before t only; it reads token t - 1. False: places read their own tokens, and see
            all.
    """

    def __init__(
        self, num_tokens: int, vocabulary: int, num_together: int, *, width: int, num_layers: int, num_heads: int, causal: bool
    ) -> None:
        super().__init__()
        self.num_tokens, self.vocabulary, self.causal = num_tokens, vocabulary, causal
        self._together = num_together
        self.unknown = vocabulary  # the input token of a place that is not known, and of what comes before the first
        self.token = nn.Embedding(num_together * (vocabulary + 1), width)
        self.place_PF = nn.Parameter(torch.randn(num_tokens // num_together, width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, num_heads, cross=True) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, num_together * vocabulary)

    def memory(self, observed_BNF: Tensor) -> list[KeysValues]:
        """Of each block, of the observation's tokens: computed once for all passes over them."""
        return [cross(block).memory(observed_BNF) for block in self.blocks]

    def forward(self, tokens_BT: Tensor, memory: list[KeysValues]) -> Tensor:
        """(B, T, V) in float32."""
        mask = None
        if self.causal:
            tokens_BT = torch.cat([torch.full_like(tokens_BT[:, :1], self.unknown), tokens_BT[:, :-1]], 1)
            mask = torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool, device=tokens_BT.device).tril()
        first_G = torch.arange(self._together, device=tokens_BT.device) * (self.vocabulary + 1)
        tokens_BPG = tokens_BT.unflatten(1, (-1, self._together)) + first_G
        x_BPF = self.token(tokens_BPG).sum(2) + self.place_PF
        for block, known in zip(self.blocks, memory, strict=True):
            x_BPF = block(x_BPF, known, mask=mask)
        logits_BTV: Tensor = self.out(self.norm(x_BPF)).unflatten(-1, (self._together, -1)).flatten(1, 2)
        return logits_BTV.float()

    def step(self, token_B: Tensor, place: int, memory: list[KeysValues], cache: list[KeysValues]) -> Tensor:
        """(B, V): the logits of one place of a causal head, from the token before it; ``cache`` grows by its keys and values.

        Args:
            cache: Empty before the first place.
        """
        x_B1F = self.token(token_B)[:, None] + self.place_PF[place]
        for i, (block, known) in enumerate(zip(self.blocks, memory, strict=True)):
            assert isinstance(block, Block)
            y_B1F = block.norms[0](x_B1F)
            here = block.attention.memory(y_B1F)
            if place:
                here = (torch.cat([cache[i][0], here[0]], 2), torch.cat([cache[i][1], here[1]], 2))
            cache[i : i + 1] = [here]
            x_B1F = x_B1F + block.attention(y_B1F, here)
            x_B1F = x_B1F + cross(block)(block.norms[1](x_B1F), known)
            x_B1F = x_B1F + block.layer(block.norms[2](x_B1F))
        logits: Tensor = self.out(self.norm(x_B1F)).float()[:, 0]
        return logits


def cross(block: nn.Module) -> Attention:
    """The part of a block that looks at the observation."""
    assert isinstance(block, Block) and block.cross is not None
    return block.cross


@dataclasses.dataclass
class Predictor:
    """A head bound to the observations of a batch: tokens -> logits.

    Args:
        memory: Of B rows; or, where ``guidance`` is given, of 2 B: with the condition, then without.
        guidance: g of u + g (c - u), by logits.
        last: Logits of the newest call.
    """

    head: TokenHead
    memory: list[KeysValues]
    guidance: float | None = None
    last: Tensor | None = None

    def __call__(self, tokens_BT: Tensor) -> Tensor:
        """(B, T, V), see ``TokenHead.forward``."""
        return self._guided(self.head(self._rows(tokens_BT), self.memory))

    def step(self, token_B: Tensor, place: int, cache: list[KeysValues]) -> Tensor:
        """(B, V), see ``TokenHead.step``."""
        return self._guided(self.head.step(self._rows(token_B), place, self.memory, cache))

    def nothing(self) -> Tensor:
        """(B, T): no place is known."""
        keys = self.memory[0][0]
        num_rows = len(keys) if self.guidance is None else len(keys) // 2
        return torch.full((num_rows, self.head.num_tokens), self.head.unknown, device=keys.device)

    def _rows(self, tokens: Tensor) -> Tensor:
        return tokens if self.guidance is None else torch.cat([tokens, tokens])

    def _guided(self, logits: Tensor) -> Tensor:
        if self.guidance is not None:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.guidance * (conditional - unconditional)
        self.last = logits
        return logits
