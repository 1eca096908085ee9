import pytest
import torch

from learner import agree
from learner.agree import digest

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float64)
CUDA = pytest.param("cuda", agree._crc, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def weights_on(device):
    generator = torch.Generator().manual_seed(0)
    made = {str(dtype): torch.rand(33, 7, generator=generator).mul(9).to(dtype) for dtype in DTYPES}
    return {
        "policy": {name: value.to(device) for name, value in made.items()},
        "acting": {"none": torch.empty(0, device=device)},
    }


@pytest.mark.parametrize(("device", "checksum"), [("cpu", agree._crc), ("cpu", agree._bit_sums), CUDA])
def test_any_weight_that_changes_is_noticed(monkeypatch, device, checksum):
    monkeypatch.setattr(agree, "_crc", checksum)
    weights = weights_on(device)
    before, seen = digest(weights), set()
    assert before == digest(weights_on(device)) < 2**48
    for tensor in weights["policy"].values():
        flat = tensor.view(-1)
        for at in (0, 1, 117, len(flat) - 1):
            raw, old = flat[at : at + 1].view(torch.uint8), flat[at].clone()
            raw[0] ^= 1  # the lowest bit
            seen.add(digest(weights))
            flat[at] = old
        first = flat[3].clone()
        flat[3], flat[4] = flat[4].clone(), first
        if flat[3] != flat[4]:
            seen.add(digest(weights))
        flat[4], flat[3] = flat[3].clone(), first
    assert digest(weights) == before and before not in seen and len(seen) >= 4 * len(DTYPES) + 4
    zeros = torch.zeros(1, 1, device=device)
    others = [{"a": zeros}, {"a": -zeros}, {"b": zeros}, {"a": zeros.int()}, {"a": zeros[0]}, {"a": zeros, "b": zeros}]
    assert len({digest({"policy": tensors}) for tensors in others}) == len(others)


def test_where_a_tensor_lies_does_not_matter():
    whole = torch.arange(12.0).view(3, 4)
    assert digest({"": {"": whole.t()}}) == digest({"": {"": whole.t().contiguous()}})
