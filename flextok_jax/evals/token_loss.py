"""Cross-entropy of held-out token sequences, by position."""

from collections.abc import Callable, Mapping
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flextok_jax.core import files
from flextok_jax.ops import nested
from flextok_jax.parallel.sharding import place


@dataclasses.dataclass(frozen=True)
class Report:
  """What one evaluation measured.

  scores is JSON-able: {"num_sequences", "loss", "by_position": [{"loss", "count"}, ...]}: nats a token, the mean over
  all tokens and over those of each position (the token that stops counts at its own); loss None where there is none.
  """

  scores: dict[str, Any]

  def scalars(self) -> dict[str, float]:
    """Returns flat numbers for a metric writer: "eval/loss", and "eval/loss_<i>" of positions at powers of two."""
    places = self.scores["by_position"]
    chosen = {f"eval/loss_{k}": places[k - 1]["loss"] for k in nested.powers_of_two(len(places))}
    return {"eval/loss": self.scores["loss"]} | {name: loss for name, loss in chosen.items() if loss is not None}

  def table(self) -> str:
    """Returns the scores as text: the mean, and a line a position at powers of two."""
    places = self.scores["by_position"]
    lines = [
      f"{self.scores['num_sequences']} sequences, loss {self.scores['loss']:.4f} nats a token",
      f"{'position':>8} {'loss':>8} {'tokens':>8}",
    ]
    for k in nested.powers_of_two(len(places)):
      loss = "-" if places[k - 1]["loss"] is None else f"{places[k - 1]['loss']:.4f}"
      lines.append(f"{k:>8} {loss:>8} {places[k - 1]['count']:>8}")
    return "\n".join(lines)

  def write(self, out_dir: str | Path, settings: Mapping[str, Any] | None = None) -> list[Path]:
    """Writes report.json (settings and scores) and loss.png (loss over position); returns their paths."""
    out_dir = Path(out_dir)
    paths = [out_dir / "report.json", out_dir / "loss.png"]
    files.write_file(paths[0], (json.dumps({**(settings or {}), **self.scores}, indent=2) + "\n").encode())
    files.write_file(paths[1], _curve_png([place["loss"] for place in self.scores["by_position"]]))
    return paths


class TokenLoss:
  """Measures the loss of a generator on fixed sequences, every one exactly once.

  Args:
    token_losses: of a stage's predict_fns: (params, batch) -> (losses [b, n], counts [b, n]).
    arrays: of data/shards/tokens.py:eval_arrays; what is not an array is left out.
    batch_size: sequences at once.
    sharding: places batches over the devices of a mesh; None: the default device.
    prepare: of the stage, applied to each batch on the devices.
  """

  def __init__(
    self,
    token_losses: Callable,
    arrays: Mapping[str, Any],
    batch_size: int,
    sharding: jax.sharding.NamedSharding | None = None,
    prepare: Callable[[dict], dict] = lambda batch: batch,
  ):
    self._arrays = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)}
    self._count = len(self._arrays["token_ids"])
    devices = sharding.num_devices if sharding else 1
    self._batch_size = -(-min(batch_size, self._count) // devices) * devices
    self._sharding, self._prepare = sharding, prepare
    replicated = jax.NamedSharding(sharding.mesh, jax.P()) if sharding else None
    self._losses = jax.jit(token_losses, out_shardings=replicated)

  def run(self, params: Any) -> Report:
    """Evaluates params.

    Raises:
      ValueError: a loss that is not finite.
    """
    totals = 0.0
    for start in range(0, self._count, self._batch_size):
      rows = np.arange(start, start + self._batch_size)
      batch = {name: x[np.minimum(rows, self._count - 1)] for name, x in self._arrays.items()}
      batch = self._prepare(place(batch, self._sharding))
      losses, counts = (np.asarray(x, np.float64) for x in self._losses(params, batch))
      counts[rows >= self._count] = 0  # padding
      totals = totals + np.stack([(losses * counts).sum(0), counts.sum(0)])
    if not np.isfinite(totals).all():
      raise ValueError("the loss of held-out sequences is not finite: these weights diverged")
    places = [{"loss": float(total / count) if count else None, "count": int(count)} for total, count in totals.T]
    total, count = totals.sum(1)
    return Report({"num_sequences": self._count, "loss": float(total / count), "by_position": places})


def _curve_png(losses: list[float | None]) -> bytes:
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: takes a second to import
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 3.8), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  axes.plot(range(1, len(losses) + 1), [np.nan if x is None else x for x in losses], marker="o", markersize=3)
  axes.set_xlabel("position of the token")
  axes.set_title("cross-entropy (nats)", fontsize=11)
  axes.grid(color="0.9", linewidth=0.8)
  axes.spines[["top", "right"]].set_visible(False)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", metadata={"Software": None})
  return buffer.getvalue()
