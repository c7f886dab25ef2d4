"""The demo's pictures, chips of tokens and strips as HTML; pictures are inside it, so no file is served for them."""

from collections.abc import Mapping, Sequence
from html import escape
import math

import numpy as np

from flextok_jax.core import pages
from flextok_jax.evals import grids
from flextok_jax.tools.demo import model as model_lib
from flextok_jax.tools.demo.model import Ids, SearchStep

_PIXELATED = 64  # pixels a side up to which a picture is enlarged without smoothing

CSS = """
.ft {font-size: var(--text-md); color: var(--body-text-color)}
.ft figure {margin: 0; display: flex; flex-direction: column; gap: 4px; min-width: 0}
.ft figcaption {font-size: var(--text-sm); line-height: 1.3}
.ft figcaption small {opacity: .7; display: block; font-size: var(--text-xs)}
.ft img {width: 100%; height: auto; border-radius: 8px; margin: 0; display: block; background: #8883;
  box-shadow: 0 0 0 1px var(--border-color-primary)}
.ft img.px {image-rendering: pixelated}
.ft-row {display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start}
.ft-row > figure {width: 104px}
.ft-stage {display: grid; grid-template-columns: minmax(0, 280px) 48px minmax(0, 280px); align-items: center}
.ft-stage figcaption b {font-size: var(--text-lg)}
.ft-arrow {text-align: center; font-size: 28px; color: var(--body-text-color-subdued)}
.ft-chips {display: flex; flex-wrap: wrap; gap: 6px; max-height: 224px; overflow-y: auto; padding: 2px}
.ft-chip {display: flex; flex-direction: column; min-width: 44px; padding: 2px 6px 4px; border-radius: 8px;
  text-align: center; font: 13px ui-monospace, monospace; border: 1px solid var(--border-color-primary);
  color: inherit; background: transparent; opacity: .4}
.ft-chip small {font: 10px system-ui, sans-serif; opacity: .75; color: inherit}
.ft-chip.on {opacity: 1; color: #fff; background: #4f46e5; border-color: #4f46e5}
.ft-chip.b {opacity: 1; color: #fff; background: #b45309; border-color: #b45309}
.ft-chip.new {outline: 3px solid #f59e0b}
.ft [data-i] {cursor: pointer}
.ft button.ft-pick {padding: 0; border: 0; background: none; width: 76px}
.ft .ft-pick:hover img, .ft figure[data-i]:hover img, .ft .now img {box-shadow: 0 0 0 3px #4f46e5}
.ft-note {opacity: .7; font-size: var(--text-sm); margin: 12px 0 6px}
.ft-steps {display: grid; grid-auto-flow: column; grid-auto-columns: minmax(84px, 116px); gap: 12px; overflow-x: auto;
  padding: 4px}
.ft-steps > div {display: flex; flex-direction: column; gap: 10px}
.ft-best img {box-shadow: 0 0 0 3px #16a34a}
.ft-intro {display: flex; gap: 8px; flex-direction: column}
.ft-intro h1 {margin: 0; font-size: 24px; font-weight: 700}
.ft-intro p {margin: 0; max-width: 84ch; line-height: 1.5}
"""
CLICK = """element.addEventListener('click', event => {
  const picked = event.target.closest('[data-i]');
  if (picked) trigger('click', {i: Number(picked.dataset.i)});
})"""  # of a gr.HTML: its click event says which element was picked


def _box(content: str, kind: str = "ft-row") -> str:
  return f'<div class="ft"><div class="{kind}">{content}</div></div>'


def _image(pixels: np.ndarray, alt: str) -> str:
  return pages.picture(alt, grids.to_png(pixels), css="px" if len(pixels) <= _PIXELATED else "smooth")


def _figure(pixels: np.ndarray, title: str, note: str = "", pick: int | None = None, kind: str = "") -> str:
  picked = "" if pick is None else f' data-i="{pick}"'
  caption = f"<figcaption>{title}<small>{note}</small></figcaption>"
  return f'<figure class="{kind}"{picked}>{_image(pixels, title)}{caption}</figure>'


def count(tokens: int) -> str:
  """Returns "1 token" or "2 tokens"."""
  return f"{tokens} token{'s' * (tokens != 1)}"


def intro(title: str, text: str) -> str:
  """Returns a heading and a paragraph."""
  return f'<div class="ft ft-intro"><h1>{escape(title)}</h1><p>{text}</p></div>'


def note(text: str) -> str:
  """Returns a line of small grey text, which is escaped."""
  return f'<div class="ft"><p class="ft-note">{escape(text)}</p></div>'


def examples(pictures: Sequence[tuple[np.ndarray, str]]) -> str:
  """Returns buttons with pictures."""
  buttons = [
    f'<button class="ft-pick" data-i="{i}" title="{escape(caption)}">{_image(pixels, caption)}</button>'
    for i, (pixels, caption) in enumerate(pictures)
  ]
  return note("Pick a picture") + _box("".join(buttons))


def stage(original: np.ndarray | None, decoded: np.ndarray, kept: int, bits: float) -> str:
  """Returns the original beside its picture from the first `kept` tokens of `bits` each."""
  size = f"{decoded.shape[1]} × {decoded.shape[0]} px"
  quality = "" if original is None else f"PSNR {model_lib.psnr(original, decoded):.1f} dB · "
  facts = f"{quality}{kept * bits:.0f} bits"
  right = _figure(decoded, f"<b>from the first {count(kept) if kept > 1 else 'token'}</b>", facts)
  if original is None:
    return _box(right, "ft-stage")
  raw = f"{size} · {original.size * 8:,} bits"
  return _box(f'{_figure(original, "<b>original</b>", raw)}<div class="ft-arrow">→</div>{right}', "ft-stage")


def chips(ids: Ids, kept: int, total: int, second: int | None = None, new: bool = False) -> str:
  """Returns the tokens with their numbers.

  Args:
    ids: the tokens.
    kept: those past it are grey.
    total: of the tokenizer; places without a token are empty.
    second: those past it are of another picture.
    new: whether the last one is marked.
  """
  parts = []
  for i in range(total):
    kind = "b" if second is not None and second <= i < kept else "on" if i < min(kept, len(ids)) else ""
    kind += " new" * (new and i == len(ids) - 1)
    text = str(ids[i]) if i < len(ids) else "·"
    parts.append(f'<span class="ft-chip {kind}" data-i="{i + 1}"><small>{i + 1}</small>{text}</span>')
  return _box("".join(parts), "ft-chips")


def strip(pictures: Mapping[int, np.ndarray], original: np.ndarray | None, kept: int | None = None) -> str:
  """Returns pictures by their number of tokens, with their PSNR, and the original at the end."""
  cells = [
    _figure(
      pixels,
      f"<b>{count(tokens)}</b>",
      "" if original is None else f"{model_lib.psnr(original, pixels):.1f} dB",
      tokens,
      "now" if tokens == kept else "",
    )
    for tokens, pixels in pictures.items()
  ]
  return _box("".join(cells + ([] if original is None else [_figure(original, "<b>original</b>")])))


def row(pictures: Sequence[np.ndarray], titles: Sequence[str]) -> str:
  """Returns pictures below each other's titles, which are escaped."""
  return _box("".join(_figure(pixels, escape(title)) for pixels, title in zip(pictures, titles, strict=True)))


def growing(pictures: Mapping[int, np.ndarray], ids: Ids, total: int, status: str) -> str:
  """Returns the picture, the tokens and the pictures so far, by number of tokens, of what is being drawn."""
  last = _figure(pictures[max(pictures)], f"<b>{escape(status)}</b>")
  return f"{_box(last, 'ft-stage')}<br>{chips(ids, len(ids), total, new=True)}<br>{strip(pictures, None)}"


def search(steps: Sequence[SearchStep], plain: np.ndarray, verifier: str, ahead: bool) -> str:
  """Returns the result beside one draw without a search, and what each step kept, best first.

  Args:
    steps: of the search.
    plain: the picture of the draw.
    verifier: which scored the candidates.
    ahead: whether it scored them completed.
  """
  # The verifier "scenes" returns log-probabilities of a picture, of which most are near 0.
  score = lambda x: f"{math.exp(x):.1%}" if verifier == "scenes" else f"{x:.2f}"
  last = steps[-1]
  found = _figure(last.pictures[0], "<b>found</b>", f"{verifier}: {score(last.scores[0])}", kind="ft-best")
  before = _figure(plain, "<b>one draw</b>", "without a search")
  top = _box(f'{before}<div class="ft-arrow">→</div>{found}', "ft-stage")
  columns = [
    [
      _figure(pixels, f"<b>{score(x)}</b>", f"after {count(step.num_tokens)}", kind="ft-best" * (i == 0))
      for i, (pixels, x) in enumerate(zip(step.pictures, step.scores))
    ]
    for step in steps
  ]
  if len(steps) == 1:
    return f"{top}{note('All candidates, the best first')}{_box(''.join(columns[0]))}"
  table = "".join(f"<div>{''.join(cells)}</div>" for cells in columns)
  caption = "What each step kept, the best first" + "; scores are those of the completed sequences" * ahead
  return f"{top}{note(caption)}{_box(table, 'ft-steps')}"
