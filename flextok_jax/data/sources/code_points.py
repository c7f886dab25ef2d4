"""Code points of emoji: their groups, names and bases, and the split into train and validation.

Glyphs that differ only in skin tone, gender, hair or direction share a base (`base_key`), as do all clock faces, all
keycaps and all letters of flags; the split is by base.
"""

from collections.abc import Iterable
import functools
import unicodedata

from flextok_jax.data.sources.base import held_out

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
_JOINER, _VARIATION, _KEYCAP = 0x200D, 0xFE0F, 0x20E3
_GENDERS = {0x2640: "woman", 0x2642: "man"}
TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
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
  skip = {_JOINER, _VARIATION, _RIGHTWARDS, *_GENDERS, *TONES, *_HAIR}
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
  variations += [f"{TONES[c]} skin tone" for c in codes if c in TONES]
  variations += ["facing right"] * (_RIGHTWARDS in codes)
  skip = {_JOINER, _VARIATION, _RIGHTWARDS, *_GENDERS, *_HAIR, *TONES}
  bases = [c for c in codes if c not in skip]
  bases.sort(key=lambda c: _SAME_FIGURE.get(c, c) not in _PEOPLE)  # the person first
  if not bases:
    return ", ".join(_name(c) for c in codes)
  names = ", ".join(_name(c) for c in bases)
  return f"{names}: {', '.join(variations)}" if variations else names


def without_variation(codes: Iterable[int]) -> tuple[int, ...]:
  """Returns the code points without variation selectors."""
  return tuple(code for code in codes if code != _VARIATION)
