"""One rank of a run's learner: from what is on disk to a running Loop. ``train`` is what each Ray actor calls."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from algorithms.base import Algorithm, DataFacts
from algorithms.policies.base import TEXT
from algorithms.policies.text import text_of
from buffer.image_cache import ImageCache
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.errors import LearnerError, RunFolderError
from fleet.files import FolderLock
from fleet.journal import Journal
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from fleet.spec import RobotSpec
from learner.agree import all_specs, newest_checkpoint
from learner.beginning import changed_settings, settings_of, wait_for_data
from learner.budget import Budget
from learner.checkpoint import Checkpoint, Checkpoints
from learner.engine import Engine
from learner.engines import make_engine
from learner.feed import allocator
from learner.fit import data_facts
from learner.instruments import Report, instruments, with_feed
from learner.keep import Keep
from learner.loop import Loop, LoopSettings, Phase
from learner.main import LearnerConfig, algorithm_class
from learner.memory import memory_errors
from learner.pace import Pace
from learner.policy import go_back, make_policy
from learner.progress import Progress
from learner.publisher import Publisher
from learner.ranks import RankPlace, Ranks
from learner.skipped import Skipped
from learner.supply import POLL_S, BatchSource

LOCK_WAIT_S = 3.0
ONE_RANK = RankPlace()


def train(
    run: RunFolder,
    tables: Mapping[str, Any],
    *,
    stop: Callable[[], bool],
    report: Report,
    place: RankPlace = ONE_RANK,
) -> Progress:
    """Trains until the configured number of steps is done or ``stop`` says so, from the newest checkpoint if there is one.

    Args:
        run: Of this rank's node; ``checkpoints``, ``releases`` and ``keys`` are the same on all nodes.
        tables: ``learner.main.LEARNER_TABLES``, loaded.
        stop: Of any rank ends all.
        place: Which rank this is. Every rank calls this.

    Raises:
        RunFolderError: Another learner works on this run.
        LearnerError: A checkpoint does not fit the configuration, all are damaged, a loss is not finite, ranks drifted apart,
            or another rank failed: then its error, with the rank before it.
        OutOfMemory: Of a GPU or of this machine's memory; the remedy names the settings that help.
        FleetError: The data, the policy or the disk cannot be used.
    """
    with _together(place, tables["learner"].device) as ranks:
        return _train(run, tables, stop, report, ranks)


def _train(run: RunFolder, tables: Mapping[str, Any], stop: Callable[[], bool], report: Report, ranks: Ranks) -> Progress:
    config: LearnerConfig = tables["learner"]
    with contextlib.ExitStack() as stack:
        if ranks.first:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            stack.callback(_lock(run.checkpoints).release)
        journal, report = instruments(run, config, report, ranks.rank)
        stack.callback(journal.close)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        catalogue = run.path / "tasks.json"  # may be edited just now, and all ranks count by it
        tasks = json.loads(ranks.broadcast_bytes(catalogue.read_bytes() if ranks.first else b""))
        cache = ImageCache(config.image_cache_mb << 20)
        sampler = Sampler(run.buffer, list(tasks), config.seed, journal, cache=cache, split=ranks.place.split())
        stack.callback(sampler.close)
        arrays = allocator(choose_device(config.device))
        feed = Prefetcher(sampler, depth=config.prefetch_depth, workers=config.prefetch_workers, allocate=arrays)
        stack.callback(feed.close)
        report = with_feed(report, sampler, feed, cache, Skipped(sampler, catalogue, journal.write))
        if not wait_for_data(sampler, config.min_size_to_sample, ranks, stop, report, journal):
            return Progress(steps=config.steps)
        embeddings_KE = torch.tensor([task["embedding"] for task in tasks.values()], dtype=torch.float32)
        with memory_errors(tables["engine"], ranks):
            named = {name: str(task["instruction"]) for name, task in tasks.items()}
            loop = make_loop(run, tables, sampler, sampler.specs, embeddings_KE, journal, report, named, feed=feed, ranks=ranks)
            return loop.run(stop)


def make_loop(
    run: RunFolder,
    tables: Mapping[str, Any],
    source: BatchSource,
    specs: list[RobotSpec],
    instructions_KE: torch.Tensor,
    journal: Journal,
    report: Report,
    tasks: Mapping[str, str] | None = None,
    *,
    feed: BatchSource | None = None,
    ranks: Ranks | None = None,
) -> Loop:
    """The loop at the newest checkpoint, or at the beginning. Every rank calls it.

    Args:
        specs: Of the robots of this rank's shard.
        tasks: Instruction by name, in the order of the sampler's; None: nobody asks for them.
        feed: What makes the source's batches ahead; None: the source itself.
        ranks: None: this is the only one.
    """
    config: LearnerConfig = tables["learner"]
    ranks, device, tasks = ranks or Ranks(ONE_RANK), choose_device(config.device), tasks or {}
    checkpoints = Checkpoints(run.checkpoints, keep=config.keep_checkpoints, keep_every_h=config.keep_checkpoint_every_h)
    checkpoint = newest_checkpoint(ranks, checkpoints)
    torch.manual_seed(config.seed)
    policy, described = make_policy(
        tables["policy"], checkpoint, all_specs(ranks, specs), instructions_KE.shape[1], source, ranks
    )
    policy.to(device)
    budget = Budget(device, run.logs / f"trace-{ranks.rank}.json", config.trace_steps, rank=ranks.rank)
    keep = _make_keep(run, config, checkpoints, checkpoint, device, budget, ranks)
    write = journal.write if ranks.first else _nothing
    loop = Loop(
        feed or source,
        instructions_KE,
        make_phases(run, policy, data_facts(policy.spec, source, list(tasks), ranks), tables, device, ranks),
        _settings(config, {"policy": described, "seed": config.seed, "run_id": run.run_id, "settings": settings_of(tables)}),
        device=device,
        ranks=ranks,
        pace=Pace(config.rate_limiter(), write),
        keep=keep,
        budget=budget,
        report=report,
        write=write,
        texts_KC=torch.stack([text_of(text) for text in tasks.values()]) if TEXT in described["spec"]["conditions"] else None,
    )
    if checkpoint is not None:
        write(
            "resumed",
            step=checkpoint.step,
            version=keep.release,
            passed_over=checkpoints.refused,
            ranks=ranks.size,
            shards_left_out=loop.resume(checkpoint),
            changed=changed_settings(checkpoint.meta["settings"], settings_of(tables)),
        )
    return loop


def make_phases(
    run: RunFolder, policy: Any, data: DataFacts, tables: Mapping[str, Any], device: torch.device, ranks: Ranks
) -> list[Phase]:
    """The start, if there is one, and the rest of the run: one phase, or iterations."""
    config: LearnerConfig = tables["learner"]

    def builder(where: str, restarts: bool = False) -> Callable[[], tuple[Algorithm, Engine]]:
        def make() -> tuple[Algorithm, Engine]:
            if restarts:
                go_back(policy, run, config.start_steps, ranks)
            cls = algorithm_class(tables[where], where)
            algorithm = cls(policy, cls.Config(**tables[where].config), data)
            return algorithm, make_engine(tables["engine"], algorithm, device, ranks)

        return make

    if config.start_steps == 0:
        return [Phase("online", config.steps, builder("algorithm"))]
    named = bool(tables["start"].name)
    start = Phase("start", config.start_steps, builder("start" if named else "algorithm"), limited=False)  # on what is there
    if not config.restart_every:
        return [start, Phase("online", config.steps, builder("algorithm") if named else None)]
    ends = range(config.start_steps + config.restart_every, config.steps + 1, config.restart_every)
    again = builder("algorithm", restarts=True)
    return [start, *(Phase(f"iteration {i}", end, again, restarts=True) for i, end in enumerate(ends, 1))]


def _settings(config: LearnerConfig, meta: dict[str, Any]) -> LoopSettings:
    return LoopSettings(
        seed=config.seed,
        publish_every=config.publish_every,
        checkpoint_every=config.checkpoint_every,
        first_release=max(config.start_steps, 1),
        meta=meta,
    )


def _make_keep(
    run: RunFolder,
    config: LearnerConfig,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    device: torch.device,
    budget: Budget,
    ranks: Ranks,
) -> Keep:
    """Publishes and checkpoints on the first rank."""
    if not ranks.first:
        return Keep(ranks, None, None, device, budget)
    store = ReleaseStore(run.releases, run.keys)
    if checkpoint is not None:
        store.never_reuse(int(checkpoint.meta["release"]))
    publisher = Publisher(store, keep=config.keep_releases, keep_first=config.restart_every > 0)
    return Keep(ranks, publisher, checkpoints, device, budget)


def choose_device(name: str) -> torch.device:
    """The device that a configuration names.

    Raises:
        LearnerError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise LearnerError(
            "learner.device = 'cuda'", rule="this machine has a GPU that torch can use", remedy="learner.device=auto"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def _together(place: RankPlace, device: str) -> Iterator[Ranks]:
    """The ranks, each of which hears why another one failed."""
    ranks = Ranks(place, "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        yield ranks
    except BaseException as error:
        cause = ranks.fail(error)
        if cause is not None:
            raise cause from error
        raise
    finally:
        ranks.close()


def _lock(folder: Path) -> FolderLock:
    """The lock of the run's one learner. One that was just killed may hold it for another moment."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return FolderLock(folder, "run's checkpoints: there is one learner a run")
        except RunFolderError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _nothing(kind: str, **fields: Any) -> None:
    """The journal of ranks that say nothing about the run."""
