"""Journal and metrics of a rank: what people see of it. Metrics are fed here and nowhere else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from buffer.image_cache import ImageCache
from buffer.prefetch import Prefetcher
from buffer.sampler import Sampler
from fleet.files import Files
from fleet.journal import Journal
from fleet.runfolder import RunFolder
from learner.main import LearnerConfig
from learner.progress import Progress
from learner.skipped import COUNTED, Skipped

Report = Callable[[Progress], None]


def instruments(run: RunFolder, config: LearnerConfig, report: Report, rank: int) -> tuple[Journal, Report]:
    """Journal and report of this process. The first rank's journal is the run's; it alone has metrics, and writes down who
    it is."""
    if rank:
        return Journal(run.logs / f"learner-rank{rank}.jsonl"), report
    path = run.logs / "learner.jsonl"
    facts: dict[str, int] = {"pid": os.getpid()}
    if config.metrics_port >= 0:
        journal, report, facts["metrics_port"] = _metered(path, config.metrics_port, report)
    else:
        journal = Journal(path)
    (run.logs / "learner.pid").write_text(str(os.getpid()))
    Files().write_atomic(run.path / "learner.json", json.dumps(facts).encode())
    return journal, report


def with_feed(report: Report, sampler: Sampler, feed: Prefetcher, cache: ImageCache, skipped: Skipped) -> Report:
    """Adds to each report how batches are made."""

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


def _metered(path: Path, port: int, report: Report) -> tuple[Journal, Report, int]:
    from fleet.metrics import LEARNER, MeteredJournal, Metrics, Totals

    metrics = Metrics(LEARNER)
    bound = metrics.serve(port)
    seconds = Totals(metrics, "fleet_learner", "part")
    counted = dict.fromkeys(("undecodable", *COUNTED, "image_cache_hits", "image_cache_misses"), 0.0)

    def tell(progress: Progress) -> None:
        seconds.tell(progress.seconds)
        for name, value in progress.feed.items():
            if name in counted:
                metrics.add(f"fleet_learner_{name}", value - counted[name])
                counted[name] = value
            else:
                metrics.set(f"fleet_learner_{name.removesuffix('_bytes')}", value)
        for source, num_steps in progress.by_source.items():
            metrics.set("fleet_buffer_steps", num_steps, source=source)
        report(progress)

    return MeteredJournal(path, metrics), tell, bound
