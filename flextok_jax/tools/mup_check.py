"""Coordinate check of muP: how large activations and their changes are at several widths.

Trains the update of a run for a few steps at each width of encoder and decoder (or of the generator), with muP relative
to the smallest width and without, and evaluates the same batch each time: the mean absolute value of layer outputs, and
of their change since initialisation. With muP the changes are about the same at all widths; without it they grow (Yang
et al. 2022, arXiv 2203.03466, section 4 and appendix D).

The learning rate is config.optim.learning_rate from the first step on, without warm-up. Adam's eps is next to nothing:
heads and modulations start at zero, so the gradients behind them are at first smaller than the usual eps, and the
smaller the wider the model. Data as in training; a frozen VAE keeps its initial values.
"""

from collections.abc import Callable, Iterable, Sequence
import io
from typing import Any

import flax
from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax import stages
from flextok_jax.config import with_fields
from flextok_jax.parallel import sharding
from flextok_jax.stages.stage import Stage
from flextok_jax.training import inputs, optim, plan
from flextok_jax.training.state import init_state, make_update

KINDS = ("standard", "mup")
_LAYERS = (
  "patch_embed",
  "code_embed",
  "time_embed",
  "text_mlp",
  "attention",
  "cross",
  "mlp",
  "blocks",
  "last",
  "head",
  "readout",
)


def check(config: ConfigDict, widths: Sequence[int], steps: int) -> dict[str, Any]:
  """Runs the check and returns its report.

  Args:
    config: of stage "tokenizer" or "ar".
    widths: ascending, multiples of head_dim; the first is the base width.
    steps: updates at each width.

  Returns:
    {"base_width", "widths", "steps", "optimizer", "learning_rate", "slopes": {kind: {layer: slope}}, "rows": see
    coordinates, with "kind" and "width"}.

  Raises:
    ValueError: the stage has no width, the data are latents, or a loss is not finite.
  """
  if config.stage not in ("tokenizer", "ar"):
    raise ValueError(f"stage {config.stage!r} has no width: muP is for stages 'tokenizer' and 'ar'")
  if config.stage == "tokenizer" and config.data.latents:
    raise ValueError(f"the check needs images: data.latents={config.data.latents} must be ''")
  for width in widths:
    stages.make_stage(at_width(config, width, widths[0]))  # checks all sizes before the first is trained
  rows = []
  for kind in KINDS:
    for width in widths:
      trained = coordinates(at_width(config, width, widths[0] if kind == "mup" else 0), steps)
      rows += [dict(kind=kind, width=width, **row) for row in trained]
      print(f"trained {kind} at width {width}: loss {rows[-1]['loss']:.4f}", flush=True)
  return dict(
    base_width=widths[0],
    widths=list(widths),
    steps=steps,
    optimizer=config.optim.name,
    learning_rate=config.optim.learning_rate,
    slopes={kind: slopes_of(row for row in rows if row["kind"] == kind) for kind in KINDS},
    rows=rows,
  )


def at_width(config: ConfigDict, width: int, base_width: int) -> ConfigDict:
  """Returns the config at another width, without warm-up and eps; base_width 0: without muP."""
  fields = {"optim.mup_base_width": base_width, "optim.warmup_steps": 0, "optim.eps": 1e-16}
  for part in _parts(config.stage):
    fields |= {f"{part}.width": width, f"{part}.readout_multiplier": base_width / width if base_width else 1.0}
  return with_fields(config, fields)


def _parts(stage: str) -> tuple[str, ...]:
  return ("ar",) if stage == "ar" else ("encoder", "decoder")


def coordinates(config: ConfigDict, steps: int) -> list[dict]:
  """Trains `steps` updates and returns a row for each step from 0 on.

  Returns:
    Rows {"step", "loss" (of the update before, None at 0), "mean_abs": {layer: mean absolute value of its output for
    the first batch}, "mean_change": {layer: that of the difference to step 0}}. The layers of a stack are numbered.
  """
  config = inputs.with_tokenizer(config)
  mesh = sharding.make_mesh(**plan.choose(config, jax.devices()).axes)
  stages.check_mesh(config, mesh)
  sharding.check_batch(config.data.global_batch, config.optim.accumulate_steps, mesh)
  stage, optimizer = stages.make_stage(config), optim.make_optimizer(config.optim, config.train.num_steps)
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  prepare, place = inputs.make_prepare(config, mesh, train=True), sharding.batch_sharding(mesh)
  batches = map(prepare, sharding.device_batches(inputs.train_batches(config, 0, mesh), place))
  create = lambda key: init_state(stage, optimizer, key)
  shardings = sharding.tree_shardings(jax.eval_shape(create, init_key), mesh)
  state = jax.jit(lambda key: unbox(create(key)), out_shardings=shardings)(init_key)
  update = make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=config.optim.ema_decay)
  update = jax.jit(update, donate_argnums=0, out_shardings=(shardings, None))
  outputs_of = jax.jit(make_outputs_fn(stage))

  batch = first = next(batches)
  start, loss, rows = outputs_of(state.joined(), first), None, []
  for step in range(steps + 1):
    if step:
      state, metrics = update(state, batch, run_key)
      loss, batch = float(metrics["loss"].compute()), next(batches)
      if not np.isfinite(loss):
        raise ValueError(
          f"the loss is not finite at step {step}, width {config[_parts(config.stage)[-1]].width}: "
          "lower optim.learning_rate"
        )
    mean_abs, mean_change = map(_floats, jax.device_get(_compare(outputs_of(state.joined(), first), start)))
    rows.append(dict(step=step, loss=loss, mean_abs=mean_abs, mean_change=mean_change))
  return rows


def make_outputs_fn(stage: Stage) -> Callable[[dict, dict], dict[str, jax.Array]]:
  """Returns a pure function (params, batch) -> {layer: output in float32}; the outputs of a stack are [layers, ...]."""

  def wanted(module, method: str) -> bool:
    return method == "__call__" and module.path[:1] != ("vae",) and module.name in _LAYERS

  def outputs_of(params, batch):
    if "image" in batch:
      args = (batch["image"],)
    else:
      features = batch.get("text_features")
      if "text_ids" in batch:
        features = stage.model.apply({"params": params}, batch["text_ids"], batch["text_lengths"], method="encode_text")
      args = batch["token_ids"], batch["label"], features, batch.get("text_lengths")
    _, found = stage.model.apply({"params": params}, *args, capture_intermediates=wanted, mutable=["intermediates"])
    # The first leaf of what a module returns is its output.
    outputs = flax.traverse_util.flatten_dict(found["intermediates"])
    return {"/".join(path[:-1]): jax.tree.leaves(x)[0].astype(jnp.float32) for path, x in outputs.items()}

  return outputs_of


@jax.jit
def _compare(now: dict[str, jax.Array], start: dict[str, jax.Array]) -> tuple[dict, dict]:
  """Returns mean absolute values of outputs and of their differences, one for each layer of a stack."""
  means = lambda name, x: jnp.abs(x).mean(range(1 if "blocks" in name.split("/") else 0, x.ndim))
  return {k: means(k, x) for k, x in now.items()}, {k: means(k, x - start[k]) for k, x in now.items()}


def _floats(means: dict[str, np.ndarray]) -> dict[str, float]:
  """Returns a number for each layer; layers of a stack get their index."""
  return {
    name if np.ndim(value) == 0 else name.replace("blocks", f"blocks/{i}"): float(x)
    for name, value in means.items()
    for i, x in enumerate(np.atleast_1d(value))
  }


def slopes_of(rows: Iterable[dict]) -> dict[str, float]:
  """Returns {layer: least-squares slope of log(mean_change) over log(width) after the last step}.

  Layers that did not change at some width are left out.
  """
  rows = list(rows)
  last = [row for row in rows if row["step"] == max(row["step"] for row in rows)]
  widths = np.log([row["width"] for row in last])
  changes = {name: [row["mean_change"][name] for row in last] for name in last[0]["mean_change"]}
  return {name: float(np.polyfit(widths, np.log(c), 1)[0]) for name, c in changes.items() if min(c) > 0}


def table(slopes: dict[str, dict[str, float]]) -> str:
  """Returns the slopes of each layer, without and with muP."""
  size = max(map(len, slopes["mup"]))
  lines = [f"{'slope of the change':{size}}  {'  '.join(f'{kind:>8}' for kind in KINDS)}"]
  for name in slopes["mup"]:
    lines.append(f"{name:{size}}  " + "  ".join(f"{slopes[kind].get(name, np.nan):8.2f}" for kind in KINDS))
  return "\n".join(lines)


def picture(report: dict) -> bytes:
  """Returns a PNG: activations after the last step and their changes by width, without and with muP."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here as it takes a second
  from matplotlib.figure import Figure

  layers = list(report["rows"][0]["mean_abs"])
  figure = Figure(figsize=(11, 7.5), dpi=130, layout="constrained")
  FigureCanvasAgg(figure)
  panels = figure.subplots(2, 2, sharex=True, sharey="row")
  for row, (field, label) in enumerate((("mean_abs", "mean |x|"), ("mean_change", "mean |x - x at step 0|"))):
    for panel, kind in zip(panels[row], KINDS):
      last = [r for r in report["rows"] if r["kind"] == kind and r["step"] == report["steps"]]
      for i, name in enumerate(layers):
        values = [r[field][name] for r in last]
        if min(values) > 0:
          panel.plot(report["widths"], values, _style(i), color=_color(i, len(layers)), markersize=4, label=name)
      panel.set_xscale("log", base=2)
      panel.set_yscale("log")
      panel.set_xticks(report["widths"], [str(width) for width in report["widths"]])
      panel.minorticks_off()
      panel.grid(color="0.9", linewidth=0.8)
      panel.set_title({"standard": "without muP", "mup": f"muP, base width {report['base_width']}"}[kind], fontsize=11)
    panels[row][0].set_ylabel(label)
  for panel in panels[1]:
    panel.set_xlabel("width")
  figure.suptitle(f"after {report['steps']} steps of {report['optimizer']} at {report['learning_rate']:g}", fontsize=11)
  handles, labels = panels[0][0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=7)
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", metadata={"Software": None})
  return buffer.getvalue()


def _style(index: int) -> str:
  return ("o-", "s--", "^:")[index % 3]


def _color(index: int, count: int) -> Sequence[float]:
  from matplotlib import colormaps

  return colormaps["turbo"](0.05 + 0.9 * index / max(count - 1, 1))
