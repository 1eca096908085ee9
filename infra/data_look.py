"""``fleet data stats | list | show``: what a run's data is, while it is served or not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from buffer.browse import Episode, find_episodes, read_episodes
from buffer.frames import Frame, read_frames
from buffer.stats import FeatureSize, Group, Stats, read_stats
from fleet.errors import EpisodeError
from fleet.robot import SOURCE_NAMES, Source
from fleet.runfolder import RunFolder
from infra.plots import contact_sheet
from infra.tables import console, table

_LABELS_SHOWN = 20


def show_stats(run_path: Path, as_json: bool) -> None:
    run = RunFolder.open(run_path)
    stats = read_stats(run.buffer)
    if as_json:
        print(json.dumps({"run": run.run_id, **stats.to_dict()}, indent=1))
        return
    out = console()
    out.print(f"run {run.run_id}", markup=False, style="bold")
    out.print(table("|", _facts(stats)))
    groups = "{}|>episodes|>success|>corrected|>takeovers|>excluded|>steps|>of operator|>hours"
    for what, found in (("robot", stats.by_robot), ("task", stats.by_task)):
        if found:
            out.print()
            out.print(table(groups.format(what), [(name, *_cells(group)) for name, group in sorted(found.items())]))
    if stats.sizes:
        out.print()
        out.print(table("robot type|feature|codec|shape|>bytes a step|>GB per robot-hour", map(_size, stats.sizes)))


def _facts(stats: Stats) -> Iterable[tuple[str, str]]:
    total, open_ones = stats.total, stats.by_outcome.get("open", 0)
    yield "steps", f"{total.steps:,} in {total.hours:.2f} robot-hours ({_counts(stats.by_source)})"
    yield "episodes", f"{total.episodes:,} ({_counts(stats.by_outcome)})" + (f", {open_ones} not finished" * bool(open_ones))
    if stats.first_ns:
        yield "recorded", f"{_clock(stats.first_ns)} to {_clock(stats.last_ns)}"
    if stats.first_version >= 0:
        yield "policy versions", f"{stats.first_version} to {stats.last_version}"
    yield "on disk", f"{stats.disk_bytes / 1e9:.3f} GB; {stats.fragments:,} fragments in {stats.segments} segments"
    yield "retention", f"{stats.compacted} segments kept in part, {stats.waiting} files to be deleted soon"
    yield "labels", _counts(stats.labels) or "none"
    if stats.unindexed:
        yield "without sidecar", f"{stats.unindexed} segments; the gateway makes them, or `fleet data repair`"
    if stats.without_state:
        yield "lost state", f"{stats.without_state} segments, not counted here: `fleet data repair`"
    damage = f"{stats.damaged} places, {stats.unreadable} fragments unreadable: `fleet data verify` names them"
    yield "damage", damage if stats.damaged or stats.unreadable else "none seen; `fleet data verify` checks every byte"


def _cells(group: Group) -> Iterable[object]:
    success = f"{100 * group.success / group.judged:.0f} %" if group.judged else "-"
    yield from (f"{group.episodes:,}", success, group.corrected, group.takeovers, group.excluded, f"{group.steps:,}")
    yield from (f"{group.operator_steps:,}", f"{group.hours:.2f}")


def _size(size: FeatureSize) -> tuple[object, ...]:
    shape = "x".join(map(str, size.shape))
    return size.robot_type, size.feature, size.codec, shape, f"{size.bytes_per_step:,.0f}", f"{size.gb_per_hour:.3f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _clock(ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ns / 1e9))


def select(
    episodes: Iterable[Episode], tasks: list[str] | None, outcomes: list[str] | None, robots: list[str] | None
) -> list[Episode]:
    """The episodes of these tasks, outcomes and robots; None or [] for all. Newest last."""
    found = [
        e
        for e in episodes
        if (not tasks or e.task in tasks) and (not outcomes or e.outcome in outcomes) and (not robots or e.key[0] in robots)
    ]
    return sorted(found, key=lambda e: e.end_ns)


def list_episodes(
    run_path: Path,
    tasks: list[str] | None,
    outcomes: list[str] | None,
    robots: list[str] | None,
    limit: int,
    as_json: bool,
) -> None:
    found = select(read_episodes(RunFolder.open(run_path).buffer), tasks, outcomes, robots)
    shown = found[-limit:] if limit else found
    if as_json:
        print(json.dumps([episode.to_dict() for episode in shown], indent=1))
        return
    out = console()
    columns = "episode|task|outcome|judge|>steps|>of operator|>takeovers|>version|>reward|ended"
    out.print(table(columns, map(_episode_row, shown)))
    if len(shown) < len(found):
        out.print(f"the newest {len(shown)} of {len(found):,}; --limit 0 shows all")


def _episode_row(episode: Episode) -> tuple[object, ...]:
    outcome = episode.outcome + " (excluded)" * episode.excluded
    ended = _clock(episode.end_ns) if episode.end_ns else "-"
    operator, version = episode.by_source[Source.OPERATOR], _versions(episode)
    return (
        episode.name,
        episode.task,
        outcome,
        episode.judged_by,
        episode.num_steps,
        operator,
        episode.num_takeovers,
        version,
        (f"{episode.reward:.2f}"),
        ended,
    )


def _versions(episode: Episode) -> str:
    first, last = episode.first_version, episode.last_version
    return "-" if first < 0 else str(first) if first == last else f"{first}-{last}"


def pick(episodes: list[Episode], name: str, last: bool, robots: list[str] | None) -> Episode:
    """The episode of a name, or the newest one.

    Raises:
        EpisodeError: There is none, or the name is of several.
    """
    if not name and not last:
        raise EpisodeError("no episode is named", rule="ROBOT/BOOT/EPISODE, or --last", remedy="`fleet data list` shows them")
    found = select(episodes, None, None, robots)
    if name:
        return find_episodes(found, [name])[0]
    if not found:
        raise EpisodeError(f"there is no episode of {', '.join(robots or ['any robot'])} yet", rule="--last names the newest")
    return found[-1]


def show_episode(
    run_path: Path, name: str, last: bool, robots: list[str] | None, num_frames: int, sheet: Path | None, as_json: bool
) -> None:
    """Prints an episode and writes its contact sheet."""
    run = RunFolder.open(run_path)
    episode = pick(read_episodes(run.buffer), name, last, robots)
    frames = read_frames(run.buffer, episode, num_frames)
    path = sheet or run.report / "episodes" / f"{episode.name.replace('/', '_')}.png"
    said = _write_sheet(frames, episode, path)
    if as_json:
        written = str(path) if said == str(path) else None
        print(json.dumps({**episode.to_dict(), "frames": [f.to_dict() for f in frames], "sheet": written}, indent=1))
        return
    out = console()
    out.print(f"episode {episode.name}", markup=False, style="bold")
    out.print(table("|", _episode_facts(episode)))
    if episode.labels:
        rows = [(_clock(x.time_ns), x.field, x.value, x.judge) for x in episode.labels[-_LABELS_SHOWN:]]
        out.print()
        out.print(table("labelled at|field|value|judge", rows))
    out.print()
    columns = ">frame|>seconds|source|operator|>version|>reward|end|action"
    out.print(table(columns, [_frame_row(frame, episode.start_ns) for frame in frames]))
    out.print()
    out.print(f"contact sheet: {said}", markup=False)


def _write_sheet(frames: list[Frame], episode: Episode, path: Path) -> str:
    """Where it is, or why there is none."""
    title = f"{episode.name}  {episode.task}  {episode.outcome}"
    try:
        return str(path) if contact_sheet(frames, title, path) else "none: the episode has no readable images"
    except ImportError as error:
        return f"none: {error.name} is not installed (pip install 'fleet-rl[learner]')"
    except OSError as error:
        return f"none: {error}"


def _episode_facts(episode: Episode) -> Iterable[tuple[str, object]]:
    said = f", the robot said {episode.said}" if episode.outcome != episode.said else ""
    yield "task", f"{episode.task}: {episode.instruction}" if episode.instruction != episode.task else episode.task
    yield "outcome", f"{episode.outcome}{said} (judge: {episode.judged_by or '-'}){' - excluded' * episode.excluded}"
    missing = f" of {episode.length}" if episode.length not in (-1, episode.num_steps) else ""
    yield "steps", f"{episode.num_steps}{missing} ({_counts(_by_source(episode))}), {episode.num_takeovers} takeovers"
    yield "policy version", _versions(episode)
    yield "reward", f"{episode.reward:.3f}"
    yield "start", episode.start or "-"
    if episode.start_ns:
        yield "recorded", f"{_clock(episode.start_ns)}, {(episode.end_ns - episode.start_ns) / 1e9:.1f} s"
    yield "segments", ", ".join(map(str, episode.segments))


def _by_source(episode: Episode) -> dict[str, int]:
    return {name: count for name, count in zip(SOURCE_NAMES, episode.by_source, strict=True) if count}


def _frame_row(frame: Frame, start_ns: int) -> tuple[Any, ...]:
    end = " ".join(word for word, is_so in (("terminated", frame.terminated), ("truncated", frame.truncated)) if is_so)
    action = " ".join(f"{x:.3g}" for x in frame.action[:8]) + (" ..." if len(frame.action) > 8 else "")
    version = frame.version if frame.version >= 0 else "-"
    seconds = f"{(frame.time_ns - start_ns) / 1e9:.2f}"
    return frame.index, seconds, SOURCE_NAMES[frame.source], frame.operator_id, version, f"{frame.reward:g}", end, action
