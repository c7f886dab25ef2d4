"""The training loop of every stage."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import functools
import json
import os
import time
from typing import Any, Protocol

from etils import epath
from flax.core.meta import unbox
import jax
from ml_collections import ConfigDict

from flextok_jax import stages
from flextok_jax.config import check, with_fields
from flextok_jax.core import extras, interrupts, unreadable, workdirs
from flextok_jax.core.progress import Bar, on_terminal
from flextok_jax.data import pipeline
from flextok_jax.parallel import processes, sharding
from flextok_jax.stages.stage import Params
from flextok_jax.training import checkpoint, goodput, inputs, optim, writers
from flextok_jax.training import metrics as metrics_lib
from flextok_jax.training import plan as plans
from flextok_jax.training.state import TrainState, init_state, make_update, state_shardings
from flextok_jax.training.warm_start import warm_start
from flextok_jax.weights import loading, saving

_MAX_HEADER = 10**8  # bytes of the header of weights.safetensors
_ON_CTRL_C = "Ctrl-C: stopping after this step, with a checkpoint; a second Ctrl-C stops at once"
_STEP = "flextok_jax.step"  # metadata entry of weights.safetensors: the step whose averaged parameters it holds


class Evaluation(Protocol):
  """An evaluation that runs every train.eval_every steps."""

  def run(self, params: Params) -> Any:
    """Returns a report with scalars, table(), and write(folder), which returns the paths of its files."""


Measure = Callable[[Params], Mapping[str, float]]  # params -> {dotted name of a config field: its measured value}
# (config, stage, mesh, prepare) -> what to run; `prepare` is that of inputs.make_prepare.
MakeEvaluation = Callable[..., tuple[Evaluation, Measure]]


def train(config: ConfigDict, workdir: str, make_evaluation: MakeEvaluation | None = None) -> None:
  """Trains config.stage in workdir until config.train.num_steps, resuming from the newest checkpoint there.

  Step n is, in this order:

  1. batch n, which depends on config.seed and n alone;
  2. the update;
  3. every train.log_every steps and before each checkpoint, metrics: the run ends here if the loss was not finite or
     too many files were unreadable, so that a checkpoint never holds such a state;
  4. every train.checkpoint_every steps, at the last step and after SIGTERM or SIGINT (Ctrl-C), the checkpoint: after
     a signal the run ends;
  5. every train.eval_every steps, the evaluation of the averaged parameters, which changes no state.

  After the last step it evaluates once more and then writes weights.safetensors: that file with the last step in it
  means that the run is complete. A run stopped anywhere and resumed does the same updates as one that was not stopped,
  bit for bit if the devices compute deterministically.

  Several processes (parallel/processes.py) call it with the same arguments; process 0 writes and prints.

  Args:
    config: complete config of a run (flextok_jax/config/defaults.py).
    workdir: folder of checkpoints, metrics, evaluations and weights, on this machine or in a bucket (gs://); made if
      missing.
    make_evaluation: returns the evaluation and a function that measures config fields on the averaged parameters;
      None: no evaluation.

  Raises:
    FileNotFoundError: nothing is at config.init_from.
    KeyboardInterrupt: the run was stopped by Ctrl-C.
    MissingPackageError: train.wandb without its package.
    OSError: the disk is full.
    ValueError: bad settings, a workdir that another run uses or that cannot be written, unusable weights at
      config.init_from, no readable checkpoint, too many unreadable files, or a loss that is not finite.
  """
  # Settings. Everything is validated before anything is written.
  time_spent = goodput.Goodput()
  check(config)
  if config.train.wandb:
    extras.require("wandb", "wandb", f"train.wandb={config.train.wandb}")
  folder = workdirs.resolve(workdir)
  workdir = str(folder)
  if workdirs.is_remote(folder):
    processes.run_on_process_0(lambda: workdirs.check_writable(folder))
  config = inputs.with_weights(inputs.with_tokenizer(config), workdir)
  if not (epath.Path(workdir) / "config.json").exists():
    inputs.check_new(config)
  config = inputs.with_present_sets(inputs.with_present_sources(config, workdir))
  plan = plans.choose(config, jax.devices())
  if plan.impossible:
    raise ValueError(plan.problem)
  for warning in filter(None, (plan.problem, plan.advice)):
    processes.log_on_process_0(f"warning: {warning}")
  mesh, config = sharding.make_mesh(**plan.axes), with_fields(config, {"mesh.chosen": plan.text})
  batch_size, num_steps = config.data.global_batch, config.train.num_steps
  sharding.check_batch(batch_size, config.optim.accumulate_steps, mesh)
  stage = stages.make_stage(config)
  for warning in optim.check(config, stage.trained_parts):
    processes.log_on_process_0(f"warning: {warning}")
  stages.check_mesh(config, mesh)
  schedule = optim.make_schedule(config.optim, num_steps)
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  prepare = inputs.make_prepare(config, mesh, train=True)
  evaluation, measure = make_evaluation(config, stage, mesh, prepare) if make_evaluation else (None, lambda params: {})
  checkpoint.check_workdir(workdir, config)

  with contextlib.ExitStack() as stack:
    stack.enter_context(checkpoint.locked(workdir))
    keep = config.train.keep_checkpoints, config.train.keep_period
    checkpoints = stack.enter_context(contextlib.closing(checkpoint.Checkpoints(workdir, *keep, own=True)))

    # State: a new one is made in its place on the mesh, an old one is restored into the same places.
    optimizer = optim.make_optimizer(config.optim, num_steps)
    init = jax.jit(functools.partial(init_state, stage, optimizer))  # traced once for both uses
    boxed = jax.eval_shape(init, init_key)
    shardings = state_shardings(boxed, mesh, plan.shard_update)
    exported = loading.abstract_params(config)  # top-level parts of the model, without those that only the loss needs
    if checkpoints.latest_step() is None:
      frozen = [name for name in boxed.frozen if name in exported]
      weights = _read_initial_weights(config.init_from, frozen, mesh)
      networks = inputs.read_networks(stage.pretrained_networks, config.vae_loss.lpips)
      networks = {k: jax.tree.map(sharding.place, tree, shardings.frozen[k]) for k, tree in networks.items()}
      with time_spent.spending("compile"):
        state = jax.jit(lambda key: unbox(init(key)), out_shardings=shardings)(init_key)
      state = state.replace(frozen={**state.frozen, **networks})
      if weights:
        weights = stage.initial_weights(weights, state.params)
        state = jax.device_put(warm_start(state, weights, config.init_from, networks), shardings)
      del weights, networks  # they would keep the arrays that were replaced on the devices
    else:
      abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), unbox(boxed), shardings)
      state = checkpoints.restore(abstract)
      processes.log_on_process_0(f"resuming from step {int(state.step)} of {workdir}")
    inputs.check_latents(config, state.frozen)
    first = int(state.step)

    # Update and batches.
    update = jax.jit(
      make_update(stage, optimizer, accumulate_steps=config.optim.accumulate_steps, decay=config.optim.ema_decay),
      donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
    )
    buckets = inputs.open_buckets(config)
    reading = pipeline.closing(inputs.train_batches(config, first, mesh, buckets), inputs.image_data(config).loading)
    local_batches = stack.enter_context(reading)
    placed = sharding.device_batches(local_batches, sharding.batch_sharding(mesh))
    batches = map(prepare, stack.enter_context(contextlib.closing(placed)))

    # Outputs.
    processes.run_on_process_0(lambda: checkpoint.claim_workdir(workdir, config))
    preempted = stack.enter_context(processes.preemption())
    outputs = stack.enter_context(contextlib.closing(workdirs.Outputs(folder, writers.FETCH)))
    writer = stack.enter_context(contextlib.closing(writers.Writer(config, folder, outputs.path)))
    profile = goodput.Profile(config.profile_steps, outputs.path / "profile", os.path.join(workdir, "profile"))
    stack.enter_context(contextlib.closing(profile))
    count = sum(x.size for x in jax.tree.leaves(state.params))
    processes.log_on_process_0(
      f"stage {config.stage}: {count / 1e6:.1f}M trained parameters, {mesh.size} devices, steps {first}..{num_steps}"
    )
    processes.log_on_process_0(f"mesh {plan.text}")

    pending, measured = None, None  # metrics since the last log, and fields measured at the last checkpoint
    losses: list[float] = []  # of the steps since the last checkpoint, averaged between logs
    logged_at, logged_step = time.monotonic(), first
    compiled: set[Any] = set()  # shapes of batches
    bar = stack.enter_context(Bar(num_steps, "steps", on_terminal(), first))
    with time_spent.spending("step"), interrupts.as_sigterm(_ON_CTRL_C) as interrupted:
      for step in range(first + 1, num_steps + 1):
        profile.before(step, state)

        # Batch and update.
        with time_spent.spending("data", behind=pending):
          batch = next(batches)
        shape = tuple((name, x.shape) for name, x in batch.items())
        new = shape not in compiled
        compiled.add(shape)
        with time_spent.spending("compile" if new else "step"):
          state, metrics = update(state, batch, run_key)
          if new and len(buckets) > 1:
            name, unit = ("image", "pixels") if "image" in batch else ("latents", "latents")
            what = " x ".join(map(str, batch[name].shape[1:3])) + f" {unit}"
            processes.log_on_process_0(f"compiled update {len(compiled)} of {len(buckets)}: {what}")
          del batch  # its memory is free for the next one
          if step == first + 1:  # traced while the devices compute the first step
            mfu = goodput.make_mfu(config, list(mesh.devices.flat), buckets)
        bar(step)
        pending = metrics if pending is None else metrics_lib.merge(pending, metrics)
        stop, save = preempted(step), step % config.train.checkpoint_every == 0 or step == num_steps

        # Metrics.
        if stop or save or step % config.train.log_every == 0:
          images = (step - logged_step) * batch_size
          scalars = metrics_lib.compute(pending)
          _check_finite(scalars, checkpoints, workdir, config.optim.learning_rate)
          _check_unreadable(int(scalars["unreadable"]), images, config.data)
          # Of stage "vae" l1: its adversarial loss has no floor, so it can fall while the run diverges.
          losses += [scalars.get("l1", scalars["loss"])] * (step - logged_step)
          rate = images / (time.monotonic() - logged_at)
          scalars["learning_rate"] = float(schedule(step - 1))
          scalars["images_per_second"] = rate
          scalars |= mfu(rate) | time_spent.shares()
          scalars["eta_seconds"] = (num_steps - step) * batch_size / rate
          writer.write(step, scalars, _progress_line(step, num_steps, scalars))
          pending, logged_at, logged_step = None, time.monotonic(), step
          outputs.upload(now=stop or save)

        # Checkpoint.
        if stop or save:
          with time_spent.spending("save"):
            measured = measure(_averaged(stage, state))
            checkpoints.save(state, measured, loss=sum(losses) / len(losses))
            losses = []
        if stop:
          if not processes.true_on_all_processes(not interrupted()):
            checkpoints.wait()
            processes.true_on_all_processes(True)  # all have saved: the end of one may end the others
            raise KeyboardInterrupt(f"stopped by Ctrl-C at step {step}; rerun the same command to go on")
          processes.log_on_process_0(f"stopped by a signal at step {step}; rerun the same command to go on")
          return

        # Evaluation, whose time is not part of the training rate.
        if evaluation and step % config.train.eval_every == 0 and step < num_steps:
          begun = time.monotonic()
          with time_spent.spending("evaluate"):
            _evaluate(evaluation, stage, state, workdir, outputs, writer)
          logged_at += time.monotonic() - begun

      # Last evaluation, then the weights: without those of the last step, an earlier run was stopped before this.
      path = folder / loading.WEIGHTS
      if first >= num_steps and _step_of_weights(path) == first:
        processes.log_on_process_0(f"nothing to do: {workdir} is at step {first} of train.num_steps={num_steps}")
        return
      if evaluation:
        _evaluate(evaluation, stage, state, workdir, outputs, writer)
      if measured is None:  # no step was left to do
        measured = measure(_averaged(stage, state))
      params = _averaged(stage, state)
      params = {name: tree for name, tree in params.items() if name in exported}
      params = processes.gather_on_process_0(params)
      if processes.is_process_0():
        extra = {_STEP: str(int(state.step))}
        saving.save_weights(
          outputs.path / loading.WEIGHTS, with_fields(config, measured), params, config.train.export_dtype, extra=extra
        )
        outputs.upload()
      fields = "".join(f"; measured {name}={value:.5g}" for name, value in measured.items())
      processes.log_on_process_0(f"averaged weights ({config.train.export_dtype}): {path}{fields}")


def _read_initial_weights(path: str, frozen: Sequence[str], mesh: jax.sharding.Mesh) -> dict:
  """Returns the weights at config.init_from, {} if that is empty; ValueError if frozen parts need them."""
  if frozen and not path:
    raise ValueError(f"the frozen {', '.join(frozen)} needs trained weights: give config.init_from")
  return loading.load(path, mesh=mesh)[1] if path else {}


def _step_of_weights(path: epath.Path) -> int | None:
  """Returns the step of the weights that train wrote to path; None if there is no whole file with a step."""
  try:
    with path.open("rb") as f:
      size = int.from_bytes(f.read(8), "little")
      header = json.loads(f.read(min(size, _MAX_HEADER)))
      end = f.seek(0, os.SEEK_END)
    step = header.pop("__metadata__")[_STEP]
    whole = end == 8 + size + max(tensor["data_offsets"][1] for tensor in header.values())
    return int(step) if whole and step.isdecimal() else None
  except Exception:  # a damaged file can hold anything
    return None


def _check_finite(
  scalars: dict[str, float], checkpoints: checkpoint.Checkpoints, workdir: str, learning_rate: float
) -> None:
  """Raises ValueError if a loss was not finite; takes out "first_bad_step"."""
  bad = int(scalars.pop("first_bad_step"))
  if bad == metrics_lib.NEVER:
    return
  newest, sane = checkpoints.latest_step(), checkpoints.sane(before=bad)
  saved = "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is untouched"
  start, origin = "from the beginning", ""
  if sane:
    start = f"from step {sane[0]} (loss {sane[1]:.4g}, near the lowest)"
    origin = f" init_from={os.path.join(workdir, 'checkpoints', str(sane[0]))}"
  raise ValueError(
    f"loss or gradient not finite at step {bad}; {saved}. Look at the data of that step, or start a new run {start} "
    f"with a lower learning rate: the same command with workdir=NEW{origin} optim.learning_rate={learning_rate / 2:.3g}"
  )


def _check_unreadable(count: int, images: int, data: ConfigDict) -> None:
  """Raises ValueError if too many files were unreadable, unless it was the same one each time, of a small folder."""
  try:
    unreadable.check(count, images, data.max_unreadable, what=f"the last {images} images")
  except ValueError:
    one = data.max_unreadable > 0 and data.num_workers == 0 and unreadable.met() <= 1
    if not processes.true_on_all_processes(one):
      raise


def _averaged(stage: stages.Stage, state: TrainState) -> Any:
  """Returns the averaged parameters as those of a model."""
  return stage.merged(state.joined(average=True))


def _evaluate(
  evaluation: Evaluation,
  stage: stages.Stage,
  state: TrainState,
  workdir: str,
  outputs: workdirs.Outputs,
  writer: writers.Writer,
) -> None:
  """Evaluates the averaged parameters and writes numbers and pictures to workdir/eval/STEP."""
  report = evaluation.run(_averaged(stage, state))
  if not processes.is_process_0():
    return
  step = int(state.step)
  folder = os.path.join("eval", f"{step:08d}")
  pictures = [path for path in report.write(outputs.path / folder) if path.suffix == ".png"]
  line = f"{report.table()}\npictures of step {step}: {os.path.join(workdir, folder)}"
  writer.write(step, report.scalars, line, pictures)
  outputs.upload()


def _progress_line(step: int, num_steps: int, scalars: Mapping[str, Any]) -> str:
  s, (minutes, seconds) = scalars, divmod(int(scalars["eta_seconds"]), 60)
  eta = f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
  return (
    f"step {step}/{num_steps}  loss {s['loss']:.4f}  |grad| {s['grad_norm']:.3f}  lr {s['learning_rate']:.2e}  "
    f"{s['images_per_second']:.1f} images/s  ETA {eta}  {goodput.summary(s)}"
  )
