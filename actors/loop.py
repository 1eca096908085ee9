"""The control loop: one robot at a fixed rate, in a process of its own.

Each tick: show the observation to the courier, take the policy's action for this frame, ask the operator, filter,
send, report. Nothing here touches the network, a disk or a policy; the only wait besides the clock is a bounded one
for a chunk that is due now (``chunk_deadline``), after which the tick goes on without it.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from actors.plan import Chunking, Plan, PlannedChunk, Proposal
from actors.records import RecordKind, pack_text
from actors.ring import Ring
from actors.safety import SafetyFilter
from fleet.errors import RobotError
from fleet.robot import Feedback, Observation, Operator, Robot, Source, Takeover
from fleet.seeds import training_seed

MAX_RESETS_IN_A_ROW = 5


@dataclasses.dataclass
class LoopSettings:
    """How the loop runs; the times are in seconds.

    tasks: What to do, in turn, starting at ``first_task``. run_seed, stream: give each episode its start's seed
    (fleet/seeds.py). num_episodes: 0 = until stopped. chunking: how chunks follow each other. realtime: False runs as
    fast as the policy allows; no chunk is late there, and "async" is "execute".
    chunk_deadline_s: how long a tick may wait for a chunk that is due in it.
    """

    tasks: Sequence[str]
    first_task: int = 0
    run_seed: int = 0
    stream: str = ""
    num_episodes: int = 0
    chunking: Chunking = dataclasses.field(default_factory=Chunking)
    realtime: bool = True
    chunk_deadline_s: float = 0.03


class Overflow(Exception):
    """The courier does not keep up: the ring to it is full. The episode cannot be recorded further."""


class ControlLoop:
    """Drives ``robot`` and reports into ``steps``; chunks come from ``chunks``.

    Args:
        demonstrates: Whether the operator shows the task from the start: its steps are demonstrations, not interventions.
        stopped: Asked each tick; the loop ends the episode as aborted when it says True.
    """

    def __init__(
        self,
        robot: Robot,
        operator: Operator,
        safety: SafetyFilter,
        steps: Ring,
        chunks: Ring,
        settings: LoopSettings,
        stopped: Callable[[], bool],
        demonstrates: bool = False,
    ) -> None:
        self.robot, self.operator, self.safety = robot, operator, safety
        self.steps, self.chunks, self.settings, self.stopped = steps, chunks, settings, stopped
        self.demonstrates = demonstrates
        late = settings.realtime or settings.chunking.mode != "async"
        self.plan = Plan(settings.chunking if late else dataclasses.replace(settings.chunking, mode="execute"))
        self.period_s = 1.0 / robot.spec.control_hz
        self.num_held = 0
        self.num_lost_episodes = 0
        self._late_ms = 0.0
        self._taken_over = False  # in the last tick

    def run(self) -> None:
        """Runs episodes until the stated number, or until stopped."""
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the middle of a tick is work over 5 ms; it runs between episodes instead
        for episode_over in self.ticks():
            if episode_over:
                gc.collect()

    def ticks(self) -> Iterator[bool]:
        """As ``run``, one tick a ``next``, for whoever lets time pass otherwise. Says whether that ended the episode; where
        the loop was stopped, the last ``next`` ends an episode without a tick."""
        episode, failed_resets = 0, 0
        while not self.stopped() and (self.settings.num_episodes == 0 or episode < self.settings.num_episodes):
            task = self.settings.tasks[(self.settings.first_task + episode) % len(self.settings.tasks)]
            seed = training_seed(self.settings.run_seed, self.settings.stream, episode)
            try:
                obs = self.robot.reset(task, seed)
                failed_resets = 0
            except RobotError:
                failed_resets += 1
                if failed_resets >= MAX_RESETS_IN_A_ROW:
                    raise
                time.sleep(0.5 * failed_resets)
                continue
            self.operator.reset(task, seed)
            try:
                yield from self._episode(episode, task, seed, obs)
            except Overflow:
                self.num_lost_episodes += 1
                self.robot.send(self.robot.hold())  # or it would go on with its last action until there is room
                self._put_when_free(RecordKind.CLOSE, episode, outcome="aborted", judge="courier too slow", length=-1)
                yield True
            episode += 1

    def _episode(self, episode: int, task: str, seed: int, obs: Observation) -> Iterator[bool]:
        self.plan.reset()
        self.safety.reset()
        self._taken_over = False
        self._put(RecordKind.OPEN, episode, task=task, seed=seed)
        frame, feedback = 0, None
        next_tick = time.monotonic()
        while not self.stopped():
            feedback = self._tick(episode, frame, obs)
            frame += 1
            if feedback.terminated or feedback.truncated:
                break
            yield False
            next_tick = self._sleep_until(next_tick + self.period_s)
            obs = self.robot.observe()
        self._close_episode(episode, frame, feedback)
        yield True

    def _close_episode(self, episode: int, frame: int, feedback: Feedback | None) -> None:
        outcome, judge = "aborted", "stopped"
        if feedback is not None and (feedback.terminated or feedback.truncated):
            judge = "robot" if feedback.success is not None else ""
            outcome = {True: "success", False: "failure", None: "unknown"}[feedback.success]
        self._put(RecordKind.CLOSE, episode, outcome=outcome, judge=judge, length=frame)

    def _tick(self, episode: int, frame: int, obs: Observation) -> Feedback:
        self._take_chunks(episode, frame, 0.0)
        self._show(episode, frame, obs)
        self._take_chunks(episode, frame, self._patience_s)
        proposal = self.plan.propose(frame)
        takeover = self.operator.poll(obs, None if proposal is None else proposal.action)
        self._taken_over = takeover is not None
        if self._taken_over:
            self.plan.overruled(frame)
        action, source = self._choose(proposal, takeover)
        feedback = self.robot.send(action)
        self._report(episode, frame, feedback, source, takeover, proposal)
        return feedback

    def _show(self, episode: int, frame: int, obs: Observation) -> None:
        record = self._reserve(RecordKind.OBSERVE, episode)
        record["frame_index"], record["wants_chunk"] = frame, self.plan.due(frame)
        prefix_DA = self.safety.ahead(self.plan.prefix(frame)) if record["wants_chunk"] else ()
        record["delay"] = len(prefix_DA)
        if len(prefix_DA):
            record["prefix"][: len(prefix_DA)] = prefix_DA
        for name in self.robot.spec.observations:
            record[name] = obs[name]
        self.steps.commit()

    def _choose(self, proposal: Proposal | None, takeover: Takeover | None) -> tuple[np.ndarray, Source]:
        hold = self.robot.hold()
        if takeover is not None:
            action, usable = self.safety(takeover.action, hold)
            source = Source.DEMO if self.demonstrates else Source.OPERATOR
        elif proposal is not None and not proposal.stale:
            action, usable = self.safety(proposal.action, hold)
            source = Source.POLICY
        else:
            action, usable = self.safety(hold, hold)
            source, self.num_held = Source.SCRIPT, self.num_held + 1
        return action, source if usable else Source.SCRIPT

    @property
    def _patience_s(self) -> float:
        if self.demonstrates or (self.settings.realtime and self._taken_over):
            return 0.0  # an operator's hands are not to feel how slow the policy is
        return self.settings.chunk_deadline_s if self.settings.realtime else 10.0

    def _take_chunks(self, episode: int, frame: int, limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while self.chunks.wait(deadline - time.monotonic() if self.plan.waits(frame) else 0.0):
            record = self.chunks.peek()
            if record["episode_id"] == episode:
                actions = np.array(record["actions"][: int(record["horizon"])])
                chunk = PlannedChunk(int(record["chunk_id"]), int(record["frame_index"]), int(record["version"]), actions)
                self.plan.add(chunk, frame)
            self.chunks.release()

    def _report(
        self, episode: int, frame: int, feedback: Feedback, source: Source, takeover: Takeover | None, proposal: Proposal | None
    ) -> None:
        record = self._reserve(RecordKind.RESULT, episode)
        record["frame_index"], record["source"] = frame, source
        record["time_ns"], record["mono_ns"] = time.time_ns(), time.monotonic_ns()
        record["action"], record["reward"] = feedback.action, feedback.reward
        record["terminated"], record["truncated"] = feedback.terminated, feedback.truncated
        record["intervention"] = source == Source.OPERATOR
        acted = proposal if source == Source.POLICY else None
        record["chunk_id"] = acted.chunk_id if acted else -1
        record["chunk_index"] = acted.chunk_index if acted else -1
        record["late_ms"] = self._late_ms
        record["text"] = pack_text(operator=takeover.operator_id if takeover else "")
        self.steps.commit()

    def _sleep_until(self, tick: float) -> float:
        """Waits for the next tick and returns its time; after a stall the schedule starts anew instead of catching up."""
        if not self.settings.realtime:
            return time.monotonic()
        ahead = tick - time.monotonic()
        if ahead > 0:
            time.sleep(ahead)
        late = max(time.monotonic() - tick, 0.0)
        self._late_ms = 1000.0 * late
        return tick if late < self.period_s else time.monotonic()

    def _reserve(self, kind: RecordKind, episode: int) -> np.void:
        record = self.steps.reserve()
        if record is None and not self.settings.realtime:
            record = self._wait_for_room()
        if record is None:
            raise Overflow
        record["kind"], record["episode_id"] = kind, episode
        return record

    def _wait_for_room(self) -> np.void | None:
        while not self.stopped():
            record = self.steps.reserve()
            if record is not None:
                return record
            time.sleep(0.001)
        return None

    def _put(self, kind: RecordKind, episode: int, **text: Any) -> None:
        record = self._reserve(kind, episode)
        record["text"] = pack_text(**text)
        self.steps.commit()

    def _put_when_free(self, kind: RecordKind, episode: int, **text: Any) -> None:
        """Between episodes the robot stands still, so waiting for room harms nobody."""
        if (record := self._wait_for_room()) is not None:
            record["kind"], record["episode_id"], record["text"] = kind, episode, pack_text(**text)
            self.steps.commit()
