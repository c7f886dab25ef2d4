"""Emoji as an image source: the colour glyphs of the Noto Color Emoji font, or a folder of glyphs in several styles.

The CBDT table of the font holds one PNG of 136x128 px per glyph. The character map and the ligatures (GSUB) map glyphs
to code points, whose Unicode names make the caption. A folder has FOLDER/STYLE/CODES.png, RGBA pictures with their
code points in hexadecimal, such as `3d/1f44b-1f3fd.png`, and the caption ends with the style. FOLDER/words.tsv, if
present, has lines of code points as in these names, the name and keywords, separated by tabs; a third of the training
captions have a keyword in place of the name.

Glyphs that differ only in skin tone, gender, hair or direction share a base (`base_key`), as do all clock faces, all
keycaps and all letters of flags; the split into train and validation is by base. Glyphs are transparent: each draw
composites one onto a random background.
"""

from collections.abc import Iterable
import functools
import io
import itertools
import os
from pathlib import Path
import re
from typing import NamedTuple
import unicodedata

import numpy as np
from PIL import Image

from flextok_jax.core import extras, files
from flextok_jax.data.sources.base import ENDLESS, Record, generator, held_out

FONT_PATHS = (
  "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
  "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
  "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
  "/usr/share/fonts/noto-emoji/NotoColorEmoji.ttf",  # Alpine
)
CLASS_NAMES = (
  "face",
  "person",
  "hand",
  "animal",
  "plant",
  "food",
  "place",
  "vehicle",
  "activity",
  "object",
  "heart",
  "symbol",
  "flag",
)
VALIDATION_PERCENT = 8  # of the base glyphs
CANVAS = 128  # height and width of a drawn record, pixels
CASTS = 2  # fixed draws per held-out base
WORDS = "words.tsv"  # of a folder
KEYWORD_SHARE = 1 / 3  # of the training captions

_CODES = r"[0-9a-f]{1,6}(-[0-9a-f]{1,6}){0,15}"
_JOINER, _VARIATION, _KEYCAP = 0x200D, 0xFE0F, 0x20E3
_GENDERS = {0x2640: "woman", 0x2642: "man"}
_TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_HAIR = {0x1F9B0: "red hair", 0x1F9B1: "curly hair", 0x1F9B2: "bald", 0x1F9B3: "white hair"}
_BLACK_FLAG, _RIGHTWARDS = 0x1F3F4, 0x27A1
_CLOCKS = range(0x1F550, 0x1F568)  # clock faces differ by a thin hand
# Variations of one figure: man, woman, person; boy, girl, child; and so on.
_SAME_FIGURE = {
  code: figure
  for figure, codes in (
    (0x1F9D1, (0x1F468, 0x1F469, 0x1F471, 0x1F474, 0x1F475, 0x1F9D3, 0x1F9D4)),
    (0x1F9D2, (0x1F466, 0x1F467)),
    (0x1FAC5, (0x1F934, 0x1F478)),
    (0x1F385, (0x1F936,)),
    (0x1F930, (0x1FAC3, 0x1FAC4)),
    (0x1F483, (0x1F57A,)),
    (0x1F46D, (0x1F46B, 0x1F46C)),
  )
  for code in codes
}
_PEOPLE = {0x1F9D1, 0x1F9D2}
# Base code points of sequences that have the same picture as a single code point.
_SAME_PICTURE = {
  (0x1F91D, 0x1F9D1): (0x1F46D,),  # people holding hands
  (0x2764, 0x1F9D1): (0x1F491,),
  (0x2764, 0x1F48B, 0x1F9D1): (0x1F48F,),  # couple with heart, kiss
  (0x1F9D1, 0x1F9D2): (0x1F46A,),  # families
  (0x1FAF1, 0x1FAF2): (0x1F91D,),  # handshake of two tones
  (0x1F384, 0x1F9D1): (0x1F385,),  # Mx Claus
}
# Names that are not in Unicode 14, the version of Python 3.11.
_NEW_NAMES = {
  0x1F6DC: "wireless",
  0x1FA75: "light blue heart",
  0x1FA76: "grey heart",
  0x1FA77: "pink heart",
  0x1FA87: "maracas",
  0x1FA88: "flute",
  0x1FAAD: "folding hand fan",
  0x1FAAE: "hair pick",
  0x1FAAF: "khanda",
  0x1FABB: "hyacinth",
  0x1FABC: "jellyfish",
  0x1FABD: "wing",
  0x1FABF: "goose",
  0x1FACE: "moose",
  0x1FACF: "donkey",
  0x1FADA: "ginger root",
  0x1FADB: "pea pod",
  0x1FAE8: "shaking face",
  0x1FAF7: "leftwards pushing hand",
  0x1FAF8: "rightwards pushing hand",
}
# Code-point ranges (inclusive) of each group, a coarser version of Unicode's own grouping. The first group that
# contains a code point counts; code points in no group are symbols.
_GROUPS = (
  ("heart", "2763-2764 1F493-1F49F 1F5A4 1F90D-1F90E 1F9E1 1FA75-1FA77 1F48C"),
  (
    "hand",
    "261D 270A-270D 1F446-1F450 1F485 1F590 1F595-1F596 1F64C 1F64F 1F90C 1F90F 1F918-1F91F 1F932 1F933 "
    "1FAF0-1FAF8 1F4AA",
  ),
  (
    "animal",
    "1F400-1F43F 1F648-1F64A 1F577-1F578 1F54A 1F980-1F9AE 1F638-1F640 1FAB0-1FAB3 1FAB6 1FAB8 1FABC-1FABF 1FACE-1FACF",
  ),
  (
    "face",
    "2639-263A 1F600-1F644 1F910-1F917 1F920-1F925 1F927-1F92F 1F970-1F976 1F978-1F97A 1F9D0 1FAE0-1FAE5 "
    "1FAE8 1F479-1F480 1F31A-1F31E 1F4A9 2620",
  ),
  (
    "person",
    "26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F440-1F445 1F463-1F478 1F47C 1F481-1F483 1F486-1F487 "
    "1F48F 1F491 1F574-1F575 1F57A 1F5E3 1F645-1F647 1F64B 1F64D-1F64E 1F6A3 1F6B4-1F6B6 1F6C0 1F6CC 1F926 "
    "1F930-1F931 1F934-1F939 1F93C-1F93E 1F977 1F93A 1F9B4-1F9B9 1F9BB 1F9CC-1F9E0 1FAC0-1FAC5 1FAE6 "
    "1F9BE-1F9BF",
  ),
  ("plant", "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F490 1F4AE 1F940 1FAB4 1FAB7 1FABB 1F384 1F38B 1F38D"),
  ("food", "2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F942-1F944 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADB 1F95A"),
  (
    "vehicle",
    "2693 26F4-26F5 26FD 2708 1F3CD-1F3CE 1F680-1F6A2 1F6A4-1F6A8 1F6B2 1F6E5 1F6E9-1F6FC 1F9BC-1F9BD 1FA82 "
    "1F6DE-1F6DF",
  ),
  (
    "place",
    "2600-2604 2614 2668 26A1 26C4-26C8 26E9-26EA 26F0-26F2 26FA 2744 1F300-1F321 1F324-1F32C 1F3A0-1F3A2 "
    "1F3AA 1F3D4-1F3DF 1F3E0-1F3E6 1F3E8-1F3F0 1F488 1F492 1F54B-1F54D 1F5FA-1F5FF 1F6D5-1F6D6 1F6DD "
    "1F6E3-1F6E4 1FA90 1F525 1F4A7 2B50",
  ),
  (
    "activity",
    "265F 2660-2666 26BD-26BE 26F3 26F8 2728 1F004 1F0CF 1F380-1F381 1F383 1F386-1F38A 1F38E-1F391 "
    "1F396-1F397 1F39F 1F3A3 1F3A8 1F3AB 1F3AD-1F3B4 1F3BD-1F3C0 1F3C5-1F3C6 1F3C8-1F3C9 1F3CF-1F3D3 "
    "1F3F8-1F3F9 1F52E 1F579 1F5BC 1F93F 1F945 1F947-1F94F 1F9E7-1F9E9 1F9F8 1F9FF 1FA70 1FA80-1FA81 "
    "1FA83-1FA86 1FAA1-1FAA2 1FAA9 1F6F7 1F9F5-1F9F6",
  ),
  ("flag", "1F1E6-1F1FF 1F38C 1F3C1 1F3F3-1F3F4 1F6A9 FE4E5-FE4EE"),
  (
    "object",
    "231A-231B 2328 23F0-23F3 260E 2692-2699 26B0-26B1 26CF-26D3 2702 2709 270F 2712 1F302 1F392-1F393 "
    "1F399-1F39B 1F39E 1F3A4-1F3A7 1F3A9 1F3AC 1F3B5-1F3BC 1F3EE 1F3F7 1F3FA 1F451-1F462 1F484 1F489-1F48B "
    "1F48D-1F48E 1F4A1-1F4A3 1F4B0-1F4FF 1F507-1F516 1F526-1F52D 1F550-1F573 1F576 1F587-1F58D 1F5A5-1F5B2 "
    "1F5C2-1F5E1 1F5F3 1F6AA-1F6AC 1F6BD 1F6BF 1F6C1 1F6CB 1F6CD-1F6CF 1F6D1-1F6D2 1F6E0-1F6E2 1F941 "
    "1F94A-1F94B 1F97B-1F97F 1F9AF 1F9BA 1F3E7 1F9E2-1F9E6 1F9EA-1F9FE 1FA71-1FA7C 1FA87-1FAAF 1FAB5 "
    "1FAB9-1FABA",
  ),
)


@functools.lru_cache(maxsize=1)
def _group_table() -> dict:
  table: dict[int, int] = {}
  for name, text in _GROUPS:
    for part in text.split():
      low, _, high = part.partition("-")
      for code in range(int(low, 16), int(high or low, 16) + 1):
        table.setdefault(code, CLASS_NAMES.index(name))
  return table


def _is_tag(code: int) -> bool:
  return 0xE0020 <= code <= 0xE007F


def _is_indicator(code: int) -> bool:
  return 0x1F1E6 <= code <= 0x1F1FF


def base_key(codes: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the sorted code points of what is drawn, with neutral figures.

  Joiners, skin tones, gender, hair and direction are dropped.
  """
  if _KEYCAP in codes or all(0x23 <= c <= 0x39 for c in codes):
    return (_KEYCAP,)
  if len(codes) == 1 and _is_indicator(codes[0]):
    return (0x1F1E6,)
  skip = {_JOINER, _VARIATION, _RIGHTWARDS, *_GENDERS, *_TONES, *_HAIR}
  base = tuple(sorted({0x1F550 if c in _CLOCKS else _SAME_FIGURE.get(c, c) for c in codes if c not in skip}))
  return _SAME_PICTURE.get(base, base) or tuple(codes)


def is_validation(codes: tuple[int, ...]) -> bool:
  """Returns whether a glyph is in the validation split: true for about VALIDATION_PERCENT percent of the base keys."""
  return held_out(" ".join(f"{c:X}" for c in base_key(codes)), VALIDATION_PERCENT)


def group_of(codes: tuple[int, ...]) -> int:
  """Returns the class of a glyph, an index into CLASS_NAMES."""
  if _KEYCAP in codes:
    return CLASS_NAMES.index("symbol")
  table = _group_table()
  if any(_SAME_FIGURE.get(c, c) in _PEOPLE for c in codes):
    return CLASS_NAMES.index("person")
  groups = [table[c] for c in codes if c in table and c not in _GENDERS]
  return groups[0] if groups else CLASS_NAMES.index("symbol")


def _name(code: int) -> str:
  return _NEW_NAMES.get(code) or unicodedata.name(chr(code), f"symbol {code:X}").lower()


def caption_of(codes: tuple[int, ...]) -> str:
  """Returns joined Unicode names, variations after a colon: 'waving hand sign: medium skin tone', 'flag: jp'."""
  if all(map(_is_indicator, codes)) and len(codes) == 2:
    return "flag: " + "".join(chr(c - 0x1F1E6 + ord("a")) for c in codes)
  if _BLACK_FLAG in codes and any(map(_is_tag, codes)):
    tags = "".join(chr(c - 0xE0000) for c in codes if 0xE0030 <= c <= 0xE007A)
    return f"flag: {tags[:2]}-{tags[2:]}"
  if _KEYCAP in codes and len(codes) > 1:
    return "keycap: " + " ".join(_name(c) for c in codes if c not in (_KEYCAP, _VARIATION))
  variations = [_GENDERS[c] for c in codes if c in _GENDERS] + [_HAIR[c] for c in codes if c in _HAIR]
  variations += [f"{_TONES[c]} skin tone" for c in codes if c in _TONES]
  variations += ["facing right"] * (_RIGHTWARDS in codes)
  skip = {_JOINER, _VARIATION, _RIGHTWARDS, *_GENDERS, *_HAIR, *_TONES}
  bases = [c for c in codes if c not in skip]
  bases.sort(key=lambda c: _SAME_FIGURE.get(c, c) not in _PEOPLE)  # the person first
  if not bases:
    return ", ".join(_name(c) for c in codes)
  names = ", ".join(_name(c) for c in bases)
  return f"{names}: {', '.join(variations)}" if variations else names


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
    words[without_variation(int(code, 16) for code in codes.split("-"))] = names
  return words


def without_variation(codes: Iterable[int]) -> tuple[int, ...]:
  """Returns the code points without variation selectors."""
  return tuple(code for code in codes if code != _VARIATION)


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
  """

  framed = True  # placed and scaled here: the pipeline resizes without cropping
  flip = False  # letters, arrows and flags have a left and a right
  class_names = CLASS_NAMES

  def __init__(self, split: str, path: str = ""):
    self._split = split
    path = find_font(path)
    self._words = read_words(path)
    bases: dict[tuple[int, ...], list[Glyph]] = {}
    for glyph in read_folder(path) if os.path.isdir(path) else itertools.starmap(Glyph, read_glyphs(path)):
      if is_validation(glyph.codes) == (split == "validation"):
        bases.setdefault(base_key(glyph.codes), []).append(glyph)
    if not bases:
      raise ValueError(f"{path} has no bitmap of a known code point for the {split} split")
    self._bases = list(bases.values())
    share = np.sqrt([len(b) for b in self._bases])
    self._cumulative = np.cumsum(share) / share.sum()

  def __len__(self) -> int:
    return ENDLESS if self._split == "train" else CASTS * len(self._bases)

  def code_points(self) -> list[tuple[int, ...]]:
    """Returns the code points of every glyph of this split."""
    return [glyph.codes for base in self._bases for glyph in base]

  def __getitem__(self, index: int) -> Record:
    rng = generator(self._split, index)
    draw, pick = rng.random(2)
    if self._split == "train":
      base = self._bases[min(int(np.searchsorted(self._cumulative, draw)), len(self._bases) - 1)]
    else:
      base = self._bases[index % len(self._bases)]
    codes, png, style = base[int(pick * len(base))]
    glyph = Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA")
    image = place(glyph, rng)
    words = self._words.get(without_variation(codes), ())
    keyword = self._split == "train" and len(words) > 1 and rng.random() < KEYWORD_SHARE
    name = words[int(rng.integers(1, len(words)))] if keyword else self.name_of(codes)
    caption = name + (f", {style}" if style else "")
    return {"image": image, "label": group_of(codes), "caption": caption, "num_objects": -1}

  def name_of(self, codes: tuple[int, ...]) -> str:
    """Returns the name in WORDS, with skin tones that it leaves out, else caption_of."""
    if words := self._words.get(without_variation(codes)):
      return words[0]
    tones = [_TONES[code] for code in codes if code in _TONES]
    words = self._words.get(without_variation(code for code in codes if code not in _TONES))
    if words and tones:
      return f"{words[0]}: {', '.join(tones)} skin tone"
    return caption_of(codes)


@functools.lru_cache(maxsize=4)
def _ramps(size: int) -> tuple[np.ndarray, np.ndarray]:
  line = np.linspace(-1.0, 1.0, size, dtype=np.float32)
  return line[:, None, None], line[None, :, None]


def place(glyph: Image.Image, rng: np.random.Generator) -> np.ndarray:
  """Returns an RGBA glyph, scaled by 0.6 to 1, at a random position on a plain or gradient background.

  The result is uint8 [CANVAS, CANVAS, 3].
  """
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
  background = Image.fromarray((canvas + np.float32(0.5)).clip(0.0, 255.0).astype(np.uint8))
  scale = rng.uniform(0.6, 1.0) * CANVAS / max(glyph.size)
  glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.BILINEAR)
  spare = np.array((CANVAS - glyph.width, CANVAS - glyph.height))
  left, top = (spare * rng.uniform(0.0, 1.0, 2)).round().astype(int)
  background.paste(glyph, (int(left), int(top)), glyph)
  return np.asarray(background)
