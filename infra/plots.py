"""A contact sheet of an episode: some of its frames, camera by camera, with who acted in each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from buffer.frames import Frame
from fleet.robot import Source

COLUMNS = 8
TILE_INCHES = 1.5
COLOURS = {Source.POLICY: "#3366aa", Source.OPERATOR: "#d1742f", Source.SCRIPT: "#888888", Source.DEMO: "#3a8f5c"}


def contact_sheet(frames: Sequence[Frame], title: str, path: Path) -> bool:
    """Writes a PNG with all frames that have images. The frame of a tile has the colour of its source.

    Returns:
        False, and nothing is written, where there is no image.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    cameras = sorted({name for frame in frames for name in frame.images})
    if not cameras:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(COLUMNS, len(frames))
    rows = math.ceil(len(frames) / columns)
    figure = Figure(figsize=(max(columns, 4) * TILE_INCHES, (rows * len(cameras) + 0.6) * (TILE_INCHES + 0.25)))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    handles = [Patch(color=COLOURS[s], label=s.name.lower()) for s in sorted({Source(f.source) for f in frames})]
    figure.legend(handles=handles, loc="lower right", ncols=len(handles), fontsize=8, frameon=False)
    for number, camera in enumerate(cameras):
        for at, frame in enumerate(frames):
            axes = figure.add_subplot(rows * len(cameras), columns, number * rows * columns + at + 1)
            version = f" v{frame.version}" if frame.version >= 0 else ""
            axes.set_title(f"{frame.index}{version}", fontsize=7, pad=2)
            axes.set_xticks([], [])
            axes.set_yticks([], [])
            for spine in axes.spines.values():
                spine.set(color=COLOURS[Source(frame.source)], linewidth=3)
            if camera in frame.images:
                image = frame.images[camera]
                axes.imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=255)
            else:
                axes.text(0.5, 0.5, "unreadable", ha="center", va="center", fontsize=7)
            if at % columns == 0:
                axes.set_ylabel(camera.removeprefix("observation.images."), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=110, bbox_inches="tight")
    return True
