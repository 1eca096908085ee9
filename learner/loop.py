"""The learner's loop. It drives any Algorithm and never asks which one it is:

    poll the buffer -> batch -> tell the other ranks -> prepare -> update each part -> after_step -> publish, checkpoint

Every rank runs it. What is decided (stop, wait, update, begin a phase, publish, checkpoint) follows from one table that
ranks make together once an update (``learner.exchange``), so all decide alike; one rank exchanges with nobody.
Randomness is a function of (seed, step), so a run that is stopped anywhere and resumed makes the same updates from the
same data.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from algorithms.base import Algorithm
from buffer.mixture import loss_table
from fleet.batch import BatchNeeds, Windows
from fleet.errors import LearnerError, NoData
from fleet.robot import SOURCE_NAMES, Source
from learner.agree import load_sampler, require_equal, sampler_states
from learner.background import Fact
from learner.budget import Budget
from learner.checkpoint import Checkpoint
from learner.engine import Engine
from learner.exchange import Facts, Known, exchange
from learner.feed import Feed, no_rows
from learner.keep import Keep
from learner.pace import Pace
from learner.progress import Progress
from learner.ranks import Ranks

POLL_S = 0.1  # between two looks at the log
WAIT_S = 0.02  # between two looks while there is nothing to do
REPORT_S = 0.5


class BatchSource(Protocol):
    """Where batches come from: ``buffer.prefetch.Prefetcher``, or ``buffer.sampler.Sampler`` itself."""

    def poll(self) -> int: ...

    def num_steps(self, source: Source | None = None) -> int: ...

    def counts(self) -> np.ndarray:
        """Steps that can be drawn by source and task: (sources, tasks)."""
        ...

    def balance(self, counts_SKT: np.ndarray) -> None:
        """What all shards have, where there are several: (shards, sources, tasks)."""
        ...

    def batch(self, needs: BatchNeeds, step: int, newest_version: int = -1) -> Windows:
        """This rank's rows. Its arrays may be overwritten from the next call on."""
        ...

    def feed_back(self, windows: Windows, loss_B: np.ndarray, table: np.ndarray) -> None:
        """Losses of the samples of a batch for priorities, and ``buffer.mixture.loss_table`` of all ranks for adaptive
        mixtures."""
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
    """One rank of a run's learner.

    Args:
        source: Where batches come from.
        instructions_KE: Instruction embedding by index of the task.
        keep: Publishes and checkpoints.
        report: Called with a copy of the progress every half second and at the end.
        write: ``Journal.write``; of the first rank only, the others say nothing about the run.
    """

    def __init__(
        self,
        source: BatchSource,
        instructions_KE: Tensor,
        phases: list[Phase],
        settings: LoopSettings,
        *,
        device: torch.device,
        ranks: Ranks,
        pace: Pace,
        keep: Keep,
        budget: Budget,
        report: Callable[[Progress], None],
        write: Callable[..., None],
    ) -> None:
        self._source, self._phases, self._settings, self._device = source, phases, settings, device
        self._ranks, self._pace, self._keep, self._budget = ranks, pace, keep, budget
        self._report, self._write, self._timed = report, write, budget.timed
        self._feed, self._num_tasks = Feed(instructions_KE, device), len(instructions_KE)
        self._phase = -1
        self._windows: Windows | None = None
        self._borrowed = False
        self._spare: tuple[BatchNeeds, Windows] | None = None  # of another rank, for when this one has nothing to draw
        self._lack: NoData | None = None
        self._known: Known
        self._algorithm: Algorithm | None = None
        self._engine: Engine | None = None
        self._num_new = 0
        self._counts_KT = source.counts()
        self._polled = self._reported = self._window_start = 0.0
        self._window_step = 0
        self.progress = Progress(steps=phases[-1].until, release=keep.release)

    def resume(self, checkpoint: Checkpoint) -> list[str]:
        """Goes on from a checkpoint; call before ``run``.

        Returns:
            Shards of which the checkpoint knows and that nobody reads any more.

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
        self._require_equal()
        self._pace.load(meta["rate"])
        num_new, nobodys = load_sampler(self._ranks, self._source, state["samplers"])
        self._pace.inserted(num_new)
        self.progress.step = checkpoint.step
        self._keep.resumed(checkpoint.step)
        return nobodys

    def run(self, stop: Callable[[], bool]) -> Progress:
        """Trains to the end of the last phase, or until ``stop`` of any rank says so; then what was learnt is on disk.

        Raises:
            LearnerError: A loss or gradient is not finite; it names step and algorithm, and the weights are as before. Or
                ranks drifted apart, or another rank failed.
            FleetError: A release or a checkpoint could not be written.
        """
        progress = self.progress
        self._window_start, self._window_step = time.monotonic(), progress.step
        self._keep.open()
        try:
            self._poll(force=True)
            self._exchange(stop=False)
            while progress.step < progress.steps:
                if self._phase < 0 or progress.step >= self._phases[self._phase].until:
                    self._enter(self._phase + 1)
                if not self._ready(stop):
                    break
                self._update()
                self._keep_up()
            if self._algorithm is not None:
                self._checkpoint()
            self._note(self._keep.facts(flush=True))
        finally:
            self._keep.close()
        self._tell(force=True)
        return progress

    def _enter(self, phase: int) -> None:
        """Begins a phase, with a new algorithm where it names one."""
        first = next((i for i in range(phase, -1, -1) if self._phases[i].build is not None), 0)
        build = self._phases[first].build
        if build is not None and (self._algorithm is None or first > self._phase):
            torch.manual_seed(self._settings.seed * 1009 + first)  # new modules begin alike on all ranks, whatever went before
            self._algorithm, self._engine = build()
            self._require_equal()
        began_at = self._phases[phase - 1].until if phase else 0
        if self._phase != phase and self.progress.step == began_at:
            self._pace.begin()
        self._phase = phase
        algorithm, _ = self._trained()
        self.progress.phase, self.progress.algorithm = self._phases[phase].name, algorithm.name

    def _trained(self) -> tuple[Algorithm, Engine]:
        if self._algorithm is None or self._engine is None:
            raise LearnerError("the first phase of a run has no algorithm", rule="phases[0].build makes one")
        return self._algorithm, self._engine

    def _require_equal(self) -> None:
        algorithm, engine = self._trained()
        with engine.gathered():
            require_equal(self._ranks, algorithm, engine.weights(), self.progress.step)

    def _ready(self, stop: Callable[[], bool]) -> bool:
        """Waits until the next update may be done, with this rank's rows at hand; False when a rank was told to stop."""
        while True:
            with self._timed("poll"):
                self._poll()
            needs, step = self._trained()[0].needs, self.progress.step
            limited = self._phase == len(self._phases) - 1  # the start trains on what is there
            held = limited and self._pace.rate_holds(self._known.num_steps, needs, step)
            self._draw(None if held else needs)
            known = self._exchange(stop())
            if known.stop:
                return False
            if not held and known.with_batch:
                self._borrow(known, needs)
                self._pace.goes_on(needs, counted=limited)
                self.progress.waiting, self.progress.pace = "", self._pace.line
                return True
            if not held and self._lack is not None:
                self._pace.data_is_missing(self._lack, needs, known.release, step)
            self._wait()

    def _wait(self) -> None:
        self.progress.waiting, self.progress.pace = self._pace.waiting, self._pace.line
        self._note(self._keep.facts())
        self._tell()
        with self._timed("wait"):
            time.sleep(WAIT_S)

    def _draw(self, needs: BatchNeeds | None) -> None:
        """This rank's rows of the next batch, if it is time for one and there is data of the kind that is asked for."""
        self._windows, self._borrowed = None, False
        if needs is None:
            return
        try:
            with self._timed("sample"):
                self._feed.wait()
                windows = self._source.batch(needs, self.progress.step, self._known.release or -1)
            self._windows = windows if len(windows.step_B) else None  # fewer rows than ranks
        except NoData as error:
            self._lack = error

    def _exchange(self, stop: bool) -> Known:
        """Tells the other ranks what this one knows."""
        facts = Facts(self._counts_KT, stop, self._windows is not None, release=self._keep.release, new_steps=self._num_new)
        if self._windows is not None:
            version_B = self._windows.version_B
            age_B = np.maximum(self.progress.release - version_B[version_B >= 0], 0)
            if len(age_B):
                facts.age_sum, facts.age_num, facts.age_max = float(age_B.sum()), len(age_B), float(age_B.max())
        elif self._algorithm is not None:
            facts.wants_loan = self._spare is None or self._spare[0] != self._algorithm.needs
        self._num_new = 0
        with self._timed("exchange"):
            known = self._known = exchange(self._ranks, facts)
        self._pace.inserted(known.new_steps)
        if len(known.counts_SKT) > 1:
            self._source.balance(known.counts_SKT)
        self.progress.num_steps, self.progress.release = known.num_steps, known.release
        return known

    def _borrow(self, known: Known, needs: BatchNeeds) -> None:
        """A rank that has nothing to draw takes part with the rows of another one, which count nothing: an empty shard must
        not hold the others. They are kept for the next time."""
        if known.wants_loan:
            lent = self._feed.lend(self._ranks, self._windows, known.with_batch[0])
            if self._windows is None:
                self._spare = (needs, dataclasses.replace(lent, shard_weight=0.0))
        if self._windows is None and self._spare is not None:
            self._windows, self._borrowed = self._spare[1], True

    def _update(self) -> None:
        algorithm, engine = self._trained()
        step, windows = self.progress.step, self._windows
        assert windows is not None
        self._seed_torch(step)
        with self._timed("prepare"), torch.no_grad():
            batch = algorithm.prepare(self._feed.batch(windows))
        stats: dict[str, float] = {}
        for part in algorithm.parts:
            try:
                numbers = engine.update(part, algorithm.loss, batch, self._timed)
            except LearnerError as error:
                what = f"step {step} of {algorithm.name}: {error.what}"
                raise type(error)(what, rule=error.rule, remedy=error.remedy) from None
            prefix = "" if len(algorithm.parts) == 1 else f"{part}."
            stats.update({prefix + name: value for name, value in numbers.items()})
        self._feed_back(algorithm, engine, windows)
        stats.update(self._known.staleness())
        with self._timed("after_step"), engine.gathered():
            algorithm.after_step(step, stats)
        self.progress.step, self.progress.stats = step + 1, stats

    def _feed_back(self, algorithm: Algorithm, engine: Engine, windows: Windows) -> None:
        """Gives the source the losses of the first part's samples, where what is drawn next depends on them."""
        needs = algorithm.needs
        if needs.priority is None and needs.adaptive is None:
            return
        part = next(iter(algorithm.parts))
        with self._timed("feed_back"):
            loss_B = engine.per_sample(part).numpy()
            if loss_B.shape != windows.step_B.shape:
                raise LearnerError(
                    f"part {part!r} of {algorithm.name} has losses of shape {loss_B.shape} for {len(windows.step_B)} windows",
                    rule="per_sample_B has one loss a window, in their order, where sampling depends on losses",
                )
            if self._borrowed:  # steps of another shard
                windows, loss_B = no_rows(windows), loss_B[:0]
            table = loss_table(windows, loss_B, self._num_tasks)
            self._source.feed_back(windows, loss_B, self._ranks.gather(table).sum(0))

    def _seed_torch(self, step: int) -> None:
        """What draws from torch's own generators (dropout, say) is a function of (seed, step, rank) too."""
        seed = (self._settings.seed * 1_000_003 + step + self._ranks.rank * 10_000_019) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device: 0.1 to 1 ms
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _keep_up(self) -> None:
        """What is due between two updates."""
        step, settings = self.progress.step, self._settings
        last = step == self.progress.steps
        if step >= settings.first_release and (last or step == settings.first_release or step % settings.publish_every == 0):
            self._keep.publish(*self._trained(), step, self.progress.stats)
        if step % settings.checkpoint_every == 0 or last:
            self._checkpoint()
        self._budget.step(step)
        self._note(self._keep.facts())
        self._tell()

    def _checkpoint(self) -> None:
        if self._keep.is_saved(self.progress.step):
            return
        with self._timed("checkpoint"):
            samplers = sampler_states(self._ranks, self._source)
            self._poll(force=True)  # what is behind these states is counted as inserted
            self._windows = None
            self._exchange(stop=False)
            algorithm, engine = self._trained()
            meta = {
                **self._settings.meta,
                "phase": self._phase,
                "algorithm": algorithm.name,
                "num_steps": self.progress.num_steps,
                "rate": self._pace.counts(),
                "ranks": self._ranks.size,
            }
            self._keep.checkpoint(algorithm, engine, self.progress.step, meta, samplers)

    def _poll(self, force: bool = False) -> None:
        now = time.monotonic()
        if force or now - self._polled >= POLL_S:
            self._polled = now
            self._num_new += self._source.poll()
            self._counts_KT = self._source.counts()

    def _note(self, facts: list[Fact]) -> None:
        for kind, fields in facts:
            self._write(kind, **fields)
        if self._ranks.size == 1:
            self.progress.release = self._keep.release

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
        progress.num_replaced = self._keep.num_replaced
        progress.by_source = dict(zip(SOURCE_NAMES, self._known.counts_SKT.sum((0, 2)).tolist(), strict=True))
        self._report(dataclasses.replace(progress, stats=dict(progress.stats), seconds=dict(self._budget.seconds)))
