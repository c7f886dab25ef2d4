"""Do generators draw what they are asked for? Measures how often images agree with their class or caption.

python -m experiments.agreement --generators=FILE,FILE --tokenizer=FILE [--num_images=256]
    [--guidance_scale=2] [--out=DIR]

A small convolutional network is trained only on plain scenes of the `synthetic` source. It learns the shape and the
colour of the largest object, the colour of the background, and the number of objects. It then classifies generated
images (for classes, equally many of each; for captions, those of held-out scenes), held-out scenes, and
reconstructions of these by the tokenizer, which are an upper bound for any generator on its tokens. For generators
that stop by themselves it also reports the rank correlation of their length with the number of objects in the
caption.
"""

from collections.abc import Callable
import json
from pathlib import Path

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import flextok_jax
from flextok_jax import cli
from flextok_jax.core import files
from flextok_jax.core import images as images_lib
from flextok_jax.data import transforms
from flextok_jax.data.sources import synthetic
from flextok_jax.inference.scenes import HEADS, read_caption
from flextok_jax.models.perception.scenes import SceneClassifier

Draw = Callable[[int], tuple[np.ndarray, dict[str, np.ndarray]]]


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_list("generators", [], "Generators: anything that load_ar takes.", flag_values=values)
  flags.DEFINE_string("tokenizer", None, "The tokenizer whose tokens they draw.", flag_values=values)
  flags.DEFINE_integer("num_images", 256, "Images of each kind.", flag_values=values)
  flags.DEFINE_float("guidance_scale", None, "Of the generators; default: from their configs.", flag_values=values)
  flags.DEFINE_float("top_p", None, "Of the generators; default: from their configs.", flag_values=values)
  flags.DEFINE_integer("steps", 1000, "Training steps of the network.", flag_values=values)
  flags.DEFINE_integer("seed", 0, "Seed of the network, the samples and the decoder's noise.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for agreement.json; default: none.", flag_values=values)


def scenes(split: str, start: int, count: int, size: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
  """Returns images uint8 [n, s, s, 3] of a split, their answers [n], their captions."""
  source = synthetic.Synthetic(split, 2 * size, "plain")
  records = [source[i] for i in range(start, start + count)]
  images = np.stack([transforms.center_crop(r["image"], size) for r in records])
  said = [read_caption(r["caption"]) for r in records]
  return images, {k: np.array([x[k] for x in said]) for k, _ in HEADS}, [r["caption"] for r in records]


def draw_scenes(size: int, first: int = 0, batch: int = 128):
  """Returns a function from a step to scenes of the training split, from number `first` on, for learn."""
  return lambda step: scenes("train", first + step * batch, batch, size)[:2]


def learn(draw: Draw, size: int, steps: int, seed: int) -> dict:
  """Trains a network on images uint8 [n, s, s, 3] and answers {question: [n]} of every step; returns its parameters."""
  network = SceneClassifier(HEADS)
  params = network.init(jax.random.key(seed), jnp.zeros((1, size, size, 3)))
  optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)

  def loss_fn(params, images, labels, key):
    x = images / 127.5 - 1
    blur, noise = jax.random.split(key)  # generated images are softer and noisier than drawn ones
    soft = nn.avg_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge"), (3, 3))
    x = x + jax.random.uniform(blur, (len(x), 1, 1, 1)) * (soft - x)
    x = x + 0.1 * jax.random.normal(noise, x.shape)
    logits = network.apply(params, x)
    ce = optax.softmax_cross_entropy_with_integer_labels
    return sum(ce(logits[k], labels[k]).mean() for k, _ in HEADS)

  @jax.jit
  def update(params, state, images, labels, key):
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  for step in range(steps):
    images, labels = draw(step)
    params, state, loss = update(params, state, images, labels, jax.random.fold_in(jax.random.key(seed), step))
    if step % 250 == 249:
      print(f"network: step {step + 1}, loss {float(loss):.3f}", flush=True)
  return params["params"]


def make_answer(params: dict):
  """Returns a function from images uint8 [n, s, s, 3] to a network's answers {question: [n]}."""
  network = SceneClassifier(HEADS)

  @jax.jit
  def classify(images):
    return {k: v.argmax(-1) for k, v in network.apply({"params": params}, images / 127.5 - 1).items()}

  def answer(images):
    parts = [jax.device_get(classify(images[i : i + 256])) for i in range(0, len(images), 256)]
    return {k: np.concatenate([part[k] for part in parts]) for k, _ in HEADS}

  return answer


def decode(tokenizer, ids: list, seed: int, batch: int = 64) -> np.ndarray:
  """Decodes sequences of ids to images uint8 [n, s, s, 3]."""
  images = []
  for i in range(0, len(ids), batch):
    x = tokenizer.detokenize(list(ids[i : i + batch]), key=jax.random.fold_in(jax.random.key(seed), i))
    images.append(np.asarray((images_lib.round_to_8bit(x) * 255).round(), np.uint8))
  return np.concatenate(images)


def generate(gen, seed: int, labels: np.ndarray, captions: list[str], **change) -> tuple[dict, list]:
  """Returns (settings, sequences of ids), for the classes or, with a text-conditional generator, the captions."""
  ar = gen.config.ar
  settings = {name: ar[name] for name in ("guidance_scale", "temperature", "top_k", "top_p")} | change
  asked = {"labels": labels} if ar.condition == "class" else {"prompts": captions}
  return settings, gen.trim(gen.generate(jax.random.key(seed), **asked, **settings))


def main(values: flags.FlagValues):
  """Measures what the flags ask for."""
  if not values.generators or not values.tokenizer:
    raise ValueError("give --generators=FILES and --tokenizer=FILE")
  tokenizer = flextok_jax.load(values.tokenizer)
  generators = {name: flextok_jax.load_ar(name) for name in values.generators}
  count, seed = values.num_images, values.seed
  given = {name: values[name].value for name in ("guidance_scale", "top_p") if values[name].value is not None}
  images, said, captions = scenes("validation", 0, count, tokenizer.image_size)
  shapes = [synthetic.CLASS_NAMES.index(name) for name in synthetic.PLAIN_SHAPES]
  labels = np.resize(shapes, count)
  answer = make_answer(learn(draw_scenes(tokenizer.image_size), tokenizer.image_size, values.steps, seed))

  def agreement(pictures, expected):
    found = answer(pictures)
    right = {k: found[k] == v for k, v in expected.items()}
    share = {k: float(v.mean()) for k, v in right.items()}
    return share | {"all": float(np.all(list(right.values()), axis=0).mean())}

  ids = np.concatenate([tokenizer.tokenize(images[i : i + 64]) for i in range(0, count, 64)])
  report = {
    "num_images": count,
    "held-out scenes": agreement(images, said),
    "their reconstructions": agreement(decode(tokenizer, ids, seed), said),
  }
  for name, gen in generators.items():
    expected = {"shape": labels} if gen.config.ar.condition == "class" else said
    for title, change in (("with guidance", given), ("without", given | {"guidance_scale": 1.0})):
      settings, sequences = generate(gen, seed, labels, captions, **change)
      results = agreement(decode(tokenizer, sequences, seed), expected)
      if gen.stop_id is not None:
        lengths = [len(sequence) for sequence in sequences]
        rho = scipy.stats.spearmanr(lengths, said["objects"])[0]
        results |= {"mean length": float(np.mean(lengths)), "rank correlation with objects": float(rho)}
      report[f"{name}, {title}"] = settings | results
  text = json.dumps(report, indent=1)
  print(text)
  if values.out:
    files.write_file(Path(values.out) / "agreement.json", (text + "\n").encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
