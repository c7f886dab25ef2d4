"""Pictures of studies: panels of curves, tables in colours, and picture grids joined."""

from collections.abc import Mapping, Sequence
import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flextok_jax.evals.metrics import samples as sample_metrics

_COLUMNS = 3  # panels side by side at most
_TITLE = 30  # pixels
_MAX_TICKS = 10  # of a linear axis; with more points it has its own


class Line(NamedTuple):
  """A curve: x, and y or (y, low, high) with an interval, of each point; and the number of its colour."""

  x: Sequence[float]
  y: Sequence[float | Sequence[float]]
  color: int | None = None  # by default its place in the panel
  dashed: bool = False


def estimate(values: np.ndarray) -> list[float]:
  """Returns the mean of values [n] and the ends of its 95% interval; of a single value the mean alone."""
  mean = float(np.mean(values, dtype=np.float64))
  return [mean, *sample_metrics.bootstrap_interval(values)] if len(values) > 1 else [mean]


def curves(
  panels: Mapping[str, Mapping[str, Line]],
  xlabel: str,
  ticks: Sequence[int],
  others: Mapping[str, Mapping[str, Mapping[str, Line]]] = {},  # noqa: B006 never changed
) -> bytes:
  """Draws panels {title: {label: line}} over one log2 axis with these ticks; returns a PNG.

  Args:
    others: {name of a linear axis: panels over it}, which follow.
  """
  figure, axes = _figure(len(panels) + sum(map(len, others.values())))
  axes = iter(axes)
  for title, lines in panels.items():
    axis = next(axes)
    _panel(axis, title, lines, xlabel)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
  for label, more in others.items():
    for title, lines in more.items():
      axis = next(axes)
      _panel(axis, title, lines, label)
      places = sorted({x for line in lines.values() for x in line.x})
      if len(places) <= _MAX_TICKS:
        axis.set_xticks(places)
  return _png(figure)


def _panel(axis, title: str, lines: Mapping[str, Line], xlabel: str):
  """Draws lines with their intervals, and a legend where there are several."""
  for i, (label, line) in enumerate(lines.items()):
    color = f"C{(i if line.color is None else line.color) % 10}"
    style = dict(color=color, label=label, marker="o", markersize=4.5, linewidth=1.8)
    style["linestyle"] = "--" if line.dashed else "-"
    points = [np.atleast_1d(y) for y in line.y]
    axis.plot(line.x, [y[0] for y in points], **style)
    inside = [(x, *y[1:]) for x, y in zip(line.x, points) if len(y) == 3]
    if inside:
      axis.vlines(*zip(*inside), color=color, alpha=0.35, linewidth=5)
  axis.set_xlabel(xlabel)
  axis.set_title(title, fontsize=11)
  axis.grid(color="0.9", linewidth=0.8)
  axis.set_axisbelow(True)
  axis.spines[["top", "right"]].set_visible(False)
  if len(lines) > 1:
    axis.legend(frameon=False, fontsize=8, handlelength=3.5)


def heat_maps(panels: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str]) -> bytes:
  """Draws tables {title: [rows, columns]} of numbers in colours, each over its own range; returns a PNG."""
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


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
  """Joins pictures from left to right on white."""
  whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
  left = 0
  for picture in pictures:
    whole.paste(picture, (left, 0))
    left += picture.width
  return whole


def below(pictures: Mapping[str, Image.Image]) -> Image.Image:
  """Joins pictures from top to bottom on white, each under its title."""
  height = sum(p.height + _TITLE for p in pictures.values())
  whole = Image.new("RGB", (max(p.width for p in pictures.values()), height), "white")
  draw, top = ImageDraw.Draw(whole), 0
  for title, picture in pictures.items():
    draw.text((12, top + _TITLE // 2), title, fill=(32, 32, 32), font=ImageFont.load_default(16), anchor="lm")
    whole.paste(picture, (0, top + _TITLE))
    top += picture.height + _TITLE
  return whole


def _figure(count: int, height: float = 3.8):
  """Returns a figure and `count` panels of a height in inches."""
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
