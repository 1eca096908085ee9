"""What tests of the learner share: steps in memory, a run folder, tables, and an algorithm with two parts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from algorithms.base import NO_FACTS, Batch, DataFacts, LossOutput, Part
from algorithms.policies.base import INSTRUCTION, PolicySpec
from fleet.batch import BatchNeeds, Windows
from fleet.errors import NoData
from fleet.identity import create_run_keys
from fleet.journal import Journal
from fleet.robot import Source
from fleet.runfolder import RunFolder
from fleet.spec import Feature, RobotSpec
from learner.main import LEARNER_TABLES
from learner.train import make_loop

torch.set_num_threads(1)  # several threads on a busy machine wait for each other
STATE_DIM, ACTION_DIM, TASKS = 3, 2, ("left", "right")
SPEC = RobotSpec(
    "toy",
    20.0,
    {"observation.state": Feature("float32", (STATE_DIM,)), "action": Feature("float32", (ACTION_DIM,), "rad", -1.0, 1.0)},
)
INSTRUCTIONS_KE = torch.eye(len(TASKS), 4)
SMALL_POLICY = {"horizon": 4, "width": 16, "num_layers": 2}


class MemorySource:
    """Steps in memory with the sampler's methods; ``add`` makes more of them. The oldest ``retired`` ones are gone."""

    def __init__(self, num_steps: int = 0, seed: int = 0, retired: int = 0) -> None:
        self._seed, self._committed, self._visible, self._retired = seed, num_steps, 0, retired

    def add(self, num_steps: int) -> None:
        self._committed += num_steps

    def poll(self) -> int:
        new, self._visible = self._committed - self._visible, self._committed
        return new

    def num_steps(self, source: Source | None = None) -> int:
        return self._visible - self._retired if source in (None, Source.DEMO) else 0

    def counts(self) -> np.ndarray:
        counts_KT = np.zeros((len(Source), len(TASKS)), np.int64)
        counts_KT[Source.DEMO, 0] = self.num_steps()
        return counts_KT

    def balance(self, counts_SKT: np.ndarray) -> None:
        pass

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"read": self._visible}

    def reads(self, state: dict[str, Any]) -> bool:
        return True

    def load_state(self, state: dict[str, Any]) -> int:
        return self._visible - state["read"]

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        if not self._visible or all(Source.DEMO not in group for group in needs.shares):
            raise NoData("no step of these sources")
        rng = np.random.default_rng((self._seed, step, self._visible))
        state = rng.normal(size=(needs.batch_size, STATE_DIM)).astype(np.float32)
        task = rng.integers(len(TASKS), size=needs.batch_size)
        action = np.tanh(state[:, :ACTION_DIM] * (2 * task[:, None] - 1)).astype(np.float32)
        shape = (needs.batch_size, needs.horizon)
        nothing = np.full(needs.batch_size, -1)
        return Windows(
            obs={"observation.state": state},
            obs_at={},
            inside_at={},
            actions_BHA=np.repeat(action[:, None], needs.horizon, 1),
            rewards_BH=np.zeros(shape, np.float32),
            terminated_BH=np.zeros(shape, bool),
            truncated_BH=np.zeros(shape, bool),
            mask_BH=rng.random(shape) < 0.9,
            source_BH=np.full(shape, int(Source.DEMO), np.uint8),
            source_B=np.full(needs.batch_size, int(Source.DEMO), np.uint8),
            task_B=task,
            version_B=nothing,
            step_B=np.arange(needs.batch_size),
            episode_B=np.zeros(needs.batch_size, np.int64),
            frame_B=np.arange(needs.batch_size),
            steps_to_go_B=nothing,
            outcome_B=nothing,
            terminated_B=np.zeros(needs.batch_size, bool),
            takeover_in_B=nothing,
            return_B=np.full(needs.batch_size, np.nan, np.float32),
            weight_B=np.ones(needs.batch_size, np.float32),
            replay={},
            index_B=np.arange(needs.batch_size),
            shard_weight=1.0,
        )


class BrokenSource(MemorySource):
    """From ``broken_at`` on its observations are NaN."""

    broken_at = 10

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        windows = super().batch(needs, step)
        if step >= self.broken_at:
            windows.obs["observation.state"][0] = np.nan
        return windows


@dataclasses.dataclass
class PairConfig:
    learning_rate: float = 0.1


class LinearPolicy(nn.Module):
    """The smallest policy that can be published, with dropout: torch's own generator is drawn from."""

    @dataclasses.dataclass
    class Config:
        action_dim: int = ACTION_DIM

    def __init__(self, config: LinearPolicy.Config) -> None:
        super().__init__()
        self.spec = PolicySpec({"observation.state": (STATE_DIM,)}, {INSTRUCTION: (4,)}, config.action_dim, 4)
        self.linear, self.dropout = nn.Linear(STATE_DIM, config.action_dim), nn.Dropout(0.5)

    def forward(self, state_BS: torch.Tensor) -> torch.Tensor:
        return self.linear(self.dropout(state_BS))


class Pair:
    """A policy trained through a critic, and the critic: what one part's loss does to the other must not show."""

    name, Config, advice = "pair", PairConfig, ""

    def __init__(self, policy: Any, config: PairConfig, data: DataFacts = NO_FACTS) -> None:
        def sgd(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9)

        self.policy, self.critic, self.steps = policy, nn.Linear(ACTION_DIM, 1), 0
        self.parts = {"policy": Part(policy, sgd), "critic": Part(self.critic, sgd)}
        self.frozen: dict[str, nn.Module] = {"reference": nn.Linear(1, 1)}
        self.needs = BatchNeeds(8, 4, ("observation.state",), {(Source.DEMO,): 1.0})

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, part: str, micro: Batch) -> LossOutput:
        actions_BA = self.policy(micro.obs["observation.state"])
        if part == "critic":
            actions_BA = actions_BA.detach()
        value_B = self.critic(actions_BA).squeeze(-1)
        loss_B = -value_B if part == "policy" else (value_B - micro.actions_BHA[:, 0, 0]) ** 2
        return LossOutput(loss_B.sum(), torch.tensor(float(len(loss_B))), loss_B.detach(), {"value": value_B.detach().mean()})

    def after_step(self, step: int, stats: Any) -> None:
        self.steps += 1

    def acting(self) -> nn.Module:
        return self.policy

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = int(state["steps"])


def make_run(path: Path) -> RunFolder:
    run = RunFolder.create(path)
    create_run_keys(run.keys)
    tasks = {name: {"instruction": name, "embedding": INSTRUCTIONS_KE[i].tolist()} for i, name in enumerate(TASKS)}
    (run.path / "tasks.json").write_text(json.dumps(tasks))
    return run


def make_tables(engine: dict[str, Any] | None = None, **learner: Any) -> dict[str, Any]:
    """Tables of a run with a small policy; ``learner`` overrides fields of LearnerConfig, ``engine`` of EngineConfig."""
    tables = {name: cls() for name, cls in LEARNER_TABLES.items()}
    small = {
        "steps": 40,
        "min_size_to_sample": 1,
        "start_steps": 10,
        "publish_every": 10,
        "checkpoint_every": 20,
        "metrics_port": -1,
        "device": "cpu",
    }
    tables["learner"] = LEARNER_TABLES["learner"](**{**small, **learner})
    tables["engine"] = LEARNER_TABLES["engine"](**(engine or {}))
    tables["policy"].config = dict(SMALL_POLICY)
    tables["algorithm"].config = {"batch_size": 16, "start_steps": 10}
    return tables


def make_toy_loop(run: RunFolder, tables: dict[str, Any], source: MemorySource, report: Any = lambda progress: None) -> Any:
    source.poll()
    journal = Journal(run.logs / "learner.jsonl")
    return make_loop(run, tables, source, [SPEC], INSTRUCTIONS_KE, journal, report)


def train_toy(run: RunFolder, tables: dict[str, Any], source: MemorySource | None = None) -> Any:
    """Trains to the end; returns the loop."""
    loop = make_toy_loop(run, tables, source or MemorySource(1000))
    loop.run(lambda: False)
    return loop


def two_releases(run: RunFolder) -> RunFolder:
    """Trains a run to its releases 1, of step 20, and 2, of step 40: each is on disk before it goes on."""
    for steps in (20, 40):
        train_toy(run, make_tables(steps=steps, start_steps=20, publish_every=20))
    return run


def state_of(loop: Any) -> dict[str, torch.Tensor]:
    """All tensors of a loop's algorithm and optimizers, by path."""
    found: dict[str, torch.Tensor] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            found[path] = value.detach().clone()
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}/{key}")

    for name, part in loop._algorithm.parts.items():
        walk(part.module.state_dict(), f"parts/{name}")
    walk(loop._algorithm.state_dict(), "algorithm")
    walk(loop._engine.state(), "optimizers")
    return found
