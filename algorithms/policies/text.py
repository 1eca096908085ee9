"""An instruction as a tensor, for policies that read the words themselves: UTF-8, zeros after it."""

from __future__ import annotations

import torch
from torch import Tensor

from fleet.errors import PolicyError

NUM_BYTES = 256  # longer instructions are refused


def text_of(instruction: str) -> Tensor:
    """(NUM_BYTES,), uint8.

    Raises:
        PolicyError: The instruction is empty, or too long.
    """
    data = instruction.strip().encode()
    if not 0 < len(data) <= NUM_BYTES:
        raise PolicyError(
            f"the task's instruction has {len(data)} bytes: {instruction[:60]!r}",
            rule=f"this policy reads the text itself, 1 to {NUM_BYTES} bytes of it",
            remedy="give the task an instruction of that length in the run's catalogue",
        )
    return torch.tensor(list(data.ljust(NUM_BYTES, b"\0")), dtype=torch.uint8)


def texts_in(text_BC: Tensor) -> list[str]:
    """The instructions of a batch, (B, NUM_BYTES) uint8."""
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in text_BC.cpu().numpy()]
