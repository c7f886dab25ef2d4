"""Building blocks that all models share: the choices of a block, norms, MLP, initialisers, scanned stacks."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.ops import layout

LORA_DOWN, LORA_UP = "lora_down", "lora_up"  # parameters that a linear layer may have besides its own
NORMS = {"layernorm": 1e-5, "rmsnorm": 1e-6}  # norms with learned scales: default epsilon
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": nn.silu,
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_tanh": functools.partial(nn.gelu, approximate=True),
  "relu": nn.relu,
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
}


# What is saved of a block for its backward pass, besides its input; the rest is recomputed. "none": recompute nothing.
# "dots": products with weights, but not norms, activations and the products between queries, keys and values. "full":
# recompute everything. A training step of d12-d12 (batch 4, slow path, compiled for a CPU) has temporaries of 7.8, 2.1
# and 0.8 GB.
REMATS = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockChoices:
  """Sizes and options of the blocks of a stack; flextok_jax/config/defaults.py explains those that a config sets.

  Attributes:
    width: features of the stream.
    head_dim: features of an attention head.
    mlp_hidden: hidden units of the MLP.
    logit_scale: factor of the products of queries and keys.
    gated_mlp: see MLP.
    activation: a key of ACTIVATIONS.
    norm: a key of NORMS: the norms of the stream. Blocks modulated by adaLN use norms.layer_norm instead.
    norm_eps: their epsilon; 0: the default of NORMS.
    qk_norm: norms of queries and keys, each head on its own: a key of NORMS, "unscaled" (norms.layer_norm) or "none".
    qk_norm_eps: as norm_eps.
    qkv_bias: whether the projections to queries, keys and values have biases.
    out_bias: whether the output projection of attention has one.
    mlp_bias: whether the layers of the MLP have one.
    layer_scale: whether what attention and MLP add to the stream is multiplied by learned factors (ViTs).
    cross_attention: whether there is attention to a text (generators).
    dtype: compute type.
    attention: one of IMPLEMENTATIONS of ops/attention.py.
  """

  width: int
  head_dim: int
  mlp_hidden: int
  logit_scale: float
  gated_mlp: bool
  activation: str
  norm: str = "layernorm"
  norm_eps: float = 0.0
  qk_norm: str = "none"
  qk_norm_eps: float = 0.0
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  layer_scale: bool = False
  cross_attention: bool = False
  dtype: jnp.dtype = jnp.dtype("float32")
  attention: str = "auto"


def with_remat(block: type[nn.Module], remat: str) -> type[nn.Module]:
  """Returns a block class that saves for its backward pass what REMATS[remat] says."""
  policy = REMATS[remat]
  return block if policy is None else nn.remat(block, prevent_cse=False, policy=policy)


def scan_blocks(step: Callable, depth: int, block: nn.Module, carry: Any, inputs: Any, *shared: Any) -> Any:
  """Runs a block `depth` times in one scan; each parameter gets a leading axis "layers".

  Args:
    step: (block, carry, inputs of this block, *shared) -> carry.
    depth: number of blocks.
    block: a module; each block has its own copy of the parameters.
    carry: tree of arrays that the first block receives.
    inputs: tree of arrays [depth, ...], one slice for each block.
    shared: trees of arrays that all blocks receive.

  Returns:
    The carry after the last block.
  """
  scan = nn.scan(
    lambda block, carry, inputs, *shared: (step(block, carry, inputs, *shared), None),
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True},
    in_axes=(0, *(nn.broadcast for _ in shared)),
    length=depth,
    metadata_params={nn.PARTITION_NAME: "layers"},
  )
  return scan(block, carry, inputs, *shared)[0]


def norm(kind: str, eps: float, dtype: jnp.dtype, name: str | None = None, axis: str | None = "embed") -> nn.Module:
  """Returns a norm of the last axis with learned scales: statistics in float32, output in dtype.

  Args:
    kind: a key of NORMS.
    eps: epsilon; 0: the default of NORMS.
    dtype: of the output.
    name: of the module.
    axis: logical axis of the scales.
  """
  ones = nn.with_logical_partitioning(nn.initializers.ones, (axis,))
  eps = eps or NORMS[kind]
  if kind == "rmsnorm":
    return nn.RMSNorm(eps, dtype=dtype, scale_init=ones, use_fast_variance=False, name=name)
  return nn.LayerNorm(eps, dtype=dtype, scale_init=ones, bias_init=zeros(axis), use_fast_variance=False, name=name)


def add_low_rank(module: nn.Module, x: jax.Array, y: jax.Array, which: int | slice = slice(None)) -> jax.Array:
  """Adds the low-rank product of a linear layer, if its parameters hold the factors (stages/lora.py).

  Args:
    module: the layer.
    x: its input [..., *inputs].
    y: its output without them [..., *outputs].
    which: of the first axis of the outputs that y has.
  """
  if not module.has_variable("params", LORA_DOWN):
    return y
  factor = lambda name: jnp.asarray(module.get_variable("params", name), y.dtype)
  down, up = factor(LORA_DOWN), factor(LORA_UP)
  return y + jnp.tensordot(jnp.tensordot(x.astype(y.dtype), down, down.ndim - 1), up[:, which], 1)


class Dense(nn.Dense):
  """nn.Dense that adds low-rank factors."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return add_low_rank(self, x, super().__call__(x))


class DenseGeneral(nn.DenseGeneral):
  """nn.DenseGeneral over the last axes that adds low-rank factors."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return add_low_rank(self, x, super().__call__(x))


class MLP(nn.Module):
  """W2(act(W1 x) * W3 x), or without a gate W2(act(W1 x)): "out", "in" and "gate".

  W1 and W3 are two arrays, as TPUs store an axis of 2 in tiles of 2 x 128: for one array of both, the compiler expects
  a tenth of all cycles of d12-d12's training to be spent on copies of it and of its gradient.
  """

  choices: BlockChoices

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x [b, l, d] -> [b, l, d]."""
    c = self.choices

    def into(name):  # [b, l, d] -> [b, l, hidden]
      y = dense(c.mlp_hidden, ("embed", "mlp"), name, c.dtype, use_bias=c.mlp_bias)(x)
      return layout.constrain(y, "batch", None, "mlp")

    h = ACTIVATIONS[c.activation](into("in"))
    if c.gated_mlp:
      h = h * into("gate")
    return dense(c.width, ("mlp", "embed"), "out", c.dtype, use_bias=c.mlp_bias)(h)


def xavier_uniform(fan_out: int, axes: tuple[str | None, ...]) -> nn.initializers.Initializer:
  """Returns a Xavier-uniform initialiser of kernels [fan_in, n * fan_out] of n fused linear maps, with axis names."""

  def init(key, shape, dtype=jnp.float32):
    limit = math.sqrt(6 / (shape[0] + fan_out))
    return jax.random.uniform(key, shape, dtype, -limit, limit)

  return nn.with_logical_partitioning(init, axes)


def zeros(*axes: str | None) -> nn.initializers.Initializer:
  """Returns an initialiser of zeros with axis names."""
  # Its own type, as flax's is float64 in 64-bit mode if none is given.
  return nn.with_logical_partitioning(lambda key, shape, dtype=jnp.float32: jnp.zeros(shape, dtype), axes)


def normal(stddev: float, *axes: str | None) -> nn.initializers.Initializer:
  """Returns an initialiser from N(0, stddev^2) with axis names."""
  return nn.with_logical_partitioning(nn.initializers.normal(stddev, jnp.float32), axes)


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  name: str | None,
  dtype: jnp.dtype,
  *,
  use_bias: bool = True,
  zero: bool = False,
  precision: jax.lax.Precision | None = None,
) -> nn.Dense:
  """Returns a linear layer with named axes; initialised Xavier-uniform or with zeros, the bias with zeros."""
  return Dense(
    features,
    use_bias=use_bias,
    dtype=dtype,
    precision=precision,
    kernel_init=zeros(*axes) if zero else xavier_uniform(features, axes),
    bias_init=zeros(axes[1]),
    name=name,
  )


def patchify(x: jax.Array, patch: int) -> jax.Array:
  """[b, h, w, c] -> [b, h/patch, w/patch, patch*patch*c], each vector in the order row, column, channel."""
  return rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=patch, q=patch)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
  """The inverse of patchify."""
  return rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=patch, q=patch)
