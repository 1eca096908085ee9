"""The text of an instruction reaches a policy that reads it: from the catalogue into batches, and on the robot."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from actors.policy_runner import PolicyRunner
from actors.robots.toy import ToyRobot
from algorithms.policies.base import INSTRUCTION, TEXT, Chunk, PolicySpec, acting_conditions
from algorithms.policies.text import NUM_BYTES, text_of, texts_in
from fleet.batch import BatchNeeds
from fleet.errors import PolicyError
from fleet.robot import Source
from learner.feed import Feed
from tests.actors.test_policy_runner import release
from tests.learner_toys import MemorySource

SPEC = PolicySpec({}, {TEXT: (NUM_BYTES,)}, 2, 4)


@dataclasses.dataclass
class Nothing:
    pass


class Reader(nn.Module):
    """Its actions are the length of the text that it was given."""

    Config = Nothing

    def __init__(self, config):
        super().__init__()
        self.spec = SPEC

    def act(self, obs, noise=None, guidance=1.0):
        lengths = torch.tensor([float(len(text)) for text in texts_in(obs[TEXT])])
        return Chunk(lengths[:, None, None].expand(-1, 4, 2) / 100)


def test_there_and_back():
    texts = ["Reach the target.", "Öffne die Tür", "x" * NUM_BYTES]
    assert texts_in(torch.stack([text_of(text) for text in texts])) == texts
    for wrong in ("", "  ", "ü" * (NUM_BYTES // 2 + 1)):
        with pytest.raises(PolicyError, match="bytes"):
            text_of(wrong)


def test_acting_conditions_have_the_text():
    conditions = acting_conditions(SPEC, torch.zeros(3, 8), "push it")
    assert set(conditions) == {TEXT} and texts_in(conditions[TEXT]) == ["push it"] * 3
    with pytest.raises(PolicyError, match="0 bytes"):
        acting_conditions(SPEC, torch.zeros(8))


def test_each_row_of_a_batch_has_the_text_of_its_task():
    texts = ["first", "second one"]
    source = MemorySource(100)
    source.poll()
    windows = source.batch(BatchNeeds(16, 4, ("observation.state",), {(Source.DEMO,): 1.0}), 0)
    assert len(set(windows.task_B.tolist())) == 2
    plain = Feed(torch.zeros(2, 3), torch.device("cpu")).batch(windows)
    assert TEXT not in plain.obs and INSTRUCTION in plain.obs
    batch = Feed(torch.zeros(2, 3), torch.device("cpu"), torch.stack([text_of(t) for t in texts])).batch(windows)
    for obs in (batch.obs, *batch.obs_at.values()):
        assert texts_in(obs[TEXT]) == [texts[task] for task in windows.task_B]


def test_a_robot_gives_the_text_of_its_task():
    runner = PolicyRunner(ToyRobot().spec, {})
    runner.set_embeddings({"reach": [0.0], "push": [0.0]}, {"reach": "12345", "push": "1234567890"})
    runner.load(*release(config={}, family=f"{Reader.__module__}:Reader"))
    for task, length in (("reach", 5), ("push", 10)):
        chunk = runner.act(0, 0, task, ToyRobot().reset("reach", 0))
        assert np.allclose(chunk.actions_HA, length / 100)
