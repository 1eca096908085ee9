"""From the log to tensors: no copy in between on the CPU, and prefetching changes nothing but the time."""

import copy
import dataclasses
import threading

import numpy as np
import pytest
import torch

from algorithms.base import Batch
from algorithms.bc import Bc
from algorithms.policies.base import INSTRUCTION
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds, Priority, Windows
from fleet.errors import LearnerError
from fleet.journal import Journal
from fleet.robot import Source
from learner.checkpoint import Checkpoints
from learner.feed import Upload, allocator
from learner.train import make_loop, train
from tests.learner.test_train import fill, run_train
from tests.learner_toys import INSTRUCTIONS_KE, make_run, make_tables

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool", "int16"])
def test_arrays_share_memory_with_their_tensors(dtype):
    array = allocator(CPU)("actions", (3, 4, 2), np.dtype(dtype))
    assert array.shape == (3, 4, 2) and array.dtype == dtype and array.flags.c_contiguous and array.flags.writeable
    assert Upload(CPU)(array).data_ptr() == array.ctypes.data
    assert allocator(CPU)("empty", (0, 3), np.dtype(dtype)).shape == (0, 3)


def test_a_batch_of_the_log_is_gathered_where_its_tensors_lie(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run)
    made = {}

    def allocate(name, shape, dtype):
        made.setdefault(name, []).append(allocator(CPU)(name, shape, dtype))
        return made[name][-1]

    sampler = Sampler(run.buffer, ["left", "right"], 0)
    prefetcher = Prefetcher(sampler, depth=2, allocate=allocate)
    try:
        prefetcher.poll()
        for step in range(12):
            windows = prefetcher.batch(BatchNeeds(16, 4, ("observation.state",), {(Source.DEMO,): 1.0}), step)
            tensor = Upload(CPU)(windows.obs["observation.state"])
            assert tensor.data_ptr() in {array.ctypes.data for array in made["observation.state"]}
            assert Upload(CPU)(windows.actions_BHA).data_ptr() in {array.ctypes.data for array in made["actions"]}
    finally:
        prefetcher.close()
        sampler.close()
    assert len(made["actions"]) <= 4


def test_prefetching_changes_no_weight(tmp_path):
    states = []
    for name, options in {"plain": {"prefetch_depth": 0}, "ahead": {"prefetch_depth": 3, "prefetch_workers": 2}}.items():
        run = make_run(tmp_path / name)
        fill(run)
        progress, seen = run_train(run, make_tables(**options))
        assert progress.step == 40
        states.append(Checkpoints(run.checkpoints, keep=3).newest().state)
        assert seen[-1].feed["batches_ready"] <= options["prefetch_depth"]
    plain, ahead = (state["parts"]["policy"] for state in states)
    assert plain and all(torch.equal(plain[name], ahead[name]) for name in plain)


def test_no_thread_is_left_when_training_fails(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    fill(run)
    draw, gather, drawn_ahead, ran_ahead = Sampler.draw, Sampler.gather, threading.Event(), []

    def drawing(self, needs, step, newest_version=-1):
        if step == 9:
            drawn_ahead.set()
        return draw(self, needs, step, newest_version)

    def broken(self, draw, out=None):
        if draw.step == 7:  # the learner waits for it, and has asked for the two after it
            ran_ahead.append(drawn_ahead.wait(10))
            raise OSError(5, "the disk is gone")
        return gather(self, draw, out)

    monkeypatch.setattr(Sampler, "draw", drawing)
    monkeypatch.setattr(Sampler, "gather", broken)
    with pytest.raises(LearnerError, match=r"batch of step 7 failed.*the disk is gone") as caught:
        train(run, make_tables(), stop=lambda: False, report=lambda progress: None)
    assert isinstance(caught.value.__cause__, OSError) and ran_ahead == [True]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("buffer-")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_fetches_from_page_locked_arrays():
    device = torch.device("cuda")
    array = allocator(device)("observation.images.top", (256, 128, 128, 3), np.dtype("uint8"))
    upload = Upload(device)
    assert torch.from_numpy(array).is_pinned()
    for value in range(50):
        upload.wait()
        array[:] = value
        tensor = upload(array)
        upload.end()
        if value % 10 == 0:
            assert int(tensor.min()) == int(tensor.max()) == value
    upload.wait()
    array[:] = 255
    assert int(tensor.max()) == 49


class Watching(Bc):
    """Behaviour cloning that looks ahead, draws by score, and keeps what it is given."""

    name = "watching"

    def __init__(self, policy, config, data):
        super().__init__(policy, config, data)
        self.needs = dataclasses.replace(
            self.needs, offsets=(-1, 0, 4), priority=Priority(), replay=("log_prob_T",), discount=0.9, by_task=False
        )
        self.batches, self.micros = [], []

    def prepare(self, batch):
        self.batches.append(copy.deepcopy(batch))
        return batch

    def loss(self, part, micro):
        self.micros.append(micro)
        return super().loss(part, micro)


def test_an_algorithm_gets_every_field_of_its_windows(tmp_path):
    run = make_run(tmp_path / "run")
    fill(run)
    tables = make_tables(steps=6, start_steps=0, prefetch_depth=1, engine={"micro_batch": 5})
    tables["algorithm"] = dataclasses.replace(
        tables["algorithm"], name=f"{__name__}:Watching", config={"batch_size": 16, "seed": 3}
    )
    sampler, windows = Sampler(run.buffer, ["left", "right"], 0), []
    sampler.poll()

    class Watched(Prefetcher):
        def batch(self, *arguments):
            windows.append(super().batch(*arguments))
            return windows[-1]

    journal = Journal(run.logs / "learner.jsonl")
    source = Watched(sampler, depth=1)
    loop = make_loop(run, tables, sampler, sampler.specs, INSTRUCTIONS_KE, journal, lambda progress: None, feed=source)
    try:
        loop.run(lambda: False)
    finally:
        source.close()
        sampler.close()
    algorithm = loop._algorithm
    assert len(algorithm.batches) == len(windows) == 6
    assert [f.name for f in dataclasses.fields(Batch)] == [f.name for f in dataclasses.fields(Windows)]
    for batch, want in zip(algorithm.batches, windows, strict=True):
        instruction = INSTRUCTIONS_KE[torch.as_tensor(want.task_B)]
        for obs in (batch.obs, batch.obs_at[-1], batch.obs_at[4]):
            assert torch.equal(obs.pop(INSTRUCTION), instruction)
        for field in dataclasses.fields(Batch):
            assert_equal(getattr(batch, field.name), getattr(want, field.name), field.name)
    assert any((batch.weight_B < 1).any() for batch in algorithm.batches)  # scores came back, and weights correct for them
    assert [len(micro.weight_B) for micro in algorithm.micros[:4]] == [4, 4, 4, 4]
    assert all(len(micro.obs_at[4]["observation.state"]) == len(micro.inside_at[4]) for micro in algorithm.micros)


def assert_equal(tensors, arrays, name):
    if isinstance(arrays, dict):
        assert set(tensors) == set(arrays)
        for key, value in arrays.items():
            assert_equal(tensors[key], value, f"{name}/{key}")
    elif isinstance(arrays, float):
        assert tensors == arrays, name
    else:
        np.testing.assert_array_equal(tensors.numpy(), arrays, err_msg=name)
        assert tensors.numpy().dtype == arrays.dtype
