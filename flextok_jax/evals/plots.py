"""Pictures of an evaluation: the curve of quality over tokens (matplotlib) and the reconstruction grid (Pillow)."""

from collections.abc import Mapping, Sequence
import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 96  # pixels; smaller images are enlarged by a whole factor
_INK = (32, 32, 32)


def to_png(image: Image.Image | np.ndarray) -> bytes:
  """Encodes a picture, Pillow or uint8 [h, w, 3]."""
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
  return buffer.getvalue()


def column_label(column: str, last: bool) -> str:
  """Returns a grid header: counts are bare numbers, and the last one says what is counted."""
  if not column.isdigit():
    return {"vae": "reconstruction"}.get(column, column)
  return column if not last else f"{column} token{'s' * (column != '1')}"


def cell_box(row: int, column: int, height: int, width: int) -> tuple[int, int, int, int]:
  """Returns (left, top, right, bottom) in the grid of the cell of images [height, width]; column 0 is the original."""
  scale = _scale(height, width)
  height, width = height * scale, width * scale
  gap = _gap(width)
  left = 2 * gap + column * (width + gap) + (gap if column else 0)  # the original stands a little apart
  top = gap + _header(width) + row * (height + gap)
  return left, top, left + width, top + height


def grid(columns: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
  """Lays out columns of uint8 [n, h, w, 3] pictures, a row an image, under their labels on white."""
  n, height, width, _ = columns[0].shape
  scale = _scale(height, width)
  _, _, right, bottom = cell_box(n - 1, len(columns) - 1, height, width)
  gap = _gap(width * scale)
  picture = Image.new("RGB", (right + 2 * gap, bottom + 2 * gap), "white")
  draw = ImageDraw.Draw(picture)
  for column, (images, label) in enumerate(zip(columns, labels, strict=True)):
    left, top, right, _ = cell_box(0, column, height, width)
    font = _font(label, width * scale)
    draw.text(((left + right) / 2, top - gap), label, fill=_INK, font=font, anchor="md")
    for row, image in enumerate(images):
      cell = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.NEAREST)
      picture.paste(cell, cell_box(row, column, height, width)[:2])
  return picture


def curve_png(sets: Mapping[str, Mapping[str, Any]]) -> bytes:
  """Draws mean PSNR and SSIM over the number of tokens (log scale), a line a set; sets as in Report.scores."""
  # Late: matplotlib takes a second to import, and tokenize and detokenize draw no curve.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(1, 2)
  for panel, metric, label in zip(panels, ("psnr", "ssim"), ("PSNR (dB)", "SSIM")):
    for name, scored in sets.items():
      counts = [int(count) for count in scored["by_tokens"]]
      values = [row[metric] for row in scored["by_tokens"].values()]
      panel.plot(counts, values, marker="o", markersize=4.5, linewidth=1.8, label=name)
    ticks = sorted({int(count) for scored in sets.values() for count in scored["by_tokens"]})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("tokens")
    panel.set_title(label, fontsize=11)
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
  panels[0].legend(frameon=False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", metadata={"Software": None})
  return buffer.getvalue()


def _scale(height: int, width: int) -> int:
  return max(1, math.ceil(MIN_CELL / min(height, width)))


def _gap(cell: int) -> int:
  return max(6, cell // 20)


def _header(cell: int) -> int:
  return max(26, cell // 5)


def _font(label: str, cell: int) -> ImageFont.FreeTypeFont:
  """Returns the built-in font at the size of the header, smaller where the label would be wider than its cell."""
  size = max(14, cell // 9)
  font = ImageFont.load_default(size)
  if font.getlength(label) > cell:
    font = ImageFont.load_default(max(8, int(size * cell / font.getlength(label))))
  return font
