"""Trains any stage: python -m flextok_jax.train --config=NAME --workdir=DIR [--config.a.b=v].

Rerunning the same command resumes from the newest checkpoint, bit for bit where the devices compute so.
"""

from collections.abc import Sequence
import contextlib
import os
import time

from absl import flags
from flax.core.meta import unbox
import jax
import safetensors

from flextok_jax import cli, stages
from flextok_jax.config import check_at_least_one, float_dtype, with_fields
from flextok_jax.evals.from_config import make_evaluator, make_measure
from flextok_jax.parallel import processes, sharding
from flextok_jax.training import checkpoint, goodput, inputs, optim
from flextok_jax.training import metrics as metrics_lib
from flextok_jax.training.state import init_state, make_update
from flextok_jax.weights import loading, saving

CONFIG = cli.define_config_flag("Experiment: NAME[:ARGUMENT] of a config, or PATH.py[:ARGUMENT].")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of checkpoints, metrics and pictures; made if missing.")

_STEP = "flextok_jax.step"  # metadata entry of weights.safetensors: the step whose average it holds


def train(config, workdir: str):
  """Runs config in workdir until config.train.num_steps, resuming what is there.

  Where several processes run it (parallel/processes.py), all do the same; the first one writes and prints.

  Raises:
    FileNotFoundError: nothing at config.init_from.
    OSError: when the disk is full.
    ValueError: for bad settings, a workdir where another run is at work, unusable weights at config.init_from, no
      checkpoint that can be read, too many unreadable files, or a loss that is not finite.
  """
  spent = goodput.Goodput()
  every = ("log_every", "checkpoint_every", "eval_every", "keep_checkpoints", "num_steps")
  check_at_least_one(config, "optim.accumulate_steps", "eval.num_images", "eval.batch_size", "eval.grid_images")
  check_at_least_one(config, *(f"train.{name}" for name in every))
  float_dtype("train.export_dtype", config.train.export_dtype)
  config = inputs.with_vae(inputs.with_tokenizer(config), workdir)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch(config.data.global_batch, config.optim.accumulate_steps, mesh)
  for line in optim.check(config):
    processes.log_on_process_0(f"warning: {line}")
  profile = goodput.Profile(config.profile_steps, os.path.join(workdir, "profile"))
  mfu = goodput.make_mfu(config, mesh.devices.flatten())
  stage = stages.make_stage(config)
  optimizer = optim.make_optimizer(config.optim, config.train.num_steps)
  schedule = optim.make_schedule(config.optim, config.train.num_steps)
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  # All that can be wrong is looked at before anything is written.
  prepare = inputs.make_prepare(config, mesh, train=True)
  evaluator = make_evaluator(config, stage, mesh, prepare)
  measure = make_measure(config, stage, mesh, evaluator)
  checkpoint.check_workdir(workdir, config)

  keep = config.train.keep_checkpoints, config.train.keep_period
  with checkpoint.locked(workdir), contextlib.closing(checkpoint.Checkpoints(workdir, *keep, own=True)) as checkpoints:
    # State: at birth in its place on the mesh, or from the newest checkpoint into the same places.
    parts = loading.abstract_params(config)  # of the model, without what the loss alone needs
    boxed = jax.eval_shape(lambda key: init_state(stage, optimizer, key), init_key)
    shardings = sharding.tree_shardings(boxed, mesh)
    if checkpoints.latest_step() is None:
      # Before anything is compiled.
      given = _read_init(config.init_from, [k for k in boxed.frozen if k in parts], mesh)
      networks = {
        k: jax.tree.map(sharding.place, tree, shardings.frozen[k])
        for k, tree in inputs.read_networks(config, stage).items()
      }
      with spent.spending("compile"):
        state = jax.jit(lambda key: unbox(init_state(stage, optimizer, key)), out_shardings=shardings)(init_key)
      state = state.replace(frozen={k: networks.get(k, v) for k, v in state.frozen.items()})
      if given:
        state = jax.device_put(checkpoint.warm_start(state, given, config.init_from, networks), shardings)
      del given, networks  # else what was replaced stays on the devices
    else:
      shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), unbox(boxed), shardings)
      state = checkpoints.restore(shapes)
      processes.log_on_process_0(f"resuming from step {int(state.step)} of {workdir}")
    inputs.check_latents(config, state.frozen)
    update = jax.jit(
      make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=config.optim.ema_decay),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    )

    first, last = int(state.step), config.train.num_steps
    local = inputs.train_batches(config, first, mesh)
    batches = map(prepare, sharding.device_batches(local, sharding.batch_sharding(mesh)))
    processes.run_on_process_0(lambda: checkpoint.claim_workdir(workdir, config))
    writer = metrics_lib.Writer(workdir, config.train.tensorboard) if processes.is_process_0() else _NoWriter()
    count = sum(x.size for x in jax.tree.leaves(state.params))
    processes.log_on_process_0(
      f"stage {config.stage}: {count / 1e6:.1f}M trained parameters, {mesh.size} devices, steps {first}..{last}"
    )

    pending, measured, mark = None, None, (time.monotonic(), first)
    with (
      processes.preemption() as preempted,
      contextlib.closing(writer),
      contextlib.closing(profile),
      spent.spending("step"),
    ):
      for step in range(first + 1, last + 1):
        profile.before(step, state)
        with spent.spending("data", behind=pending):
          batch = next(batches)
        with spent.spending("compile" if step == first + 1 else "step"):
          state, metrics = update(state, batch, run_key)
        pending = metrics if pending is None else metrics_lib.merge(pending, metrics)
        stop, save = preempted(step), step % config.train.checkpoint_every == 0 or step == last
        if stop or save or step % config.train.log_every == 0:
          images = (step - mark[1]) * config.data.global_batch
          scalars = metrics_lib.compute(pending)
          _check(scalars, images, config, checkpoints)
          rate = images / (time.monotonic() - mark[0])
          scalars["learning_rate"] = float(schedule(step - 1))
          scalars["images_per_second"] = rate
          scalars |= mfu(rate) | spent.shares()
          scalars["eta_seconds"] = (last - step) * config.data.global_batch / rate
          writer.write(step, scalars, _line(step, last, scalars))
          pending, mark = None, (time.monotonic(), step)
        if stop or save:
          with spent.spending("save"):
            measured = measure(state.joined(average=True))
            checkpoints.save(state, measured)
        if stop:
          processes.log_on_process_0(f"stopped by a signal at step {step}; rerun the same command to go on")
          return
        if step % config.train.eval_every == 0 and step < last:
          begun = time.monotonic()
          with spent.spending("evaluate"):
            _evaluate(evaluator, state, step, workdir, writer)
          mark = (mark[0] + time.monotonic() - begun, mark[1])  # not a part of the training rate
      # The weights come last: where those of this step are missing, an earlier run was stopped before its end.
      path = os.path.join(workdir, "weights.safetensors")
      if first >= last and _step_of(path) == first:
        processes.log_on_process_0(f"nothing to do: {workdir} is at step {first} of train.num_steps={last}")
        return
      _evaluate(evaluator, state, int(state.step), workdir, writer)
      extra = {_STEP: str(int(state.step))}
      if measured is None:  # else it is that of the last step, saved just now
        measured = measure(state.joined(average=True))
      told = "".join(f"; {name}={value:.5g} was measured" for name, value in measured.items())
      weights = processes.gather_on_process_0({k: v for k, v in state.joined(average=True).items() if k in parts})
      if processes.is_process_0():
        full = with_fields(config, measured)
        saving.save_weights(path, full, weights, config.train.export_dtype, extra=extra)
      processes.log_on_process_0(f"averaged weights ({config.train.export_dtype}): {path}{told}")


class _NoWriter:
  """In place of metrics.Writer, where another process writes."""

  def write(self, *args):
    pass

  def close(self):
    pass


def _read_init(path: str, frozen: Sequence[str], mesh) -> dict:
  """Returns the weights at config.init_from, {} where that is empty; ValueError if frozen parts need them."""
  if frozen and not path:
    raise ValueError(f"the frozen {', '.join(frozen)} needs trained weights: give --config.init_from=PATH")
  return loading.load(path, mesh=mesh)[1] if path else {}


def _step_of(path: str) -> int | None:
  """Returns the step of the weights that train() left at path; None where no readable file of a known step is."""
  try:
    with safetensors.safe_open(path, "numpy") as f:
      step = (f.metadata() or {}).get(_STEP, "")
  except (OSError, safetensors.SafetensorError):
    return None
  return int(step) if step.isdecimal() else None


def _check(scalars: dict, images: int, config, checkpoints):
  """Raises ValueError when a loss was not finite or too many files were unreadable."""
  bad = int(scalars.pop("first_bad_step"))
  if bad != metrics_lib.NEVER:
    kept = checkpoints.latest_step()
    state = f"the checkpoint of step {kept} is untouched" if kept is not None else "there is no checkpoint yet"
    raise ValueError(
      f"loss or gradient not finite at step {bad}; {state}. "
      "Lower optim.learning_rate or optim.clip_norm, or look at the data of that step"
    )
  if scalars["unreadable"] > config.data.max_unreadable * images:
    raise ValueError(
      f"{int(scalars['unreadable'])} unreadable files among the last {images} images, a larger share than "
      f"data.max_unreadable={config.data.max_unreadable}; the log names them"
    )


def _evaluate(evaluator, state, step: int, workdir: str, writer):
  """Writes the report on the averaged parameters, numbers and pictures, under workdir/eval/STEP."""
  report = evaluator.run(state.joined(average=True))
  if not processes.is_process_0():
    return
  out = os.path.join(workdir, "eval", f"{step:08d}")
  report.write(out)
  writer.write(step, report.scalars, f"{report.table()}\npictures of step {step}: {out}")


def _line(step: int, last: int, s: dict) -> str:
  minutes, seconds = divmod(int(s["eta_seconds"]), 60)
  eta = f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
  return (
    f"step {step}/{last}  loss {s['loss']:.4f}  |grad| {s['grad_norm']:.3f}  lr {s['learning_rate']:.2e}  "
    f"{s['images_per_second']:.1f} images/s  ETA {eta}  {goodput.line(s)}"
  )


def main():
  if CONFIG.value is None or not WORKDIR.value:
    raise ValueError("give --config=NAME and --workdir=DIR")
  train(CONFIG.value, WORKDIR.value)


if __name__ == "__main__":
  cli.run(main)
