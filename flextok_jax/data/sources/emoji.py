"""Emoji as an image source: the colour glyphs of the Noto Color Emoji font, or a folder of glyphs in several styles.

The CBDT table of the font holds one PNG of 136x128 px per glyph. The character map and the ligatures (GSUB) map glyphs
to code points, whose Unicode names make the caption. A folder has FOLDER/STYLE/CODES.png, RGBA pictures with their
code points in hexadecimal, such as `3d/1f44b-1f3fd.png`, and the caption ends with the style. FOLDER/words.tsv, if
present, has lines of code points as in these names, the name and keywords, separated by tabs; a third of the training
captions have a keyword in place of the name.

The split into train and validation is by base (code_points.py). Glyphs are transparent: each draw composites one onto
a random background.
"""

import functools
import io
import itertools
import os
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from flextok_jax.core import extras, files
from flextok_jax.data.sources import code_points
from flextok_jax.data.sources.base import ENDLESS, Record, generator

FONT_PATHS = (
  "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
  "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
  "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
  "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",  # Alpine
)
CANVAS = 128  # height and width of a drawn record, pixels
CASTS = 2  # fixed draws per held-out base
WORDS = "words.tsv"  # of a folder
KEYWORD_SHARE = 1 / 3  # of the training captions

_CODES = r"[0-9a-f]{1,6}(-[0-9a-f]{1,6}){0,15}"


def find_font(path: str) -> str:
  """Returns path, of a font or a folder, or the path of the system's NotoColorEmoji.ttf if path is empty."""
  for candidate in (path,) if path else FONT_PATHS:
    if os.path.isfile(candidate) or (path and os.path.isdir(path)):
      return candidate
  missing = f"the emoji font {path} does not exist" if path else "NotoColorEmoji.ttf was not found on this system"
  raise FileNotFoundError(
    f"{missing}: install Debian's fonts-noto-color-emoji, or set data.sources.emoji.path to the font file"
  )


def check_present():
  """Raises FileNotFoundError or MissingPackageError if this machine lacks the font, or the package that reads it."""
  find_font("")
  extras.require("fontTools.ttLib", "toy", "the source emoji")


class Glyph(NamedTuple):
  """A picture: code points, the bytes of a PNG, and its style, "" in a font."""

  codes: tuple[int, ...]
  png: bytes
  style: str = ""

  def picture(self) -> Image.Image:
    """Returns the picture, RGBA."""
    return Image.open(io.BytesIO(self.png), formats=("PNG",)).convert("RGBA")


def read_folder(path: str) -> list[Glyph]:
  """Returns the glyphs of a folder, sorted by style and name.

  Raises:
    ValueError: a file's name is not made of code points, or there is no glyph.
  """
  found = []
  for file in sorted(Path(path).glob("*/*.png")):
    if not re.fullmatch(_CODES, file.stem):
      raise ValueError(f"{file} must be named by code points in hexadecimal, such as 1f44b-1f3fd.png")
    found.append(Glyph(tuple(int(code, 16) for code in file.stem.split("-")), file.read_bytes(), file.parent.name))
  if not found:
    raise ValueError(f"{path} has no glyph: files such as {path}/3d/1f44b.png")
  return found


def read_words(path: str) -> dict[tuple[int, ...], list[str]]:
  """Returns {code points without variation selectors: [name, keyword, ...]} of WORDS; {} without such a file.

  Raises:
    ValueError: a line is not of this form.
  """
  file = Path(path) / WORDS
  if not file.exists():
    return {}
  words = {}
  for number, line in enumerate(files.lines(files.read_text(file)), 1):
    codes, *names = line.split("\t")
    if not re.fullmatch(_CODES, codes) or not all(names) or not names:
      raise ValueError(f"{file}, line {number}: code points in hexadecimal, a name and keywords expected, between tabs")
    words[code_points.without_variation(int(code, 16) for code in codes.split("-"))] = names
  return words


def read_glyphs(path: str) -> list[tuple[tuple[int, ...], bytes]]:
  """Returns (code points, PNG bytes) of every bitmap of a CBDT font, in the order of the font."""
  ttlib = extras.require("fontTools.ttLib", "toy", "the source emoji")

  try:
    font = ttlib.TTFont(path, lazy=True)
    tables = set(font.keys())
  except (ttlib.TTLibError, OSError, ValueError) as error:
    raise ValueError(f"{path} is not a font file: {error}") from error
  if not {"CBDT", "CBLC", "cmap", "GSUB"} <= tables:
    raise ValueError(
      f"{path} has no colour bitmaps (tables CBDT, CBLC, cmap and GSUB): use the CBDT build of Noto Color Emoji"
    )
  codes = {glyph: (code,) for code, glyph in sorted(font.getBestCmap().items(), reverse=True)}
  # Flags and keycaps also have old private code points; their sequences are more specific.
  private = {glyph for glyph, (code,) in codes.items() if code >= 0xF0000}
  ligatures = []
  for lookup in font["GSUB"].table.LookupList.Lookup:
    for table in lookup.SubTable:
      table = getattr(table, "ExtSubTable", table)
      if table.LookupType == 4:
        ligatures += [
          ((first, *ligature.Component), ligature.LigGlyph)
          for first, group in table.ligatures.items()
          for ligature in group
        ]
  grew = True
  while grew:  # a ligature may contain another
    grew = False
    for parts, glyph in ligatures:
      if (glyph not in codes or glyph in private) and all(p in codes for p in parts):
        codes[glyph] = tuple(c for p in parts for c in codes[p])
        private.discard(glyph)
        grew = True
  strike = font["CBDT"].strikeData[0]
  return [(codes[g], bytes(b.imageData)) for g, b in strike.items() if g in codes and getattr(b, "imageData", None)]


class Emoji:
  """Glyphs on backgrounds, records of CANVAS x CANVAS pixels.

  train: endless; index i draws a base (weighted by the square root of its number of glyphs), one of its glyphs, a
  background, a size and a position. validation: CASTS fixed draws per held-out base. The split is the same in every
  style.

  Args:
    split: "train" or "validation".
    path: the font file, or a folder of glyphs; "": see find_font.
    centered: share of the draws that are centred. light: backgrounds. See place.

  Attributes:
    bases: the glyphs of every base of this split.
  """

  framed = True  # placed and scaled here: the pipeline resizes without cropping
  flip = False  # letters, arrows and flags have a left and a right
  class_names = code_points.CLASS_NAMES

  def __init__(self, split: str, path: str = "", centered: float = 0.0, light: bool = False):
    self._split, self._centered, self._light = split, centered, light
    path = find_font(path)
    self._words = read_words(path)
    bases: dict[tuple[int, ...], list[Glyph]] = {}
    for glyph in read_folder(path) if os.path.isdir(path) else itertools.starmap(Glyph, read_glyphs(path)):
      if code_points.is_validation(glyph.codes) == (split == "validation"):
        bases.setdefault(code_points.base_key(glyph.codes), []).append(glyph)
    if not bases:
      raise ValueError(f"{path} has no bitmap of a known code point for the {split} split")
    self.bases = list(bases.values())
    share = np.sqrt([len(b) for b in self.bases])
    self._cumulative = np.cumsum(share) / share.sum()

  def __len__(self) -> int:
    return ENDLESS if self._split == "train" else CASTS * len(self.bases)

  def __getitem__(self, index: int) -> Record:
    rng = generator(self._split, index)
    draw, pick = rng.random(2)
    if self._split == "train":
      base = self.bases[min(int(np.searchsorted(self._cumulative, draw)), len(self.bases) - 1)]
    else:
      base = self.bases[index % len(self.bases)]
    glyph = base[int(pick * len(base))]
    centered = bool(self._centered and rng.random() < self._centered)
    image = place(glyph.picture(), rng, centered, self._light)
    words = self._words.get(code_points.without_variation(glyph.codes), ())
    keyword = self._split == "train" and len(words) > 1 and rng.random() < KEYWORD_SHARE
    caption = self.caption_of(glyph, words[int(rng.integers(1, len(words)))] if keyword else "")
    return {"image": image, "label": code_points.group_of(glyph.codes), "caption": caption, "num_objects": -1}

  def caption_of(self, glyph: Glyph, name: str = "") -> str:
    """Returns a name, by default that of the glyph, and the style."""
    return (name or self._name_of(glyph.codes)) + (f", {glyph.style}" if glyph.style else "")

  def _name_of(self, codes: tuple[int, ...]) -> str:
    """Returns the name in WORDS, with skin tones that it leaves out, else code_points.caption_of."""
    if words := self._words.get(code_points.without_variation(codes)):
      return words[0]
    tones = [code_points.TONES[code] for code in codes if code in code_points.TONES]
    words = self._words.get(code_points.without_variation(code for code in codes if code not in code_points.TONES))
    if words and tones:
      return f"{words[0]}: {', '.join(tones)} skin tone"
    return code_points.caption_of(codes)


@functools.lru_cache(maxsize=4)
def _ramps(size: int) -> tuple[np.ndarray, np.ndarray]:
  line = np.linspace(-1.0, 1.0, size, dtype=np.float32)
  return line[:, None, None], line[None, :, None]


def place(glyph: Image.Image, rng: np.random.Generator, centered: bool = False, light: bool = False) -> np.ndarray:
  """Returns an RGBA glyph, scaled by 0.6 to 1, at a random position on a plain or gradient background.

  If `centered`, it is in the middle, scaled by 0.85, on white; if `light`, the background is a random light colour. The
  result is uint8 [CANVAS, CANVAS, 3].
  """
  if light:
    background = Image.new("RGB", (CANVAS, CANVAS), tuple((255 - rng.integers(0, 80, 3)).tolist()))
  elif centered:
    background = Image.new("RGB", (CANVAS, CANVAS), "white")
  else:
    background = _background(rng)
  if centered:
    return _paste(glyph, background, 0.85, np.array((0.5, 0.5)))
  return _paste(glyph, background, rng.uniform(0.6, 1.0), rng.uniform(0.0, 1.0, 2))


def _background(rng: np.random.Generator) -> Image.Image:
  """Returns a background [CANVAS, CANVAS] of one colour, or of two and what is between them."""
  first = rng.uniform(0.0, 255.0, 3).astype(np.float32)
  if rng.random() < 0.35:  # towards white, gray or black: most pages are not saturated
    first += (rng.choice((255.0, 128.0, 20.0)) - first) * np.float32(rng.uniform(0.6, 1.0))
  second = np.clip(first + rng.normal(0.0, 70.0, 3), 0.0, 255.0).astype(np.float32)
  kind = rng.random()
  angle, cx, cy = rng.uniform((0.0, -0.5, -0.5), (2.0 * np.pi, 0.5, 0.5))
  y, x = _ramps(CANVAS)
  if kind < 0.45:
    canvas = np.broadcast_to(first, (CANVAS, CANVAS, 3)).copy()
  elif kind < 0.8:
    ramp = 0.5 + 0.5 * (np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y)
    canvas = first + (second - first) * np.clip(ramp, 0.0, 1.0)
  else:
    radius = np.sqrt((x - np.float32(cx)) ** 2 + (y - np.float32(cy)) ** 2)
    canvas = first + (second - first) * np.clip(radius * np.float32(0.7), 0.0, 1.0)
  return Image.fromarray((canvas + np.float32(0.5)).clip(0.0, 255.0).astype(np.uint8))


def _paste(glyph: Image.Image, background: Image.Image, scale: float, position: np.ndarray) -> np.ndarray:
  """Returns a background [CANVAS, CANVAS] with a glyph; position: shares of the spare width and height before it."""
  scale *= CANVAS / max(glyph.size)
  glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.BILINEAR)
  spare = np.array((CANVAS - glyph.width, CANVAS - glyph.height))
  left, top = (spare * position).round().astype(int)
  background.paste(glyph, (int(left), int(top)), glyph)
  return np.asarray(background)
