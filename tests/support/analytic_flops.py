"""FLOPs of every job by formula, independent of core/flops.py, which counts them in traced programs.

A product [m, k] x [k, n] counts 2 m k n; a convolution 2 for each pair of an output and an input that its kernel
connects, excluding padding. Elementwise work (norms, activations, softmax, modulation, FSQ, optimiser) is not counted:
it is a few percent for models of usable size. Nor is what a fused attention kernel recomputes. Every function follows
the path that runs, plain or fast, so these are executed FLOPs, fewer on the fast path. Arguments are a config
(flextok_jax/config/defaults.py) or a section of it, and integers; results are integers.
"""

from collections.abc import Mapping
import itertools
import math

from ml_collections import ConfigDict

from flextok_jax.models.perception import lpips
from flextok_jax.models.tokenizer import flextok
from flextok_jax.models.transformer import mlp_hidden
from flextok_jax.ops import guidance, nested
from flextok_jax.stages import repa
from flextok_jax.stages.tokenizer import bucket_rows

TIME_FEATURES = 256  # posemb.timestep_features


def linear(rows: int, fan_in: int, fan_out: int) -> int:
  """[rows, fan_in] x [fan_in, fan_out]: 2 rows fan_in fan_out."""
  return 2 * rows * fan_in * fan_out


def attention(part: ConfigDict, queries: int, length: int) -> int:
  """`queries` of `length` tokens attend to all of them; d = part.width.

  q: 2 q d^2; k and v: 4 l d^2; logits and weighted sum: 2 q l d each; output projection: 2 q d^2.
  """
  d = part.width
  products = 2 * linear(queries, d, length)
  return linear(queries, d, d) + linear(length, d, 2 * d) + products + linear(queries, d, d)


def mlp(part: ConfigDict, tokens: int) -> int:
  """2 n d h in, twice that if gated, and 2 n h d out; h is the hidden width."""
  hidden = mlp_hidden(part.width, part.mlp_ratio, part.gated_mlp)
  return linear(tokens, part.width, (2 if part.gated_mlp else 1) * hidden) + linear(tokens, hidden, part.width)


def block(part: ConfigDict, queries: int, length: int) -> int:
  """Attention and MLP for `queries` of `length` tokens, without modulations."""
  return attention(part, queries, length) + mlp(part, queries)


def blocks(part: ConfigDict, queries: int, length: int) -> int:
  """All blocks: depth - 1 with `length` queries, and a last one with `queries`."""
  return (part.depth - 1) * block(part, length, length) + block(part, queries, length)


def computed_again(part: ConfigDict, queries: int, length: int, remat: str, outputs: bool) -> int:
  """FLOPs of `blocks` that the backward pass recomputes under a name of layers.REMATS.

  Args:
      outputs: whether gradients need the MLPs' outputs, as those of a gate do; otherwise they are not recomputed.
  """
  if remat == "none":
    return 0
  queries_of_all = (part.depth - 1) * length + queries
  if remat == "dots":
    return 2 * linear(queries_of_all, part.width, length)  # logits and weighted sum
  hidden = mlp_hidden(part.width, part.mlp_ratio, part.gated_mlp)
  return blocks(part, queries, length) - (0 if outputs else linear(queries_of_all, hidden, part.width))


def latent_side(config: ConfigDict) -> int:
  """Latent pixels per side of an image of config.image_size."""
  if config.vae.kind == "pixels":
    return config.image_size
  return config.image_size // 2 ** (len(config.vae.block_out_channels) - 1)


def patches(config: ConfigDict, part: ConfigDict) -> tuple[int, int]:
  """Number of patches of an image, and number of values per patch."""
  channels = 3 if config.vae.kind == "pixels" else config.vae.latent_channels
  return (latent_side(config) // part.patch_size) ** 2, part.patch_size**2 * channels


def encoder(config: ConfigDict, num_tokens: int) -> int:
  """Encoder for one image and num_tokens registers: patch embedding, blocks, head; the last block queries registers."""
  part, (count, size) = config.encoder, patches(config, config.encoder)
  ends = linear(count, size, part.width) + linear(num_tokens, part.width, len(config.tokens.levels))
  if config.tokens.layout == "grid":
    return ends + blocks(part, count, count)
  return ends + blocks(part, num_tokens, count + num_tokens)


def decoder(config: ConfigDict, slots: int) -> int:
  """Decoder for one image, `slots` registers and one time: embeddings of codes and patches, blocks, head.

  The last block queries patches; modulations are not included.
  """
  part, (count, size) = config.decoder, patches(config, config.decoder)
  if config.tokens.layout == "grid":
    embedded = linear(config.tokens.num_registers, len(config.tokens.levels), part.width)
    ends = embedded + 2 * linear(count, size, part.width)
    return ends + blocks(part, count, count)
  ends = linear(slots, len(config.tokens.levels), part.width) + 2 * linear(count, size, part.width)
  return ends + blocks(part, count, count + slots)


def modulations(config: ConfigDict) -> int:
  """Work that depends only on the time: its embedding; shift, scale and gate of every block and the head; d = width.

  2 (256 d + d^2) + 2 depth d 6 d s + 2 d 2 d; s is 2 if patches and registers have separate ones, else 1.
  """
  part = config.decoder
  d, sets = part.width, 2 if part.modulation == "per_segment" else 1
  head = linear(1, d, 2 * d) if part.head_modulation else 0
  return linear(1, TIME_FEATURES, d) + linear(1, d, d) + part.depth * linear(1, d, sets * 6 * d) + head


def encoded(config: ConfigDict, num_tokens: int, fast: bool) -> int:
  """Registers that the encoder processes for num_tokens: all of them on the plain path."""
  total = config.tokens.num_registers
  return nested.padded_length(num_tokens - 1, total) if fast else total


def decoded(config: ConfigDict, num_tokens: int, fast: bool) -> int:
  """Registers that the decoder processes for num_tokens: all of them on the plain path."""
  total = config.tokens.num_registers
  return nested.padded_length(num_tokens, total) if fast else total


def tokenize(config: ConfigDict, num_tokens: int, batch: int, fast: bool) -> int:
  """Latents to token ids."""
  return batch * encoder(config, encoded(config, num_tokens, fast))


def sampler(config: ConfigDict, num_tokens: int, batch: int, fast: bool) -> int:
  """Token ids to latents by the sampler of config.sampler.

  Plain: every call of the decoder processes all registers, and computes modulations per row; a guided step has twice
  the rows. Fast: modulations are computed once per step for all rows; if the unconditional half of a guided step is a
  separate call, it has one register.
  """
  s, slots = config.sampler, decoded(config, num_tokens, fast)
  guided = 0
  if s.guidance != "none" and s.guidance_scale != 1:
    first, end = guidance.guided_steps(s.num_steps, s.guidance_interval)
    guided = end - first
  if not fast:
    return batch * (s.num_steps + guided) * (decoder(config, slots) + modulations(config))
  null = slots if slots <= flextok.MAX_JOINT_CODES else 1
  calls = s.num_steps * decoder(config, slots) + guided * decoder(config, null)
  return batch * calls + s.num_steps * modulations(config)


def train(config: ConfigDict, batch: int, fast: bool) -> int:
  """Forward and backward pass over latents: three times the forward pass, since each product has two in the backward.

  Except: latents and times have no gradient, which saves one product in each of their embeddings; and config.remat
  recomputes blocks or parts of them. REPA's projector is included, its teacher is not.
  Plain: all registers in every row. Fast: as many as a row's bucket has, and none in the encoder if all rows of the
  bucket are unconditional. Of all ways to cut the rows into buckets, the one with the fewest FLOPs of the blocks'
  matrices counts, if each bucket costs half a row of one register besides.
  """
  tokens, total = config.tokens, config.tokens.num_registers
  rows = bucket_rows(batch, tokens.bucket_rows)
  slots = [total] * rows
  if fast:
    bounds = nested.row_bounds(tokens.nested_dropout, total, tokens.null_prob, rows)
    slots = _bucketed(config, [nested.padded_length(bound, total) if bound else 0 for bound in map(int, bounds)])
  return batch // rows * sum(_train_row(config, n) for n in slots) + 3 * batch * projector(config)


def _bucketed(config: ConfigDict, slots: list[int]) -> list[int]:
  """Returns the registers that each row computes, of ascending numbers that it needs."""

  def row(registers: int) -> int:
    parts = [(config.decoder, max(registers, 1)), *([(config.encoder, registers)] if registers else [])]
    return sum(part.depth * part.width**2 * (n + patches(config, part)[0]) for part, n in parts)

  edges = [i for i in range(1, len(slots)) if slots[i] != slots[i - 1]]
  forced = {i for i in edges if not slots[i - 1]}
  best, least = slots, math.inf
  for count in range(len(edges) + 1):
    for cuts in itertools.combinations(edges, count):
      if forced <= set(cuts):
        bounds = [0, *cuts, len(slots)]
        filled = [slots[b - 1] for a, b in zip(bounds, bounds[1:]) for _ in range(a, b)]
        cost = sum(map(row, filled)) + (count + 1) * row(1) / 2
        best, least = (filled, cost) if cost < least else (best, least)
  return best


def projector(config: ConfigDict) -> int:
  """REPA's projector for one image, 0 if disabled: n (2 d h + 2 h h + 2 h f); h is its hidden width."""
  if repa.section(config) is None:
    return 0
  (count, _), hidden = patches(config, config.decoder), config.repa.hidden
  ends = linear(count, config.decoder.width, hidden) + linear(count, hidden, config.repa.features)
  return ends + linear(count, hidden, hidden)


def vit(sizes: Mapping, grid: int) -> int:
  """A vision transformer (models/perception/vit.py) of these sizes without a head: one image of grid x grid patches.

  For n tokens and width d, each block has 8 n d^2 and 4 n^2 d for attention, and the MLP's two or three products.
  """
  d, tokens = sizes["width"], 1 + sizes.get("num_registers", 0) + grid**2
  hidden = (3 if sizes.get("gated_mlp") else 2) * linear(tokens, d, sizes["mlp_hidden"])
  attention = 4 * linear(tokens, d, d) + 2 * linear(tokens, d, tokens)
  return linear(grid**2, 3 * sizes["patch_size"] ** 2, d) + sizes["depth"] * (attention + hidden)


def _train_row(config: ConfigDict, slots: int) -> int:
  """One image of the training batch; slots=0: unconditional, with one register in the decoder only."""
  sum_, remat = 0, config.remat
  if slots:
    part, (count, size) = config.encoder, patches(config, config.encoder)
    sum_ += 3 * encoder(config, slots) - linear(count, size, part.width)
    sum_ += computed_again(part, slots, count + slots, remat, outputs=False)  # no gates in the encoder
  slots = max(slots, 1)
  part, (count, size) = config.decoder, patches(config, config.decoder)
  sum_ += 3 * (decoder(config, slots) + modulations(config))
  sum_ -= linear(count, size, part.width) + linear(1, TIME_FEATURES, part.width)
  return sum_ + computed_again(part, count, count + slots, remat, outputs=True)


def train_vae(config: ConfigDict, batch: int) -> int:
  """Forward and backward pass of stage "vae": three times the forward pass, but no gradient of the images."""
  first = conv(config.image_size, 3, config.vae.block_out_channels[0])
  networks = perceptual_loss(config) + adversarial_losses(config)
  return 3 * (vae_encode(config, batch) + vae_decode(config, batch)) + batch * (networks - first)


def perceptual_loss(config: ConfigDict) -> int:
  """LPIPS with VGG16 of an image and its reconstruction, and its gradient in the reconstruction."""
  if not config.vae_loss.lpips_weight:
    return 0
  sum_, side, before = 0, config.image_size, 3
  for window, convolutions in lpips.NETS["vgg"]:
    side //= 2 if window else 1
    for _, channels, *_ in convolutions:
      sum_ += conv(side, before, channels)
      before = channels
  return 3 * sum_


def adversarial_losses(config: ConfigDict) -> int:
  """Discriminator of an image and its reconstruction, with gradients in its weights and, for the generator, in pixels.

  Includes both gradients of the decoder's last kernel, for the adaptive weight.
  """
  c = config.discriminator
  if not c["weight"]:
    return 0
  side, before, layers = config.image_size, 3, []
  for i in range(c.num_layers + 2):
    stride = 2 if i < c.num_layers else 1
    outputs = side // 2 if stride == 2 else side - 1
    channels = c.channels * min(2**i, 8) if i <= c.num_layers else 1
    layers.append(conv(side, before, channels, 4, stride, outputs=outputs))
    side, before = outputs, channels
  return 7 * sum(layers) - 2 * layers[0] + 2 * conv(config.image_size, config.vae.block_out_channels[0], 3)


def conv(
  side: int,
  channels_in: int,
  channels_out: int,
  kernel: int = 3,
  stride: int = 1,
  low: int = 1,
  outputs: int | None = None,
) -> int:
  """A square convolution of a square map with `side` pixels, padded by `low` pixels at the top and left.

  Along an axis, tap j of output o reads pixel o stride + j - low; only existing pixels count. By default there are
  side / stride outputs.
  """
  outputs = side // stride if outputs is None else outputs
  taps = sum(0 <= o * stride + j - low < side for o in range(outputs) for j in range(kernel))
  return 2 * taps**2 * channels_in * channels_out


def resnet(side: int, channels_in: int, channels: int) -> int:
  """Two 3x3 convolutions, and a 1x1 one if the number of channels changes."""
  shortcut = linear(side**2, channels_in, channels) if channels_in != channels else 0
  return conv(side, channels_in, channels) + conv(side, channels, channels) + shortcut


def vae_middle(side: int, channels: int) -> int:
  """Two resnets, and attention between all pixels: four projections, logits, weighted sum."""
  pixels = side**2
  return (
    2 * resnet(side, channels, channels) + 4 * linear(pixels, channels, channels) + 2 * linear(pixels, channels, pixels)
  )


def vae_encode(config: ConfigDict, batch: int) -> int:
  """Images to the moments of latents."""
  c, side = config.vae, config.image_size
  sum_ = conv(side, 3, c.block_out_channels[0])
  before = c.block_out_channels[0]
  for i, channels in enumerate(c.block_out_channels):
    sum_ += resnet(side, before, channels) + (c.layers_per_block - 1) * resnet(side, channels, channels)
    if i < len(c.block_out_channels) - 1:
      sum_ += conv(side, channels, channels, stride=2, low=0)
      side //= 2
    before = channels
  moments = 2 * c.latent_channels
  sum_ += vae_middle(side, before) + conv(side, before, moments) + linear(side**2, moments, moments)
  return batch * sum_


def vae_decode(config: ConfigDict, batch: int) -> int:
  """Latents to images."""
  c, side = config.vae, latent_side(config)
  before = c.block_out_channels[-1]
  sum_ = linear(side**2, c.latent_channels, c.latent_channels) + conv(side, c.latent_channels, before)
  sum_ += vae_middle(side, before)
  for i, channels in enumerate(reversed(c.block_out_channels)):
    sum_ += resnet(side, before, channels) + c.layers_per_block * resnet(side, channels, channels)
    if i < len(c.block_out_channels) - 1:
      side *= 2
      sum_ += conv(side, channels, channels)
    before = channels
  return batch * (sum_ + conv(side, before, 3))
