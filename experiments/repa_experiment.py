"""Does REPA shorten training? A small self-trained teacher, three small tokenizers, and what they learn by which step.

python -m experiments.repa_experiment teacher DIR   trains a small ViT without labels, writes DIR/own and DIR/random
python -m experiments.repa_experiment train DIR     trains tokenizers without REPA, with DIR/own and with DIR/random
python -m experiments.repa_experiment plot DIR      draws docs/images/repa.png and prints a table

docs/repa.md has the results.
"""

import functools
import json
from pathlib import Path
import time

from flax.core.meta import unbox
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from flextok_jax import cli
from flextok_jax.configs import shapes
from flextok_jax.core.tables import markdown_table
from flextok_jax.data import pipeline, transforms
from flextok_jax.data.sources.base import read
from flextok_jax.models.perception.vit import IMAGENET, ViT
from flextok_jax.models.tokenizer.decoder import Inputs
from flextok_jax.parallel import sharding
from flextok_jax.stages import make_stage
from flextok_jax.training import inputs, optim
from flextok_jax.training.state import init_state, make_update
from flextok_jax.weights.perception import vit as vit_files

SIZE, PATCH, WIDTH = 32, 4, 96
SIZES = dict(
  patch_size=PATCH, grid=SIZE // PATCH, width=WIDTH, depth=4, head_dim=32, mlp_hidden=4 * WIDTH, layer_scale=True
)
RUNS = {"without": None, "own teacher": "own", "random teacher": "random"}
STEPS, MEASURED = 240, (40, 80, 120, 160, 200, 240)
PROBES = {"shapes": 6, "emoji": 13}  # classes: the shape of the largest object on a plain background; the emoji's group
COUNT = 600  # images of a probe, a third of them for testing


def config_of(folder=None, teacher=None, steps=STEPS):
  """Returns the config of a tokenizer of scenes, emoji and photographs, with REPA if a teacher is given."""
  c = shapes.get_config()
  c.update(
    fast=False,  # compiles sooner
    encoder=dict(depth=3),
    tokens=dict(levels=(8, 8, 8, 5, 5, 5), nested_dropout="pow2"),
    data=dict(
      sources=dict(synthetic=dict(weight=0.45, style="scenes"), emoji=dict(weight=0.4), photos=dict(weight=0.15))
    ),
    optim=dict(name="adamw", learning_rate=1.5e-3, warmup_steps=30, ema_decay=0.95),
    train=dict(num_steps=steps),
  )
  if teacher:
    c.repa.update(dict(weight=1.0, block=1, hidden=256, teacher=str(folder / teacher), features=WIDTH, dtype="float32"))
  return c


# The teacher: SimCLR (Chen et al. 2020), which contrasts two crops of an image with those of all others in the batch.


def crops(key, images):
  """Random crops of 40% to 100% of the area, flips, colour changes: [b, s, s, 3] in [0, 1] -> normalised."""

  def one(key, image):
    keys = jax.random.split(key, 5)
    side = jnp.sqrt(jax.random.uniform(keys[0], minval=0.4))
    shift = -jax.random.uniform(keys[1], (2,)) * (1 - side) * SIZE / side
    image = jax.image.scale_and_translate(image, image.shape, (0, 1), jnp.full(2, 1 / side), shift, "linear")
    image = jnp.where(jax.random.bernoulli(keys[2]), image[:, ::-1], image)
    gain, offset = jax.random.uniform(keys[3], (3,), minval=0.6, maxval=1.4), jax.random.uniform(keys[4], (3,)) - 0.5
    return ((image - 0.5) * gain + 0.5 + 0.3 * offset).clip(0, 1)

  images = jax.vmap(one)(jax.random.split(key, len(images)), images)
  return (images - jnp.asarray(IMAGENET[0])) / jnp.asarray(IMAGENET[1])


def train_teacher(folder: Path, steps: int = 250, size: int = 64, temperature: float = 0.2):
  vit, key = ViT(**SIZES), jax.random.key(0)
  init = jax.jit(lambda key: unbox(vit.init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"]))
  write(folder / "random", init(jax.random.key(7)))
  keys = jax.random.split(jax.random.key(1))
  dense = lambda key, m, n: jax.random.normal(key, (m, n)) * m**-0.5
  params = {"vit": init(key), "head": [dense(keys[0], WIDTH, 256), dense(keys[1], 256, 64)]}
  schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, 20, steps, 1e-5)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(params, state, images, key):
    both = jnp.concatenate([crops(k, images / 255.0) for k in jax.random.split(key)])

    def loss_fn(params):
      x = vit.apply({"params": params["vit"]}, both)["patches"].mean(1)  # the mean, so that the patches learn
      x = jax.nn.gelu(x @ params["head"][0]) @ params["head"][1]
      x = x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)
      logits = x @ x.T / temperature - 1e9 * jnp.eye(2 * size)
      return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(jnp.arange(2 * size), size)).mean()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    changes, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, changes), state, loss

  batches = pipeline.train_batches(inputs.image_data(config_of()), global_batch=size, image_size=SIZE, seed=1)
  state, begun = optimizer.init(params), time.time()
  for step in range(1, steps + 1):
    images = next(batches)["image"].astype(np.float32)
    params, state, loss = update(params, state, images, jax.random.fold_in(key, step))
    if step % 25 == 0:
      print(f"teacher, step {step}: loss {loss:.3f}, {(time.time() - begun) / step:.2f} s per step", flush=True)
  write(folder / "own", params["vit"])
  for name in ("own", "random"):
    print(f"{name}: probes of the mean patch {vit_probe(vit_files.load_vit(folder / name)[1])}", flush=True)


def write(folder: Path, params):
  """Writes a ViT in the format of a DINOv2 in transformers."""
  folder.mkdir(parents=True, exist_ok=True)
  flat = {path: np.asarray(x, np.float32) for path, x in flatten_dict(params, sep="/").items()}
  found = {}
  for e in vit_files.entries({path: x.shape for path, x in flat.items()}, "dinov2"):
    found |= {name: np.ascontiguousarray(e.to_official(flat[e.path], i)) for i, name in enumerate(e.names)}
  save_file(found, folder / "model.safetensors", {"format": "pt"})
  config = dict(
    model_type="dinov2",
    hidden_size=WIDTH,
    num_hidden_layers=SIZES["depth"],
    num_attention_heads=WIDTH // SIZES["head_dim"],
    patch_size=PATCH,
    image_size=SIZE,
    layer_norm_eps=1e-6,
    hidden_act="gelu",
    num_channels=3,
    qkv_bias=True,
    mlp_ratio=4,
    use_swiglu_ffn=False,
  )
  (folder / "config.json").write_text(json.dumps(config, indent=1))


# What the tokenizers learned.


@functools.cache
def probe_sets():
  """Returns {name: (images uint8 [n, s, s, 3], labels [n])}; emoji are from the training split, which has no labels."""
  config = config_of()
  config.data.sources.synthetic.style = "plain"
  data = inputs.image_data(config)
  shapes = pipeline.eval_set(data, "synthetic", image_size=SIZE, num_images=COUNT)
  source = data.open_source("emoji", "train")
  crop = lambda image: transforms.center_crop(image, SIZE)
  drawn = [read(source, int(i), crop)[0] for i in np.random.default_rng(0).integers(0, 10**6, COUNT)]
  classes = np.unique(shapes["label"], return_inverse=True)[1]
  emoji = np.stack([record["image"] for record in drawn]), np.array([record["label"] for record in drawn])
  return {"shapes": (shapes["image"], classes), "emoji": emoji}


def ridge(features: np.ndarray, labels: np.ndarray, strength: float = 30.0) -> float:
  """Returns the accuracy, on the last third, of a ridge regression to the classes that is fitted on the rest."""
  cut = 2 * len(labels) // 3
  x = features.astype(np.float64)
  x = (x - x[:cut].mean(0)) / (x[:cut].std(0) + 1e-6)
  x = np.concatenate([x, np.ones((len(x), 1))], 1)
  y = np.eye(labels.max() + 1)[labels]
  w = np.linalg.solve(x[:cut].T @ x[:cut] + strength * np.eye(x.shape[1]), x[:cut].T @ y[:cut])
  return float(((x[cut:] @ w).argmax(1) == labels[cut:]).mean())


def batched(fn, images, size=100):
  return np.concatenate([np.asarray(fn(images[i : i + size])) for i in range(0, len(images), size)])


@functools.cache
def _vit_fn():
  mean, std = map(jnp.asarray, IMAGENET)
  apply = lambda params, x: ViT(**SIZES).apply({"params": params}, (x / 255.0 - mean) / std)["patches"].mean(1)
  return jax.jit(apply)


def vit_probe(params) -> str:
  found = {
    name: ridge(batched(lambda x: _vit_fn()(params, x), images), labels)
    for name, (images, labels) in probe_sets().items()
  }
  return ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in found.items())


def make_measure(config):
  """Returns a function of params that measures the flow loss of held-out images and the accuracies of the probes."""
  config = config.copy_and_resolve_references()
  config.repa.weight = 0.0
  stage = make_stage(config)
  sets = {
    name: pipeline.eval_set(inputs.image_data(config), name, image_size=SIZE, num_images=192)["image"][:192]
    for name in ("synthetic", "emoji")
  }
  loss_fn = jax.jit(
    lambda params, images, i: (
      stage.loss_fn(params, {"image": images}, jax.random.fold_in(jax.random.key(9), i), 0)[1]["loss"][0] / len(images)
    )
  )

  @jax.jit
  def features(params, images):
    apply = functools.partial(stage.model.apply, {"params": params})
    latents = apply(images, method="encode_latents")
    z = apply(latents, method="encode_registers").reshape(len(images), -1)
    noise, t = jax.random.normal(jax.random.key(3), latents.shape), jnp.full(len(images), 0.3)
    x_t = 0.7 * latents + 0.3 * noise
    codes, none = jnp.zeros((len(images), 1, 6)), jnp.ones(len(images), bool)  # only patches, no condition
    inputs = [Inputs(x_t, t, codes, jnp.ones(len(images), int), none)]
    taps = [apply(inputs, block, method="velocity_batches")[0][1].mean(1) for block in (1, 2)]
    return jnp.concatenate([z, *taps], -1)

  def measure(params):
    losses = {
      f"loss_{name}": float(np.mean([loss_fn(params, x[i : i + 64], i) for i in range(0, 192, 64)]))
      for name, x in sets.items()
    }
    width, probes = config.decoder.width, {}
    for name, (images, labels) in probe_sets().items():
      found = batched(lambda x: features(params, x), images)
      parts = np.split(found, [found.shape[1] - 2 * width, found.shape[1] - width], 1)
      probes |= {f"{name}_{what}": ridge(x, labels) for what, x in zip(("registers", "block_1", "block_2"), parts)}
    return losses | probes

  return measure


def train(folder: Path, steps: int = STEPS):
  for name, teacher in RUNS.items():
    out = folder / f"{name.replace(' ', '_')}.json"
    if out.exists():
      continue
    config = config_of(folder, teacher, steps)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    stage, optimizer = make_stage(config), optim.make_optimizer(config.optim, steps)
    prepare = inputs.make_prepare(config, mesh, train=True)
    batches = sharding.device_batches(inputs.train_batches(config, 0, mesh), sharding.batch_sharding(mesh))
    batches = map(prepare, batches)
    state = jax.jit(lambda key: unbox(init_state(stage, optimizer, key)))(jax.random.key(0))  # noqa: B023
    update = jax.jit(make_update(stage, optimizer, accumulate_steps=1, decay=config.optim.ema_decay), donate_argnums=0)
    measure, rows, spent = make_measure(config), [], 0.0
    for step in range(steps + 1):
      if step in MEASURED:
        rows.append({"step": step, "seconds": spent, **measure(state.joined(average=True))})
        print(name, rows[-1], flush=True)
      if step < steps:
        begun = time.time()
        state, metrics = update(state, next(batches), jax.random.key(1))
        metrics = jax.block_until_ready(metrics)
        spent += time.time() - begun
        if step % 50 == 49 and "repa" in metrics:
          print(f"{name}, step {step + 1}: repa {float(metrics['repa'].compute()):.3f}", flush=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")


def plot(folder: Path):
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  columns = {
    "loss_synthetic": "flow loss, held-out scenes",
    "loss_emoji": "flow loss, held-out emoji",
    "shapes_block_2": "probe of block 2, shapes",
    "emoji_registers": "probe of the registers, emoji",
  }
  figure, axes = plt.subplots(1, len(columns), figsize=(14, 3.2))
  found = {name: json.loads((folder / f"{name.replace(' ', '_')}.json").read_text()) for name in RUNS}
  for axis, (column, title) in zip(axes, columns.items()):
    for name, rows in found.items():
      axis.plot([row["step"] for row in rows], [row[column] for row in rows], marker="o", ms=3, label=name)
    axis.set(title=title, xlabel="steps")
    axis.grid(alpha=0.3)
  axes[0].legend()
  figure.tight_layout()
  out = Path(__file__).parents[1] / "docs" / "images" / "repa.png"
  out.parent.mkdir(exist_ok=True)
  figure.savefig(out, dpi=80)
  names = [name for name in rows[0] if name not in ("step", "seconds")]
  lines = [
    [name, str(row["step"]), *(f"{row[column]:.3f}" for column in names)]
    for name, rows in found.items()
    for row in rows
  ]
  print(markdown_table(("run", "steps", *names), lines))


def main(what: str, folder: str):
  """Runs one part of the experiment."""
  parts = {"teacher": train_teacher, "train": train, "plot": plot}
  if what not in parts:
    raise ValueError(f"unknown part {what!r}: one of {', '.join(parts)}")
  path = Path(folder)
  path.mkdir(parents=True, exist_ok=True)
  parts[what](path)


if __name__ == "__main__":
  cli.run(main, ["WHAT", "DIR"])
