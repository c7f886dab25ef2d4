"""Procedural scenes: deterministic, with captions that match the images."""

import re

import numpy as np

from flextok_jax.data.sources import synthetic
from tests.support.pictures import same_record


def test_scenes_depend_only_on_split_and_index():
  one, other = synthetic.Synthetic("train", 32), synthetic.Synthetic("train", 32)
  for i in (0, 1, 12345, len(one) - 1):
    assert same_record(one[i], other[i])
  assert not same_record(one[0], one[1])
  assert not same_record(one[0], synthetic.Synthetic("validation", 32)[0])


def test_caption_gives_object_count_and_class():
  source = synthetic.Synthetic("validation", 32)
  color = "|".join(synthetic.COLORS)
  shape = "|".join(synthetic.CLASS_NAMES)
  number = "an?|two|three|four|five|six"
  for i in range(200):
    record = source[i]
    assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
    assert 1 <= record["num_objects"] <= synthetic.MAX_OBJECTS
    things = re.match(rf"((({number}) ({color}) ({shape})e?s?(, | and )?)+) on ", record["caption"])
    parts = re.findall(rf"({number}) (?:{color}) ({shape})", things.group(1))
    counts = [1 if n in ("a", "an") else synthetic.NUMBERS.index(n) for n, _ in parts]
    assert sum(counts) == record["num_objects"]
    assert synthetic.CLASS_NAMES[record["label"]] == parts[0][1]


def test_scenes_are_diverse():
  records = [synthetic.Synthetic("train", 32)[i] for i in range(400)]
  assert {r["label"] for r in records} == set(range(len(synthetic.CLASS_NAMES)))
  assert {r["num_objects"] for r in records} == set(range(1, synthetic.MAX_OBJECTS + 1))
  means = np.stack([r["image"].reshape(-1, 3).mean(0) for r in records])
  assert (means.std(0) > 30).all()  # overall colours differ
  assert np.mean([r["image"].std() for r in records]) > 30  # and so do regions of an image


def test_edges_are_antialiased_at_any_size():
  small, large = (synthetic.Synthetic("train", s) for s in (32, 128))
  for i in range(20):
    reduced = large[i]["image"].reshape(32, 4, 32, 4, 3).mean((1, 3))
    assert np.abs(reduced - small[i]["image"]).mean() < 8.0


def test_plain_scenes_use_the_named_colours_in_grid_cells():
  palette = {name: np.round(np.array(rgb) * 255) for name, rgb in synthetic.COLORS.items()}
  source = synthetic.Synthetic("train", 64, "plain")
  colors = "|".join(palette)
  for index in range(60):
    record = source[index]
    *things, ground = re.findall(rf"\b(sky blue|{colors})\b", record["caption"])
    image = record["image"].reshape(-1, 3).astype(int)
    nearest = {name: np.abs(image - palette[name]).max(1) <= 1 for name in (ground, *things)}
    assert nearest[ground].any() and nearest[things[0]].any(), record["caption"]
    inside = np.any(list(nearest.values()), 0)
    assert inside.mean() > 0.8  # all except anti-aliased edges
    assert all(np.linalg.norm(palette[ground] - palette[name]) > 0.48 * 255 for name in things)
    cells = np.abs(record["image"] - palette[ground]).max(-1) > 1
    cells = cells.reshape(4, 16, 4, 16).any((1, 3))  # each object in its own cells, four of them for the first
    assert cells.sum() == 3 + record["num_objects"]
    assert max(cells[y : y + 2, x : x + 2].sum() for y in range(3) for x in range(3)) == 4
