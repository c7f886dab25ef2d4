"""The pre-norm transformer of the tokenizer's encoder and decoder: a scanned stack over one or more segments."""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
from typing import Any, NamedTuple

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import SelfAttention
from flextok_jax.ops import layout, norms, posemb

Segments = tuple[jax.Array, ...]  # parts [b, l_i, d] of one sequence


def mlp_hidden(width: int, ratio: float, gated: bool) -> int:
  """Returns the hidden width of an MLP; a gated one has 3 matrices for 2, so two thirds of it (Shazeer 2020)."""
  hidden = int(ratio * width)
  return int(2 * hidden / 3) if gated else hidden


def _residual(
  fn: Callable[[jax.Array], jax.Array],
  segments: Segments,
  modulation: list[tuple[jax.Array, jax.Array, jax.Array]] | None,
  output: int | None = None,
) -> Segments:
  """Returns x + gate * fn(LN(x) * (1 + scale) + shift); fn receives the segments as one sequence.

  Args:
    fn: [b, l, d] -> [b, l, d], or with `output` -> [b, l_output, d].
    segments: [b, l_i, d] each.
    modulation: (gate, shift, scale) of each segment, each [b, 1, d] and broadcast, never expanded to every token.
    output: the only segment that fn computes, and that is returned; None: all.
  """
  h = [norms.layer_norm(x) for x in segments]
  if modulation is not None:
    h = [x * (1 + scale) + shift for x, (_, shift, scale) in zip(h, modulation)]
  # [b, l_i, d] each -> [b, l, d]
  y = fn(jnp.concatenate(h, 1))
  if output is None:
    # [b, l, d] -> [b, l_i, d] each
    updates = jnp.split(y, list(itertools.accumulate(x.shape[1] for x in segments))[:-1], axis=1)
  else:
    updates, segments = [y], segments[output : output + 1]
    modulation = modulation and modulation[output : output + 1]
  if modulation is not None:
    updates = [gate * x for x, (gate, _, _) in zip(updates, modulation)]
  return tuple(x + dx for x, dx in zip(segments, updates))


class ModulatedBlock(nn.Module):
  """Attention and MLP over segments, with adaLN-zero modulation (Peebles & Xie 2023) if one is given."""

  choices: layers.BlockChoices
  output: int | None = None  # the only segment to compute; None: all

  @nn.compact
  def __call__(
    self, segments: Segments, modulation: jax.Array | None, mask: jax.Array | None, key_bias: jax.Array | None
  ) -> Segments:
    """See Stream; modulation [b or 1, s * 6 * d] is that of this block."""
    output, queries = self.output, None
    segments = tuple(layout.constrain(x, "batch", None, None) for x in segments)
    attention_modulation = mlp_modulation = None
    if modulation is not None:
      # [b, s * 6 * d] -> [s, 6, b, 1, d]. The six are in the order of the released weights: gate of attention, gate of
      # the MLP, shift and scale of attention, shift and scale of the MLP.
      chunks = rearrange(modulation, "b (s n d) -> s n b 1 d", n=6, d=segments[0].shape[-1])
      chunks = jnp.broadcast_to(chunks, (len(segments), *chunks.shape[1:]))  # one set may serve all segments
      attention_modulation = [(gate, shift, scale) for gate, _, shift, scale, _, _ in chunks]
      mlp_modulation = [(gate, shift, scale) for _, gate, _, _, shift, scale in chunks]
    if output is not None:
      queries = sum(x.shape[1] for x in segments[:output]), segments[output].shape[1]
      mlp_modulation = mlp_modulation and mlp_modulation[output : output + 1]
    attention = SelfAttention(self.choices, name="attention")
    attend = lambda x: attention(x, mask, key_bias, queries)[0]
    segments = _residual(attend, segments, attention_modulation, output)
    return _residual(layers.MLP(self.choices, name="mlp"), segments, mlp_modulation)


class Stream(NamedTuple):
  """A batch of sequences of one length l for a stack of blocks.

  Attributes:
    segments: [b, l_i, d] each, which the blocks see as one sequence.
    modulation: [depth, b or 1, s * 6 * d], see AdaLN; None: blocks without modulation.
    mask: boolean [l, l], see SelfAttention.
    key_bias: float32 [b, l], see SelfAttention.
  """

  segments: Segments
  modulation: jax.Array | None = None
  mask: jax.Array | None = None
  key_bias: jax.Array | None = None


class Transformer(nn.Module):
  """`depth` blocks. All but the last run in a scan, their parameters stacked along a leading "layers" axis."""

  depth: int
  choices: layers.BlockChoices
  output: int  # the segment to return: the last block computes no other
  remat: str = "none"  # a key of layers.REMATS

  @nn.compact
  def __call__(
    self, streams: Sequence[Stream], feature_block: int | None = None
  ) -> list[tuple[jax.Array, jax.Array | None]]:
    """Runs the blocks over each stream.

    All streams pass a block before the next begins: sharded parameters are gathered, and their gradients summed over
    devices, once for all streams.

    Args:
      streams: any number, all with a modulation or none.
      feature_block: number of a block, from 1, whose output is returned as well.

    Returns:
      Of each stream, the segment `output` [b, l_i, d] after the last block, and after the feature_block (None without
      one).

    Raises:
      ValueError: there is no such block.
    """
    if feature_block is not None and not 1 <= feature_block <= self.depth:
      raise ValueError(f"there is no block {feature_block}: they are 1 to {self.depth}")
    block = layers.with_remat(ModulatedBlock, self.remat)
    modulations = [stream.modulation for stream in streams]
    scanned, last = ([x if x is None else x[part] for x in modulations] for part in (slice(-1), -1))
    # The features are carried, not stacked over the blocks: one copy, whose gradient enters only at its block.
    features_of = lambda stream: None if feature_block is None else jnp.zeros_like(stream.segments[self.output])
    carry = [(stream.segments, features_of(stream)) for stream in streams]
    shared = [(stream.mask, stream.key_bias) for stream in streams]
    if self.depth > 1:

      def step(block, carry, inputs, shared):
        number, modulations = inputs
        new = []
        for (segments, features), modulation, (mask, key_bias) in zip(carry, modulations, shared, strict=True):
          segments = block(segments, modulation, mask, key_bias)
          if features is not None:
            features = jnp.where(number == feature_block, segments[self.output], features)
          new.append((segments, features))
        return new

      inputs = jnp.arange(1, self.depth), scanned
      blocks = block(self.choices, name="blocks")
      carry = layers.scan_blocks(step, self.depth - 1, blocks, carry, inputs, shared)
    last_block = block(self.choices, self.output, name="last")
    outputs = []
    for (segments, features), modulation, (mask, key_bias) in zip(carry, last, shared, strict=True):
      (x,) = last_block(segments, modulation, mask, key_bias)
      x = layout.constrain(x, "batch", None, None)
      outputs.append((x, x if feature_block == self.depth else features))
    return outputs


def first_blocks(params: Mapping[str, Any], depth: int) -> dict[str, Any]:
  """Returns the parameters of the first `depth` blocks of a Transformer, as those of one of that depth."""
  if "blocks" not in params or depth > len(jax.tree.leaves(params["blocks"])[0]):
    return dict(params)
  stacked = params["blocks"]
  cut = {"last": jax.tree.map(lambda x: x[depth - 1], stacked)}
  return cut if depth == 1 else cut | {"blocks": jax.tree.map(lambda x: x[: depth - 1], stacked)}


class AdaLN(nn.Module):
  """Modulations of all blocks and of the head: SiLU > Linear of the time embedding, initialised at zero.

  They depend only on time, so a sampler computes them once for all steps.
  """

  depth: int
  sets: int  # of (gate, shift, scale) of attention and MLP: 2 with one for each segment, 1 with one for both
  head: bool
  head_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, cond: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """cond [b, d] -> blocks [depth, b, sets * 6 * d], head [b, 2 * d] (shift, scale) or None."""
    width = cond.shape[-1]
    features = self.sets * 6 * width
    # Whole on every device that has its row: from parts over "tensor", as the layer before it leaves them, XLA's
    # partitioner computes a wrong gradient if the mesh has all of "data", "fsdp" and "tensor".
    cond = layout.constrain(nn.silu(cond), "batch", None)
    # Outputs before inputs: the order in which TPUs keep it, so that kernel, moments and average need no copies.
    kernel = self.param("kernel", layers.zeros("layers", "modulation", "embed"), (self.depth, features, width))
    bias = self.param("bias", layers.zeros("layers", "modulation"), (self.depth, features))
    # [b, d], [depth, sets * 6 * d, d] -> [depth, b, sets * 6 * d]
    blocks = jnp.einsum("bd,lfd->lbf", cond, kernel.astype(self.dtype)) + bias.astype(self.dtype)[:, None]
    blocks = layout.constrain(blocks, None, "batch", None)  # gathered once, not by every block
    if not self.head:
      return blocks, None
    head = layers.dense(2 * width, ("embed", "modulation"), "head", self.dtype, use_bias=self.head_bias, zero=True)
    return blocks, head(cond)


class PatchTransformer(nn.Module, kw_only=True):
  """Base of encoder and decoder: sizes and options, which flextok_jax/config/defaults.py explains.

  max_grid must be above 0 here: where the modules are built, 0 is replaced by the grid of image_size.
  """

  width: int
  depth: int
  head_dim: int
  patch_size: int
  num_registers: int
  layout: str = "registers"  # of the tokens
  mlp_ratio: float = 4.0
  gated_mlp: bool = True
  activation: str = "silu"
  qk_norm: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  posemb: str = "sincos"
  posemb_scaling: str = "absolute"
  max_grid: int = 0
  max_grid_width: int = 0
  head_bias: bool = True
  readout_multiplier: float = 1.0
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  attention: str = "auto"

  @property
  def choices(self) -> layers.BlockChoices:
    """The choices of the blocks."""
    return layers.BlockChoices(
      width=self.width,
      head_dim=self.head_dim,
      mlp_hidden=mlp_hidden(self.width, self.mlp_ratio, self.gated_mlp),
      logit_scale=8 / self.head_dim,  # muP
      gated_mlp=self.gated_mlp,
      activation=self.activation,
      qk_norm="unscaled" if self.qk_norm else "none",
      qkv_bias=self.qkv_bias,
      out_bias=self.out_bias,
      mlp_bias=self.mlp_bias,
      dtype=self.dtype,
      attention=self.attention,
    )

  @property
  def table_shape(self) -> tuple[int, int]:
    """Rows and columns of the table of positions."""
    return self.max_grid, self.max_grid_width or self.max_grid

  def check_grid(self, height: int, width: int) -> None:
    """Raises ValueError if the table has too few positions for a grid of patches."""
    if self.posemb_scaling == "absolute":
      posemb.check_fits(self.table_shape, height, width)

  def embed_patches(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
    """Embeds the patches of each x and adds their positions: [b, h, w, c] -> [b, h/p * w/p, width]."""
    embed = layers.dense(self.width, (None, "embed"), "patch_embed", self.dtype)
    # [b, h, w, c] -> [b, h/p, w/p, p * p * c] -> [b, h/p, w/p, width]
    xs = [embed(layers.patchify(x, self.patch_size)) for x in xs]
    table = functools.cache(self._positions)  # once for each grid
    # [b, h/p, w/p, width] -> [b, h/p * w/p, width]
    return [(x + table(*x.shape[1:3]).astype(self.dtype)).reshape(x.shape[0], -1, self.width) for x in xs]

  def _positions(self, height: int, width: int) -> jax.Array:
    """Returns the positions of a grid of patches, float32 [height, width, self.width]."""
    shape, scaling = self.table_shape, self.posemb_scaling
    if self.posemb == "sincos_released":
      return posemb.fit_table(posemb.released_table(shape, self.width), height, width, scaling=scaling)
    axes: Any
    if self.posemb == "sincos":
      scaled = scaling == "scaled"
      axes = posemb.scaled_axes(shape, height, width, self.width) if scaled else posemb.sincos_axes(*shape, self.width)
    else:
      init = layers.normal(0.02, None, "grid", "embed")
      rows, columns = self.param("positions", init, (2, max(shape), self.width))
      axes = rows[: shape[0]], columns[: shape[1]]
    scaling = "absolute" if scaling == "scaled" else scaling  # the axes are of this grid
    return posemb.grid_table(axes, height, width, scaling=scaling, product=self.posemb == "learnable_prod")

  def run_blocks(
    self, streams: Sequence[Stream], output: int, feature_block: int | None = None
  ) -> list[tuple[jax.Array, jax.Array | None]]:
    """See Transformer."""
    return Transformer(self.depth, self.choices, output, self.remat, name="transformer")(streams, feature_block)

  def project(
    self,
    xs: Sequence[jax.Array],
    features: int,
    modulations: Sequence[jax.Array | None],
    dtype: jnp.dtype | None = None,
    precision: jax.lax.Precision | None = None,
  ) -> list[jax.Array]:
    """Applies the head to each x: LayerNorm, adaLN if it has a modulation, projection.

    Args:
      xs: [b, l, d] each.
      features: of the outputs.
      modulations: shift and scale of each x, [b or 1, 2 * d], or None.
      dtype: compute type; None: that of the module.
      precision: of the projection.

    Returns:
      [b, l, features] each, of dtype.
    """
    dtype = dtype or self.dtype
    dense = layers.dense(
      features, ("embed", None), "head", dtype, use_bias=self.head_bias, zero=True, precision=precision
    )
    outputs = []
    for x, modulation in zip(xs, modulations, strict=True):
      x = norms.layer_norm(x.astype(dtype))
      if modulation is not None:
        # [b, 2 * d] -> [b, 1, d] each; shift before scale, as in the released weights
        shift, scale = jnp.split(modulation[:, None], 2, -1)
        x = x * (1 + scale) + shift
      outputs.append(dense(self.readout_multiplier * x))
    return outputs
