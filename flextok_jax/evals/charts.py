"""Charts: panels of curves with confidence intervals, and heat maps (matplotlib)."""

from collections.abc import Mapping, Sequence
import io
from typing import NamedTuple

import numpy as np

_COLUMNS = 3  # panels side by side, at most
_LEGEND_COLUMNS = 6  # of a legend that all panels share, at most
_MAX_TICKS = 10  # of a linear axis at the points; if there are more points, matplotlib places the ticks


class Line(NamedTuple):
  """A curve; y holds numbers, or (y, low, high) with an interval. Labels that begin with _ are not in the legend."""

  x: Sequence[float]
  y: Sequence[float | Sequence[float]]
  color: int | None = None  # number of the colour; None: position in the panel
  dashed: bool = False
  marked: bool = True  # a marker at each point


def curves(
  panels: Mapping[str, Mapping[str, Line]],
  xlabel: str,
  ticks: Sequence[int],
  linear: Mapping[str, Mapping[str, Mapping[str, Line]]] | None = None,
) -> bytes:
  """Draws panels {title: {label: line}} over a log2 axis; returns a PNG.

  Args:
    xlabel, ticks: of the log2 axis.
    linear: {label of a linear axis: panels over it}, drawn after the others.
  """
  linear = linear or {}
  figure, axes = _figure(len(panels) + sum(map(len, linear.values())))
  axes = iter(axes)
  for title, lines in panels.items():
    axis = next(axes)
    _panel(axis, title, lines, xlabel)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
  for label, more in linear.items():
    for title, lines in more.items():
      axis = next(axes)
      _panel(axis, title, lines, label)
      points = sorted({x for line in lines.values() for x in line.x})
      if len(points) <= _MAX_TICKS:
        axis.set_xticks(points)
  _add_legends(figure)
  return _png(figure)


def _add_legends(figure) -> None:
  """Adds one legend below the panels if all have the same lines, else one to each that has several."""
  found = [(axis, *axis.get_legend_handles_labels()) for axis in figure.axes]  # without labels that begin with _
  labels = [tuple(labels) for _, _, labels in found]
  style = dict(frameon=False, fontsize=8, handlelength=3.5)
  if len(labels) > 1 and len(labels[0]) > 1 and len(set(labels)) == 1:
    columns = min(len(labels[0]), _LEGEND_COLUMNS)
    figure.legend(found[0][1], labels[0], loc="outside lower center", ncols=columns, **style)
    return
  for axis, handles, names in found:
    if len(names) > 1:
      axis.legend(handles, names, **style)


def _panel(axis, title: str, lines: Mapping[str, Line], xlabel: str):
  """Draws lines with their intervals."""
  for i, (label, line) in enumerate(lines.items()):
    color = f"C{(i if line.color is None else line.color) % 10}"
    style = dict(color=color, label=label, linewidth=1.8, linestyle="--" if line.dashed else "-")
    if line.marked:
      style |= dict(marker="o", markersize=4.5)
    points = [np.atleast_1d(y) for y in line.y]
    axis.plot(line.x, [y[0] for y in points], **style)
    intervals = [(x, *y[1:]) for x, y in zip(line.x, points) if len(y) == 3]
    if intervals:
      axis.vlines(*zip(*intervals), color=color, alpha=0.35, linewidth=5)
  axis.set_xlabel(xlabel)
  axis.set_title(title, fontsize=11)
  axis.grid(color="0.9", linewidth=0.8)
  axis.set_axisbelow(True)
  axis.spines[["top", "right"]].set_visible(False)


def heat_maps(panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str]) -> bytes:
  """Draws heat maps {title: [rows, columns]}, each with its own colour range; returns a PNG."""
  figure, axes = _figure(len(panels), height=1.6 + 0.32 * len(rows))
  for axis, (title, values) in zip(axes, panels.items()):
    image = axis.imshow(values, aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
      ink = "white" if value < middle else "black"
      axis.text(column, row, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8)
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_title(title, fontsize=11)
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, shrink=0.8)
  return _png(figure)


def _figure(count: int, height: float = 3.8):
  """Returns a figure and `count` panels; height in inches."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: takes a second to import
  from matplotlib.figure import Figure

  columns = min(count, _COLUMNS)
  rows = -(-count // columns)
  figure = Figure(figsize=(4.5 * columns, height * rows), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False).flatten()
  for axis in axes[count:]:
    axis.remove()
  return figure, axes[:count]


def _png(figure) -> bytes:
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", metadata={"Software": None})
  return buffer.getvalue()
