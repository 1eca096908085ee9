"""The learner's loop. It drives any Algorithm and never asks which one it is:

    poll the buffer -> batch -> tell the other ranks -> prepare -> update each part -> after_step -> publish, checkpoint

Every rank runs it. What is decided (stop, wait, update, begin a phase, publish, checkpoint) follows from one table that
ranks make together once an update (``learner.exchange``), so all decide alike; one rank exchanges with nobody.
Randomness is a function of (seed, step), so a run that is stopped anywhere and resumed makes the same updates from the
same data.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from algorithms.base import Algorithm, Batch, Part
from fleet.batch import Windows
from fleet.errors import LearnerError, PolicyError
from fleet.robot import SOURCE_NAMES
from learner.agree import require_equal
from learner.background import Fact
from learner.budget import Budget
from learner.checkpoint import Checkpoint
from learner.engine import Engine
from learner.feed import Feed
from learner.keep import Keep
from learner.memory import is_short
from learner.minibatches import minibatches
from learner.pace import Pace
from learner.progress import Progress
from learner.ranks import Ranks
from learner.supply import BatchSource, Supply

REPORT_S = 0.5


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run: trains with what ``build`` makes until ``until`` updates are done in all.

    ``build`` None: the algorithm of the phase before goes on. The policy is shared, so its weights carry over; a new
    algorithm brings new optimizers. ``limited``: whether the rate of samples per insert holds it. ``restarts``: it begins at
    the run's first release again, which ``build`` sees to, and has one release, at its end.
    """

    name: str
    until: int
    build: Callable[[], tuple[Algorithm, Engine]] | None
    limited: bool = True
    restarts: bool = False


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
        instructions_KE, texts_KC: See ``Feed``.
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
        texts_KC: Tensor | None = None,
    ) -> None:
        self._phases, self._settings, self._device, self._ranks = phases, settings, device, ranks
        self._pace, self._keep, self._budget, self._timed = pace, keep, budget, budget.timed
        self._report, self._write = report, write
        self._feed = Feed(instructions_KE, device, texts_KC)
        self._supply = Supply(source, self._feed, ranks, pace, lambda: keep.release, budget.timed)
        self._phase = -1
        self._algorithm: Algorithm | None = None
        self._engine: Engine | None = None
        self._reported = self._window_start = 0.0
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
        except (KeyError, RuntimeError, PolicyError) as error:
            if is_short(error):
                raise
            said = error.what if isinstance(error, PolicyError) else error
            raise LearnerError(
                f"the checkpoint of step {checkpoint.step} does not fit: {said}"[:500], rule="same modules, same shapes"
            ) from None
        engine.load_state(state["optimizers"])
        self._require_equal()
        self._pace.load(meta["rate"])
        nobodys = self._supply.load(state["samplers"])
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
            self._supply.poll(force=True)
            self._supply.exchange()
            while progress.step < progress.steps:
                if self._phase < 0 or progress.step >= self._phases[self._phase].until:
                    self._enter(self._phase + 1)
                windows = self._next(stop)
                if windows is None:
                    break
                self._update(windows)
                self._keep_up()
            if self._algorithm is not None:
                self._checkpoint()
            self._note(self._keep.facts(flush=True))
            self._keep.require_written()
        finally:
            self._keep.close()
            self._budget.close()
        self._tell(force=True)
        return progress

    def _enter(self, phase: int) -> None:
        """Begins a phase, with a new algorithm where it names one."""
        first = next((i for i in range(phase, -1, -1) if self._phases[i].build is not None), 0)
        build = self._phases[first].build
        if build is not None and (self._algorithm is None or first > self._phase):
            torch.manual_seed(self._settings.seed * 1009 + first)  # new modules begin alike on all ranks, whatever went before
            if self._engine is not None:
                if self._phases[phase].restarts:
                    self._require_release()
                self._engine.close()
            self._algorithm, self._engine = build()
            self._require_equal()
        if self._phase != phase and not (self._phase >= 0 and self._phases[self._phase].limited):
            self._pace.begin()
        self._phase = phase
        algorithm, _ = self._trained()
        self.progress.phase, self.progress.algorithm = self._phases[phase].name, algorithm.name

    def _require_release(self) -> None:
        """What was learnt so far is on disk as a release, also where there was no room for it when it was due."""
        self._note(self._keep.facts(flush=True))
        self._keep.publish(*self._trained(), self.progress.step, self.progress.stats)
        self._note(self._keep.facts(flush=True))

    def _trained(self) -> tuple[Algorithm, Engine]:
        if self._algorithm is None or self._engine is None:
            raise LearnerError("the first phase of a run has no algorithm", rule="phases[0].build makes one")
        return self._algorithm, self._engine

    def _require_equal(self) -> None:
        algorithm, engine = self._trained()
        with engine.gathered():
            require_equal(self._ranks, algorithm, engine.weights(), self.progress.step)

    def _next(self, stop: Callable[[], bool]) -> Windows | None:
        """This rank's rows of the next batch; None when a rank was told to stop."""
        needs, limited = self._trained()[0].needs, self._phases[self._phase].limited
        windows = self._supply.next(needs, self.progress.step, limited=limited, stop=stop, idle=self._idle)
        self.progress.waiting = ""
        return windows

    def _idle(self) -> None:
        """While the next update has to wait."""
        self.progress.waiting = self._pace.waiting
        self._note(self._keep.facts())
        self._tell()

    def _update(self, windows: Windows) -> None:
        algorithm, engine = self._trained()
        step = self.progress.step
        self._seed_torch(step)
        with self._timed("prepare"), torch.no_grad():
            batch = algorithm.prepare(self._feed.batch(windows))
        stats: dict[str, float] = {}
        for number, (name, part) in enumerate(algorithm.parts.items()):
            prefix = "" if len(algorithm.parts) == 1 else f"{name}."
            if step % part.every:  # what the last update said still holds
                stats.update({key: value for key, value in self.progress.stats.items() if key.startswith(prefix)})
                continue
            numbers, loss_B = self._update_part(name, part, batch)
            stats.update({prefix + key: value for key, value in numbers.items()})
            if number == 0 and loss_B is not None:
                with self._timed("feed_back"):
                    self._supply.feed_back(windows, loss_B)
        stats.update(self._supply.known.staleness())
        with self._timed("after_step"), engine.gathered():
            algorithm.after_step(step, stats)
        if algorithm.advice != self.progress.advice:
            self.progress.advice = algorithm.advice
            self._write("advice", step=step, algorithm=algorithm.name, advice=algorithm.advice)
        self.progress.step, self.progress.stats = step + 1, stats

    def _update_part(self, name: str, part: Part, batch: Batch) -> tuple[dict[str, float], np.ndarray | None]:
        """All updates of a part in a step: the means of their numbers, and the losses of this rank's samples where what is
        drawn next depends on them."""
        algorithm, engine = self._trained()
        depends = algorithm.needs.priority is not None or algorithm.needs.adaptive is not None
        loss_B = torch.full([len(batch.step_B)], math.nan) if depends else None
        each: list[dict[str, float]] = []
        for rows_N, minibatch in minibatches(batch, part):
            try:
                each.append(engine.update(name, algorithm.loss, minibatch, self._timed))
            except LearnerError as error:
                what = f"step {self.progress.step} of {algorithm.name}: {error.what}"
                raise type(error)(what, rule=error.rule, remedy=error.remedy) from None
            if loss_B is not None:
                loss_B[rows_N] = self._losses_of(name, len(rows_N))
            if part.after_update is not None:
                with self._timed("after_step"), engine.gathered():
                    part.after_update()
        numbers = {key: math.fsum(one[key] for one in each) / len(each) for key in each[0]}
        return numbers, None if loss_B is None else loss_B.numpy()

    def _losses_of(self, name: str, num_rows: int) -> Tensor:
        algorithm, engine = self._trained()
        loss_B = engine.per_sample(name)
        if loss_B.shape != (num_rows,):
            raise LearnerError(
                f"part {name!r} of {algorithm.name} has losses of shape {tuple(loss_B.shape)} for {num_rows} windows",
                rule="per_sample_B has one loss a window, in their order, where sampling depends on losses",
            )
        return loss_B

    def _seed_torch(self, step: int) -> None:
        """What draws from torch's own generators (dropout, say) is a function of (seed, step, rank) too."""
        seed = (self._settings.seed * 1_000_003 + step + self._ranks.rank * 10_000_019) % 2**63
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device: 0.1 to 1 ms
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _keep_up(self) -> None:
        """What is due between two updates."""
        step, settings = self.progress.step, self._settings
        last, phase = step == self.progress.steps, self._phases[self._phase]
        every = step == settings.first_release or step % settings.publish_every == 0
        if step >= settings.first_release and (last or (step == phase.until if phase.restarts else every)):
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
            samplers = self._supply.states()
            algorithm, engine = self._trained()
            meta = {
                **self._settings.meta,
                "phase": self._phase,
                "algorithm": algorithm.name,
                "num_steps": self._supply.known.num_steps,
                "rate": self._pace.counts(),
                "ranks": self._ranks.size,
            }
            self._keep.checkpoint(algorithm, engine, self.progress.step, meta, samplers)

    def _note(self, facts: list[Fact]) -> None:
        for kind, fields in facts:
            self._write(kind, **fields)

    def _tell(self, force: bool = False) -> None:
        now, progress, known = time.monotonic(), self.progress, self._supply.known
        if not force and now - self._reported < REPORT_S:
            return
        self._reported = now
        progress.num_steps, progress.pace = known.num_steps, self._pace.line
        progress.release = max(known.release, self._keep.release)  # the first rank knows it before the others
        num_updates = progress.step - self._window_step
        if num_updates if force else now - self._window_start >= 2 * REPORT_S:  # at the end the last rate stays
            progress.updates_per_s = num_updates / max(now - self._window_start, 1e-9)
            if num_updates:
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
        progress.by_source = dict(zip(SOURCE_NAMES, known.counts_SKT.sum((0, 2)).tolist(), strict=True))
        self._report(dataclasses.replace(progress, stats=dict(progress.stats), seconds=dict(self._budget.seconds)))
