"""Tokens and back. The reference of the DCT is its sum, written out in float64."""

import math

import numpy as np
import pytest
import torch

from algorithms.policies.token_codec import Codec, dct_basis, filled

B, H, A = 64, 6, 3


def _chunks(seed=0, reach=1.0):
    return (torch.rand(B, H, A, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def _reference_dct(chunks_BHA):
    chunks, order = chunks_BHA.double().numpy(), np.arange(chunks_BHA.shape[1])
    size = len(order)
    rows = [
        math.sqrt((1 if k == 0 else 2) / size)
        * sum(chunks[:, h] * math.cos(math.pi * k * (2 * h + 1) / (2 * size)) for h in order)
        for k in order
    ]
    return np.stack(rows, 1)


@pytest.mark.parametrize("vocabulary", [2, 9, 64, 255])
def test_bins_are_off_by_half_a_step_at_most(vocabulary):
    codec, chunks = Codec(H, A, vocabulary), _chunks()
    error = (codec.decode(codec.encode(chunks)) - chunks).abs()
    assert codec.num_tokens == H * A and codec.step == pytest.approx(2 / (vocabulary - 1))
    assert codec.step / 4 < error.max() <= codec.step / 2 + 1e-6
    every = torch.randint(vocabulary, (B, H * A))
    assert torch.equal(codec.encode(codec.decode(every)), every)


def test_bins_meet_the_ends_and_the_middle_and_take_what_is_beyond_to_the_end():
    codec = Codec(1, 5, 255)
    tokens = codec.encode(torch.tensor([[[-1.0, 0.0, 1.0, -7.0, 1e30]]]))
    assert tokens.tolist() == [[0, 127, 254, 0, 254]]
    torch.testing.assert_close(codec.decode(tokens), torch.tensor([[[-1.0, 0.0, 1.0, -1.0, 1.0]]]), rtol=0, atol=1e-6)


def test_bins_are_time_major_and_their_mask_is_that_of_the_steps():
    codec = Codec(2, 3, 5)
    chunk = torch.tensor([[[-1.0, -0.5, 0.0], [0.5, 1.0, -1.0]]])
    assert codec.encode(chunk).tolist() == [[0, 1, 2, 3, 4, 0]]
    mask = codec.mask(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert mask.tolist() == [[True] * 3 + [False] * 3, [False] * 6]


def test_the_dct_is_the_orthonormal_one():
    basis = dct_basis(H)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(H), rtol=0, atol=1e-6)
    chunks = _chunks()
    np.testing.assert_allclose((basis @ chunks).numpy(), _reference_dct(chunks), atol=1e-5)


@pytest.mark.parametrize("num_frequencies", [1, 3, H])
@pytest.mark.parametrize("vocabulary", [17, 255])
def test_dct_error_is_rounding_and_the_frequencies_that_are_cut(num_frequencies, vocabulary):
    codec, chunks = Codec(H, A, vocabulary, num_frequencies), _chunks()
    assert codec.num_tokens == num_frequencies * A
    energy_BA = (codec.decode(codec.encode(chunks)) - chunks).double().square().sum(1).numpy()
    cut_BA = np.square(_reference_dct(chunks)[:, num_frequencies:]).sum(1)
    rounding = num_frequencies * (codec.step / 2) ** 2
    assert (energy_BA <= cut_BA + rounding + 1e-6).all() and (energy_BA >= cut_BA - 1e-5).all()
    assert (energy_BA - cut_BA).max() > rounding / 8  # the bound is near


def test_no_coefficient_of_a_chunk_within_the_range_is_clipped():
    codec = Codec(H, 1, 65, H)
    square = torch.tensor([[1.0, 1, 1, -1, -1, -1], [1, 1, 1, 1, 1, 1], [1, -1, 1, -1, 1, -1]])[..., None]
    worst = torch.stack([dct_basis(H)[k].sign() for k in range(H)])[..., None]  # the largest k-th coefficient there is
    for chunks in (square, worst):
        error = codec.decode(codec.encode(chunks)) - chunks
        assert error.square().sum(1).max() <= H * (codec.step / 2) ** 2 + 1e-6
    assert codec.encode(square[1:2])[0, 0] == 64  # the constant at the range's end takes the last token


def test_dct_tokens_begin_with_the_lowest_frequency_of_each_dimension():
    codec = Codec(H, 2, 65, 2)
    still = torch.tensor([0.5, -1.0]).expand(1, H, 2)
    tokens = codec.encode(still)[0]
    assert tokens[1] == 0 and 32 < tokens[0] < 64 and tokens[2:].tolist() == [32, 32]
    mask = codec.mask(torch.tensor([[0.0, 0, 0, 0, 1, 0], [0.0] * 6]))
    assert mask.tolist() == [[True] * 4, [False] * 4]


def test_decoding_is_linear_between_tokens():
    for codec in (Codec(H, A, 9), Codec(H, A, 9, 3)):
        low, high = torch.randint(0, 5, (B, codec.num_tokens)), torch.randint(4, 9, (B, codec.num_tokens))
        mean = (codec.decode(low) + codec.decode(high)) / 2
        torch.testing.assert_close(codec.decode((low + high) / 2), mean, rtol=0, atol=1e-6)


def test_masked_steps_take_the_valid_action_before_them():
    actions = torch.arange(1.0, 5.0).repeat(4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).float()
    garbage = torch.where(mask > 0, actions, torch.nan)[..., None]
    expected = torch.tensor([[1.0, 2, 2, 2], [3, 3, 3, 3], [1, 1, 3, 3], [0, 0, 0, 0]])
    assert torch.equal(filled(garbage, mask)[..., 0], expected)


@pytest.mark.parametrize("num_frequencies", [0, 8])
def test_tokens_are_the_same_where_training_is_in_bfloat16(num_frequencies):
    codec = Codec(16, 4, 127, num_frequencies)
    actions_BHA = (0.3 * torch.randn(64, 16, 4, generator=torch.Generator().manual_seed(0)).cumsum(1)).clamp(-1, 1)
    tokens_BT = codec.encode(actions_BHA)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codec.encode(actions_BHA), tokens_BT)
        inside_BHA = codec.decode(tokens_BT)
    assert torch.equal(inside_BHA, codec.decode(tokens_BT))
