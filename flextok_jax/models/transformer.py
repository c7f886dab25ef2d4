"""The pre-norm transformer of encoder and decoder: a scanned stack of blocks over one or more segments."""

from collections.abc import Callable
import dataclasses
import itertools

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.models import layers
from flextok_jax.models.attention import Attention
from flextok_jax.ops import layout, posemb

Segments = tuple[jax.Array, ...]  # parts [b, l_i, d] of one sequence
MODULATIONS = ("per_segment", "shared")
# What the backward pass finds ready of a block besides its input; the rest it computes again. "none": everything.
# "dots": products with weights, but not norms, activations and the products between queries, keys and values. "full":
# nothing. A training step of d12-d12 (batch 4, plain path, compiled for a CPU) has temporaries of 7.8, 2.1 and 0.8 GB.
REMATS = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockChoices:
  """What all blocks of a stack have in common; flextok_jax/config.py explains the fields."""

  head_dim: int
  mlp_ratio: float
  gated_mlp: bool
  activation: str
  qk_norm: bool
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  dtype: jnp.dtype
  attention: str


def remat_name(remat: str) -> str:
  """Returns the name of a rematerialisation policy; ValueError if it is not one of REMATS."""
  if remat not in REMATS:
    raise ValueError(f"unknown remat {remat!r}: one of {', '.join(REMATS)}")
  return remat


def rematerialised(block: type[nn.Module], remat: str) -> type[nn.Module]:
  """Returns the block, made to keep no more for its backward pass than REMATS[remat] says."""
  policy = REMATS[remat]
  return block if policy is None else nn.remat(block, prevent_cse=False, policy=policy)


def mlp_hidden(width: int, ratio: float, gated: bool) -> int:
  """Returns the hidden width of an MLP; a gated one has 3 matrices for 2, so two thirds of it (Shazeer 2020)."""
  hidden = int(ratio * width)
  return int(2 * hidden / 3) if gated else hidden


class MLP(nn.Module):
  """W2(act(W1 x) * W3 x), or without gate W2(act(W1 x))."""

  hidden: int
  gated: bool
  activation: str
  use_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    x = nn.DenseGeneral(
      (2 if self.gated else 1, self.hidden),
      use_bias=self.use_bias,
      dtype=self.dtype,
      kernel_init=layers.xavier_uniform(self.hidden, ("embed", None, "mlp")),
      bias_init=layers.zeros(None, "mlp"),
      name="in",
    )(x)  # [b, l, n, hidden]
    x = layout.constrain(x, "batch", None, None, "mlp")
    h = layers.ACTIVATIONS[self.activation](x[..., 0, :])
    if self.gated:
      h = h * x[..., 1, :]
    return layers.dense(width, ("mlp", "embed"), "out", self.dtype, use_bias=self.use_bias)(h)


def _residual(
  fn: Callable[[jax.Array], jax.Array],
  segments: Segments,
  modulation: list[tuple[jax.Array, jax.Array, jax.Array]] | None,
  output: int | None = None,
) -> Segments:
  """x + gate * fn(LN(x) * (1 + scale) + shift), fn seeing all segments as one sequence.

  Each segment has its own (gate, shift, scale), each [b, 1, d] and broadcast: never expanded to every token. With
  `output` fn answers for that segment alone, which is then all that is returned.
  """
  h = [layers.layer_norm(x) for x in segments]
  if modulation is not None:
    h = [x * (1 + scale) + shift for x, (_, shift, scale) in zip(h, modulation)]
  y = fn(jnp.concatenate(h, 1))
  if output is None:
    y = jnp.split(y, list(itertools.accumulate(x.shape[1] for x in segments))[:-1], axis=1)
  else:
    y, segments = [y], segments[output : output + 1]
    modulation = modulation and modulation[output : output + 1]
  if modulation is not None:
    y = [gate * x for x, (gate, _, _) in zip(y, modulation)]
  return tuple(x + dx for x, dx in zip(segments, y))


class Block(nn.Module):
  """Attention and MLP, adaLN-zero modulated (Peebles & Xie 2023) where a modulation is given."""

  choices: BlockChoices
  output: int | None = None  # the only segment wanted, or all

  @nn.compact
  def __call__(
    self, segments: Segments, modulation: jax.Array | None, mask: jax.Array | None, key_bias: jax.Array | None
  ) -> tuple[Segments, None]:
    """See Transformer; modulation [b or 1, s * 6 * d] is of this block, the None is for the scan."""
    c, output = self.choices, self.output
    segments = tuple(layout.constrain(x, "batch", None, None) for x in segments)
    attn = mlp = None
    if modulation is not None:
      mod = rearrange(modulation, "b (s n d) -> s n b 1 d", n=6, d=segments[0].shape[-1])
      mod = jnp.broadcast_to(mod, (len(segments), *mod.shape[1:]))  # one set may serve all segments
      attn = [(gate, shift, scale) for gate, _, shift, scale, _, _ in mod]
      mlp = [(gate, shift, scale) for _, gate, _, _, shift, scale in mod]
    queries = None
    if output is not None:
      queries = sum(x.shape[1] for x in segments[:output]), segments[output].shape[1]
      mlp = mlp and mlp[output : output + 1]
    attention = Attention(
      c.head_dim, c.qk_norm, c.qkv_bias, c.out_bias, c.dtype, implementation=c.attention, name="attention"
    )
    segments = _residual(lambda x: attention(x, mask, key_bias, queries), segments, attn, output)
    hidden = mlp_hidden(segments[0].shape[-1], c.mlp_ratio, c.gated_mlp)
    fn = MLP(hidden, c.gated_mlp, c.activation, c.mlp_bias, c.dtype, name="mlp")
    segments = _residual(fn, segments, mlp)
    return segments, None


class TappedBlock(Block):
  """A Block in a stack, of one of which a copy of a segment is kept."""

  kept: int = 0  # the segment

  def __call__(
    self, carry: tuple[Segments, jax.Array], layer: tuple[jax.Array | None, jax.Array], *args: jax.Array | None
  ) -> tuple[tuple[Segments, jax.Array], None]:
    """As Block of (segments, what was kept before) and of (modulation, whether to keep the output of this block)."""
    (segments, before), (modulation, keep) = carry, layer
    segments, _ = super().__call__(segments, modulation, *args)
    return (segments, jnp.where(keep, segments[self.kept], before)), None


class Transformer(nn.Module):
  """`depth` blocks. All but the last are scanned, their parameters stacked along a leading "layers" axis."""

  depth: int
  choices: BlockChoices
  output: int  # the segment to return: the last block has no queries of the others
  remat: str = "none"  # a key of REMATS

  @nn.compact
  def __call__(
    self,
    segments: Segments,
    modulation: jax.Array | None = None,
    mask: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    tap: int | None = None,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Runs the blocks over the segments as one sequence of length l.

    Args:
      segments: [b, l_i, d] each.
      modulation: [depth, b or 1, s * 6 * d] as of Modulation, or None for blocks without.
      mask: boolean [l, l], see Attention.
      key_bias: float32 [b, l], see Attention.
      tap: a block, counted from 1.

    Returns:
      The segment `output` [b, l_i, d]; with a tap also that segment as it leaves the block `tap`.
    """
    if tap is not None and not 1 <= tap <= self.depth:
      raise ValueError(f"there is no block {tap}: they are 1 to {self.depth}")
    block = rematerialised(Block, self.remat)
    first, last = (None, None) if modulation is None else (modulation[:-1], modulation[-1])
    kept = None
    if self.depth > 1:
      inner, options, carry = block, {}, segments
      if tap is not None:
        # Carried along rather than stacked over the blocks: one copy, whose gradient enters at its block alone.
        inner, options = rematerialised(TappedBlock, self.remat), {"kept": self.output}
        carry, first = (segments, jnp.zeros_like(segments[self.output])), (first, jnp.arange(self.depth - 1) == tap - 1)
      stack = nn.scan(
        inner,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=self.depth - 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      carry, _ = stack(self.choices, name="blocks", **options)(carry, first, mask, key_bias)
      segments, kept = (carry, None) if tap is None else carry
    (x,), _ = block(self.choices, self.output, name="last")(segments, last, mask, key_bias)
    x = layout.constrain(x, "batch", None, None)
    return x if tap is None else (x, x if tap == self.depth else kept)


class AdaLN(nn.Module):
  """Modulations of all blocks and of the head: SiLU > Linear of the time embedding, starting at zero.

  They depend on time alone, so a sampler computes them once for all its steps.
  """

  depth: int
  sets: int  # (gate, shift, scale) of attention and MLP: 2 for patches and registers apart, 1 for both alike
  head: bool
  head_bias: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, cond: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """cond [b, d] -> blocks [depth, b, sets * 6 * d], head [b, 2 * d] or None."""
    width = cond.shape[-1]
    features = self.sets * 6 * width
    cond = nn.silu(cond)
    kernel = self.param("kernel", layers.zeros("layers", "embed", "modulation"), (self.depth, width, features))
    bias = self.param("bias", layers.zeros("layers", "modulation"), (self.depth, features))
    blocks = jnp.einsum("bd,ldf->lbf", cond, kernel.astype(self.dtype)) + bias.astype(self.dtype)[:, None]
    blocks = layout.constrain(blocks, None, "batch", None)  # fetched once, not by every block
    if not self.head:
      return blocks, None
    head = layers.dense(2 * width, ("embed", "modulation"), "head", self.dtype, use_bias=self.head_bias, zero=True)
    return blocks, head(cond)


class PatchTransformer(nn.Module, kw_only=True):
  """What encoder and decoder have in common: the sizes, and the choices that flextok_jax/config.py explains.

  max_grid must be a number here: that 0 means the grid of image_size is resolved where the modules are built.
  """

  width: int
  depth: int
  head_dim: int
  patch_size: int
  num_registers: int
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
  head_bias: bool = True
  readout_multiplier: float = 1.0
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  attention: str = "auto"

  def embed_patches(self, x: jax.Array) -> jax.Array:
    """Embeds the patches of x and adds their positions: [b, h, w, c] -> [b, h/p * w/p, width]."""
    x = layers.patchify(x, self.patch_size)
    batch, height, width, _ = x.shape
    x = layers.dense(self.width, (None, "embed"), "patch_embed", self.dtype)(x)
    if self.posemb == "sincos":
      axes = posemb.sincos_axes(self.max_grid, self.width)
    else:
      init = layers.normal(0.02, None, "grid", "embed")
      axes = self.param("positions", init, (2, self.max_grid, self.width))
    product = self.posemb == "learnable_prod"
    table = posemb.grid_table(axes, height, width, scaling=self.posemb_scaling, product=product)
    return (x + table.astype(self.dtype)).reshape(batch, height * width, self.width)

  def run_blocks(
    self,
    segments: Segments,
    output: int,
    modulation: jax.Array | None = None,
    mask: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    tap: int | None = None,
  ) -> jax.Array | tuple[jax.Array, jax.Array]:
    """See Transformer."""
    fields = [field.name for field in dataclasses.fields(BlockChoices)]
    choices = BlockChoices(**{name: getattr(self, name) for name in fields})
    stack = Transformer(self.depth, choices, output, self.remat, name="transformer")
    return stack(segments, modulation, mask, key_bias, tap)

  def project(
    self,
    x: jax.Array,
    features: int,
    modulation: jax.Array | None = None,
    dtype: jnp.dtype | None = None,
    precision: jax.lax.Precision | None = None,
  ) -> jax.Array:
    """The head: LayerNorm, adaLN by modulation [b or 1, 2 * d] if given, projection: [b, l, d] -> [b, l, features]."""
    dtype = dtype or self.dtype
    x = layers.layer_norm(x.astype(dtype))
    if modulation is not None:
      shift, scale = jnp.split(modulation[:, None], 2, -1)
      x = x * (1 + scale) + shift
    dense = layers.dense(
      features, ("embed", None), "head", dtype, use_bias=self.head_bias, zero=True, precision=precision
    )
    return dense(self.readout_multiplier * x)
