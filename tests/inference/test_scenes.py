"""Captions of plain scenes, and the network that judges pictures by them."""

import types

import numpy as np
import pytest

from flextok_jax.data import transforms
from flextok_jax.data.sources import synthetic
from flextok_jax.inference import scenes, verifiers


def records(split, count):
  source = synthetic.Synthetic(split, 64, "plain")
  return [source[i] for i in range(count)]


def test_captions_say_what_is_drawn():
  seen = set()
  for record in records("train", 300):
    said = scenes.read_caption(record["caption"])
    assert said["shape"] == record["label"] and said["objects"] == record["num_objects"] - 1
    assert f" {synthetic.COLOR_NAMES[said['color']]} " in record["caption"]
    assert record["caption"].endswith(f"a plain {synthetic.COLOR_NAMES[said['background']]} background")
    seen.add((said["shape"], said["objects"]))
  assert len(seen) > 30
  assert scenes.read_caption("two red crosses and a blue ring on a plain white background")["objects"] == 2


@pytest.mark.parametrize(
  "caption",
  ["", "a red ring", "a red thing on a plain white background", "seven red rings on a plain white background"],
)
def test_other_captions_are_one_line_errors(caption):
  with pytest.raises(ValueError, match="is no caption of a plain scene, such as") as error:
    scenes.read_caption(caption)
  assert "\n" not in str(error.value)


def test_the_network_prefers_what_a_caption_says():
  """On held-out scenes, each against the caption of the next."""
  found = records("validation", 64)
  images = np.stack([transforms.center_crop(record["image"], 32) for record in found])
  captions = [record["caption"] for record in found]
  score = lambda prompts: verifiers.make("scenes")(types.SimpleNamespace(images=images / 127.5 - 1, prompts=prompts))
  right, wrong = score(captions), score(captions[1:] + captions[:1])
  assert np.median(right) > np.log(0.5) and (right > wrong).mean() > 0.95
