"""One learner on one run folder: from what is on disk to a running Loop. ``train`` is what the Ray actor calls."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algorithms.base import Algorithm
from algorithms.policies.registry import FAMILIES, build
from buffer.image_cache import ImageCache
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.batch import BatchNeeds
from fleet.errors import LearnerError, NoData, RunFolderError
from fleet.files import Files, FolderLock
from fleet.journal import Journal
from fleet.lookup import resolve
from fleet.robot import Source
from fleet.runfolder import RunFolder
from fleet.server.releases import ReleaseStore
from fleet.spec import RobotSpec
from learner.checkpoint import Checkpoint, Checkpoints
from learner.engine import Engine
from learner.engines import make_engine
from learner.feed import allocator
from learner.loop import POLL_S, BatchSource, Loop, LoopSettings, Phase
from learner.main import EngineConfig, LearnerConfig, PolicyConfig, algorithm_class
from learner.progress import Progress
from learner.publisher import Publisher
from learner.ranks import RankPlace, Ranks
from learner.skipped import COUNTED, Skipped

LOCK_WAIT_S = 3.0
STATISTICS_STEPS = 8192  # drawn from the demonstrations, to normalise observations by
Report = Callable[[Progress], None]


def train(run: RunFolder, tables: Mapping[str, Any], *, stop: Callable[[], bool], report: Report) -> Progress:
    """Trains until the configured number of steps is done or ``stop`` says so, from the newest checkpoint if there is one.

    Args:
        tables: ``learner.main.LEARNER_TABLES``, loaded.

    Raises:
        RunFolderError: Another learner works on this run.
        LearnerError: A checkpoint does not fit the configuration, all are damaged, or a loss is not finite.
        FleetError: The data, the policy or the disk cannot be used.
    """
    config: LearnerConfig = tables["learner"]
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(_lock(run.checkpoints).release)
        journal, report = _instruments(run, config, report)
        stack.callback(journal.close)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        tasks = json.loads((run.path / "tasks.json").read_text())
        cache = ImageCache(config.image_cache_mb << 20)
        sampler = Sampler(run.buffer, list(tasks), config.seed, journal, cache=cache)
        stack.callback(sampler.close)
        arrays = allocator(choose_device(config.device))
        feed = Prefetcher(sampler, depth=config.prefetch_depth, workers=config.prefetch_workers, allocate=arrays)
        stack.callback(feed.close)
        report = _with_feed(report, sampler, feed, cache, Skipped(sampler, run.path / "tasks.json", journal.write))
        if not wait_for_data(sampler, config.min_size_to_sample, stop, report, journal):
            return Progress(steps=config.steps)
        specs = sampler.specs
        embeddings_KE = torch.tensor([task["embedding"] for task in tasks.values()], dtype=torch.float32)
        loop = make_loop(run, tables, sampler, specs, embeddings_KE, journal, report, feed=feed)
        return loop.run(stop)


def make_loop(
    run: RunFolder,
    tables: Mapping[str, Any],
    source: BatchSource,
    specs: list[RobotSpec],
    instructions_KE: torch.Tensor,
    journal: Journal,
    report: Report,
    *,
    feed: BatchSource | None = None,
) -> Loop:
    """The loop at the newest checkpoint, or at the beginning.

    Args:
        feed: What makes the source's batches ahead; None: the source itself.
    """
    config: LearnerConfig = tables["learner"]
    device = choose_device(config.device)
    checkpoints = Checkpoints(run.checkpoints, keep=config.keep_checkpoints)
    store = ReleaseStore(run.releases, run.keys)
    checkpoint = checkpoints.newest()
    torch.manual_seed(config.seed)
    if checkpoint is None:
        described = complete_policy(tables["policy"], specs, instructions_KE.shape[1])
        policy = build(described["family"], described["config"])
        fit_statistics(policy, source)
    else:
        described = checkpoint.meta["policy"]
        check_same_policy(tables["policy"], described, checkpoint)
        policy = build(described["family"], described["config"])
        store.never_reuse(int(checkpoint.meta["release"]))
    policy.to(device)
    settings = LoopSettings(
        seed=config.seed,
        publish_every=config.publish_every,
        checkpoint_every=config.checkpoint_every,
        first_release=max(config.start_steps, 1),
        meta={"policy": described, "seed": config.seed, "run_id": run.run_id},
    )
    publisher = Publisher(store, keep=config.keep_releases)
    loop = Loop(
        feed or source,
        instructions_KE,
        make_phases(policy, tables, device),
        settings,
        device=device,
        limiter=config.rate_limiter(),
        publisher=publisher,
        checkpoints=checkpoints,
        report=report,
        write=journal.write,
    )
    if checkpoint is not None:
        loop.resume(checkpoint)
        journal.write("resumed", step=checkpoint.step, version=publisher.version, passed_over=checkpoints.refused)
    return loop


def make_phases(policy: Any, tables: Mapping[str, Any], device: torch.device) -> list[Phase]:
    """The start, if there is one, and the rest of the run."""
    config: LearnerConfig = tables["learner"]
    own: EngineConfig = tables["engine"]

    def builder(where: str) -> Callable[[], tuple[Algorithm, Engine]]:
        def make() -> tuple[Algorithm, Engine]:
            cls = algorithm_class(tables[where], where)
            algorithm = cls(policy, cls.Config(**tables[where].config))
            return algorithm, make_engine(own, algorithm, device, Ranks(RankPlace()))

        return make

    if config.start_steps == 0:
        return [Phase("online", config.steps, builder("algorithm"))]
    if not tables["start"].name:
        return [Phase("start", config.start_steps, builder("algorithm")), Phase("online", config.steps, None)]
    return [Phase("start", config.start_steps, builder("start")), Phase("online", config.steps, builder("algorithm"))]


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


def wait_for_data(source: BatchSource, min_size: int, stop: Callable[[], bool], report: Report, journal: Journal) -> bool:
    """Waits until the buffer has ``min_size`` steps; False when ``stop`` came first."""
    said = False
    while True:
        source.poll()
        num_steps = source.num_steps()
        if num_steps >= min_size or stop():
            return num_steps >= min_size
        why = (
            f"the learner waits for data: the buffer has {num_steps} steps, learner.min_size_to_sample is {min_size}; "
            "give demonstrations with `fleet join FILE --demonstrate 10`"
        )
        if not said:
            journal.write("waiting", why=why, step=0)
            said = True
        report(Progress(num_steps=num_steps, waiting=why))
        time.sleep(POLL_S)


def complete_policy(table: PolicyConfig, specs: list[RobotSpec], instruction_dim: int) -> dict[str, Any]:
    """Family and whole config of a policy: what the run file leaves open is read off the robots' specs and the tasks.

    Raises:
        LearnerError: The robots of this run do not share an action or an observation.
    """
    fields = set(resolve(FAMILIES, table.family, kind="policy family", error=LearnerError).Config.__dataclass_fields__)
    sizes = sorted({spec.action.size for spec in specs})
    if len(sizes) != 1:
        raise LearnerError(f"robots of this run have actions of {sizes} dims", rule="one policy has one action dimension")
    shared = {
        name: list(feature.shape)
        for name, feature in specs[0].observations.items()
        if not feature.is_image and all(name in s.features and s.features[name].shape == feature.shape for s in specs)
    }
    derived: dict[str, Any] = {"reads": shared, "action_dim": sizes[0], "instruction_dim": instruction_dim}
    config = {**{name: value for name, value in derived.items() if name in fields}, **table.config}
    if "reads" in fields and not config["reads"]:
        raise LearnerError(
            "the robots of this run share no observation", rule="a policy reads something", remedy="set policy.config.reads"
        )
    return {"family": table.family, "config": config}


def check_same_policy(table: PolicyConfig, described: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raises LearnerError when the configuration names another policy than the checkpoint holds."""
    different = {"family": (described["family"], table.family)} if described["family"] != table.family else {}
    for name, value in table.config.items():
        if _plain(described["config"].get(name)) != _plain(value):
            different[f"config.{name}"] = (described["config"].get(name), value)
    for name, (old, new) in different.items():
        raise LearnerError(
            f"policy.{name} = {new!r}, but the checkpoint of step {checkpoint.step} has {old!r}",
            rule="a run goes on with the policy that it began with",
            remedy="put the setting back, or start a new run",
        )


def fit_statistics(policy: Any, source: BatchSource) -> None:
    """Gives a policy that normalises its inputs their mean and standard deviation, from demonstrations if there are any."""
    if not hasattr(policy, "set_statistics"):
        return
    reads = tuple(policy.spec.reads)
    try:
        obs = source.batch(BatchNeeds(STATISTICS_STEPS, 1, reads, {(Source.DEMO,): 1.0}), 0).obs
    except NoData:
        obs = source.batch(BatchNeeds(STATISTICS_STEPS, 1, reads, {tuple(Source): 1.0}), 0).obs
    values = {name: np.asarray(value, np.float64) for name, value in obs.items()}
    policy.set_statistics({n: v.mean(0) for n, v in values.items()}, {n: v.std(0) for n, v in values.items()})


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


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _with_feed(report: Report, sampler: Sampler, feed: Prefetcher, cache: ImageCache, skipped: Skipped) -> Report:
    def tell(progress: Progress) -> None:
        stats = cache.stats()
        progress.feed = {
            "batches_ready": feed.num_ready,
            "undecodable": sampler.undecodable.num_windows,
            **skipped.look(),
            "image_cache_hits": stats.hits,
            "image_cache_misses": stats.misses,
            "image_cache_bytes": stats.bytes,
        }
        report(progress)

    return tell


def _instruments(run: RunFolder, config: LearnerConfig, report: Report) -> tuple[Journal, Report]:
    """Journal and report of this process; writes down who it is. Metrics are fed here and nowhere else."""
    path = run.logs / "learner.jsonl"
    facts: dict[str, int] = {"pid": os.getpid()}
    journal, tell = Journal(path), report
    if config.metrics_port >= 0:
        from fleet.metrics import LEARNER, MeteredJournal, Metrics

        metrics = Metrics(LEARNER)
        facts["metrics_port"] = metrics.serve(config.metrics_port)
        journal.close()
        journal = MeteredJournal(path, metrics)
        waited = [0.0]
        counted = dict.fromkeys(("undecodable", *COUNTED, "image_cache_hits", "image_cache_misses"), 0.0)

        def tell(progress: Progress) -> None:
            wait_s = progress.seconds.get("wait", 0.0) + progress.seconds.get("sample", 0.0)
            metrics.add("fleet_learner_data_wait", max(wait_s - waited[0], 0.0))
            waited[0] = wait_s
            for name, value in progress.feed.items():
                if name in counted:
                    metrics.add(f"fleet_learner_{name}", value - counted[name])
                    counted[name] = value
                else:
                    metrics.set(f"fleet_learner_{name.removesuffix('_bytes')}", value)
            for source, num_steps in progress.by_source.items():
                metrics.set("fleet_buffer_steps", num_steps, source=source)
            report(progress)

    (run.logs / "learner.pid").write_text(str(os.getpid()))
    Files().write_atomic(run.path / "learner.json", json.dumps(facts).encode())
    return journal, tell
