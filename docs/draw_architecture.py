"""Draws docs/images/architecture.png: the packages in their order, and how data flows through them.

python docs/draw_architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import patches  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402

INK, SOFT, PAPER = "#1c2433", "#5b6678", "#fbfbf8"
ROOMS = [  # from the top; a package imports only packages below it
  ("commands", "train, evaluate, tokenize, detokenize, sample, convert, …: flags", "#d9dee8"),
  ("tools", "benchmark, compile for TPUs, sweeps", "#e3d5ea"),
  ("evals", "metrics, reports, studies", "#f3cfd6"),
  ("training", "loop, optimizers, checkpoints, teacher, throughput", "#f8d6bd"),
  ("inference", "FlexTok, ARGenerator: the API; prompts, token files, shards", "#f7e3b0"),
  ("weights", "load, save, official formats, fingerprints", "#e9ecb4"),
  ("stages", "vae, tokenizer, ar: parameters, loss, predictions", "#cfe8bb"),
  ("data", "sources, crops, pipeline, shards", "#bde5cd"),
  ("models", "encoder, decoder, VAE, generator, perception networks", "#b9e3e3"),
  ("parallel", "device mesh, processes, padded batches", "#bfdcf0"),
  ("ops", "maths without parameters: FSQ, nested dropout, flow, guidance, attention", "#c9d2f3"),
  ("core", "files, hub, hashing, FLOPs, timing", "#d8d4f0"),
]
COLOR = {name: color for name, _, color in ROOMS}


def box(ax, x, y, w, h, text, color, size=9.5, weight="normal", style="round,pad=0,rounding_size=0.08", edge=SOFT):
  ax.add_patch(patches.FancyBboxPatch((x, y), w, h, boxstyle=style, facecolor=color, edgecolor=edge, linewidth=0.9))
  ax.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK, weight=weight)


def arrow(ax, start, end, **kwargs):
  style = dict(arrowstyle="-|>", color=INK, linewidth=1.3, mutation_scale=13, shrinkA=0, shrinkB=0) | kwargs
  ax.add_patch(patches.FancyArrowPatch(start, end, **style))


def draw_rooms(ax, x, top, width, height):
  """A bar per package, and the direction in which they import each other."""
  ax.text(x, top + 0.28, "Packages", fontsize=14, weight="bold", color=INK)
  step = height / len(ROOMS)
  for i, (name, what, color) in enumerate(ROOMS):
    y = top - (i + 1) * step
    box(ax, x + 0.45, y + 0.06, width - 0.45, step - 0.12, "", color)
    ax.text(x + 0.6, y + step / 2, name, fontsize=10.5, weight="bold", va="center", color=INK)
    ax.text(x + 1.75, y + step / 2, what, fontsize=8.8, va="center", color=INK)
  arrow(ax, (x + 0.2, top - 0.06), (x + 0.2, top - height + 0.06), linewidth=1.8, mutation_scale=18)
  ax.text(x, top - height / 2, "imports", fontsize=10, rotation=90, va="center", ha="center", color=INK)
  note = "config/ (defaults, ranges) is below core; __init__.py and cli.py are beside the commands."
  ax.text(x + 0.45, top - height - 0.22, note, fontsize=8.6, color=SOFT, va="center")


def chain(ax, x, y, steps, title, width=1.32, height=0.78, gap=0.3):
  """Steps (text, package or None for data) from left to right; returns the x of each box's left side."""
  ax.text(x, y + height + 0.17, title, fontsize=11.5, weight="bold", color=INK)
  places = []
  for i, (text, room) in enumerate(steps):
    w = width
    if room:
      box(ax, x, y, w, height, text, COLOR[room])
    else:
      box(ax, x, y, w, height, text, "white", style="square,pad=0")
    places.append(x)
    if i + 1 < len(steps):
      arrow(ax, (x + w + 0.03, y + height / 2), (x + w + gap - 0.03, y + height / 2))
    x += w + gap
  return places


def main():
  fig = plt.figure(figsize=(16.4, 8.1), facecolor=PAPER)
  ax = fig.add_axes((0, 0, 1, 1))
  ax.set(xlim=(0, 16.4), ylim=(0, 8.1))
  ax.axis("off")
  draw_rooms(ax, 0.3, 7.35, 6.65, 6.75)

  x = 7.45
  ax.text(x, 7.63, "Data flow", fontsize=14, weight="bold", color=INK)
  ax.text(
    x + 1.35, 7.63, "a filled box has its package's colour; a white box is an array or a file", fontsize=9, color=SOFT
  )

  steps = [
    ("image\n[256, 256, 3]", None),
    ("VAE encoder", "models"),
    ("latents\n[32, 32, 16]", None),
    ("encoder:\npatches and\nk registers", "models"),
    ("FSQ", "ops"),
  ]
  y1 = 6.05
  chain(ax, x, y1, steps, "Tokenize", width=1.4, gap=0.36)
  arrow(ax, (x + 4 * 1.76 + 0.7, y1 - 0.03), (x + 4 * 1.76 + 0.7, y1 - 0.68))

  y2 = 4.56
  ax.text(x, y2 + 0.95, "Decode", fontsize=11.5, weight="bold", color=INK)
  items = [
    ("image\n[256, 256, 3]", None),
    ("VAE decoder", "models"),
    ("latents\n[32, 32, 16]", None),
    ("flow decoder,\n25 guided\nEuler steps", "models"),
    ("token ids [k]\n1 to 256,\ncoarse to fine", None),
  ]
  for i, (text, room) in enumerate(items):
    left = x + i * 1.76
    box(
      ax,
      left,
      y2,
      1.4,
      0.78,
      text,
      COLOR[room] if room else "white",
      style="round,pad=0,rounding_size=0.08" if room else "square,pad=0",
    )
    if i:
      arrow(ax, (left - 0.03, y2 + 0.39), (left - 0.33, y2 + 0.39))
  # noise enters the flow decoder
  ax.text(x + 3 * 1.76 + 0.7, y2 + 1.09, "noise", fontsize=9.5, ha="center", va="center", color=INK)
  arrow(ax, (x + 3 * 1.76 + 0.7, y2 + 1.0), (x + 3 * 1.76 + 0.7, y2 + 0.81))

  y3 = 3.07
  places = chain(
    ax,
    x + 2 * 1.76,
    y3,
    [
      ("class, caption\nor first tokens", None),
      ("generator:\ncausal blocks,\ncached", "models"),
      ("sampling:\ntop-k, top-p", "models"),
    ],
    "Generate",
    width=1.4,
    gap=0.36,
  )
  arrow(ax, (places[2] + 0.7, y3 + 0.81), (places[2] + 0.7, y2 - 0.03))

  y4 = 1.58
  steps = [
    ("images, tokens,\nlatents", None),
    ("sources, crops,\nbatches", "data"),
    ("loss of a stage:\nvae, tokenizer,\nar", "stages"),
    ("update, average,\ncheckpoint", "training"),
    ("weights\n.safetensors", "weights"),
  ]
  chain(ax, x, y4, steps, "Train", width=1.4, gap=0.36)

  y5 = 0.22
  steps = [
    ("weights, held-out\nimages", None),
    ("reconstruct,\nor sample", "inference"),
    ("PSNR, FID,\nstudies, …", "evals"),
    ("report.json,\ncurves, grids", None),
  ]
  chain(ax, x, y5, steps, "Evaluate", width=1.4, gap=0.36)
  out = Path(__file__).parent / "images" / "architecture.png"
  fig.savefig(out, dpi=110, facecolor=PAPER)
  print(out)


if __name__ == "__main__":
  main()
