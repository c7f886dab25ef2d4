"""Grids and strips of labelled images and texts, and pictures joined (Pillow)."""

from collections.abc import Collection, Mapping, Sequence
import io
import math
import textwrap
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 96  # pixels; smaller images are enlarged by an integer factor
_INK = (32, 32, 32)
_FRAME = (150, 150, 150)
_MAX_LABEL = 200  # characters per line of a text
_STRIP_COLUMNS = 8
_TITLE = 30  # pixels; height of the title above a picture


def to_png(image: Image.Image | np.ndarray) -> bytes:
  """Encodes a picture as PNG; an array is uint8 [h, w, 3]."""
  buffer = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, "PNG")
  return buffer.getvalue()


def column_label(column: str, last: bool) -> str:
  """Returns the header of a report's column; the last of the token counts is followed by "tokens"."""
  if not column.isdigit():
    return {"vae": "reconstruction"}.get(column, column)
  return column if not last else f"{column} token{'s' * (column != '1')}"


def cell_box(row: int, column: int, height: int, width: int, apart: bool = True) -> tuple[int, int, int, int]:
  """Returns (left, top, right, bottom) of a cell in the grid of images [height, width]; see grid."""
  scale = _scale(height, width)
  height, width = height * scale, width * scale
  gap = _gap(width)
  left = 2 * gap + column * (width + gap) + (gap if column and apart else 0)
  top = gap + _header(width) + row * (height + gap)
  return left, top, left + width, top + height


def grid(
  columns: Sequence[np.ndarray | Sequence[str]],
  labels: Sequence[str],
  framed: Collection[tuple[int, int]] = (),
  apart: bool = True,
) -> Image.Image:
  """Draws columns of images, one image per row, below their labels on white.

  Args:
    columns: uint8 [n, h, w, 3], all of one size; or n texts, wrapped to fit a cell. If a text does not fit, its first
      paragraph is cut with an ellipsis.
    labels: of the columns.
    framed: (row, column) of the cells with a grey frame.
    apart: whether there is more space after column 0, which has originals or texts.
  """
  n, height, width, _ = next(column.shape for column in columns if isinstance(column, np.ndarray))
  scale = _scale(height, width)
  _, _, right, bottom = cell_box(n - 1, len(columns) - 1, height, width, apart)
  gap = _gap(width * scale)
  picture = Image.new("RGB", (right + 2 * gap, bottom + 2 * gap), "white")
  draw = ImageDraw.Draw(picture)
  for column, (cells, label) in enumerate(zip(columns, labels, strict=True)):
    left, top, right, _ = cell_box(0, column, height, width, apart)
    font = _font(label, width * scale)
    draw.text(((left + right) / 2, top - gap), label, fill=_INK, font=font, anchor="md")
    text_font = _text_font("" if isinstance(cells, np.ndarray) else "".join(cells), width * scale)
    for row, content in enumerate(cells):
      box = cell_box(row, column, height, width, apart)
      if isinstance(content, str):
        _write(draw, content, box, text_font)
        continue
      cell = Image.fromarray(content).resize((width * scale, height * scale), Image.Resampling.NEAREST)
      if (row, column) in framed:
        left, top, right, bottom = box
        draw.rectangle((left - gap // 2, top - gap // 2, right + gap // 2 - 1, bottom + gap // 2 - 1), _FRAME)
      picture.paste(cell, box[:2])
  return picture


def strip(images: np.ndarray, labels: Sequence[str], columns: int = _STRIP_COLUMNS) -> Image.Image:
  """Draws images uint8 [n, h, w, 3] below their labels, from left to right in lines of `columns`."""
  lines = []
  for start in range(0, len(images), columns):
    part = slice(start, start + columns)
    lines.append(grid([image[None] for image in images[part]], labels[part], apart=False))
  picture = Image.new("RGB", (lines[0].width, sum(line.height for line in lines)), "white")
  for i, line in enumerate(lines):
    picture.paste(line, (0, i * line.height))
  return picture


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
  """Joins pictures from left to right on white."""
  whole = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
  left = 0
  for picture in pictures:
    whole.paste(picture, (left, 0))
    left += picture.width
  return whole


def below(pictures: Mapping[str, Image.Image]) -> Image.Image:
  """Joins pictures {title: picture} from top to bottom on white, each below its title."""
  height = sum(p.height + _TITLE for p in pictures.values())
  whole = Image.new("RGB", (max(p.width for p in pictures.values()), height), "white")
  draw, top = ImageDraw.Draw(whole), 0
  for title, picture in pictures.items():
    draw.text((12, top + _TITLE // 2), title, fill=(32, 32, 32), font=ImageFont.load_default(16), anchor="lm")
    whole.paste(picture, (0, top + _TITLE))
    top += picture.height + _TITLE
  return whole


def _scale(height: int, width: int) -> int:
  return max(1, math.ceil(MIN_CELL / min(height, width)))


def _gap(cell: int) -> int:
  return max(6, cell // 20)


def _header(cell: int) -> int:
  return max(26, cell // 5)


def _font(label: str, cell: int) -> ImageFont.FreeTypeFont:
  """Returns the built-in font at the size of the header, smaller if the label would be wider than its cell."""
  size = max(14, cell // 9)
  font = _default_font(size)
  if font.getlength(label) > cell:
    font = _default_font(max(8, int(size * cell / font.getlength(label))))
  return font


def _default_font(size: int) -> ImageFont.FreeTypeFont:
  return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # of this type if a size is given


def _write(draw: ImageDraw.ImageDraw, text: str, box: tuple[int, int, int, int], font: ImageFont.FreeTypeFont):
  """Draws a text into a cell, left-aligned and vertically centred."""
  left, top, right, bottom = box
  spacing = int(font.size) // 4
  first, *rest = text.split("\n")
  rest = [line for paragraph in rest for line in _wrap(paragraph, font, right - left)]
  max_lines = (bottom - top) // (sum(font.getmetrics()) + spacing) - len(rest)
  lines = [*_wrap(first, font, right - left, max(1, max_lines)), *rest]
  draw.multiline_text((left, (top + bottom) / 2), "\n".join(lines), fill=_INK, font=font, anchor="lm", spacing=spacing)


def _text_font(text: str, cell: int) -> ImageFont.FreeTypeFont:
  """Returns the built-in font, or for other than ASCII that of matplotlib, which has more letters."""
  size = max(14, cell // 14)
  if text.isascii():
    return _default_font(size)
  import matplotlib  # late: takes a second to import

  return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int | None = None) -> list[str]:
  """Breaks a text into at most `max_lines` lines of at most `width` pixels; an ellipsis replaces the rest."""
  for characters in range(min(len(text), _MAX_LABEL), 0, -1):
    lines = textwrap.wrap(text, characters, max_lines=max_lines, placeholder="…")
    if all(font.getlength(line) <= width for line in lines):
      return lines
  return ["…"]
