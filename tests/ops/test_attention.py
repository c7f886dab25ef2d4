"""Attention: every implementation against the plain softmax, and the module that uses it."""

import functools
import types

import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from flextok_jax.ops import attention
from flextok_jax.ops.attention import MASKED, choose_implementation

CPU = types.SimpleNamespace(platform="cpu")
TPU = types.SimpleNamespace(platform="tpu")
A100 = types.SimpleNamespace(platform="gpu", compute_capability="8.0")
V100 = types.SimpleNamespace(platform="gpu", compute_capability="7.0")
MI250 = types.SimpleNamespace(platform="gpu", compute_capability="gfx90a")


# Traced anew in each test, which may replace what attend calls.
def attend(*args, scale, implementation="xla", layer_norm=False, **options):
  static = {"scale": scale, "implementation": implementation, "layer_norm": layer_norm}
  run = lambda args, options: attention.attend(*args, **static, **options)
  return jax.jit(run)(args, options)


def softmax_attention(q, k, v, scale, mask=None, key_bias=None):
  """The definition, in float64."""
  logits = scale * np.einsum("bqhe,bkhe->bhqk", *(np.asarray(x, np.float64) for x in (q, k)))
  if key_bias is not None:
    logits = logits + np.asarray(key_bias, np.float64)[:, None, None]
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  return np.einsum("bhqk,bkhe->bqhe", weights / weights.sum(-1, keepdims=True), np.asarray(v, np.float64))


def example(seed, *, batch=2, queries=7, keys=7, heads=2, head_dim=16, mask=False, bias=None):
  """Returns (q, k, v), options: a random mask that lets each query see a key, a bias [bias, keys] that hides a key."""
  rng = np.random.default_rng(seed)
  draw = lambda length: rng.standard_normal((batch, length, heads, head_dim)).astype(np.float32)
  options = {"scale": 8 / head_dim}
  if mask:
    options["mask"] = rng.random((queries, keys)) < 0.5
    options["mask"][:, 0] = True
  if bias:
    options["key_bias"] = rng.uniform(-1, 6, (bias, keys)).astype(np.float32)
    options["key_bias"][:, 2] = MASKED
  return (draw(queries), draw(keys), draw(keys)), options


CASES = {
  "plain": {},
  "mask": {"mask": True},
  "bias": {"bias": 2},
  "one bias for all": {"bias": 1},
  "mask and bias": {"mask": True, "bias": 2},
  "fewer queries": {"queries": 3, "keys": 10, "mask": True, "bias": 2},
}


@pytest.fixture(params=list(CASES))
def case(request):
  return example(0, **CASES[request.param])


def test_xla_is_the_softmax(case):
  inputs, options = case
  np.testing.assert_allclose(attend(*inputs, **options), softmax_attention(*inputs, **options), atol=2e-6)


def test_bfloat16_is_near(case):
  inputs, options = case
  out = attend(*(jnp.asarray(x, jnp.bfloat16) for x in inputs), **options)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), softmax_attention(*inputs, **options), atol=0.05)


def test_cudnn_inputs(case, monkeypatch):
  """What cuDNN is given means the same; here XLA computes it, adding bfloat16 products in float32 as cuDNN does."""
  inputs, options = case
  inputs = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
  plain = jax.nn.dot_product_attention

  def cudnn(q, k, v, *, mask, scale, implementation):
    assert implementation == "cudnn" and q.dtype == k.dtype == v.dtype == jnp.bfloat16
    assert not any(x.shape[1] % 2 or x.shape[-1] % 8 for x in (q, k, v)) and q.shape[-1] == v.shape[-1]
    # float32 from here on, in which products of bfloat16 numbers are exact, so rounding cannot hide an error.
    return plain(*(x.astype(jnp.float32) for x in (q, k, v)), mask=mask, scale=scale, implementation="xla")

  monkeypatch.setattr(attention, "_default_device", lambda: A100)
  monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
  assert choose_implementation("auto", 16, jnp.bfloat16) == "cudnn"
  run = lambda q, k, v: attend(q, k, v, **options, implementation="cudnn")
  np.testing.assert_allclose(run(*inputs), softmax_attention(*inputs, **options), atol=1e-5)
  grad = jax.jit(jax.grad(lambda q: run(q, *inputs[1:]).sum()))(inputs[0])
  assert np.isfinite(grad.astype(jnp.float32)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_bias_features(dtype):
  """The product of the widened vectors has the bias added, exactly, where a bfloat16 bias would be 1.6 % off."""
  bias = jnp.log(jnp.arange(1.0, 257.0))[None].at[0, 3].set(MASKED)
  q, k = jnp.ones((2, 3, 1, 4), dtype), jnp.zeros((2, 256, 1, 4), dtype)
  wide_q, wide_k = jax.jit(attention.bias_features)(q, k, bias)
  assert wide_q.dtype == wide_k.dtype == dtype
  product = np.einsum("bqhe,bkhe->bhqk", *(np.asarray(x, np.float32) for x in (wide_q, wide_k)))
  seen = np.arange(256) != 3
  expected = np.broadcast_to(bias, product.shape)
  # A float16 below 2^-14 has fewer digits.
  np.testing.assert_allclose(product[..., seen], expected[..., seen], rtol=0, atol=1e-7 if dtype == jnp.float16 else 0)
  assert (product[..., 3] <= -(2.0**15)).all() and np.isfinite(product).all()


def test_equal_keys_merge():
  """n equal keys weigh as much as one of them with the bias log n; a hidden key as none."""
  (q, k, v), options = example(1, keys=6)
  repeat = np.array([1, 1, 3, 1, 255, 1])
  long = attend(q, np.repeat(k, repeat, 1), np.repeat(v, repeat, 1), **options)
  bias = np.broadcast_to(np.log(repeat), (2, 6))
  # From float64, the sum over 262 keys differs by 2.2e-6 (jax 0.10) or 7.6e-6 (jax 0.12), the merged one by 4.2e-7.
  np.testing.assert_allclose(attend(q, k, v, key_bias=bias, **options), long, atol=1e-5)
  hidden = np.where(np.arange(6) == 4, MASKED, bias)
  keep = np.arange(6) != 4
  without = attend(q, k[:, keep], v[:, keep], key_bias=bias[:, keep], **options)
  np.testing.assert_allclose(attend(q, k, v, key_bias=hidden, **options), without, atol=1e-6)


def test_no_gradient_into_the_bias():
  inputs, options = example(2, bias=2)
  loss = lambda bias: attend(*inputs, scale=1.0, key_bias=bias).sum()
  assert not jax.grad(loss)(options["key_bias"]).any()


@pytest.mark.parametrize(
  "name, head_dim, dtype, device, chosen",
  [
    ("auto", 64, jnp.float32, CPU, "xla"),
    ("auto", 64, jnp.bfloat16, TPU, "pallas"),
    ("auto", 64, jnp.float32, TPU, "xla"),
    ("auto", 256, jnp.bfloat16, TPU, "xla"),
    ("auto", 64, jnp.bfloat16, A100, "cudnn"),
    ("auto", 64, jnp.float16, A100, "cudnn"),
    ("auto", 64, jnp.float32, A100, "xla"),
    ("auto", 128, jnp.bfloat16, A100, "xla"),
    ("auto", 64, jnp.bfloat16, V100, "xla"),
    ("auto", 64, jnp.bfloat16, MI250, "xla"),
    ("xla", 64, jnp.bfloat16, A100, "xla"),
    ("cudnn", 64, jnp.bfloat16, A100, "cudnn"),
    ("pallas", 64, jnp.bfloat16, TPU, "pallas"),
  ],
)
def test_choose(name, head_dim, dtype, device, chosen):
  assert choose_implementation(name, head_dim, dtype, device) == chosen
  if name == "auto":
    masked = choose_implementation(name, head_dim, dtype, device, masked=True)
    assert masked == ("xla" if device is not TPU else chosen)
    assert choose_implementation(name, head_dim, dtype, TPU, length=897) == "xla"


@pytest.mark.parametrize(
  "name, head_dim, dtype, device, why",
  [
    ("flash", 64, jnp.bfloat16, A100, "unknown attention 'flash': one of auto, xla, cudnn, pallas"),
    ("cudnn", 64, jnp.bfloat16, CPU, "needs an NVIDIA GPU of compute capability 8.0 or later, not cpu: use 'auto'"),
    ("cudnn", 64, jnp.bfloat16, V100, "not gpu 7.0"),
    ("cudnn", 64, jnp.bfloat16, MI250, "not gpu gfx90a"),
    ("cudnn", 64, jnp.float32, A100, "computes in bfloat16 or float16, not float32: use 'auto'"),
    ("cudnn", 128, jnp.bfloat16, A100, "at most 125 features, not 128"),
    ("pallas", 64, jnp.bfloat16, CPU, "needs a TPU, not cpu: use 'auto'"),
    ("pallas", 64, jnp.float16, TPU, "computes in bfloat16 or float32, not float16"),
    ("pallas", 256, jnp.bfloat16, TPU, "at most 128 features, not 256"),
  ],
)
def test_unsupported_implementations_are_refused(name, head_dim, dtype, device, why):
  with pytest.raises(ValueError, match=why):
    choose_implementation(name, head_dim, dtype, device)


def test_the_default_device_decides():
  assert choose_implementation("auto", 64, jnp.bfloat16) == "xla"
  with jax.default_device("cpu"), pytest.raises(ValueError, match="not cpu"):
    choose_implementation("cudnn", 64, jnp.bfloat16)
  with jax.default_device(jax.devices()[1]), pytest.raises(ValueError, match="not cpu"):
    choose_implementation("pallas", 64, jnp.bfloat16)


def test_shapes_that_do_not_fit_are_refused():
  inputs, options = example(4)
  with pytest.raises(ValueError, match=r"mask must be \[7, 7\] \(query, key\), got \[1, 7\]"):
    attend(*inputs, **options, mask=np.ones((1, 7), bool))
  with pytest.raises(ValueError, match=r"key bias must be \[2, 7\] or \[1, 7\], got \[7\]"):
    attend(*inputs, **options, key_bias=np.zeros(7, np.float32))


# The TPU kernel, in Pallas's interpreter.


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(attention, "_default_device", lambda: TPU)
  with pltpu.force_tpu_interpret_mode():
    yield


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("case", [CASES["plain"], CASES["fewer queries"]], ids=["plain", "fewer queries"])
def test_pallas(case, layer_norm, interpreted):
  """The kernel and its gradients, with and without the norms of queries and keys, by the definition's."""
  (q, k, v), options = example(5, **case)
  grad = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)
  run = lambda name: functools.partial(attend, **options, layer_norm=layer_norm, implementation=name)
  out, pull = jax.vjp(run("pallas"), q, k, v)
  expected, expected_pull = jax.vjp(run("xla"), q, k, v)
  if layer_norm:
    q, k = ((x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) for x in (q, k))
  definition = softmax_attention(q, k, v, **options)
  for found in (out, expected):
    np.testing.assert_allclose(found, definition, atol=2e-6)
  for dx, expected_dx in zip(jax.jit(pull)(grad), expected_pull(grad)):
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)


@pytest.mark.parametrize("batch, heads", [(4, 2), (3, 1), (1, 4)])
def test_pallas_over_devices(batch, heads, interpreted):
  """Every device attends to its part of the batch and of the heads; a batch that does not divide is padded."""
  mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  inputs, options = example(7, batch=batch, queries=3, keys=5, heads=heads, bias=batch)
  place = jax.NamedSharding(mesh, jax.P("data" if batch % 2 == 0 else None))
  placed = jax.device_put(inputs, place)
  out = jax.jit(lambda *x: attend(*x, **options, implementation="pallas"))(*placed)
  np.testing.assert_allclose(out, softmax_attention(*inputs, **options), atol=2e-6)
  loss = lambda *x: (attend(*x, **options, implementation="pallas") ** 2).sum()
  expected = jax.grad(lambda *x: (attend(*x, **options, implementation="xla") ** 2).sum(), (0, 1, 2))(*inputs)
  for dx, expected_dx in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*placed), expected):
    np.testing.assert_allclose(dx, expected_dx, atol=1e-5)


def test_pallas_lowers_for_tpus(monkeypatch):
  """Mosaic accepts kernel and gradient at the length of a 256 px image with 24 tokens."""
  monkeypatch.setattr(attention, "_default_device", lambda: TPU)
  q, k = (jax.ShapeDtypeStruct((2, length, 3, 64), jnp.bfloat16) for length in (256, 281))
  run = lambda q, k, v, mask, bias: attend(q, k, v, scale=0.125, mask=mask, key_bias=bias, implementation="pallas")
  loss = lambda *args: run(*args).astype(jnp.float32).sum()
  mask, bias = jax.ShapeDtypeStruct((256, 281), bool), jax.ShapeDtypeStruct((2, 281), jnp.float32)
  exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(q, k, k, mask, bias)
  assert exported.mlir_module().count("custom_call @tpu_custom_call") >= 1


def test_pallas_is_for_short_sequences(monkeypatch):
  monkeypatch.setattr(attention, "_default_device", lambda: TPU)
  x = jnp.zeros((1, attention.PALLAS_LENGTH + 1, 1, 8))
  with pytest.raises(ValueError, match="at most 896 queries or keys, not 897: use 'auto'"):
    attend(x, x, x, scale=1.0, implementation="pallas")
