"""The control process: its start, its end, and what it runs. The robot is opened in it and nowhere else."""

from __future__ import annotations

import dataclasses
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from typing import TYPE_CHECKING, Any

from actors.records import chunk_dtype, step_dtype
from actors.ring import PipeEnds, Ring, RingClosed, make_pipe
from fleet.errors import FleetError, RobotError
from fleet.robot import Observation, Operator, Takeover
from fleet.spec import RobotSpec

if TYPE_CHECKING:
    import numpy as np

    from actors.config import ActorConfig, OperatorConfig, RobotConfig

START_TIMEOUT_S = 120.0
CHUNK_SLOTS = 16
STEP_RING_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass
class ControlArgs:
    """What the control process needs to open the robot."""

    robot: RobotConfig
    operator: OperatorConfig
    actor: ActorConfig


class NoOperator:
    """Nobody takes over."""

    def reset(self, task: str, seed: int | None) -> None:
        """Nothing to prepare."""

    def poll(self, obs: Observation, proposed: np.ndarray | None) -> Takeover | None:
        return None


class ControlProcess:
    """The parent's handle. Starting it opens the robot and learns its spec.

    Raises:
        RobotError: The robot or operator cannot be opened, or does not answer in time.
    """

    def __init__(self, context: SpawnContext, args: ControlArgs) -> None:
        self._pipe, child_pipe = context.Pipe()
        self._steps_pipe, self._chunks_pipe = make_pipe(), make_pipe()
        self._stop = context.Event()
        self.failure: FleetError | None = None
        self._process = context.Process(
            target=_main, args=(args, child_pipe, self._steps_pipe, self._chunks_pipe, self._stop), name="control", daemon=True
        )
        self._process.start()
        child_pipe.close()
        self._rings: tuple[Ring, ...] = ()
        self.spec = RobotSpec.from_dict(self._receive("its spec"))

    def go(self, tasks: list[str], stream: str) -> tuple[Ring, Ring]:
        """Lets the loop begin; returns the rings (steps to read, chunks to write)."""
        steps_type = step_dtype(self.spec)
        slots = max(64, min(1024, STEP_RING_BYTES // steps_type.itemsize))
        steps = Ring(steps_type, slots, self._steps_pipe)
        chunks = Ring(chunk_dtype(self.spec), CHUNK_SLOTS, self._chunks_pipe)
        self._rings = (steps, chunks)
        self._pipe.send({"tasks": tasks, "stream": stream, "steps": (steps.name, slots), "chunks": chunks.name})
        steps.consumes_here()
        chunks.produces_here()
        return steps, chunks

    def ask_to_stop(self) -> None:
        """The loop ends its episode as aborted and returns."""
        self._stop.set()

    def join(self) -> None:
        """Waits for the end of the process; ``failure`` says why it ended if it did not end well."""
        try:
            self._receive("its end")
        except FleetError as error:
            self.failure = error
        self._process.join(timeout=5)

    def stop(self) -> None:
        """Ends the process in any case, and frees the rings."""
        self._stop.set()
        self._pipe.close()
        self._process.join(timeout=5)
        if self.alive:
            self.kill()
        for ring in self._rings:
            ring.close()
        self._rings = ()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def _receive(self, what: str) -> Any:
        try:
            if not self._pipe.poll(START_TIMEOUT_S):
                raise RobotError(
                    f"the control process did not say {what} in {START_TIMEOUT_S:.0f} s", rule="robots open in time"
                )
            kind, value = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise RobotError(
                "the control process died", rule="it ends with a reason", remedy="see the log above for its error"
            ) from None
        if kind == "error":
            raise RobotError(value["what"], rule=value["rule"], remedy=value["remedy"])
        return value


def _main(args: ControlArgs, pipe: Connection, steps_pipe: PipeEnds, chunks_pipe: PipeEnds, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the courier decides when to stop
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            number, lambda signum, frame: sys.exit(128 + signum)
        )  # whoever ends all processes at once: the robot is closed
    try:
        _drive(args, pipe, steps_pipe, chunks_pipe, stop)
        pipe.send(("done", None))
    except FleetError as error:
        pipe.send(("error", error.to_fields()))
    except (RingClosed, EOFError):
        return  # the courier is gone; the robot was put on hold


def _drive(args: ControlArgs, pipe: Connection, steps_pipe: PipeEnds, chunks_pipe: PipeEnds, stop: Any) -> None:
    from actors.loop import ControlLoop, LoopSettings
    from actors.operators import make_operator
    from actors.robots import make_robot
    from actors.safety import SafetyFilter

    config = args.actor
    robot = make_robot(args.robot.adapter, **args.robot.settings)
    try:
        operator: Operator = NoOperator()
        if args.operator.adapter != "none":
            operator = make_operator(args.operator.adapter, control_hz=robot.spec.control_hz, **args.operator.settings)
        pipe.send(("spec", robot.spec.to_dict()))
        begin = pipe.recv()
        steps = Ring(step_dtype(robot.spec), begin["steps"][1], steps_pipe, begin["steps"][0])
        chunks = Ring(chunk_dtype(robot.spec), CHUNK_SLOTS, chunks_pipe, begin["chunks"])
        steps.produces_here()
        chunks.consumes_here()
        settings = LoopSettings(
            tasks=begin["tasks"],
            first_task=config.first_task,
            run_seed=config.seed,
            stream=begin["stream"],
            num_episodes=config.num_episodes,
            chunking=config.chunk_rule(),
            realtime=config.realtime,
            chunk_deadline_s=config.chunk_deadline / robot.spec.control_hz,
        )
        safety = SafetyFilter(robot.spec, config.safety)
        ControlLoop(robot, operator, safety, steps, chunks, settings, stop.is_set, config.demonstrate).run()
    finally:
        robot.close()
