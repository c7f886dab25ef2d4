"""Emoji: disjoint splits, captions, draws, and font errors."""

import numpy as np
from PIL import Image
import pytest

from flextok_jax.data.sources import code_points, emoji
from tests.support.pictures import same_record


def font_path() -> str:
  try:
    return emoji.find_font("")
  except FileNotFoundError:
    pytest.skip("NotoColorEmoji.ttf is not installed")


def codes_of(source: emoji.Emoji) -> list[tuple[int, ...]]:
  return [glyph.codes for base in source.bases for glyph in base]


def test_base_key_merges_variants():
  wave, tone = 0x1F44B, 0x1F3FD
  assert code_points.base_key((wave,)) == code_points.base_key((wave, tone))
  runner = code_points.base_key((0x1F3C3,))
  for codes in ((0x1F3C3, 0x200D, 0x2640), (0x2642, 0x200D, 0x1F3C3, 0x1F3FF), (0x27A1, 0x200D, 0x1F3C3)):
    assert code_points.base_key(codes) == runner
  doctor = {code_points.base_key((0x2695, 0x200D, who, 0x1F3FB)) for who in (0x1F468, 0x1F469, 0x1F9D1)}
  assert len(doctor) == 1 and doctor != {code_points.base_key((0x1F468,))}
  couple = code_points.base_key((0x1F469, 0x200D, 0x2764, 0x200D, 0x1F468))
  assert couple == code_points.base_key((0x1F491,))
  assert code_points.base_key((0x1F355,)) != code_points.base_key((0x1F354,))


def test_split_is_stable_and_by_base():
  codes = [(c,) for c in range(0x1F300, 0x1F700) if c not in code_points.TONES]
  held_out = [c for c in codes if code_points.is_validation(c)]
  assert 0.04 < len(held_out) / len(codes) < 0.12
  for base in codes:
    assert {code_points.is_validation((*base, tone)) for tone in code_points.TONES} == {code_points.is_validation(base)}
  # These must never change: reports of trained models depend on them.
  assert code_points.is_validation((0x1F680,)) and not code_points.is_validation((0x1F600,))


def test_captions():
  assert code_points.caption_of((0x1F44B, 0x1F3FD)) == "waving hand sign: medium skin tone"
  assert code_points.caption_of((0x1F1EF, 0x1F1F5)) == "flag: jp"
  assert code_points.caption_of((0x2642, 0x200D, 0x1F3C3)) == "runner: man"
  assert code_points.caption_of((0x1F3A8, 0x200D, 0x1F468)) == "man, artist palette"
  assert code_points.caption_of((0x33, 0x20E3)) == "keycap: digit three"
  assert code_points.CLASS_NAMES[code_points.group_of((0x1F436,))] == "animal"
  assert code_points.CLASS_NAMES[code_points.group_of((0x1F355,))] == "food"
  assert code_points.CLASS_NAMES[code_points.group_of((0x1F1EF, 0x1F1F5))] == "flag"


def test_splits_of_the_font_do_not_overlap():
  path = font_path()
  train, validation = emoji.Emoji("train", path), emoji.Emoji("validation", path)
  assert len(codes_of(train)) + len(codes_of(validation)) == len(emoji.read_glyphs(path)) > 3000
  bases = [{code_points.base_key(c) for c in codes_of(s)} for s in (train, validation)]
  assert not bases[0] & bases[1] and len(bases[1]) > 100
  tones = set(code_points.TONES)
  plain = [{tuple(sorted(set(c) - tones)) for c in codes_of(s) if len(c) > 1} for s in (train, validation)]
  plain[1] |= {c for c in codes_of(validation) if len(c) == 1}
  assert not plain[0] & plain[1]


def test_draws():
  source = emoji.Emoji("train", font_path())
  again = emoji.Emoji("train", font_path())
  records = [source[i] for i in range(40)]
  assert all(same_record(r, again[i]) for i, r in enumerate(records))
  corners = np.stack([r["image"][0, 0] for r in records]).astype(float)
  assert (corners.std(0) > 30).all()  # backgrounds differ
  assert len({r["caption"] for r in records}) > 25
  validation = emoji.Emoji("validation", font_path())
  held_out = {code_points.caption_of(c) for c in codes_of(validation)}
  assert {validation[i]["caption"] for i in range(len(validation))} <= held_out


def test_centered_glyphs_are_all_of_one_size_and_place():
  glyph, rng = Image.new("RGBA", (40, 20), (200, 0, 0, 255)), np.random.default_rng(0)
  colors = []
  for light in (False, True, True):
    image = emoji.place(glyph, rng, centered=True, light=light)
    rows, columns = np.nonzero((image == (200, 0, 0)).all(-1))
    side = emoji.CANVAS
    assert image.shape == (side, side, 3) and np.ptp(columns) + 1 == round(0.85 * side)
    assert rows.min() + rows.max() == side - 1 and abs(columns.min() + columns.max() - side + 1) <= 1
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2
    colors.append(tuple(image[0, 0].tolist()))
  assert colors[0] == (255, 255, 255) and len(set(colors)) == 3 and min(map(min, colors)) > 175


def test_missing_and_bad_fonts(tmp_path, monkeypatch):
  with pytest.raises(FileNotFoundError, match="fonts-noto-color-emoji"):
    emoji.Emoji("train", str(tmp_path / "none.ttf"))
  monkeypatch.setattr(emoji, "FONT_PATHS", ())
  with pytest.raises(FileNotFoundError, match="set data.sources.emoji.path to the font file"):
    emoji.Emoji("train", "")
  (tmp_path / "text.ttf").write_text("not a font")
  with pytest.raises(ValueError, match="not a font file"):
    emoji.Emoji("train", str(tmp_path / "text.ttf"))


def test_font_without_bitmaps():
  matplotlib = pytest.importorskip("matplotlib")
  outline = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
  with pytest.raises(ValueError, match="has no colour bitmaps"):
    emoji.Emoji("train", outline)


def test_names_and_keywords_of_a_folder(tmp_path):
  """Training draws keywords too, validation only names; variation selectors do not matter; tones follow the name."""
  (tmp_path / "3d").mkdir()
  for name in ("1f44b", "1f44b-1f3fd", "1f680", "263a-fe0f", "1f34e"):
    Image.new("RGBA", (8, 8)).save(tmp_path / "3d" / f"{name}.png")
  words = tmp_path / emoji.WORDS
  words.write_text("1f44b\twaving hand\thello\n1f680\trocket\tspace\n263a\tsmiling face\n")
  captions = [emoji.Emoji("train", str(tmp_path))[i]["caption"] for i in range(400)]
  expected = ("waving hand", "hello", "waving hand: medium skin tone", "smiling face", "red apple")
  assert set(captions) == {f"{caption}, 3d" for caption in expected}
  assert 0.2 < captions.count("hello, 3d") / (captions.count("hello, 3d") + captions.count("waving hand, 3d")) < 0.47
  validation = emoji.Emoji("validation", str(tmp_path))
  assert {validation[i]["caption"] for i in range(len(validation))} == {"rocket, 3d"}
  words.write_text("1f44b\twaving hand\nwave\thello\n")
  with pytest.raises(ValueError, match="words.tsv, line 2: code points in hexadecimal"):
    emoji.Emoji("train", str(tmp_path))


def test_a_folder_has_styles(tmp_path):
  """The split is by base and the same in every style; captions name the style."""
  codes = [(0x1F600 + i,) for i in range(40)] + [(0x1F44B, 0x1F3FD), (0x1F680,)]
  for i, style in enumerate(("3d", "flat")):
    (tmp_path / style).mkdir()
    for j, sequence in enumerate(codes):
      picture = Image.new("RGBA", (32, 32), (6 * j, 100 * i, 50, 255))
      picture.save(tmp_path / style / ("-".join(f"{c:x}" for c in sequence) + ".png"))
  train, validation = (emoji.Emoji(split, str(tmp_path)) for split in ("train", "validation"))
  assert len(codes_of(train)) + len(codes_of(validation)) == 2 * len(codes)
  assert not set(codes_of(train)) & set(codes_of(validation)) and (0x1F680,) in codes_of(validation)
  captions = {train[i]["caption"] for i in range(300)}
  assert {"waving hand sign: medium skin tone, 3d", "waving hand sign: medium skin tone, flat"} < captions
  assert {caption.rpartition(", ")[2] for caption in captions} == {"3d", "flat"}
  assert train[3]["image"].shape == (emoji.CANVAS, emoji.CANVAS, 3)
  (tmp_path / "3d" / "smile.png").write_bytes(b"")
  with pytest.raises(ValueError, match="smile.png must be named by code points in hexadecimal, such as 1f44b-1f3fd"):
    emoji.Emoji("train", str(tmp_path))
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="empty has no glyph: files such as"):
    emoji.Emoji("train", str(tmp_path / "empty"))
