"""A plot of a run: loss and gap closed by task."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from arc_ds.tracking.metrics_log import read_metrics

LOSS = re.compile(r"^train/loss/(?P<decoder>[^/]+)/(?P<task>[^/]+)$")
GAP = re.compile(r"^validation/(?P<decoder>[^/]+)/(?P<task>[^/]+)/gap_closed$")
SMOOTHING = 0.9

Curve = list[tuple[int, float]]


def read_curves(metrics_file: Path, pattern: re.Pattern[str]) -> dict[str, Curve]:
    """(step, value) points of all metrics that match `pattern`, by task (and by decoder if there are several)."""
    curves: dict[tuple[str, str], Curve] = defaultdict(list)
    for entry in read_metrics(metrics_file):
        for name, value in entry.metrics.items():
            if match := pattern.match(name):
                curves[match["decoder"], match["task"]].append((entry.step, value))
    decoders = {decoder for decoder, _ in curves}
    return {task if len(decoders) == 1 else f"{task}, {decoder}": curve for (decoder, task), curve in curves.items()}


def draw(metrics_file: Path, picture: Path, *, title: str, interrupted_at: int | None = None) -> None:
    """Write a PNG with two panels, loss and gap closed over steps. interrupted_at: a step to mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, gap_axes = figure.subplots(1, 2)
    for task, curve in sorted(read_curves(metrics_file, LOSS).items()):
        steps = [step for step, _ in curve]
        (line,) = loss_axes.plot(steps, [value for _, value in curve], alpha=0.25, linewidth=0.8)
        loss_axes.plot(steps, smooth(curve), color=line.get_color(), label=task)
    for task, curve in sorted(read_curves(metrics_file, GAP).items()):
        gap_axes.plot([step for step, _ in curve], [value for _, value in curve], marker="o", label=task)
    gap_axes.axhline(0.0, color="grey", linewidth=0.8)
    gap_axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    loss_axes.set(title="training loss", xlabel="step", ylabel="NLL, nats per token")
    gap_axes.set(title="gap closed on held-out text", xlabel="step", ylabel="0: as without text, 1: as with full text")
    for axes in (loss_axes, gap_axes):
        if interrupted_at is not None:
            axes.axvline(interrupted_at, color="black", linewidth=0.8, linestyle="--", label="interrupted, resumed")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(picture)


def smooth(curve: Curve) -> list[float]:
    """Exponential moving average of a curve's values with bias correction."""
    average, weight, out = 0.0, 0.0, []
    for _, value in curve:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append(average / weight)
    return out
