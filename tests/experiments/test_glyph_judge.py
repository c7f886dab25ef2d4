"""The judge of generated glyphs: the nearest of known glyphs, on any background."""

import numpy as np
from PIL import Image

from experiments.glyphs import agreement
from flextok_jax.data import transforms
from flextok_jax.data.sources import emoji


def test_the_nearest_glyph_answers(tmp_path):
  """Glyphs of patches, some transparent, are found again on other backgrounds and under noise."""
  rng = np.random.default_rng(0)
  for style in ("3d", "flat"):
    (tmp_path / style).mkdir()
    for code in range(0x1F400, 0x1F40A):
      patches = np.concatenate([rng.integers(180, 256, (4, 4, 3)), 255 * rng.integers(0, 2, (4, 4, 1))], -1)
      picture = patches.astype(np.uint8).repeat(16, 0).repeat(16, 1)
      Image.fromarray(picture, "RGBA").save(tmp_path / style / f"{code:x}.png")
  known = emoji.read_folder(str(tmp_path))
  judge = agreement.Judge(known)
  for light in (False, True):
    placed = [emoji.place(glyph.picture(), rng, centered=True, light=light) for glyph in known]
    small = np.stack([transforms.center_crop(image, 64) for image in placed])
    noisy = (small + rng.normal(0, 10, small.shape)).clip(0, 255).astype(np.uint8)
    found = judge(noisy)
    assert found["glyph"].tolist() == list(range(20))
    assert found["style"].tolist() == [0] * 10 + [1] * 10
    assert found["color"].tolist() == [agreement.facts(glyph)["color"] for glyph in known]
