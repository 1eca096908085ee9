"""Conservative critics: chunks that the policy likes must not be worth more than those that are in the data.

    gap = T log sum_i exp( (Q(s, c_i) - log q(c_i)) / T ) - Q(s, c_data)              CQL (arXiv 2006.04779, appendix F)

over samples c_i of densities q. Where densities are not known, as of flows and deterministic policies, samples of the policy
itself are weighed alike: T log mean_i exp(Q(s, c_i) / T), which is CQL with the policy as prior (its section 3.2), and with one
sample Q(s, pi(s)) - Q(s, c_data). Cal-QL (arXiv 2303.05479, eq. 5.1) puts max(Q(s, c_i), G) in place of the policy's values, G
the return of the stored episode: values are not pushed below what is known to have been reached. G = -inf is CQL.

Uniform samples, a third of them in both papers, are left out for chunks: log q = H A log(1/2) on [-1, 1]^(H A) adds 48.5 to the
value of each where H A = 70, so they would decide the sum whatever the critic says of them.

Shape suffixes: B batch, N samples a state, K critics.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def conservative_gap(
    value_KBN: Tensor,
    data_KB: Tensor,
    *,
    bound_B: Tensor | None = None,
    bounded_N: Tensor | None = None,
    log_density_BN: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(K, B): the gap of each critic in each state, see the header.

    Args:
        value_KBN: Q(s, c_i).
        data_KB: Q(s, c_data).
        bound_B: G, -inf where it is not known; None: CQL. No gradient goes to a value below it.
        bounded_N: bool, which samples are the policy's; None: all.
        log_density_BN: log q(c_i); None: samples of the policy, weighed alike.
        temperature: T; near 0 the largest value counts alone.
    """
    if bound_B is not None:
        lifted_KBN = torch.maximum(value_KBN, bound_B.to(value_KBN.dtype)[:, None])
        value_KBN = lifted_KBN if bounded_N is None else torch.where(bounded_N, lifted_KBN, value_KBN)
    if log_density_BN is not None:
        total_KB = temperature * torch.logsumexp((value_KBN - log_density_BN) / temperature, -1)
    else:
        total_KB = temperature * (torch.logsumexp(value_KBN / temperature, -1) - math.log(value_KBN.shape[-1]))
    return total_KB - data_KB
