"""Does the generator draw what it was asked for? Agreement of its images with their class or caption.

python -m tests.agreement --generator=FILE --tokenizer=FILE [--num_images=256] [--guidance_scale=2] [--out=DIR]

A small convolutional network learns, on plain scenes of the `synthetic` source alone, the shape and the colour of the
largest object, the colour of the background and the number of objects. It then looks at generated images (classes: as
many of each; captions: those of held-out scenes), at held-out scenes, and at their reconstructions by the tokenizer,
which no generator on its tokens can be expected to surpass. For generators that stop by themselves: the rank
correlation of their length and the number of objects in the caption.
"""

import json
from pathlib import Path
import re

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

import flextok_jax
from flextok_jax import cli, files
from flextok_jax.data import synthetic, transforms
from flextok_jax.evals import metrics

GENERATOR = flags.DEFINE_string("generator", None, "Anything that load_ar takes.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "The tokenizer whose tokens it draws.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 256, "Images of each kind.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", None, "Of the generator; default: its config's.")
TOP_P = flags.DEFINE_float("top_p", None, "Of the generator; default: its config's.")
STEPS = flags.DEFINE_integer("steps", 1500, "Of the network's training.")
SEED = flags.DEFINE_integer("seed", 0, "Of everything.")
OUT = flags.DEFINE_string("out", None, "Folder for agreement.json; default: none.")

COLORS = synthetic.COLOR_NAMES
HEADS = {"shape": len(synthetic.CLASS_NAMES), "color": len(COLORS), "background": len(COLORS),
         "objects": synthetic.MAX_OBJECTS}
_COLOR = "|".join(COLORS)


class Network(nn.Module):
  """Four convolutions with stride 2 and a linear layer for each question."""

  @nn.compact
  def __call__(self, x):
    for width in (32, 64, 128, 128):
      x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3))(x)))
      x = nn.relu(nn.Conv(width, (3, 3), 2)(x))
    x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
    return {name: nn.Dense(size)(x) for name, size in HEADS.items()}


def answers(record: dict) -> dict[str, int]:
  """What a scene's record says."""
  color = re.match(rf"\S+ ({_COLOR}) ", record["caption"])[1]
  background = re.search(rf"on a plain ({_COLOR}) background", record["caption"])[1]
  return {"shape": record["label"], "color": COLORS.index(color), "background": COLORS.index(background),
          "objects": record["num_objects"] - 1}


def scenes(split: str, start: int, count: int, size: int) -> tuple[np.ndarray, dict[str, np.ndarray], list[str]]:
  """Images uint8 [n, s, s, 3] of a split, their answers [n], their captions."""
  source = synthetic.Synthetic(split, 2 * size, "plain")
  records = [source[i] for i in range(start, start + count)]
  images = np.stack([transforms.center_crop(r["image"], size) for r in records])
  said = [answers(r) for r in records]
  return images, {k: np.array([x[k] for x in said]) for k in HEADS}, [r["caption"] for r in records]


def learn(size: int, steps: int, seed: int, batch: int = 128):
  """Trains the network; returns a function of images uint8 [n, s, s, 3] to answers [n]."""
  network = Network()
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
    return sum(ce(logits[k], labels[k]).mean() for k in HEADS)

  @jax.jit
  def update(params, state, images, labels, key):
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels, key)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = optimizer.init(params)
  for step in range(steps):
    images, labels, _ = scenes("train", step * batch, batch, size)
    params, state, loss = update(params, state, images, labels, jax.random.fold_in(jax.random.key(seed), step))
    if step % 250 == 249:
      print(f"network: step {step + 1}, loss {float(loss):.3f}", flush=True)

  classify = jax.jit(lambda images: {k: v.argmax(-1) for k, v in network.apply(params, images / 127.5 - 1).items()})

  def answer(images):
    parts = [jax.device_get(classify(images[i : i + 256])) for i in range(0, len(images), 256)]
    return {k: np.concatenate([part[k] for part in parts]) for k in HEADS}

  return answer


def decode(tokenizer, ids: list, seed: int, batch: int = 64) -> np.ndarray:
  """Images uint8 of sequences of ids, by the tokenizer's own sampler."""
  s, images = tokenizer.config.sampler, []
  for i in range(0, len(ids), batch):
    x = tokenizer.detokenize(
        list(ids[i : i + batch]), key=jax.random.fold_in(jax.random.key(seed), i), num_steps=s.num_steps,
        guidance=s.guidance, guidance_scale=s.guidance_scale)
    images.append(np.asarray((metrics.round_to_8bit(x) * 255).round(), np.uint8))
  return np.concatenate(images)


def main():
  if not GENERATOR.value or not TOKENIZER.value:
    raise ValueError("give --generator=FILE and --tokenizer=FILE")
  gen, tokenizer = flextok_jax.load_ar(GENERATOR.value), flextok_jax.load(TOKENIZER.value)
  ar, count, seed = gen.config.ar, NUM_IMAGES.value, SEED.value
  scale = ar.guidance_scale if GUIDANCE_SCALE.value is None else GUIDANCE_SCALE.value
  top_p = ar.top_p if TOP_P.value is None else TOP_P.value
  images, asked, captions = scenes("validation", 0, count, tokenizer.image_size)
  answer = learn(tokenizer.image_size, STEPS.value, seed)

  def share(pictures, wanted):
    found = answer(pictures)
    return {k: float((found[k] == v).mean()) for k, v in wanted.items()}

  report = {"num_images": count, "guidance_scale": scale, "top_p": top_p, "held-out scenes": share(images, asked)}
  ids = np.concatenate([tokenizer.tokenize(images[i : i + 64]) for i in range(0, count, 64)])
  report["their reconstructions"] = share(decode(tokenizer, ids, seed), asked)
  settings = dict(guidance_scale=scale, temperature=ar.temperature, top_k=ar.top_k, top_p=top_p)
  if ar.condition == "class":
    shapes = [synthetic.CLASS_NAMES.index(name) for name in synthetic.PLAIN_SHAPES]
    asked = {"shape": np.resize(shapes, count)}
    settings["labels"] = asked["shape"]
  else:
    settings["prompts"] = captions
  for name, change in (("generated", {}), ("generated without guidance", {"guidance_scale": 1.0})):
    sequences = gen.trim(gen.generate(jax.random.key(seed), **settings | change))
    report[name] = share(decode(tokenizer, sequences, seed), asked)
    if gen.stop_id is not None:
      lengths = [len(sequence) for sequence in sequences]
      rho = scipy.stats.spearmanr(lengths, asked["objects"])[0]
      report[name] |= {"mean length": float(np.mean(lengths)), "rank correlation with objects": float(rho)}
  text = json.dumps(report, indent=1)
  print(text)
  if OUT.value:
    files.write_file(Path(OUT.value) / "agreement.json", (text + "\n").encode())


if __name__ == "__main__":
  cli.run(main)
