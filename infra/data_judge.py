"""``fleet data label | exclude``: facts about episodes that come later. Nothing that is stored is changed."""

from __future__ import annotations

import getpass
import time
from pathlib import Path

from buffer.browse import find_episodes, read_episodes
from buffer.labels import Label, append_labels, check_label
from fleet.runfolder import RunFolder


def label_episodes(run_path: Path, names: list[str], field: str, value: str, judge: str) -> list[str]:
    """Appends the same fact to several episodes; returns their full names.

    Raises:
        EpisodeError: A name is of none or several, or the fact means nothing; then nothing is stored.
        RunFolderError, StorageError: The labels cannot be stored.
    """
    run = RunFolder.open(run_path)
    check_label(field, value)
    episodes = find_episodes(read_episodes(run.buffer), names)
    said_by, now_ns = judge or _user(), time.time_ns()
    append_labels(run.buffer, [Label(*episode.key, field, value, said_by, now_ns) for episode in episodes])
    return [episode.name for episode in episodes]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "operator"
