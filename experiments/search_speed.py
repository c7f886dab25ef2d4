"""How much faster is the batched, cached search than the same algorithm run naively?

python -m experiments.search_speed [--num_prompts=8] [--num_tokens=256] [--naive_prompts=1] [--branching=last]
    [--out=DIR]

A generator of 12 blocks of width 768 with random weights, guided, and a tiny decoder; beam width 5, 10 candidates,
geometric schedule, both in float32 on the same cores, without the time to compile. The naive search goes prompt by
prompt and recomputes the prefix for every token, as the public code does; it runs for the first --naive_prompts, and
its time is scaled to all. With --branching=last both must find the same tokens. Peak memory is that of the process.
"""

import json
from pathlib import Path
import resource
import time

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import FrozenConfigDict
import numpy as np

from flextok_jax import cli
from flextok_jax import config as common
from flextok_jax.core import files
from flextok_jax.inference import search, search_plan
from flextok_jax.inference.generator import ARGenerator
from flextok_jax.inference.tokenizer import FlexTok
from flextok_jax.weights import loading

WIDTH, CANDIDATES, SCALE = 5, 10, 3.0


def define_flags(values: flags.FlagValues = flags.FLAGS):
  """Defines the command's flags."""
  flags.DEFINE_integer("num_prompts", 8, "Classes that are searched for.", flag_values=values)
  flags.DEFINE_integer("naive_prompts", 1, "How many of them the naive search does.", flag_values=values)
  flags.DEFINE_integer("num_tokens", 256, "Tokens of a sequence.", flag_values=values)
  flags.DEFINE_enum("branching", "last", search_plan.BRANCHINGS, "See search_plan.Settings.", flag_values=values)
  flags.DEFINE_string("out", None, "Folder for the results; default: none.", flag_values=values)


def models(num_tokens: int) -> tuple[ARGenerator, FlexTok]:
  """Returns a generator and a tiny tokenizer with random weights."""
  part = dict(width=64, depth=2, head_dim=32, patch_size=4)
  tokenizer = common.derive(
    image_size=32,
    dtype="float32",
    vae=dict(kind="pixels", scaling_factor=1.0),
    encoder=part,
    decoder=part,
    tokens=dict(num_registers=num_tokens),
    sampler=dict(num_steps=4, guidance="none"),
  )
  generator = common.derive(stage="ar", dtype="float32", ar=dict(num_tokens=num_tokens, num_classes=10))
  made = []
  for kind, config in ((ARGenerator, generator), (FlexTok, tokenizer)):
    rng = np.random.default_rng(0)
    draw = lambda x, rng=rng: jnp.asarray(rng.normal(0, 0.03, x.shape), jnp.float32)
    made.append(kind(jax.tree.map(draw, loading.abstract_params(config)), FrozenConfigDict(config)))
  return made[0], made[1]


def brightness(candidates: search.Candidates) -> np.ndarray:
  """A verifier that costs nothing."""
  assert candidates.images is not None
  return candidates.images.mean((1, 2, 3))


def naive(gen: ARGenerator, model: FlexTok, label: int, key: jax.Array, counts: tuple[int, ...]) -> np.ndarray:
  """Returns the best ids [tokens] for a class, greedy, branching at the last token of a step."""

  def log_probs(rows: list[list[int]]) -> np.ndarray:
    """Of the next token of each row, which all have one length, by the whole prefix; padded to a multiple of 32."""
    length = len(rows[0])
    padded = np.zeros((WIDTH, min(-(-(length + 1) // 32) * 32, gen.num_tokens)), np.int32)
    padded[: len(rows), :length] = rows
    conditional, unconditional = (next_logits(gen, padded, np.int32(length), np.int32(c)) for c in (label, -1))
    return np.asarray(jax.nn.log_softmax(unconditional + SCALE * (conditional - unconditional)))[: len(rows)]

  beams: list[list[int]] = [[]]
  for count in counts:
    while len(beams[0]) < count - 1:
      beams = [[*row, int(found.argmax())] for row, found in zip(beams, log_probs(beams))]
    rows = []
    for row, found in zip(beams, log_probs(beams)):
      rows += [[*row, int(token)] for token in np.argsort(-found, kind="stable")[:CANDIDATES]]
    keys = jnp.stack([key] * len(rows))
    images = search.decode(model, np.array(rows, np.int32), None, keys, len(rows))
    order = np.argsort(-images.mean((1, 2, 3)), kind="stable")[:WIDTH]
    beams = [rows[i] for i in order]
  return np.array(beams[0])


@jax.jit
def next_logits(gen: ARGenerator, ids: jax.Array, length: jax.Array, label: jax.Array) -> jax.Array:
  """Returns the logits [b, num_ids] of token `length`, recomputed from ids [b, n]."""
  from flextok_jax.stages.ar import make_generator

  model = make_generator(gen.config)
  labels = jnp.full(len(ids), label)
  hidden = model.apply({"params": gen.params}, ids, labels, method="hidden")
  return model.ar.apply({"params": gen.params["ar"]}, hidden[:, length], method="logits")


def main(values: flags.FlagValues):
  """Times both, and prints the ratio."""
  gen, model = models(values.num_tokens)
  labels = np.arange(values.num_prompts) % 10
  keys = jax.random.split(jax.random.key(0), values.num_prompts)
  settings = dict(beam_width=WIDTH, candidates=CANDIDATES, branching=values.branching, greedy=True, batch_size=512)
  for _ in range(2):  # the first run compiles
    start = time.monotonic()
    found = gen.search(keys, model, brightness, labels=labels, guidance_scale=SCALE, **settings)
    searched = time.monotonic() - start
  print(f"search: {searched:.1f} s", flush=True)
  counts = tuple(step.ids.shape[2] for step in found.steps)
  for length in range(32, -(-values.num_tokens // 32) * 32 + 1, 32):
    next_logits(gen, np.zeros((WIDTH, min(length, values.num_tokens)), np.int32), np.int32(0), np.int32(0))
  start = time.monotonic()
  result = [naive(gen, model, int(labels[i]), keys[i], counts) for i in range(values.naive_prompts)]
  naive_seconds = time.monotonic() - start
  if values.branching == "last":
    np.testing.assert_array_equal(np.stack(result), found.ids[: values.naive_prompts, 0])
  scaled = naive_seconds * values.num_prompts / values.naive_prompts
  report = {
    **{name: values[name].value for name in ("num_prompts", "naive_prompts", "num_tokens", "branching")},
    "search_seconds": searched,
    "naive_seconds": scaled,
    "times_as_fast": scaled / searched,
    "peak_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
  }
  print(json.dumps(report, indent=1))
  if values.out:
    files.write_file(Path(values.out) / "search_speed.json", (json.dumps(report, indent=1) + "\n").encode())


if __name__ == "__main__":
  define_flags()
  cli.run(lambda: main(flags.FLAGS))
