"""The learner's loop. It drives any Algorithm and never asks which one it is:

    poll the buffer -> batch -> prepare -> update each part -> after_step -> now and then: publish, checkpoint

Files are written by a thread of their own from a copy taken between two updates. Randomness is a function of (seed,
step), so a run that is stopped anywhere and resumed makes the same updates from the same data.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from algorithms.base import Algorithm, Batch
from algorithms.policies.base import INSTRUCTION
from buffer.mixture import loss_table
from buffer.rate import RateLimiter
from fleet.batch import BatchNeeds, Windows
from fleet.errors import LearnerError, NoData
from fleet.robot import Source
from learner.background import Background
from learner.checkpoint import Checkpoint, Checkpoints, freeze, to_arrays
from learner.engine import Engine
from learner.feed import Upload
from learner.progress import Progress
from learner.publisher import Publisher, describe, snapshot

POLL_S = 0.1  # between two looks at the log
WAIT_S = 0.02  # between two looks while there is nothing to do
REPORT_S = 0.5


class BatchSource(Protocol):
    """Where batches come from: ``buffer.prefetch.Prefetcher``, or ``buffer.sampler.Sampler`` itself."""

    def poll(self) -> int: ...

    def num_steps(self, source: Source | None = None) -> int: ...

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        """Its arrays may be overwritten from the next call on."""
        ...

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None:
        """Losses of the samples of a batch for priorities, and ``buffer.mixture.loss_table`` of it for adaptive mixtures."""
        ...

    def state(self) -> dict[str, Any]:
        """What draws depend on beside (seed, step, position): plain data and numpy arrays."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> int:
        """Returns how many steps came since ``state`` was asked for, whatever retention took meanwhile."""
        ...


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run: trains with what ``build`` makes until ``until`` updates are done in all.

    ``build`` None: the algorithm of the phase before goes on. The policy is shared, so its weights carry over; a new
    algorithm brings new optimizers.
    """

    name: str
    until: int
    build: Callable[[], tuple[Algorithm, Engine]] | None


@dataclasses.dataclass(frozen=True)
class LoopSettings:
    """When what is due, in updates. Nothing is published before ``first_release``; ``meta`` is kept in checkpoints."""

    seed: int
    publish_every: int
    checkpoint_every: int
    first_release: int
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


class Loop:
    """One run of the learner.

    Args:
        source: Where batches come from.
        instructions_KE: Instruction embedding by index of the task.
        report: Called with a copy of the progress every half second and at the end.
        write: ``Journal.write``.
    """

    def __init__(
        self,
        source: BatchSource,
        instructions_KE: Tensor,
        phases: list[Phase],
        settings: LoopSettings,
        *,
        device: torch.device,
        limiter: RateLimiter,
        publisher: Publisher,
        checkpoints: Checkpoints,
        report: Callable[[Progress], None],
        write: Callable[..., None],
    ) -> None:
        self._source, self._instructions_KE = source, instructions_KE.to(device)
        self._phases, self._settings, self._device, self._limiter = phases, settings, device, limiter
        self._publisher, self._checkpoints, self._report, self._write = publisher, checkpoints, report, write
        self._upload = Upload(device)
        self._phase = -1
        self._windows: Windows
        self._algorithm: Algorithm | None = None
        self._engine: Engine | None = None
        self._background: Background | None = None
        self._polled = self._reported = self._window_start = 0.0
        self._window_step = self._saved = 0
        self.progress = Progress(steps=phases[-1].until, release=publisher.version)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; call before ``run``.

        Raises:
            LearnerError: It was made by another algorithm, or does not fit the modules.
        """
        meta, state = checkpoint.meta, checkpoint.state
        self._enter(min(int(meta["phase"]), len(self._phases) - 1))
        algorithm, engine = self._trained()
        if algorithm.name != meta["algorithm"]:
            raise LearnerError(
                f"the checkpoint of step {checkpoint.step} was made by {meta['algorithm']!r}",
                rule=f"this run's configuration says {algorithm.name!r} for that step",
                remedy="put the algorithm back, or start a new run",
            )
        try:
            engine.load_weights(state["parts"])
            algorithm.load_state_dict(state["algorithm"])
        except (KeyError, RuntimeError) as error:
            raise LearnerError(
                f"the checkpoint of step {checkpoint.step} does not fit: {error}"[:500], rule="same modules, same shapes"
            ) from None
        engine.load_state(state["optimizers"])
        self._limiter.load(meta["rate"])
        self._limiter.insert(self._source.load_state(to_arrays(state["sampler"])))
        self.progress.step = self._saved = checkpoint.step

    def run(self, stop: Callable[[], bool]) -> Progress:
        """Trains to the end of the last phase, or until ``stop`` says so; then what was learnt is on disk.

        Raises:
            LearnerError: A loss or gradient is not finite; it names step and algorithm, and the weights are as before.
            FleetError: A release or a checkpoint could not be written.
        """
        background = self._background = Background()
        self._window_start, self._window_step = time.monotonic(), self.progress.step
        torch.manual_seed(self._settings.seed)
        try:
            self._poll(force=True)
            while self.progress.step < self.progress.steps and not stop():
                if self._phase < 0 or self.progress.step >= self._phases[self._phase].until:
                    self._enter(self._phase + 1)
                if self._wait(stop):
                    self._update()
                    self._keep_up()
            if self._algorithm is not None:
                self._checkpoint()
            self._note(background.flush())
        finally:
            background.close()
        self._tell(force=True)
        return self.progress

    def _enter(self, phase: int) -> None:
        """Begins a phase, with a new algorithm where it names one."""
        first = next((i for i in range(phase, -1, -1) if self._phases[i].build is not None), 0)
        build = self._phases[first].build
        if build is not None and (self._algorithm is None or first > self._phase):
            self._algorithm, self._engine = build()
        began_at = self._phases[phase - 1].until if phase else 0
        if self._phase != phase and self.progress.step == began_at:
            self._limiter.begin()
        self._phase = phase
        algorithm, _ = self._trained()
        self.progress.phase, self.progress.algorithm = self._phases[phase].name, algorithm.name

    def _trained(self) -> tuple[Algorithm, Engine]:
        if self._algorithm is None or self._engine is None:
            raise LearnerError("the first phase of a run has no algorithm", rule="phases[0].build makes one")
        return self._algorithm, self._engine

    def _wait(self, stop: Callable[[], bool]) -> bool:
        """Waits until the next update may be done; False when ``stop`` came first."""
        while True:
            with self._timed("poll"):
                self._poll()
            why = self._reason_to_wait()
            if why is None or stop():
                break
            self.progress.waiting = why
            self._note(self._background.facts() if self._background else [])
            self._tell()
            with self._timed("wait"):
                time.sleep(WAIT_S)
        self.progress.waiting = ""
        return why is None

    def _reason_to_wait(self) -> str | None:
        """Also draws the next batch, since only that tells whether there is data of the kind that is asked for."""
        why = self._rate_reason()
        if why is None:
            needs = self._trained()[0].needs
            try:
                with self._timed("sample"):
                    self._upload.wait()
                    self._windows = self._source.batch(needs, self.progress.step, self.progress.release or -1)
            except NoData as error:
                why = f"the learner waits for data: {error.what}"
                if not self.progress.waiting.startswith("the learner waits for data"):
                    self._write("waiting", why=why, step=self.progress.step)
        return why

    def _rate_reason(self) -> str | None:
        if self._phase < len(self._phases) - 1:
            return None  # the start trains on what is there
        why = self._limiter.wait_for(self.progress.num_steps, self._trained()[0].needs.batch_size)
        for fields in self._limiter.news():
            self._write("rate", step=self.progress.step, **fields)
        return why

    def _update(self) -> None:
        algorithm, engine = self._trained()
        step = self.progress.step
        self._seed_torch(step)
        with self._timed("prepare"), torch.no_grad():
            batch = algorithm.prepare(self._to_batch(self._windows))
        self._limiter.sample(algorithm.needs.batch_size)
        stats: dict[str, float] = {}
        with self._timed("update"):
            for part in algorithm.parts:
                try:
                    numbers = engine.update(part, algorithm.loss, batch)
                except LearnerError as error:
                    what = f"step {step} of {algorithm.name}: {error.what}"
                    raise LearnerError(what, rule=error.rule, remedy=error.remedy) from None
                prefix = "" if len(algorithm.parts) == 1 else f"{part}."
                stats.update({prefix + name: value for name, value in numbers.items()})
        self._feed_back(algorithm, engine)
        with self._timed("after_step"):
            algorithm.after_step(step, stats)
        self.progress.step, self.progress.stats = step + 1, stats

    def _feed_back(self, algorithm: Algorithm, engine: Engine) -> None:
        """Gives the source the losses of the first part's samples, where what is drawn next depends on them."""
        if algorithm.needs.priority is None and algorithm.needs.adaptive is None:
            return
        part, num_windows = next(iter(algorithm.parts)), len(self._windows.step_B)
        with self._timed("feed_back"):
            loss_B = engine.per_sample(part).numpy()
            if loss_B.shape != (num_windows,):
                raise LearnerError(
                    f"part {part!r} of {algorithm.name} has losses of shape {loss_B.shape} for {num_windows} windows",
                    rule="per_sample_B has one loss a window, in their order, where sampling depends on losses",
                )
            table = loss_table(self._windows, loss_B, len(self._instructions_KE))
            self._source.feed_back(self._windows, loss_B, table)

    def _seed_torch(self, step: int) -> None:
        """What draws from torch's own generators (dropout, say) is a function of (seed, step) too."""
        seed = (self._settings.seed * 1_000_003 + step) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device: 0.1 to 1 ms
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _to_batch(self, windows: Windows) -> Batch:
        """Every field of the windows, and the instruction of each one's task."""
        batch = Batch(**{field.name: self._uploaded(getattr(windows, field.name)) for field in dataclasses.fields(Batch)})
        instruction_BE = self._instructions_KE[batch.task_B]
        for obs in (batch.obs, *batch.obs_at.values()):
            obs[INSTRUCTION] = instruction_BE
        self._upload.end()
        return batch

    def _uploaded(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._uploaded(inner) for key, inner in value.items()}
        return self._upload(value) if isinstance(value, np.ndarray) else value

    def _keep_up(self) -> None:
        """What is due between two updates."""
        step, settings = self.progress.step, self._settings
        last = step == self.progress.steps
        if step >= settings.first_release and (last or step == settings.first_release or step % settings.publish_every == 0):
            self._publish()
        if step % settings.checkpoint_every == 0 or last:
            self._checkpoint()
        if self._background is not None:
            self._note(self._background.facts())
        self._tell()

    def _publish(self) -> None:
        step, publisher = self.progress.step, self._publisher
        if self._background is None or not publisher.wants(step):
            return
        with self._timed("publish"):
            algorithm, _ = self._trained()
            acting = algorithm.acting()
            weights, policy, stats, name = snapshot(acting), describe(acting), self.progress.stats, algorithm.name

            def job() -> tuple[str, dict[str, Any]]:
                manifest = publisher.publish(weights, policy, name, step, stats)
                return "published", {"version": manifest.version, "step": step}

            self._background.submit("publish", job)

    def _checkpoint(self) -> None:
        step = self.progress.step
        if self._background is None or step == self._saved:
            return
        with self._timed("checkpoint"):
            algorithm, engine = self._trained()
            parts = engine.weights()
            sampler = self._source.state()
            self._poll(force=True)  # what is behind this state is counted as inserted
            state = freeze(
                {"parts": parts, "algorithm": algorithm.state_dict(), "optimizers": engine.state(), "sampler": sampler}
            )
            meta = {
                **self._settings.meta,
                "phase": self._phase,
                "algorithm": algorithm.name,
                "num_steps": self.progress.num_steps,
                "rate": self._limiter.counts(),
            }
            checkpoints, publisher = self._checkpoints, self._publisher

            def job() -> tuple[str, dict[str, Any]]:
                # The release that was submitted before is out now: its number must be in here.
                checkpoints.save(Checkpoint(step, {**meta, "release": publisher.version}, state))
                return "checkpoint", {"step": step}

            self._background.submit("checkpoint", job)
            self._saved = step

    def _poll(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._polled >= POLL_S:
            self._polled = now
            self._limiter.insert(self._source.poll())
            self.progress.num_steps = self._source.num_steps()

    def _note(self, facts: list[tuple[str, dict[str, Any]]]) -> None:
        for kind, fields in facts:
            self._write(kind, **fields)
        self.progress.release = self._publisher.version

    def _tell(self, force: bool = False) -> None:
        now, progress = time.monotonic(), self.progress
        if not force and now - self._reported < REPORT_S:
            return
        self._reported = now
        if now - self._window_start >= 2 * REPORT_S or force:
            progress.updates_per_s = (progress.step - self._window_step) / max(now - self._window_start, 1e-9)
            if progress.step > self._window_step:
                loss = next((value for name, value in progress.stats.items() if name.split(".")[-1] == "loss"), 0.0)
                self._write(
                    "update",
                    step=progress.step,
                    loss=loss,
                    updates_per_s=round(progress.updates_per_s, 1),
                    phase=progress.phase,
                )
            self._window_start, self._window_step = now, progress.step
        if self._background is not None:
            progress.num_replaced = self._background.num_replaced
        progress.by_source = {source.name.lower(): self._source.num_steps(source) for source in Source}
        self._report(dataclasses.replace(progress, stats=dict(progress.stats), seconds=dict(progress.seconds)))

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.progress.seconds[what] = self.progress.seconds.get(what, 0.0) + time.perf_counter() - start
