"""The page report.html of a run: curves, pictures by step, figures of the last evaluation, config, in one file."""

from collections.abc import Callable, Mapping, Sequence
import datetime
import html
import io
import json
import math
import os
from pathlib import Path
import time
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from flextok_jax.core import files, pages

_EVERY = 30.0  # seconds between two pages, if there is no evaluation
_KEPT, _DRAWN = 20_000, 400  # points of a curve at most
_PANELS = 40
_STEPS = 8  # evaluations whose pictures are shown: the first and the newest
_WIDTH, _BYTES = 1600, 200_000  # of a picture; larger ones are reduced, and saved as JPEG
_GRID = "grid_"  # pictures with this prefix are shown by step, others of the last evaluation only
_FIRST = {  # titles of the first curves
  "loss": "Loss",
  "grad_norm": "Gradient norm",
  "learning_rate": "Learning rate",
  "images_per_second": "Images per second",
}
_NOT_DRAWN = ("eta_seconds", "unreadable")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; background: #f6f7f9 } h1 { margin-bottom: 0 } h2 { margin-top: 1.6em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 14px }
.card { background: white; border: 1px solid #e3e5e8; border-radius: 8px; padding: 10px 14px; overflow-x: auto }
.card b { font-weight: 600 } .card .now { float: right; color: #555 } .small, svg text { color: #666; font-size: 13px }
.tiles { display: flex; flex-wrap: wrap; gap: 14px } .tiles .card { min-width: 110px } .value { display: block;
font-size: 20px } .bar { background: #e3e5e8; border-radius: 4px; height: 8px; margin: 12px 0 16px } .bar div {
background: #2563eb; border-radius: 4px; height: 8px } svg { width: 100%; display: block } svg text { fill: #666;
font-size: 11px } .key { display: inline-block; margin-right: 10px } pre { font-size: 12px; margin: 0 }
"""


class RunReport:
  """Keeps the page of a run up to date: at each evaluation, and at other steps at most every 30 seconds.

  It starts from what the workdir holds already, so a resumed run shows its whole history, each step once. That the page
  cannot be written is a warning, and does not stop the run.

  Args:
    path: of the page.
    metrics: the run's metrics.jsonl.
    folder: its workdir, maybe in a bucket, where eval/STEP has the pictures of earlier evaluations.
    config: of the run.
    clock: monotonic, in seconds.
  """

  def __init__(
    self, path: Path, metrics: Path, folder: epath.Path, config: ConfigDict, clock: Callable[[], float] = time.monotonic
  ):
    self._path, self._config, self._clock, self._name = path, config, clock, run_name(folder)
    self._written = -math.inf
    self._curves: dict[str, dict[int, float]] = {}
    self._last: dict[str, float] = {}  # scalars of the newest step
    self._evaluated: tuple[int, dict[str, float]] = (0, {})  # of the newest evaluation
    self._pictures: dict[int, dict[str, str]] = {}  # step -> name -> <img>
    with open(metrics, "rb") as lines:
      for line in lines:
        try:
          scalars = json.loads(line)
          self._add(int(scalars.pop("step")), scalars)
        except (ValueError, AttributeError, KeyError, TypeError):
          continue  # not one of our lines
    for step in _shown([int(f.name) for f in _children(folder / "eval") if f.name.isdecimal()]):
      found = {path.stem: path.read_bytes() for path in _children(folder / "eval" / f"{step:08d}", ".png")}
      self._pictures[step] = _encode(found)

  def write(self, step: int, scalars: Mapping[str, float], pictures: Sequence[Path]) -> None:
    """Adds the scalars and pictures of a step."""
    self._add(step, scalars)
    if pictures:
      found = {step: _encode({path.stem: path.read_bytes() for path in pictures})}
      kept = self._pictures | found
      self._pictures = {step: kept[step] for step in _shown(kept)}
    if pictures or self._clock() - self._written >= _EVERY:
      self._publish(running=True)

  def close(self) -> None:
    """Writes the last page, which no longer refreshes itself."""
    if self._curves:
      self._publish(running=False)

  def _add(self, step: int, scalars: Mapping[str, float]):
    if any(name.startswith("eval/") for name in scalars):
      self._evaluated = step, dict(scalars)
    else:
      self._last = {"step": step, **scalars}
    for name, value in scalars.items():
      curve = self._curves.setdefault(name, {})
      curve[step] = float(value)
      if len(curve) > _KEPT:
        self._curves[name] = dict(sorted(curve.items())[::2])

  def _publish(self, running: bool):
    self._written = self._clock()
    try:
      files.write_file(self._path, self._page(running))
    except ValueError as e:
      logging.warning("%s", e)

  def _page(self, running: bool) -> bytes:
    step, total = int(self._last.get("step", self._evaluated[0])), self._config.train.num_steps
    state = "running" if running else "finished" if step >= total else "stopped"
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    body = [
      f"<h1>{html.escape(self._name)}</h1>",
      f'<div class="small">stage {html.escape(self._config.stage)}, {state}, {now}</div>',
      f'<div class="bar"><div style="width: {min(100, 100 * step / total):.1f}%"></div></div>',
      self._tiles(step, total, running),
      "<h2>Training</h2>",
      f'<div class="grid">{"".join(_panel(*panel) for panel in _training_panels(self._curves)[:_PANELS])}</div>',
    ]
    at, scalars = self._evaluated
    if scalars:
      panels = "".join(_panel(*panel) for panel in _evaluation_panels(self._curves)[:_PANELS])
      body += ["<h2>Evaluations by step</h2>", f'<div class="grid">{panels}</div>']
      body += [f"<h2>Last evaluation, step {at:,}</h2>", f'<div class="card">{_table(scalars)}</div>']
    newest = max(self._pictures, default=0)
    for name, picture in self._pictures.get(newest, {}).items():
      if not name.startswith(_GRID):
        body.append(f'<p class="card">{picture}</p>')
    shown = [
      f'<div class="card"><b>step {at:,}</b> {html.escape(name.removeprefix(_GRID))}<br>{image}</div>'
      for name in sorted({name for pictures in self._pictures.values() for name in pictures if name.startswith(_GRID)})
      for at, pictures in sorted(self._pictures.items(), reverse=True)
      if (image := pictures.get(name))
    ]
    body += ["<h2>Pictures by step</h2>", f'<div class="tiles">{"".join(shown)}</div>'] if shown else []
    config = html.escape(self._config.to_json(indent=1))
    body.append(f'<h2>Config</h2><details class="card"><summary>all fields</summary><pre>{config}</pre></details>')
    return pages.page(f"{self._name}: step {step:,}", body, _STYLE, int(_EVERY) if running else 0)

  def _tiles(self, step: int, total: int, running: bool) -> str:
    last = self._last
    tiles = {"step": f"{step:,} of {total:,}"}
    tiles |= {name.replace("_", " "): f"{last[name]:.4g}" for name in ("loss", "images_per_second") if name in last}
    if running and "eta_seconds" in last:
      tiles["time left"] = str(datetime.timedelta(seconds=int(last["eta_seconds"])))
    if "mfu" in last:
      tiles["MFU"] = f"{last['mfu']:.1%}"
    shares = {name.removeprefix("time/"): share for name, share in last.items() if name.startswith("time/")}
    if shares:
      tiles["time"] = ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.01)
    cards = (f'<div class="card"><b class="value">{html.escape(text)}</b>{name}</div>' for name, text in tiles.items())
    return f'<div class="tiles">{"".join(cards)}</div>'


def run_name(folder: str | os.PathLike) -> str:
  """Returns the name of a run: that of its workdir, which may be in a bucket."""
  return os.path.basename(os.path.abspath(folder))


def _children(folder: epath.Path, suffix: str = "") -> list[epath.Path]:
  return sorted(path for path in folder.iterdir() if path.name.endswith(suffix)) if folder.is_dir() else []


def _shown(steps: Any) -> list[int]:
  first, *rest = sorted(steps) or [None]
  return [] if first is None else [first, *rest[1 - _STEPS :]]


def _encode(found: Mapping[str, bytes]) -> dict[str, str]:
  """Returns an <img> for each PNG file, of bounded size; a damaged one is left out."""
  pictures = {}
  for name, data in sorted(found.items()):
    try:
      if len(data) <= _BYTES:
        pictures[name] = pages.picture(name, data)
        continue
      image, buffer = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
      image.thumbnail((_WIDTH, image.height))
      image.save(buffer, "JPEG", quality=85)
      pictures[name] = pages.picture(name, buffer.getvalue(), "jpeg")
    except OSError:
      logging.warning("the picture %s cannot be read and is left out of report.html", name)
  return pictures


# Curves.

Lines = dict[str, dict[int, float]]  # label -> step -> value


def _split(name: str) -> tuple[str, str]:
  """Splits "eval/photos/psnr_16" into ("photos/psnr", "16"); the label is "" if there is none."""
  name = name.removeprefix("eval/")
  stem, _, label = name.rpartition("_")
  return (stem, label) if stem and (label.isdecimal() or label in ("vae", "original")) else (name, "")


def _training_panels(curves: Lines) -> list[tuple[str, Lines]]:
  panels = {title: {"": curves[name]} for name, title in _FIRST.items() if name in curves}
  kept = [name.removeprefix("loss_") for name in curves if name.startswith("loss_")]
  if kept:
    kept.sort(key=lambda label: (not label[1:].isdecimal(), len(label), label))
    panels["Loss by group"] = {label: curves[f"loss_{label}"] for label in kept}
  left_out = ("eval/", "time/", "loss_", *_FIRST, *_NOT_DRAWN)
  return [*panels.items(), *((name, {"": curves[name]}) for name in curves if not name.startswith(left_out))]


def _evaluation_panels(curves: Lines) -> list[tuple[str, Lines]]:
  groups: dict[str, Lines] = {}
  for name, curve in curves.items():
    if name.startswith("eval/"):
      stem, label = _split(name)
      groups.setdefault(stem, {})[label] = curve
  return list(groups.items())


def _table(scalars: Mapping[str, float]) -> str:
  """Returns a table of an evaluation: a row per token count, a column per set and metric."""
  cells = {_split(name): value for name, value in scalars.items()}
  columns, rows = (list(dict.fromkeys(keys)) for keys in zip(*cells))
  header = "".join(f"<th>{html.escape(column)}</th>" for column in ("tokens", *columns))
  lines = [f"<tr>{header}</tr>"]
  for row in rows:
    values = (f"{cells[column, row]:.4g}" if (column, row) in cells else "" for column in columns)
    lines.append(f"<tr><td>{html.escape(row) or 'all'}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>")
  return f"<table>{''.join(lines)}</table>"


_W, _H, _LEFT, _BOTTOM = 400, 190, 46, 18  # of a chart, in its own units


def _panel(title: str, lines: Lines) -> str:
  """Returns a card with a chart (SVG) of lines over the step; values over a factor of 30 are on a logarithmic axis."""
  values = [value for curve in lines.values() for value in curve.values() if math.isfinite(value)]
  steps = [step for curve in lines.values() for step in curve]
  if not values:
    return ""
  low, high = min(values), max(values)
  logarithmic = 0 < 30 * low < high and title != _FIRST["learning_rate"]
  scale = math.log10 if logarithmic else float
  y_ticks, x_ticks = _ticks(scale(low), scale(high)), _ticks(min(steps), max(steps))
  bottom, top = min(scale(low), y_ticks[0]), max(scale(high), y_ticks[-1])
  left, right = min(steps), max(steps)
  x = lambda step: _LEFT + (_W - _LEFT - 20) * ((step - left) / (right - left) if right > left else 0.5)
  y = lambda value: 8 + (_H - _BOTTOM - 8) * (1 - ((value - bottom) / (top - bottom) if top > bottom else 0.5))
  parts = []
  for tick in y_ticks:
    text = f"{float(f'{10**tick:.2g}'):g}" if logarithmic else f"{tick:.6g}"
    parts.append(f'<path d="M{_LEFT} {y(tick):.1f}H{_W}" stroke="#eceef1"/>')
    parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{text}</text>')
  for tick in x_ticks:
    text = f"{tick / 1000:g}k" if abs(tick) >= 10_000 else f"{tick:g}"
    parts.append(f'<text x="{x(tick):.1f}" y="{_H - 3}" text-anchor="middle">{text}</text>')
  keys = []
  for i, (label, curve) in enumerate(lines.items()):
    color = f"hsl({250 - 215 * i / (len(lines) - 1):.0f} 70% 45%)" if len(lines) > 1 else "#2563eb"
    points = [(x(step), y(scale(value))) for step, value in sorted(curve.items()) if math.isfinite(value)]
    points = points[: -1 : len(points) // _DRAWN + 1] + points[-1:]
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"/>')
    if len(points) <= 20:
      parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="{color}"/>' for a, b in points]
    keys.append(f'<span class="key" style="color: {color}">{html.escape(label)}</span>')
  now = f'<span class="now">{next(iter(lines.values()))[max(next(iter(lines.values())))]:.4g}</span>'
  legend = f'<div class="small">{"".join(keys)}</div>' if len(lines) > 1 else ""
  svg = f'<svg viewBox="0 0 {_W} {_H}">{"".join(parts)}</svg>'
  return f'<div class="card">{now if len(lines) == 1 else ""}<b>{html.escape(title)}</b>{svg}{legend}</div>'


def _ticks(low: float, high: float) -> list[float]:
  """Returns about five round numbers from low to high."""
  if high <= low:
    return [low]
  raw = (high - low) / 6
  size = 10 ** math.floor(math.log10(raw))
  step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
  return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
