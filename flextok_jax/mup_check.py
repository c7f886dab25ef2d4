"""Checks by its coordinates that muP serves a config: how large activations are, and their changes, at several widths.

python -m flextok_jax.mup_check --config=NAME --widths=64,128,256 --steps=5 --out=DIR

Trains the very update for a few steps at each width of encoder and decoder (or of the generator), with muP relative to
the smallest width and without, and each time looks at the same batch: the mean absolute value of what layers put out,
and of its change since initialisation. Under muP the changes stay about the same at all widths; without they grow
(Yang et al. 2022, arXiv 2203.03466, section 4 and appendix D). Prints the slopes of log(change) over log(width) after
the last step; --out gets coordinates.json and coordinates.png.

The learning rate is config.optim.learning_rate from the first step on, without warm-up. Adam's eps is next to nothing:
heads and modulations start at zero, so that the gradients behind them are smaller than it at first, and the smaller the
wider the model. Data as for training; a frozen VAE stays as initialised.
"""

from collections.abc import Callable, Iterable, Sequence
import io
import json
from pathlib import Path

from absl import flags
import flax
from flax.core.meta import unbox
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from flextok_jax import cli, stages
from flextok_jax.config import check_at_least_one
from flextok_jax.core import files
from flextok_jax.parallel import sharding
from flextok_jax.training import inputs, optim
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


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  cli.define_config_flag("The model and its training.", values)
  flags.DEFINE_list("widths", ["64", "128", "256"], "Widths, multiples of head_dim.", flag_values=values)
  flags.DEFINE_integer("steps", 5, "Updates at each width.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder of coordinates.json and coordinates.png.", flag_values=values)


def main(values: flags.FlagValues):
  """Does what the flags ask for."""
  if values.config is None or values.out is None:
    raise ValueError("give --config=NAME and --out=DIR")
  config, widths = values.config, _widths(values.widths)
  if values.steps < 1:
    raise ValueError(f"--steps={values.steps} must be at least 1")
  if config.stage not in ("tokenizer", "ar"):
    raise ValueError(f"stage {config.stage!r} has no width: muP is of stages 'tokenizer' and 'ar'")
  if config.stage == "tokenizer" and config.data.latents:
    raise ValueError(f"the check looks at images: it takes no config.data.latents={config.data.latents}")
  check_at_least_one(config, "data.global_batch")
  rows = []
  for kind in KINDS:
    for width in widths:
      rows += [
        dict(kind=kind, width=width, **row)
        for row in coordinates(of_width(config, width, widths[0], kind), values.steps)
      ]
      print(f"trained {kind} at width {width}: loss {rows[-1]['loss']:.4f}", flush=True)
  slopes = {kind: slopes_of(row for row in rows if row["kind"] == kind) for kind in KINDS}
  report = dict(
    base_width=widths[0],
    widths=widths,
    steps=values.steps,
    optimizer=config.optim.name,
    learning_rate=config.optim.learning_rate,
    slopes=slopes,
    rows=rows,
  )
  out = Path(values.out)
  files.write_file(out / "coordinates.json", (json.dumps(report, indent=1) + "\n").encode())
  files.write_file(out / "coordinates.png", picture(report))
  print(table(slopes) + f"\n{out / 'coordinates.png'}")


def _widths(items: Iterable[str]) -> list[int]:
  if not all(item.isdecimal() and int(item) for item in items) or len(set(items)) < 2:
    raise ValueError(f"--widths={','.join(items)} must be two or more widths, like 64,128,256")
  return sorted({int(item) for item in items})


def of_width(config: ConfigDict, width: int, base_width: int, kind: str) -> ConfigDict:
  """Returns the config at another width, with muP relative to base_width or ("standard") without, as the check does it.

  That is without warm-up and eps.
  """
  config = config.copy_and_resolve_references()
  for name in ("ar",) if config.stage == "ar" else ("encoder", "decoder"):
    config[name].width = width
    config[name].readout_multiplier = base_width / width if kind == "mup" else 1.0
  config.optim.update(mup_base_width=base_width if kind == "mup" else 0, warmup_steps=0, eps=1e-16)
  return config


def coordinates(config: ConfigDict, steps: int) -> list[dict]:
  """Trains `steps` updates and returns a row for each step from 0 on.

  Rows have step, loss (of the update that led there, None at 0), and by layer mean_abs and mean_change: the mean
  absolute value of the layer's output for the first batch, and of its difference to that of step 0. Layers of a stack
  have a number each.
  """
  config = inputs.with_tokenizer(config)
  mesh = sharding.make_mesh(**config.mesh)
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
  look = jax.jit(make_look(stage))

  batch = first = next(batches)
  start, loss, rows = look(state.joined(), first), None, []
  for step in range(steps + 1):
    if step:
      state, metrics = update(state, batch, run_key)
      loss, batch = float(metrics["loss"].compute()), next(batches)
      if not np.isfinite(loss):
        raise ValueError(f"the loss is not finite at step {step}, width {_width(config)}: lower optim.learning_rate")
    mean_abs, mean_change = map(_floats, jax.device_get(_compare(look(state.joined(), first), start)))
    rows.append(dict(step=step, loss=loss, mean_abs=mean_abs, mean_change=mean_change))
  return rows


def _width(config: ConfigDict) -> int:
  return (config.ar if config.stage == "ar" else config.decoder).width


def make_look(stage) -> Callable[[dict, dict], dict[str, jax.Array]]:
  """Returns a pure function (params, batch) -> {layer: its output, float32}, of a stack [layers, ...]."""

  def wanted(module, method: str) -> bool:
    return method == "__call__" and module.path[:1] != ("vae",) and module.name in _LAYERS

  def look(params, batch):
    if "image" in batch:
      args = (batch["image"],)
    else:
      features = batch.get("text_features")
      if "text_ids" in batch:
        features = stage.model.apply({"params": params}, batch["text_ids"], batch["text_lengths"], method="encode_text")
      args = batch["token_ids"], batch["label"], features, batch.get("text_lengths")
    _, found = stage.model.apply({"params": params}, *args, capture_intermediates=wanted, mutable=["intermediates"])
    # Of what a module gives, its output comes first.
    outputs = flax.traverse_util.flatten_dict(found["intermediates"])
    return {"/".join(path[:-1]): jax.tree.leaves(x)[0].astype(jnp.float32) for path, x in outputs.items()}

  return look


@jax.jit
def _compare(now: dict[str, jax.Array], start: dict[str, jax.Array]) -> tuple[dict, dict]:
  """Mean absolute values of outputs and of their differences, of a stack one for each layer."""
  means = lambda name, x: jnp.abs(x).mean(range(1 if "blocks" in name.split("/") else 0, x.ndim))
  return {k: means(k, x) for k, x in now.items()}, {k: means(k, x - start[k]) for k, x in now.items()}


def _floats(means: dict[str, np.ndarray]) -> dict[str, float]:
  """A number a layer, those of a stack by their index."""
  return {
    name if np.ndim(value) == 0 else name.replace("blocks", f"blocks/{i}"): float(x)
    for name, value in means.items()
    for i, x in enumerate(np.atleast_1d(value))
  }


def slopes_of(rows: Iterable[dict]) -> dict[str, float]:
  """Returns by layer the slope of log(mean_change) over log(width) after the last step, by least squares.

  Layers that did not move at some width are left out.
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
  """Returns a PNG: activations after the last step and their changes over the width, without and with muP."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # late: takes a second to import
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


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
