"""Draws docs/demo.svg, the figure of the README, from a demo's run folder: python tools/demo_figure.py runs/demo"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fleet.runfolder import RunFolder
from infra.report import plot_curve, plot_interventions
from infra.report_data import read_facts


def main() -> None:
    facts = read_facts(RunFolder.open(Path(sys.argv[1])))
    with rc_context({"font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "demo"}):
        figure = Figure(figsize=(9.6, 3.2), layout="constrained")
        for axes, draw, title in zip(
            figure.subplots(1, 2),
            (plot_curve, plot_interventions),
            ("success on held-out starts, 95 % intervals", "episodes, and those with an intervention"),
            strict=True,
        ):
            draw(axes, facts)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("minutes since the run started")
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color="#e5e5e5")
        out = Path(__file__).parents[1] / "docs" / "demo.svg"
        out.parent.mkdir(exist_ok=True)
        figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
