"""The generator's model, its stage and its loss: against plain numpy, and by properties."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flextok_jax.stages import make_stage
from tests.support import numpy_ar

LLAMA = dict(norm="rmsnorm", qk_norm="rmsnorm", ffn="swiglu")
GPT = dict(norm="layernorm", ffn="mlp_gelu")
BLOCKS = {
  "llama": LLAMA,
  "gpt_sincos_bias_head": dict(
    GPT, qk_norm="none", bias=True, pos_embed="sincos1d", head_layernorm=True, readout_multiplier=0.5
  ),
  "text_llama_bias": dict(LLAMA, condition="text", qk_norm="layernorm", bias=True, norm_eps=0.1),
  "text_gpt_sincos": dict(GPT, condition="text", qk_norm="layernorm", pos_embed="sincos1d", readout_multiplier=2.0),
  "none_stop_bias": dict(condition="none", norm="layernorm", qk_norm="none", ffn="swiglu", bias=True, stop=True),
}


def close(actual, desired, atol=1e-4):
  np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=atol)


def draw_batch(config, batch=3, seed=0):
  """Token ids with lengths, and labels or text features."""
  c, rng = config.ar, np.random.default_rng(seed)
  result = dict(
    token_ids=rng.integers(0, c.num_ids, (batch, c.num_tokens), np.int32),
    length=np.array([c.num_tokens, 5, 1], np.int32)[:batch],
    label=rng.integers(0, c.num_classes, batch, np.int32) if c.condition == "class" else np.full(batch, -1, np.int32),
  )
  result["label"][-1] = -1
  if c.condition == "text":
    result["text_features"] = rng.standard_normal((batch, 7, config.text.features)).astype(np.float32)
    result["text_lengths"] = np.array([7, 1, 4], np.int32)[:batch]
  return result


def read(gen, batch):
  """The generator's logits of a batch."""
  labels = batch["label"] if gen.num_classes else None
  return np.asarray(gen.logits(batch["token_ids"], labels, batch.get("text_features"), batch.get("text_lengths")))


@pytest.mark.parametrize("name", BLOCKS)
def test_logits_of_numpy(name):
  gen = numpy_ar.tiny_generator(**BLOCKS[name])
  batch = draw_batch(gen.config)
  expected = numpy_ar.forward(
    gen.params, gen.config.ar, batch["token_ids"], batch["label"], batch.get("text_features"), batch.get("text_lengths")
  )
  logits = read(gen, batch)
  assert logits.shape == (3, 12, 25 if gen.config.ar.stop else 24) and logits.dtype == np.float32
  close(logits, expected, 1e-5)


# Properties of the model


@pytest.fixture(scope="module")
def by_class():
  return numpy_ar.tiny_generator(bias=True)


@pytest.fixture(scope="module")
def by_text():
  return numpy_ar.tiny_generator(condition="text")


@pytest.mark.parametrize("condition", ["class", "text"])
def test_causality(by_class, by_text, condition):
  """Id j has no effect on positions up to j, and an effect on all later ones."""
  gen = by_class if condition == "class" else by_text
  batch = draw_batch(gen.config)
  before = read(gen, batch)
  for j in (0, 4, 11):
    ids = batch["token_ids"].copy()
    ids[:, j] = (ids[:, j] + 7) % 24
    after = read(gen, dict(batch, token_ids=ids))
    np.testing.assert_array_equal(after[:, : j + 1], before[:, : j + 1])
    assert (np.abs(after - before)[:, j + 1 :].max(-1) > 1e-4).all()


def test_class_reaches_every_token(by_class):
  batch = draw_batch(by_class.config)
  before = read(by_class, batch)
  after = read(by_class, dict(batch, label=(batch["label"] + 2) % 5))
  assert (np.abs(after - before).max(-1) > 1e-4).all()
  np.testing.assert_array_equal(
    by_class.logits(batch["token_ids"]), by_class.logits(batch["token_ids"], np.full(3, -1))
  )


def test_padding_of_text_has_no_influence(by_text):
  batch = draw_batch(by_text.config)
  before, text = read(by_text, batch), batch["text_features"].copy()
  text[np.arange(7) >= batch["text_lengths"][:, None]] = 1e3
  np.testing.assert_array_equal(read(by_text, dict(batch, text_features=text)), before)
  text[:, 0] += 1
  assert (np.abs(read(by_text, dict(batch, text_features=text)) - before).max(-1) > 1e-4).all()
  cut = by_text.logits(batch["token_ids"], None, batch["text_features"][:, :4], np.minimum(batch["text_lengths"], 4))
  close(cut[1:], before[1:], 1e-6)


def test_fewer_ids_than_the_model_takes(by_class):
  batch = draw_batch(by_class.config)
  close(by_class.logits(batch["token_ids"][:, :5], batch["label"]), read(by_class, batch)[:, :5], 1e-6)


# Loss


@pytest.fixture(scope="module")
def hidden_and_targets():
  rng = np.random.default_rng(1)
  return rng.standard_normal((3, 12, 32)).astype(np.float32), rng.integers(0, 24, (3, 12), np.int32)


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 100])
def test_chunked_cross_entropy(by_class, hidden_and_targets, chunk):
  """The same in value and gradient, whether the chunk divides the length or not; rows weigh differently."""
  hidden, targets = hidden_and_targets
  model = make_stage(by_class.config).model.ar
  weights = np.random.default_rng(2).random(targets.shape).astype(np.float32)
  apply = lambda readout, *args, method: model.apply(
    {"params": {**by_class.params["ar"], "readout": readout}}, *args, method=method
  )

  def chunked(readout, x):
    losses = apply(readout, x, targets, chunk, method="losses")
    return (losses * weights).sum(), losses

  def direct(readout, x):
    logits = apply(readout, x, method="logits")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum(), losses

  grad = lambda fn: jax.jit(jax.value_and_grad(fn, (0, 1), has_aux=True))(by_class.params["ar"]["readout"], hidden)
  jax.tree.map(lambda a, b: close(a, b, 1e-5), grad(chunked), grad(direct))


def test_chunked_cross_entropy_saves_memory():
  """With many ids, most of the memory is logits: of all positions at once, or of one chunk."""
  config = numpy_ar.tiny(num_ids=20_000, num_tokens=16)
  params = numpy_ar.abstract_params(config)["ar"]
  hidden, targets = jnp.zeros((8, 16, 32)), jnp.zeros((8, 16), int)
  model, temporary = make_stage(config).model.ar, {}
  for chunk in (1, 16):

    def loss_fn(readout, hidden, rest, chunk=chunk):
      return model.apply({"params": {**rest, **readout}}, hidden, targets, chunk, method="losses").sum()

    lowered = jax.jit(jax.grad(loss_fn, (0, 1))).lower({"readout": params["readout"]}, hidden, params)
    temporary[chunk] = lowered.compile().memory_analysis().temp_size_in_bytes
  logits = 8 * 16 * 20_000 * 4  # bytes of all
  assert temporary[16] > 1.5 * logits > 2 * temporary[1], temporary


@pytest.mark.parametrize("stop, decay", [(False, 0.0), (True, 0.7)])
def test_loss_of_numpy(stop, decay):
  """Tokens up to the length, then, if the model is to stop, the stop; earlier ones weigh more with a decay."""
  config = numpy_ar.tiny(stop=stop, position_decay=decay)
  stage, params, batch = make_stage(config), numpy_ar.random_params(config), draw_batch(config)
  log_probs = numpy_ar.log_softmax(numpy_ar.forward(params, config.ar, batch["token_ids"], batch["label"]))
  losses, counts = np.zeros((3, 12)), np.zeros((3, 12))
  for row, length in enumerate(batch["length"]):
    targets = [*batch["token_ids"][row, :length], *([24] if stop else [])][:12]
    for i, target in enumerate(targets):
      losses[row, i], counts[row, i] = -log_probs[row, i, target], 1
  evaluate = lambda batch: (stage.predict_fns["token_losses"](params, batch), *stage.loss_fn(params, batch, None, 0))
  ours, loss, metrics = jax.jit(evaluate)(batch)
  close(ours[0] * ours[1], losses)
  np.testing.assert_array_equal(ours[1], counts)

  weights = counts * np.arange(1, 13) ** -decay
  close(loss, (losses * weights).sum() / weights.sum())
  spans = {
    "loss": (0, 12),
    "loss_to_1": (0, 1),
    "loss_to_2": (1, 2),
    "loss_to_4": (2, 4),
    "loss_to_8": (4, 8),
    "loss_to_12": (8, 12),
  }
  assert set(metrics) == set(spans)
  for name, (low, high) in spans.items():
    close(metrics[name], (losses[:, low:high].sum(), counts[:, low:high].sum()))


def test_gradients_of_numpy():
  """Slopes of the loss in random directions, with recomputed activations and text ids for the joint encoder."""
  config = numpy_ar.tiny(condition="text", bias=True)
  config.remat = "full"
  stage, params, batch = make_stage(config), numpy_ar.random_params(config), draw_batch(config)
  del batch["text_features"]
  batch["text_ids"] = np.random.default_rng(0).integers(0, 257, (3, 10), np.int32)
  loss, grads = jax.jit(jax.value_and_grad(lambda params: stage.loss_fn(params, batch, None, 0)[0]))(params)
  encode = lambda *args: stage.model.apply({"params": params}, *args, method="encode_text")
  features = jax.jit(encode)(batch["text_ids"], batch["text_lengths"])

  def expected(params):
    logits = numpy_ar.forward(params, config.ar, batch["token_ids"], batch["label"], features, batch["text_lengths"])
    chosen = np.take_along_axis(numpy_ar.log_softmax(logits), batch["token_ids"][..., None], -1)[..., 0]
    counts = np.arange(12) < batch["length"][:, None]
    return -(chosen * counts).sum() / counts.sum()

  close(loss, expected(params))
  text_grads = grads.pop("text")
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(text_grads))
  given = {k: params[k] for k in grads}
  rng = np.random.default_rng(1)
  for _ in range(3):
    direction = jax.tree.map(lambda p: rng.standard_normal(p.shape), given)
    moved = lambda step: expected(jax.tree.map(lambda p, d: np.float64(p) + step * d, given, direction))  # noqa: B023
    slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
    close(slope, (moved(1e-5) - moved(-1e-5)) / 2e-5)


# Bad configurations

BAD = {
  "dtype": (dict(dtype="int8"), "'int8'"),
  "attention": (dict(attention="flash"), "'flash'"),
  "width": (dict(ar=dict(width=0)), "ar.width must be .* 1 to 65536, got 0"),
  "head_dim": (dict(ar=dict(head_dim=24)), "width 32 .* ar.head_dim 24"),
  "sincos": (dict(ar=dict(pos_embed="sincos1d", width=30, head_dim=15)), "width 30 .* 4"),
  "loss_chunk": (dict(ar=dict(loss_chunk=0)), "ar.loss_chunk .* 0"),
  "num_classes": (dict(ar=dict(num_classes=0)), "ar.num_classes .* 0"),
  "condition": (dict(ar=dict(condition="image")), "ar.condition must be one of class, text, none, got 'image'"),
  "norm": (dict(ar=dict(norm="batchnorm")), "ar.norm .* 'batchnorm'"),
  "qk_norm": (dict(ar=dict(qk_norm="l2")), "ar.qk_norm must be one of .*none, got 'l2'"),
  "ffn": (dict(ar=dict(ffn="relu")), "ar.ffn .* 'relu'"),
  "pos_embed": (dict(ar=dict(pos_embed="rope")), "ar.pos_embed .* 'rope'"),
  "mlp_ratio": (dict(ar=dict(mlp_ratio=0.0)), "ar.mlp_ratio .* 0.0"),
  "mlp_ratio_nan": (dict(ar=dict(mlp_ratio=float("nan"))), "ar.mlp_ratio .* nan"),
  "drop_condition": (dict(ar=dict(drop_condition=1.0)), "ar.drop_condition .* 1.0"),
  "position_decay": (dict(ar=dict(position_decay=float("inf"))), "ar.position_decay .* inf"),
  "encoder": (dict(ar=dict(condition="text"), text=dict(encoder="clip")), "text.encoder .*t5, bytes, got 'clip'"),
  "mlp_hidden": (dict(ar=dict(condition="text"), text=dict(mlp_hidden=0)), "text.mlp_hidden .* 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config(name):
  overrides, message = BAD[name]
  config = numpy_ar.tiny()
  config.update(overrides)
  with pytest.raises(ValueError, match=message) as e:
    make_stage(config)
  assert "\n" not in str(e.value)
