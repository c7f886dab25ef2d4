"""Which objective makes the better student in the same time: paths of the teacher, shortcuts, or MeanFlow's identity?

python -m experiments.student_objectives --trajectories=DIR --objective=paths|path_states|shortcut|meanflow --steps=N
    [--num_images=64] --out=FILE.json

Trains a student of the tokenizer of plain scenes that ships, on its trajectory shards (docs/students.md), and prints
seconds of training, fidelity and variation (evals/studies/steps.py) with 1, 2 and 4 steps at 1, 4 and 16 tokens.

  paths        stage "distill": from the states that the student's own sampler reaches to the teacher's path
  path_states  the same from the teacher's states
  shortcut     Frans et al. 2024: at interval 0 the teacher's guided velocity, else two steps of half the interval by
               the averaged student; data points are the ends of the paths, with new noise in every step
  meanflow     Geng et al. 2025: the guided velocity minus interval times the derivative along it, by jax.jvp; errors
               are weighted by their inverse, as there
"""

from collections.abc import Callable
import json
from pathlib import Path
import time
from typing import Any

from absl import flags
from flax.core import meta
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict
import numpy as np
import optax

from flextok_jax import cli
from flextok_jax.configs import distill
from flextok_jax.core import assets, files
from flextok_jax.data import pipeline
from flextok_jax.data.shards.trajectories import TrajectoryShards
from flextok_jax.data.sources import synthetic
from flextok_jax.evals.studies import steps as steps_study
from flextok_jax.inference.tokenizer import FlexTok, load
from flextok_jax.ops import flow, guidance
from flextok_jax.stages.distill import DistillStage, Paths, student_config
from flextok_jax.training import optim
from flextok_jax.weights import loading

TEACHER = "shapes"
STEPS, COUNTS = (1, 2, 4), (1, 4, 16)
FINEST = 5  # the shortest interval of "shortcut" is 2^-FINEST
BATCH = 32

Loss = Callable[[Any, Any, Paths, jax.Array], jax.Array]  # params, averaged params, rows, key


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_string("trajectories", None, "Shards of paths of the teacher.", flag_values=values)
  flags.DEFINE_enum("objective", "paths", list(LOSSES), "What the student learns.", flag_values=values)
  flags.DEFINE_integer("steps", 500, "Training steps.", 3, flag_values=values)
  flags.DEFINE_integer("num_images", 64, "Held-out scenes.", 1, flag_values=values)
  flags.DEFINE_string("out", None, "File for the results, .json.", flag_values=values)


def student_velocity(stage: DistillStage, params: Any, x: Any, t: Any, interval: Any, rows: Paths) -> Any:
  """Returns the student's velocity [b, h, w, c] for times and intervals [b]."""
  keep = jnp.zeros(x.shape[0], bool)
  inputs = x, t, rows.codes, rows.keep_k, keep
  return stage.model.apply({"params": params}, *inputs, interval=interval, method="velocity")


def guided_velocity(stage: DistillStage, params: Any, x: Any, t: Any, rows: Paths) -> Any:
  """Returns the teacher's velocity [b, h, w, c] with classifier-free guidance."""
  keep = jnp.zeros(x.shape[0], bool)
  v = lambda drop: stage.teacher.apply(
    {"params": {"decoder": params["teacher"]}}, x, t, rows.codes, rows.keep_k, drop, method="velocity"
  )
  return guidance.cfg(v(keep), v(~keep), stage.teacher_sampler.guidance_scale)


def per_image(x: jax.Array) -> jax.Array:
  """Returns values [b] as [b, 1, 1, 1]."""
  return x[:, None, None, None]


def squared(error: jax.Array) -> jax.Array:
  """Returns the mean square of each image of an error [b, h, w, c]."""
  return jnp.square(error).mean((1, 2, 3))


def paths_loss(stage: DistillStage, own: bool) -> Loss:
  """Returns the loss of stage "distill", from the student's own states or from the teacher's."""

  def teacher_states(params, buckets):
    del params
    every = stage.intervals // jnp.asarray(stage.steps, jnp.int32)
    return [rows.path[jnp.arange(len(segment))[:, None], segment * every] for rows, segment in buckets]

  if not own:
    stage._own_states = teacher_states  # type: ignore[method-assign]

  def loss(params, averaged, rows, key):
    del averaged
    shape = rows.keep_k.size, len(stage.steps)
    segment = jax.random.randint(key, shape, 0, jnp.asarray(stage.steps, jnp.int32), jnp.int32)
    return stage._errors(params, [(rows, segment, None)])[0].mean()

  return loss


def shortcut_loss(stage: DistillStage) -> Loss:
  """Returns the loss of shortcut models; a quarter of the rows has interval 0."""

  def loss(params, averaged, rows, key):
    level_key, t_key, noise_key = jax.random.split(key, 3)
    size = rows.keep_k.size
    base = jnp.arange(size) < size // 4
    interval = 2.0 ** -jax.random.randint(level_key, (size,), 0, FINEST).astype(jnp.float32)
    draw = jax.random.uniform(t_key, (size,))
    t = jnp.where(base, draw, interval * jnp.ceil(jnp.maximum(draw / interval, 1e-6)))
    x_t = flow.add_noise(rows.path[:, -1], jax.random.normal(noise_key, rows.path[:, 0].shape), t)
    half = interval / 2
    shown = jnp.where(half > 2.0**-FINEST, half, 0.0)  # as long as the finest: interval 0
    first = student_velocity(stage, averaged, x_t, t, shown, rows)
    second = student_velocity(stage, averaged, x_t - per_image(half) * first, t - half, shown, rows)
    teacher = guided_velocity(stage, params, x_t, t, rows)
    target = jax.lax.stop_gradient(jnp.where(per_image(base), teacher, (first + second) / 2))
    return squared(student_velocity(stage, params, x_t, t, jnp.where(base, 0.0, interval), rows) - target).mean()

  return loss


def meanflow_loss(stage: DistillStage) -> Loss:
  """Returns the loss of MeanFlow; a quarter of the rows has interval 0."""

  def loss(params, averaged, rows, key):
    del averaged
    t_key, noise_key = jax.random.split(key)
    size = rows.keep_k.size
    ends = jnp.sort(jax.random.uniform(t_key, (size, 2)), axis=1)
    t, r = ends[:, 1], jnp.where(jnp.arange(size) < size // 4, ends[:, 1], ends[:, 0])
    x_t = flow.add_noise(rows.path[:, -1], jax.random.normal(noise_key, rows.path[:, 0].shape), t)
    v = guided_velocity(stage, params, x_t, t, rows)
    mean = lambda x, t, interval: student_velocity(stage, params, x, t, interval, rows)
    u, slope = jax.jvp(mean, (x_t, t, t - r), (v, jnp.ones(size), jnp.ones(size)))
    error = squared(u - jax.lax.stop_gradient(v - per_image(t - r) * slope))
    return (error / jax.lax.stop_gradient(error + 1e-3)).mean()

  return loss


LOSSES: dict[str, Callable[[DistillStage], Loss]] = {
  "paths": lambda stage: paths_loss(stage, own=True),
  "path_states": lambda stage: paths_loss(stage, own=False),
  "shortcut": shortcut_loss,
  "meanflow": meanflow_loss,
}


def train(
  stage: DistillStage, config: ConfigDict, loss: Loss, params: Any, shards: TrajectoryShards, num_steps: int
) -> tuple[Any, float]:
  """Returns the averaged parameters and the seconds per step, compilation apart; `config` is the section optim."""
  optimizer = optim.make_optimizer(config, num_steps)

  @jax.jit
  def update(decoder, averaged, state, batch, key):
    rows = stage.stored_paths(batch)
    of = lambda decoder: loss({**params, **decoder}, {**params, **averaged}, rows, key)
    value, grads = jax.value_and_grad(of)(decoder)
    updates, state = optimizer.update(grads, state, decoder)
    decoder = optax.apply_updates(decoder, updates)
    return decoder, optax.incremental_update(decoder, averaged, 1 - config.ema_decay), state, value

  decoder = {"decoder": params["decoder"]}
  averaged, state = decoder, optimizer.init(decoder)
  strata = np.array(list(zip(*shards.strata(shards.meta["group_rows"]))))  # [groups, rows]
  rng, start = np.random.default_rng(0), 0.0
  for step in range(num_steps):
    groups = rng.integers(len(strata), size=BATCH // strata.shape[1])
    records = [shards[int(i)] for i in strata[groups].reshape(-1)]
    batch = {
      "token_ids": np.stack([r["ids"].astype(np.int32) for r in records]),
      "keep_k": np.array([r["keep_k"] for r in records], np.int32),
      "path": np.stack([r["path"] for r in records]),
    }
    key = jax.random.fold_in(jax.random.key(1), step)
    decoder, averaged, state, value = update(decoder, averaged, state, batch, key)
    if step == 1:  # compiled for the types of the first arguments, and of its own results
      jax.block_until_ready(value)
      start = time.perf_counter()
    if step % 100 == 99:
      print(f"step {step + 1}: loss {float(value):.4f}", flush=True)
  jax.block_until_ready(averaged)
  return averaged, (time.perf_counter() - start) / max(num_steps - 2, 1)


def measure(teacher: FlexTok, student: FlexTok, images: np.ndarray) -> list[dict[str, float]]:
  """Returns fidelity and variation by numbers of steps and tokens."""
  ids = np.repeat(np.asarray(teacher.tokenize(images)), 2, axis=0)  # two noises each
  to_bytes = lambda x: np.asarray((np.clip(x, -1, 1) + 1) * 127.5).round().astype(np.uint8)
  found = []
  for count in COUNTS:
    pictures = lambda model, **given: to_bytes(model.detokenize(ids[:, :count], key=jax.random.key(0), **given))  # noqa: B023
    pairs = lambda decodes: decodes.reshape(len(images), 2, *decodes.shape[1:])
    wanted = pictures(teacher)
    spread = steps_study.between_decodes(pairs(wanted))
    for num_steps in STEPS:
      decodes = pictures(student, num_steps=num_steps)
      found.append(
        {
          "tokens": count,
          "steps": num_steps,
          "fidelity": steps_study.mse(decodes, wanted) / spread,
          "variation": steps_study.between_decodes(pairs(decodes)) / spread,
        }
      )
  return found


def main(values: flags.FlagValues):
  """Trains a student and measures it."""
  cli.require(values, "trajectories", "out")
  teacher_config, weights = loading.load(assets.resolve(TEACHER))
  config = distill.get_config(TEACHER)
  config.distill.sampler.update(student_config(teacher_config, STEPS).distill.sampler)
  stage = DistillStage(config)
  new = meta.unbox(stage.init(jax.random.key(0))[0])
  params = stage.initial_weights(weights, new)
  averaged, seconds = train(
    stage, config.optim, LOSSES[values.objective](stage), params, TrajectoryShards(values.trajectories), values.steps
  )
  scenes = synthetic.Synthetic("validation", 2 * config.image_size, "plain")
  data = [pipeline.transforms.center_crop(scenes[i]["image"], config.image_size) for i in range(values.num_images)]
  kept = {name: part for name, part in weights.items() if name != "decoder"}
  student = FlexTok({**kept, **averaged}, FrozenConfigDict(student_config(teacher_config, STEPS)))
  report = {"objective": values.objective, "steps": values.steps, "seconds per step": seconds}
  report["results"] = measure(load(TEACHER), student, np.stack(data))
  text = json.dumps(report, indent=1)
  print(text)
  files.write_file(Path(values.out), (text + "\n").encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
