import numpy as np
import pytest
import torch
from torch import nn

from algorithms.policies.vision import Cameras, make_vision, random_shift, shift_noise
from fleet.errors import PolicyError

FRONT, WRIST = "observation.images.front", "observation.images.wrist"


@pytest.mark.parametrize(
    ("name", "shape", "num_tokens"),
    [
        ("cnn", (84, 84, 3), 36),
        ("cnn", (16, 16, 1), 64),
        ("cnn", (480, 640, 3), 80),
        ("cnn", (224, 224, 3), 49),
        ("vit", (84, 84, 3), 49),
        ("vit", (96, 128, 3), 48),
        ("vit", (224, 224, 4), 64),
    ],
)
def test_tokens(name, shape, num_tokens):
    torch.manual_seed(0)
    encoder = make_vision(name, shape, 16)
    image = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    tokens = encoder(image)
    assert tokens.shape == (2, encoder.num_tokens, 16) and encoder.num_tokens == num_tokens
    image[1] = image[0]
    rows, columns, _ = shape
    image[1, : rows // 8, : columns // 8] //= 2
    changed = (encoder(image)[1] - encoder(image)[0]).abs().sum(1)
    assert changed[0] > 0  # what is at the top left is in the first token


def test_every_pixel_counts():
    for name in ("cnn", "vit"):
        encoder = make_vision(name, (84, 84, 3), 16)
        seen = torch.zeros(84, 84)
        image = torch.randint(0, 256, (1, 84, 84, 3)).float().requires_grad_()
        weights = torch.randn(encoder.num_tokens, 16)  # a norm's outputs have a fixed sum
        (encoder(image) * weights).sum().backward()
        seen = image.grad.abs().sum((0, 3))
        assert (seen > 0).float().mean() > 0.99, name


@pytest.mark.parametrize(
    ("name", "shape", "width", "said"),
    [
        ("cnn", (8, 84, 3), 16, "16 to 1024 pixels"),
        ("cnn", (84, 2000, 3), 16, "16 to 1024 pixels"),
        ("cnn", (84, 84, 7), 16, "1 to 4 channels"),
        ("cnn", (84, 84), 16, "height, width, channels"),
        ("cnn", (84, 84, 3), 20, "multiple of 8"),
        ("vit", (84, 83, 3), 16, "(84, 83, 3)"),
        ("vit", (84, 84, 3), 18, "multiple of 4"),
        ("ccn", (84, 84, 3), 16, "did you mean 'cnn'"),
    ],
)
def test_refusals(name, shape, width, said):
    with pytest.raises(PolicyError) as caught:
        make_vision(name, shape, width, FRONT)
    assert said in str(caught.value) and (FRONT in str(caught.value) or name == "ccn")


def test_an_image_that_is_missing_or_of_another_kind_is_refused_by_name():
    cameras = Cameras({FRONT: (32, 32, 3), WRIST: (16, 24, 3)}, "cnn", 8, 2)
    obs = {FRONT: torch.zeros(2, 32, 32, 3, dtype=torch.uint8), WRIST: torch.zeros(2, 16, 24, 3, dtype=torch.uint8)}
    assert [tokens.shape[1] for tokens in cameras(obs)] == cameras.num_tokens
    with pytest.raises(PolicyError, match=rf"{WRIST}.* is missing"):
        cameras({FRONT: obs[FRONT]})
    with pytest.raises(PolicyError, match=rf"{WRIST}.*\(24, 16, 3\)"):
        cameras({**obs, WRIST: obs[WRIST].mT.permute(0, 3, 1, 2).reshape(2, 24, 16, 3)})
    with pytest.raises(PolicyError, match="float32"):
        cameras({**obs, FRONT: obs[FRONT].float()})
    with pytest.raises(PolicyError, match="shift_pixels"):
        Cameras({FRONT: (32, 32, 3)}, "cnn", 8, -1)


class Mean(nn.Module):
    """An encoder of somebody else."""

    num_tokens = 1

    def __init__(self, shape, width):
        super().__init__()
        self.width = width

    def forward(self, image):
        return image.float().mean((1, 2, 3))[:, None, None].expand(-1, 1, self.width)


def test_an_encoder_of_ones_own():
    encoder = make_vision(f"{__name__}:Mean", (4, 4, 3), 2)
    assert torch.equal(encoder(torch.full((1, 4, 4, 3), 7, dtype=torch.uint8)), torch.full((1, 1, 2), 7.0))


def test_shift_moves_by_what_was_drawn_and_repeats_edges():
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 10, 12, 3), np.uint8))
    noise = {f"shift.{FRONT}": torch.tensor([[2, 2], [0, 4], [3, 2]])}
    moved = random_shift(image, FRONT, 2, noise)
    assert torch.equal(moved[0], image[0])  # the middle of the range: not moved
    assert torch.equal(moved[1, 2:, :-2], image[1, :-2, 2:])  # down by 2, left by 2
    assert torch.equal(moved[1, :2, :-2], image[1, :1, 2:].expand(2, -1, -1))
    assert torch.equal(moved[2, :-1], image[2, 1:]) and torch.equal(moved[2, -1], image[2, -1])
    for same in (random_shift(image, WRIST, 2, noise), random_shift(image, FRONT, 2, None)):
        assert torch.equal(same, image)


def test_shifts_are_uniform_and_by_camera():
    drawn = shift_noise(4000, [FRONT, WRIST], 3, torch.Generator().manual_seed(0))
    assert set(drawn) == {f"shift.{FRONT}", f"shift.{WRIST}"} and shift_noise(5, [FRONT], 0, None) == {}
    for shift in drawn.values():
        counts = torch.stack([torch.bincount(axis, minlength=7) for axis in shift.T])
        assert counts.shape == (2, 7) and ((counts - 4000 / 7).abs() < 4 * (4000 / 7) ** 0.5).all()
    assert not torch.equal(*drawn.values())
