"""Cross-entropy of held-out token sequences, by position."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import numpy as np

from flextok_jax.core.progress import track
from flextok_jax.evals import charts
from flextok_jax.evals.report import Report, Table
from flextok_jax.ops import nested
from flextok_jax.parallel import batching, sharding


class TokenLoss:
  """Measures the loss of a generator on fixed sequences, each exactly once.

  Args:
    token_losses: of a stage's predict_fns: (params, batch) -> (losses [b, n], counts [b, n]).
    arrays: of data/shards/tokens.py:eval_arrays; only its arrays are used.
    batch_size: sequences per batch, at most.
    mesh: devices that batches are split over; None: the default device.
    prepare: of the stage, applied to each batch on the devices.
    progress: whether a bar shows the sequences done; None: a bar on a terminal, and elsewhere lines.
  """

  def __init__(
    self,
    token_losses: Callable,
    arrays: Mapping[str, Any],
    batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
    prepare: Callable[[dict], dict] = lambda batch: batch,
    progress: bool | None = False,
  ):
    self._arrays = {name: x for name, x in arrays.items() if isinstance(x, np.ndarray)}
    self._count = len(self._arrays["token_ids"])
    self._batch_size = batching.batch_rows(batch_size, self._count, mesh)
    self._mesh, self._prepare, self._progress = mesh, prepare, progress
    self._losses = jax.jit(token_losses, out_shardings=None if mesh is None else sharding.replicated(mesh))

  def run(self, params: Any) -> Report:
    """Evaluates params.

    The scores of the report are {"num_sequences", "loss", "by_position": [{"loss", "count"}, ...]}: nats per token, the
    mean over all tokens and over those of each position (a token that ends a sequence counts at its own position); the
    loss is None at positions without tokens.

    Raises:
      ValueError: a loss that is not finite.
    """
    totals = np.zeros(())
    function = lambda batch: self._losses(params, self._prepare(batch))
    batches = batching.slices(self._arrays, self._batch_size)
    computed = batching.map_batches(function, batches, self._batch_size, self._mesh)
    for batch in track(computed, self._count, "sequences", self._progress, size=lambda batch: len(batch[0])):
      losses, counts = (x.astype(np.float64) for x in batch)
      totals = totals + np.stack([(losses * counts).sum(0), counts.sum(0)])
    if not np.isfinite(totals).all():
      raise ValueError("the loss of held-out sequences is not finite: these weights diverged")
    positions = [{"loss": float(total / count) if count else None, "count": int(count)} for total, count in totals.T]
    total, count = totals.sum(1)
    return make_report({"num_sequences": self._count, "loss": float(total / count), "by_position": positions})


def make_report(scores: dict[str, Any]) -> Report:
  """Returns the report of the scores of TokenLoss.

  Its picture is loss.png, the loss over the position; its scalars are "eval/loss", and "eval/loss_<i>" of positions at
  powers of two, which are also the rows of its table.
  """
  positions = scores["by_position"]
  shown = {k: positions[k - 1] for k in nested.powers_of_two(len(positions))}
  losses = {f"eval/loss_{k}": position["loss"] for k, position in shown.items() if position["loss"] is not None}
  rows = [
    [k, None if position["loss"] is None else f"{position['loss']:.4f}", position["count"]]
    for k, position in shown.items()
  ]
  title = f"{scores['num_sequences']} sequences, loss {scores['loss']:.4f} nats per token"
  table = Table(title, ["position", "loss", "tokens"], rows)
  draw = functools.partial(_draw_curve, [position["loss"] for position in positions])
  return Report(scores, [table], {"loss.png": draw}, {"eval/loss": scores["loss"]} | losses)


def _draw_curve(losses: list[float | None]) -> bytes:
  line = charts.Line(range(1, len(losses) + 1), [np.nan if x is None else x for x in losses])
  return charts.curves({}, "", (), {"position of the token": {"cross-entropy (nats)": {"loss": line}}})
