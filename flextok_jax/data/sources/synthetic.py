"""Procedural scenes: an endless source with class labels, captions and a known number of objects.

A scene has a background (plain, gradient, glow, two halves, landscape, room, stripes, checks, clouds, rays) and one to
six objects, the first of which is the largest. Every object is a signed distance function, so edges are anti-aliased at
any size; it has a colour, a texture, shading and often a shadow. Scene i of a split depends on (split, i) alone.

Scenes of the style "plain" have the same kind of captions and classes, but only a few flat upright shapes in a few
fixed colours on a plain background. The first object fills four cells of a 4 x 4 grid, every other object one cell.
They are for models too small to learn textures and poses.
"""

import collections
import functools
from typing import Any

import numpy as np

from flextok_jax.data.sources.base import ENDLESS, Record, generator
from flextok_jax.data.sources.shapes import SHAPES

# The class of a scene is the shape of its first, largest object.
CLASS_NAMES = tuple(SHAPES)
PLAIN_SHAPES = ("circle", "triangle", "ring", "cross", "crescent", "heart")
PLAIN_COLORS = ("red", "yellow", "green", "blue", "pink", "white", "black")
STYLES = ("scenes", "plain")
COLORS = {
  "red": (0.86, 0.14, 0.15),
  "orange": (0.96, 0.52, 0.10),
  "yellow": (0.97, 0.84, 0.20),
  "green": (0.20, 0.64, 0.24),
  "teal": (0.10, 0.62, 0.62),
  "blue": (0.16, 0.36, 0.84),
  "sky blue": (0.50, 0.76, 0.95),
  "purple": (0.52, 0.22, 0.70),
  "pink": (0.95, 0.52, 0.70),
  "brown": (0.48, 0.29, 0.15),
  "beige": (0.90, 0.82, 0.66),
  "white": (0.95, 0.95, 0.94),
  "gray": (0.52, 0.53, 0.55),
  "black": (0.09, 0.09, 0.11),
}
COLOR_NAMES = tuple(COLORS)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MAX_OBJECTS = 6

_PALETTE = np.array(list(COLORS.values()), np.float32)
_SKIES = ("sky blue", "blue", "orange", "pink", "purple", "gray", "black", "beige")
_GROUNDS = ("green", "brown", "beige", "white", "gray", "teal", "orange", "blue")


class Synthetic:
  """Scenes of render_size x render_size pixels in one of STYLES; both splits are endless."""

  framed = True  # composed here: the pipeline resizes without cropping, so num_objects stays true
  flip = True
  class_names = CLASS_NAMES

  def __init__(self, split: str, render_size: int, style: str = "scenes"):
    if render_size < 8:
      raise ValueError(f"synthetic scenes need render_size >= 8 pixels, got {render_size}")
    if style not in STYLES:
      raise ValueError(f"unknown style {style!r} of synthetic scenes: use one of {', '.join(STYLES)}")
    self._split = split
    self._size = render_size
    self._style = style

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> Record:
    return draw_scene(generator(self._split, index), self._size, self._style)


def draw_scene(rng: np.random.Generator, size: int, style: str = "scenes") -> Record:
  """Returns the record of a random scene; the image is uint8 [size, size, 3]."""
  if style == "plain":
    color = _pick(rng, PLAIN_COLORS)
    canvas, background = np.repeat(np.repeat(_exact_color(color), size, 1), size, 2), f"a plain {color} background"
    free = [c for c in PLAIN_COLORS if c != color]
    kinds, placed = _cells(rng, set(COLOR_NAMES).difference(free))
    for (shape, color), cx, cy, radius in placed:
      view, x, y = _frame(canvas, cx * size, cy * size, radius * size)
      view += (_exact_color(color) - view) * np.clip(0.5 - SHAPES[shape](x, y) * (radius * size), 0.0, 1.0)
  else:
    y, x = _grid(size)
    canvas, background, used = _background(rng, x, y)
    light = _light(rng)
    kinds, placed = _layout(rng, used)
    for kind, cx, cy, radius in placed:
      _draw_object(rng, canvas, kind, cx * size, cy * size, radius * size, light)
    canvas *= 1.0 + rng.uniform(-0.12, 0.12) * x + rng.uniform(-0.12, 0.12) * y  # uneven lighting
  image = np.clip(canvas, 0.0, 1.0).transpose(1, 2, 0) * 255.0 + 0.5
  return {
    "image": image.astype(np.uint8),
    "label": CLASS_NAMES.index(kinds[0][0]),
    "caption": _caption(placed, background),
    "num_objects": len(placed),
  }


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pixel centres y [size, 1] and x [1, size] in (-1, 1)."""
  line = (np.arange(size, dtype=np.float32) + 0.5) * (2.0 / size) - 1.0
  return line[:, None], line[None, :]


def _exact_color(name: str) -> np.ndarray:
  """Returns the named colour, [3, 1, 1]."""
  return _PALETTE[COLOR_NAMES.index(name)][:, None, None]


def _color(rng: np.random.Generator, name: str) -> np.ndarray:
  """Returns a random shade of the named colour, [3, 1, 1]."""
  shade = _PALETTE[COLOR_NAMES.index(name)] * rng.uniform(0.82, 1.1) + rng.uniform(-0.05, 0.05, 3)
  return np.clip(shade, 0.02, 1.0).astype(np.float32)[:, None, None]


def _pick(rng: np.random.Generator, names, avoid=()) -> str:
  names = [n for n in names if n not in avoid]
  return names[rng.integers(len(names))]


def _lerp(a: np.ndarray, b: np.ndarray | np.float32, t: np.ndarray | np.float32) -> np.ndarray:
  return a + (b - a) * t


def _clouds(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, terms: int = 5) -> np.ndarray:
  """Returns smooth noise in [0, 1], a sum of plane waves with amplitudes proportional to their wavelengths."""
  frequency = rng.uniform(1.0, 7.0, terms)
  angle, phase = rng.uniform(0.0, 2.0 * np.pi, (2, terms))
  warp = 0.5 * np.sin(2.0 * y + phase[0])
  total: Any = 0.0
  for f, a, p in zip(frequency, angle, phase):
    total = total + np.sin((f * np.cos(a)) * x + (f * np.sin(a)) * y + (p + warp), dtype=np.float32) / f
  return np.clip(0.5 + 0.5 * total / np.sum(1.0 / frequency) * 1.8, 0.0, 1.0)


def _background(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, str, set]:
  """Returns the canvas [3, size, size] in [0, 1], its description, and the names of its colours."""
  size = x.shape[1]
  soft = size / 2.0  # (-1, 1) units to pixels: coverage = clip(0.5 + distance * soft)
  kind = rng.choice(10, p=(0.10, 0.16, 0.10, 0.06, 0.22, 0.08, 0.08, 0.07, 0.09, 0.04))
  first = _pick(rng, COLOR_NAMES)
  second = _pick(rng, COLOR_NAMES, (first,))
  angle = rng.uniform(0.0, 2.0 * np.pi)
  along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y  # [size, size]
  if kind == 4:
    first, second = _pick(rng, _SKIES), ""
    second = _pick(rng, _GROUNDS, (first,))
  a, b = _color(rng, first), _color(rng, second)
  if kind == 0:
    return np.broadcast_to(a, (3, size, size)).copy(), f"a plain {first} background", {first}
  if kind == 1:
    return _lerp(a, b, np.clip(0.5 + 0.5 * along, 0.0, 1.0)), f"a gradient from {first} to {second}", {first, second}
  if kind == 2:
    cx, cy = rng.uniform(-0.6, 0.6, 2)
    t = np.clip(np.sqrt((x - cx) ** 2 + (y - cy) ** 2) / rng.uniform(0.7, 1.6), 0.0, 1.0).astype(np.float32)
    return _lerp(a, b, t), f"a {first} glow on {second}", {first, second}
  if kind == 3:
    edge = np.clip(0.5 + (along - rng.uniform(-0.5, 0.5)) * soft, 0.0, 1.0).astype(np.float32)
    return _lerp(a, b, edge), f"{first} beside {second}", {first, second}
  if kind == 4:
    return _landscape(rng, x, y, a, b), f"a {second} landscape under a {first} sky", {first, second}
  if kind == 5:  # a wall and a floor, with boards or tiles
    horizon = rng.uniform(0.0, 0.6)
    depth = np.maximum(y - horizon, 1e-3)
    boards = np.sin((x / (0.35 + depth)) * rng.uniform(4.0, 12.0), dtype=np.float32)
    floor = b * (0.8 + 0.12 * np.clip(boards * 3.0, -1.0, 1.0) + 0.25 * depth)
    wall = a * (0.95 - 0.2 * y)
    paint = _lerp(wall, floor, np.clip(0.5 + (y - horizon) * soft, 0.0, 1.0)).astype(np.float32)
    return paint, f"a {second} floor before a {first} wall", {first, second}
  if kind == 6:
    frequency = rng.uniform(4.0, 14.0)
    bend = rng.uniform(0.0, 0.5) * np.sin(3.0 * (x - y), dtype=np.float32) if rng.random() < 0.4 else 0.0
    wave = np.sin((along + bend * 0.5) * frequency) * (soft / frequency)
    paint = np.clip(0.5 + wave, 0.0, 1.0).astype(np.float32)
    return _lerp(a, b, paint), f"{first} and {second} stripes", {first, second}
  if kind == 7:
    frequency = rng.uniform(4.0, 11.0)
    across = np.float32(-np.sin(angle)) * x + np.float32(np.cos(angle)) * y
    wave = np.sin(along * frequency) * np.sin(across * frequency) * (soft / frequency)
    paint = np.clip(0.5 + wave, 0.0, 1.0).astype(np.float32)
    return _lerp(a, b, paint), f"{first} and {second} checks", {first, second}
  if kind == 8:
    paint = _clouds(rng, x * 2.0, y * 2.0).astype(np.float32)
    return _lerp(a, b, paint), f"{first} and {second} clouds", {first, second}
  cx, cy = rng.uniform(-0.8, 0.8, 2)
  rays = rng.integers(5, 13)
  wave = np.sin(np.arctan2(y - cy, x - cx) * rays + angle) * np.sqrt((x - cx) ** 2 + (y - cy) ** 2) * (soft / rays)
  paint = np.clip(0.5 + wave, 0.0, 1.0).astype(np.float32)
  return _lerp(a, b, paint), f"{first} and {second} rays", {first, second}


def _landscape(
  rng: np.random.Generator, x: np.ndarray, y: np.ndarray, sky: np.ndarray, ground: np.ndarray
) -> np.ndarray:
  """Returns a sky gradient, sometimes with clouds, above one to three ridges of hills."""
  soft = x.shape[1] / 2.0
  haze = np.clip(sky + rng.uniform(-0.3, 0.4), 0.0, 1.0)
  canvas = _lerp(sky, haze, np.clip(0.5 + 0.6 * y, 0.0, 1.0) * np.ones_like(x))
  if rng.random() < 0.35:
    clouds = np.clip(_clouds(rng, x * 1.5, y * 4.0, 4) * 3.0 - 1.6, 0.0, 0.8)
    canvas = _lerp(canvas, np.float32(0.97), clouds)
  ridges = rng.integers(1, 4)
  horizon = rng.uniform(-0.3, 0.45)
  for i in range(ridges):
    f1, f2, p1, p2 = rng.uniform((1.0, 3.0, 0.0, 0.0), (3.0, 8.0, 6.3, 6.3))
    height = rng.uniform(0.0, 0.3) * (ridges - i) / ridges
    line = horizon + height * (0.7 * np.sin(f1 * x + p1) + 0.3 * np.sin(f2 * x + p2))
    near = (i + 1) / ridges
    shade = _lerp(haze, ground, np.float32(0.3 + 0.7 * near)) * (1.0 - 0.25 * np.clip(y - horizon, 0.0, 1.0))
    canvas = _lerp(canvas, shade, np.clip(0.5 + (y - line) * soft, 0.0, 1.0))
    horizon += rng.uniform(0.1, 0.3)
  return canvas.astype(np.float32)


def _light(rng: np.random.Generator) -> np.ndarray:
  """Returns the unit vector towards the light, which is above, left or right, on the viewer's side (y points down)."""
  v = np.array((rng.uniform(-0.8, 0.8), rng.uniform(-0.9, -0.2), rng.uniform(0.5, 0.9)))
  return (v / np.linalg.norm(v)).astype(np.float32)


def _count(rng: np.random.Generator) -> int:
  return 1 + int(rng.choice(MAX_OBJECTS, p=(0.30, 0.22, 0.18, 0.13, 0.10, 0.07)))


def _kind(rng: np.random.Generator, shapes: tuple, used: set) -> tuple[str, str]:
  return _pick(rng, shapes), _pick(rng, COLOR_NAMES, used)


def _next_kind(rng: np.random.Generator, kinds: list, shapes: tuple, used: set) -> tuple[str, str]:
  """Returns the kind (shape, colour) of another object; adds a new kind to `kinds`, which has at most three."""
  if len(kinds) == 1 or (len(kinds) < 3 and rng.random() < 0.5):
    kinds.append(_kind(rng, shapes, used))
  return kinds[rng.integers(len(kinds))]


def _cells(rng: np.random.Generator, used: set) -> tuple[list, list]:
  """As _layout, with the objects in cells of a 4 x 4 grid."""
  kinds = [_kind(rng, PLAIN_SHAPES, used)]
  count, (row, col) = _count(rng), rng.integers(3, size=2)
  placed = [(kinds[0], (col + 1) / 4, (row + 1) / 4, 0.23)]
  others = [(y, x) for y in range(4) for x in range(4) if y - row not in (0, 1) or x - col not in (0, 1)]
  for y, x in rng.permutation(others)[: count - 1]:
    placed.append((_next_kind(rng, kinds, PLAIN_SHAPES, used), (x + 0.5) / 4, (y + 0.5) / 4, 0.11))
  return kinds, placed


def _layout(rng: np.random.Generator, used: set) -> tuple[list, list]:
  """Returns the kinds (shape, colour) and the objects (kind, x, y, radius), in units of the canvas side.

  No object has one of the `used` colours.
  """
  kinds = [_kind(rng, CLASS_NAMES, used)]
  count = _count(rng)
  big = rng.uniform(*((0.24, 0.44) if count == 1 else (0.17, 0.32)))
  placed = [(kinds[0], *rng.uniform(big * 0.8, 1.0 - big * 0.8, 2), big)]
  for _ in range(1, count):
    kind = _next_kind(rng, kinds, CLASS_NAMES, used)
    spots = rng.uniform(0.08, 0.92, (12, 2))
    taken = np.array([p[1:] for p in placed])
    room = np.sqrt(((spots[:, None] - taken[:, :2]) ** 2).sum(-1)) - taken[:, 2]
    room = room.min(1)  # distance of each spot to the nearest object's edge
    best = int(rng.integers(12)) if rng.random() < 0.3 else int(np.argmax(room))
    if room[best] < 0.06:
      best = int(np.argmax(room))
    if room[best] < 0.05:  # no position leaves it visible
      continue
    radius = min(rng.uniform(0.07, 0.19), room[best] * 1.05, big)
    placed.append((kind, *spots[best], radius))
  return kinds, placed


def _caption(placed: list, background: str) -> str:
  """Returns a caption: 'a red ball, two blue stars and a green ring on a gradient from pink to white'."""
  counts = collections.Counter(kind for kind, *_ in placed)  # in the order of the objects
  parts = []
  for (shape, color), count in counts.items():
    if count == 1:
      parts.append(f"a {color} {shape}")
    else:
      parts.append(f"{NUMBERS[count]} {color} {shape}{'es' if shape.endswith('s') else 's'}")
  things = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
  return f"{things} on {background}".replace("a orange", "an orange")  # the only colour that starts with a vowel


_UPRIGHT = {"ball", "cube", "cylinder"}  # solids stay upright; flat shapes have any angle
_LEANING = {"heart", "triangle", "star"}  # mostly near upright, as people draw them


def _angle(rng, shape):
  if shape in _UPRIGHT:
    return rng.uniform(-0.15, 0.15)
  return rng.normal(0.0, 0.25) if shape in _LEANING and rng.random() < 0.7 else rng.uniform(-np.pi, np.pi)


def _frame(canvas: np.ndarray, cx: float, cy: float, radius: float, angle: float = 0.0, soft: float = 0.0) -> tuple:
  """Returns the part of canvas [3, size, size] around an object, with a margin of `soft` pixels, and local x and y."""
  size, reach = canvas.shape[1], radius * 1.1 + 2.0 + soft
  c, s = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
  x0, x1 = max(int(cx - reach), 0), min(int(cx + reach) + 1, size)
  y0, y1 = max(int(cy - reach), 0), min(int(cy + reach) + 1, size)
  px = (np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - cx))[None]
  py = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - cy))[:, None]
  return canvas[:, y0:y1, x0:x1], c * px + s * py, c * py - s * px


def _draw_object(
  rng: np.random.Generator, canvas: np.ndarray, kind: tuple, cx: float, cy: float, radius: float, light: np.ndarray
):
  """Paints one object and its shadow onto canvas [3, size, size]; cx, cy, radius in pixels."""
  shape, color = kind
  angle = _angle(rng, shape)
  shadow, soft, drop = rng.random() < 0.6, radius * rng.uniform(0.1, 0.5) + 1.0, radius * rng.uniform(0.1, 0.35)
  if shadow:
    sx, sy = cx - light[0] * drop * 2.0, cy - light[1] * drop * 2.0
    view, x, y = _frame(canvas, sx, sy, radius, angle, soft)
    if view.size:
      view *= 1.0 - rng.uniform(0.25, 0.6) * np.clip(0.5 - SHAPES[shape](x, y) * (radius / soft), 0.0, 1.0)
  view, x, y = _frame(canvas, cx, cy, radius, angle)
  distance = SHAPES[shape](x, y)
  cover = np.clip(0.5 - distance * radius, 0.0, 1.0)
  first = _color(rng, color)
  paint = _texture(rng, first, x, y, radius)
  paint = paint * _shade(rng, shape, x, y, distance, light, angle)
  if shape == "ball":
    hx, hy = light[0] * 0.5, light[1] * 0.5
    spot = np.exp(-((x - hx) ** 2 + (y - hy) ** 2) * 14.0) * rng.uniform(0.3, 0.9)
    paint = _lerp(paint, np.float32(1.0), spot)
  if rng.random() < 0.2:  # an outline, darker or lighter than the inside
    band = np.clip(0.5 - (np.abs(distance + 0.08) - 0.07) * radius, 0.0, 1.0)
    paint = _lerp(paint, first * 0.35 if rng.random() < 0.7 else np.clip(first * 0.4 + 0.6, 0.0, 1.0), band)
  view += (paint - view) * cover


def _texture(rng, first, x, y, radius):
  """Returns the object's colours: mostly plain, else a gradient, stripes, checks, dots or clouds of two shades."""
  kind = rng.choice(6, p=(0.50, 0.16, 0.12, 0.08, 0.08, 0.06))
  if kind == 0:
    return first
  gain = rng.uniform(0.35, 0.65)
  second = first * gain if first.mean() > 0.35 else np.clip(first * gain + (1.0 - gain), 0.0, 1.0)
  if kind == 1:
    return _lerp(first, second, np.clip(0.5 + 0.6 * y, 0.0, 1.0))
  frequency = rng.uniform(5.0, 11.0)
  edge = radius / frequency
  if kind == 2:
    return _lerp(first, second, np.clip(0.5 + np.sin(x * frequency) * edge, 0.0, 1.0))
  if kind == 3:
    return _lerp(first, second, np.clip(0.5 + np.sin(x * frequency) * np.sin(y * frequency) * edge, 0.0, 1.0))
  if kind == 4:
    dots = np.cos(x * frequency) + np.cos(y * frequency) - 0.7
    return _lerp(first, second, np.clip(0.5 + dots * edge, 0.0, 1.0))
  return _lerp(first, second, _clouds(rng, x * 3.0, y * 3.0, 4))


def _shade(rng, shape, x, y, distance, light, angle):
  """Returns the brightness over the object, about 1: Lambert's law on solids, a plane or a bevel on flat shapes."""
  if shape == "ball":
    z = np.sqrt(np.clip(1.0 - (x * x + y * y) / 0.9025, 0.0, 1.0))
    return 0.38 + 0.85 * np.clip((x * light[0] + y * light[1]) / 0.95 + z * light[2], 0.0, 1.0)
  if shape == "cylinder":
    nx = np.clip(x / 0.62, -1.0, 1.0)
    side = 0.45 + 0.65 * np.clip(nx * light[0] + np.sqrt(1.0 - nx * nx) * light[2], 0.0, 1.0)
    top = (x / 0.62) ** 2 + ((y + 0.68) / 0.24) ** 2 < 1.0
    return np.where(top, np.float32(1.2), side)
  if shape == "cube":  # the three faces meet in the middle: top, left and right
    left = 0.72 - 0.3 * light[0]
    right = 0.72 + 0.3 * light[0]
    return np.where(y < -np.abs(x) * 0.57735, np.float32(1.15), np.where(x < 0.0, np.float32(left), np.float32(right)))
  style = rng.random()
  if style < 0.4:
    return np.float32(1.0)
  if style < 0.75:  # a plane tilted to the light, which is rotated into the object's frame
    lx = light[0] * np.cos(angle) + light[1] * np.sin(angle)
    ly = light[1] * np.cos(angle) - light[0] * np.sin(angle)
    return 1.0 + 0.32 * (np.float32(lx) * x + np.float32(ly) * y)
  return 0.72 + 0.4 * np.clip(-distance * 3.0, 0.0, 1.0)  # rounded rim
