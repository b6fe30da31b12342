"""The picture of the expert benchmark: how far each way is ahead of the gate alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .contract import Report
from .expert_tables import ALONE, MAIN_EXPERTS, SCORES, WAYS, Setting, difference, main_settings, select

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by most people (Okabe and Ito)


def plot_experts(report: Report, file: Path) -> None:
    """One panel for each score, one mark for each data set in its main setting, with the standard error over seeds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    main = main_settings(report.rows)
    figure, panels = plt.subplots(len(SCORES), 1, sharex=True, figsize=(9, 8), layout="constrained")
    for panel, (score, title) in zip(panels, SCORES.items(), strict=True):
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(title, fontsize=10, loc="left")
        panel.grid(axis="y", alpha=0.3)
        for number, setting in enumerate(main):
            rows = [row for row in report.rows if Setting.of(row) == setting]
            for place, (form, matching) in enumerate(WAYS.values()):
                found = difference(
                    select(rows, form, matching, 0 if matching == "none" else MAIN_EXPERTS),
                    select(rows, ALONE, "none"),
                    score,
                )
                if found is not None:
                    panel.errorbar(
                        place + 0.18 * (number - (len(main) - 1) / 2),
                        found.mean,
                        yerr=found.error or 0,
                        fmt="o",
                        markersize=5,
                        capsize=2,
                        color=_COLOURS[number % len(_COLOURS)],
                        label=setting.data_set if place == 0 else None,
                    )
    panels[0].legend(fontsize=8, loc="lower left")
    panels[1].set_ylabel("points ahead of the gate alone")
    panels[-1].set_xticks(range(len(WAYS)), list(WAYS), rotation=25, ha="right", fontsize=9)
    figure.savefig(file, dpi=100)
    plt.close(figure)
