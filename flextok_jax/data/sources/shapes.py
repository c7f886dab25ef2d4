"""Signed distance functions of the shapes in procedural scenes (synthetic.py)."""

import numpy as np


def polygon(x, y, sides):
  """A regular polygon of circumradius 1 with a corner at the top."""
  step = 2.0 * np.pi / sides
  a = np.arctan2(x, -y)
  a -= step * np.floor(a / step) + 0.5 * step
  return np.hypot(x, y) * np.cos(a) - np.cos(0.5 * step)


def star(x, y, points=5, inner=0.45):
  """Distance to the line from a tip (radius 1) to the next notch (radius inner), folded into one half sector."""
  step = 2.0 * np.pi / points
  a = np.arctan2(x, -y)
  a = np.abs(a - step * np.round(a / step))
  r = np.hypot(x, y)
  px, py = r * np.cos(a) - 1.0, r * np.sin(a)
  ex, ey = inner * np.cos(0.5 * step) - 1.0, inner * np.sin(0.5 * step)
  return (px * ey - py * ex) / np.hypot(ex, ey)


def heart(x, y, h=0.56):
  """A tilted square with a disc on each upper side."""
  p, q = (x + y) * 0.70710678, (y - x) * 0.70710678
  square = np.maximum(np.abs(p), np.abs(q)) - h
  return np.minimum(square, np.minimum(np.hypot(p + h, q), np.hypot(p, q + h)) - h)


def cross(x, y):
  flat = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.32)
  return np.minimum(flat, np.maximum(np.abs(x) - 0.32, np.abs(y) - 0.95))


def cylinder(x, y):
  body = np.maximum(np.abs(x) - 0.62, np.abs(y) - 0.68)
  caps = np.sqrt((x / 0.62) ** 2 + ((np.abs(y) - 0.68) / 0.24) ** 2)
  return np.minimum(body, (caps - 1.0) * 0.24)


# Signed distances, negative inside, in units of the object's radius; x right, y down.
SHAPES = {
  "circle": lambda x, y: np.hypot(x, y) - 0.95,
  "ball": lambda x, y: np.hypot(x, y) - 0.95,
  "ellipse": lambda x, y: (np.sqrt(x * x + (y / 0.58) ** 2) - 1.0) * 0.58,
  "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.78,
  "rectangle": lambda x, y: np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.48),
  "triangle": lambda x, y: polygon(x, y, 3),
  "pentagon": lambda x, y: polygon(x, y, 5),
  "hexagon": lambda x, y: polygon(x, y, 6),
  "star": star,
  "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.24,
  "cross": cross,
  "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 0.95, 0.82 - np.hypot(x - 0.5, y)),
  "heart": heart,
  "capsule": lambda x, y: np.hypot(np.maximum(np.abs(x) - 0.58, 0.0), y) - 0.38,
  "cube": lambda x, y: polygon(x, y, 6),
  "cylinder": cylinder,
}
