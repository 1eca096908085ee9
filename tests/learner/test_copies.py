import numpy as np
import pytest
import torch

from learner.background import Background
from learner.copies import Copies

CPU = torch.device("cpu")


def memory_of(copy):
    return copy.state["w"].untyped_storage().data_ptr()


def test_a_copy_does_not_follow_what_it_was_taken_from():
    live = {"w": torch.zeros(3, requires_grad=True), "list": [np.zeros(2), ("x", 1)], "t": torch.arange(6.0).reshape(2, 3).T}
    copy = Copies(CPU).take(live)
    with torch.no_grad():
        live["w"] += 1
    live["list"][0] += 1
    live["t"].zero_()
    state = copy.state
    assert state["w"].sum() == 0 and not state["w"].requires_grad and state["list"][0].sum() == 0
    assert state["list"][1] == ["x", 1] and torch.equal(state["t"], torch.arange(6.0).reshape(2, 3).T)
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in (state["w"], state["t"]))


def test_memory_is_used_again_when_nobody_holds_the_copy():
    copies, live = Copies(CPU), {"w": torch.randn(1000)}
    first = copies.take(live)
    where = memory_of(first)
    del first
    second = copies.take(live)
    assert memory_of(second) == where
    third = copies.take({"w": torch.zeros(1000)})
    assert memory_of(third) != where and torch.equal(second.state["w"], live["w"]), "what is held stays"
    del second, third
    copies.take(live)
    assert len(copies._memories) == 1, "one stays while one is enough"


@pytest.mark.parametrize("size", [10, 2000])
def test_a_state_may_change_its_form(size):
    copies = Copies(CPU)
    copies.take({"w": torch.ones(1000), "momentum": torch.ones(3, dtype=torch.bfloat16)})
    state = copies.take({"w": torch.full((size,), 2.0), "count": torch.tensor(3), "none": torch.zeros(0, 4)}).state
    assert state["w"].shape == (size,) and (state["w"] == 2).all() and int(state["count"]) == 3
    assert state["none"].shape == (0, 4)


def test_a_job_that_is_done_gives_its_memory_back():
    copies, background = Copies(CPU), Background()
    where = []
    for step in range(5):
        copy = copies.take({"w": torch.full((1000,), float(step))})

        def job(copy=copy):
            where.append(memory_of(copy))

        background.submit("checkpoint", job)
        del copy, job
        background.flush()
    background.close()
    assert len(set(where)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_copy_is_of_the_moment():
    device = torch.device("cuda")
    live, busy = torch.zeros(64 << 20, device=device), torch.randn(8192, 8192, device=device)
    for _ in range(20):
        busy = busy @ busy / 100
    copy = Copies(device).take({"w": live})
    assert not torch.cuda.current_stream().query(), "nothing waited"
    live += 1
    assert copy.state["w"].is_pinned() and copy.state["w"].sum() == 0
