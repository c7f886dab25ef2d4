"""Independent reference implementation of the tokenizer: plain numpy, float64, no fused loops, no code of the package.

Weights `w` are a flat dict with the names and layouts of the official checkpoints (linear [out, in], convolution
[out, in, kh, kw]); arrays are channels-last. The code favours clarity over speed.
"""

import dataclasses
import itertools
import math
import statistics

import numpy as np

ENC, DEC = "encoder.module_dict.enc_", "decoder.module_dict.dec_"


@dataclasses.dataclass(frozen=True)
class Options:
  """Transformer settings that the weights do not determine; the defaults are those of released models."""

  activation: str = "silu"
  qk_norm: bool = True
  posemb: str = "sincos"
  posemb_scaling: str = "absolute"
  max_grid: int = 0  # of the fixed table; 0: large enough
  max_grid_width: int = 0  # 0: max_grid
  readout_multiplier: float = 1.0
  max_timestep: float = 1.0
  single_null: bool = False


RELEASED = Options()


def float64(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the weights in float64."""
  return {name: np.asarray(value, np.float64) for name, value in weights.items()}


def linear(w, name, x):
  """x [..., in] to [..., out]; the bias is optional."""
  return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def silu(x):
  return x / (1 + np.exp(-x))


def activate(x, kind):
  if kind == "relu":
    return np.maximum(x, 0)
  if kind == "gelu":
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
  if kind == "gelu_tanh":
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
  if kind == "quick_gelu":
    return x / (1 + np.exp(-1.702 * x))
  assert kind == "silu"
  return silu(x)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def layer_norm(x):
  """No affine part, eps 1e-5."""
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


# Patches and positions.


def patchify(x, p):
  """[b, h, w, c] to [b, h/p * w/p, p * p * c], rows of patches first, vector order (row, column, channel)."""
  b, h, width, _ = x.shape
  corners = itertools.product(range(0, h, p), range(0, width, p))
  return np.stack([x[:, i : i + p, j : j + p].reshape(b, -1) for i, j in corners], 1)


def unpatchify(patches, p, h, width):
  """Inverse of patchify."""
  x = np.zeros((patches.shape[0], h, width, patches.shape[-1] // p**2))
  for n, (i, j) in enumerate(itertools.product(range(0, h, p), range(0, width, p))):
    x[:, i : i + p, j : j + p] = patches[:, n].reshape(-1, p, p, x.shape[-1])
  return x


def sincos_2d(h, width, dim, step_down=1.0, step_right=1.0):
  """[h, width, dim]: sin, cos of the row, then sin, cos of the column, at dim / 4 frequencies each."""
  table = np.zeros((h, width, dim))
  quarter = dim // 4
  for row, col, i in itertools.product(range(h), range(width), range(quarter)):
    frequency = 1 / 10000 ** (i / quarter)
    table[row, col, i::quarter] = (
      math.sin(row * step_down * frequency),
      math.cos(row * step_down * frequency),
      math.sin(col * step_right * frequency),
      math.cos(col * step_right * frequency),
    )
  return table


def released_sincos(h, width, dim):
  """The table of the released code: its positions are counted as for width rows of h, and placed as h rows of width."""
  square = sincos_2d(max(h, width), max(h, width), dim)
  table = np.zeros((h, width, dim))
  for n in range(h * width):
    table[n // width, n % width] = square[n // h, n % h]
  return table


def bilinear(table, h, width):
  """Resizes [g, k, d] to [h, width, d] with fixed corners."""
  out, low, right = np.zeros((h, width, table.shape[-1])), len(table) - 1, table.shape[1] - 1
  for i, j in itertools.product(range(h), range(width)):
    row = i * low / (h - 1) if h > 1 else 0.0
    col = j * right / (width - 1) if width > 1 else 0.0
    for r, c in itertools.product(range(low + 1), range(right + 1)):
      out[i, j] += max(0.0, 1 - abs(row - r)) * max(0.0, 1 - abs(col - c)) * table[r, c]
  return out


def patch_positions(w, name, h, width, dim, options):
  """Returns [h * width, dim] from a table of all positions of the largest grid; only learned vectors are in w."""
  rows_of, columns_of = options.max_grid or max(h, width), options.max_grid_width or options.max_grid or max(h, width)
  if options.posemb_scaling == "scaled":  # from 0 to 1, times the last position of the table
    steps = ((last - 1) * (1 / (count - 1)) for last, count in ((rows_of, h), (columns_of, width)))
    return sincos_2d(h, width, dim, *steps).reshape(h * width, dim)
  if options.posemb == "sincos":
    table = sincos_2d(rows_of, columns_of, dim)
  elif options.posemb == "sincos_released":
    table = released_sincos(rows_of, columns_of, dim)
  else:
    rows, cols = w[f"{name}.posembs"][:, 0]  # [d, g] each
    side = rows.shape[1]
    shape = (options.max_grid, options.max_grid_width) if options.max_grid_width else (side, side)
    table = np.zeros((*shape, dim))
    for r, c in itertools.product(*map(range, shape)):
      pair = rows[:, r], cols[:, c]
      table[r, c] = pair[0] * pair[1] if options.posemb == "learnable_prod" else pair[0] + pair[1]
  table = bilinear(table, h, width) if options.posemb_scaling == "interpolate" else table[:h, :width]
  assert table.shape == (h, width, dim)
  return table.reshape(h * width, dim)


def timestep_features(t, max_timestep=1.0):
  """[b] to [b, 256]: cosines, then sines, of 128 angles."""
  angles = np.asarray(t, np.float64)[:, None] * 1000 / max_timestep * np.exp(-math.log(256) * np.arange(128) / 128)
  return np.concatenate([np.cos(angles), np.sin(angles)], -1)


# FSQ.


def fsq_bound(z, levels):
  bounded = np.empty(z.shape)
  for i, level in enumerate(levels):
    half_l = (level - 1) * (1 + 1e-3) / 2
    offset = 0.5 if level % 2 == 0 else 0.0
    bounded[..., i] = np.tanh(z[..., i] + np.arctanh(offset / half_l)) * half_l - offset
  return bounded


def fsq_quantize(z, levels):
  """z [..., n] to codes in [-1, 1] and ids [...]."""
  digits = np.round(fsq_bound(z, levels))  # half to even
  half = np.array([level // 2 for level in levels])
  basis = np.cumprod([1, *levels[:-1]])
  return digits / half, ((digits + half) * basis).sum(-1).astype(np.int64)


def fsq_lookup(ids, levels):
  """ids [...] to codes [..., n]."""
  codes = []
  for level in levels:
    codes.append((ids % level - level // 2) / (level // 2))
    ids = ids // level
  return np.stack(codes, -1)


def fsq_grad(z, grad_codes, levels):
  """Gradient of quantize, with rounding treated as the identity: bound's derivative over level // 2."""
  grad = np.empty(z.shape)
  for i, level in enumerate(levels):
    half_l = (level - 1) * (1 + 1e-3) / 2
    shift = np.arctanh((0.5 if level % 2 == 0 else 0.0) / half_l)
    grad[..., i] = grad_codes[..., i] * half_l * (1 - np.tanh(z[..., i] + shift) ** 2) / (level // 2)
  return grad


# Transformer.


def attention(w, name, x, head_dim, mask=None, qk_norm=True):
  """x [b, l, d]; mask [l, l], true where a query (row) sees a key (column)."""
  b, length, width = x.shape
  q, k, v = (
    linear(w, f"{name}.w{kind}", x).reshape(b, length, width // head_dim, head_dim).transpose(0, 2, 1, 3)
    for kind in "qkv"
  )
  if qk_norm:
    q, k = layer_norm(q), layer_norm(k)
  logits = q @ k.swapaxes(-1, -2) * 8 / head_dim
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  out = (softmax(logits) @ v).transpose(0, 2, 1, 3).reshape(b, length, width)
  return linear(w, f"{name}.proj", out)


def mlp(w, name, x, activation="silu"):
  h = activate(linear(w, f"{name}.fc1", x), activation)
  if f"{name}.fc3.weight" in w:  # gated
    h = h * linear(w, f"{name}.fc3", x)
  return linear(w, f"{name}.fc2", h)


def num_modules(w, prefix):
  """Number of modules prefix.0, prefix.1, ..."""
  return len({name.removeprefix(prefix).split(".")[1] for name in w if name.startswith(f"{prefix}.")})


def patch_size_of(w, name, channels):
  return math.isqrt(w[f"{name}.weight"].shape[1] // channels)


def encoder_blocks(w, latents, head_dim=64, options=RELEASED, layers=None):
  """Latents [b, h, w, c] to patches [b, n, d] and registers [b, r, d] after `layers` blocks of the encoder, or all."""
  b, h, width, c = latents.shape
  p = patch_size_of(w, ENC + "patch_emb.patch_proj", c)
  x = linear(w, ENC + "patch_emb.patch_proj", patchify(latents, p))
  x = x + patch_positions(w, ENC + "patches_posemb_module", h // p, width // p, x.shape[-1], options)
  patches = x.shape[1]
  grid = ENC + "register_module.registers" not in w  # a token for each patch
  if not grid:
    x = np.concatenate([x, np.repeat(w[ENC + "register_module.registers"][None], b, 0)], 1)
  length = x.shape[1]
  mask = np.zeros((length, length), bool)
  for i, j in itertools.product(range(length), range(length)):
    mask[i, j] = j < patches or j <= i
  for i in range(num_modules(w, ENC + "transformer.blocks") if layers is None else layers):
    block = f"{ENC}transformer.blocks.{i}"
    x = x + attention(w, f"{block}.attn", layer_norm(x), head_dim, mask, options.qk_norm)
    x = x + mlp(w, f"{block}.mlp", layer_norm(x), options.activation)
  return x[:, :patches], x[:, patches:]


def encode(w, latents, head_dim=64, options=RELEASED):
  """Latents [b, h, w, c] to the encoder's output [b, n, len(levels)], before FSQ."""
  patches, registers = encoder_blocks(w, latents, head_dim, options)
  out = registers if registers.shape[1] else patches  # a token for each patch
  return linear(w, ENC + "to_latents.proj", options.readout_multiplier * layer_norm(out))


def registers_in(w, codes, keep_k=None, null=None):
  """Codes [b, k, n] to the decoder's registers [b, k, d]; keep_k int [b], null bool [b]."""
  x = linear(w, DEC + "from_latents.proj", codes)
  x = x + w[DEC + "registers_posemb_module.posembs"][0, 0].T[: x.shape[1]]
  for i in range(x.shape[0]):
    if keep_k is not None:
      x[i, keep_k[i] :] = w[DEC + "nested_dropout.dropout_mask_token"]
    if null is not None and null[i]:
      x[i] = w.get(DEC + "latent_dropout.nullcond", 0.0)
  return x


def codes_on_grid(w, codes, side, patches, keep_k=None, null=None):
  """Codes [b, side * side, n] to what is added to patches x patches patches; keep_k int [b], null bool [b]."""
  b, k, n = codes.shape
  full = np.full((b, side * side, n), -1.0)  # id 0
  for i in range(b):
    length = k if keep_k is None else min(k, keep_k[i])
    full[i, :length] = codes[i, :length]
  x = linear(w, DEC + "from_latents.proj", full)
  if null is not None:
    x[null] = w.get(DEC + "latent_dropout.nullcond", 0.0)
  where = np.arange(patches) * side // patches  # row or column of the token of a patch
  return x.reshape(b, side, side, -1)[:, where][:, :, where].reshape(b, patches * patches, -1)


def time_embedding(w, t, max_timestep=1.0):
  h = silu(linear(w, DEC + "time_embedder.mlp.0", timestep_features(t, max_timestep)))
  return linear(w, DEC + "time_embedder.mlp.2", h)


def velocity(w, x, t, codes, keep_k=None, null=None, head_dim=64, options=RELEASED):
  """Predicted velocity [b, h, w, c] of noised latents x [b, h, w, c] at times t [b]."""
  b, h, width, c = x.shape
  p = patch_size_of(w, DEC + "noise_patch_emb.patch_proj", c)
  patches = linear(w, DEC + "noise_patch_emb.patch_proj", patchify(x, p))
  patches = patches + patch_positions(w, DEC + "patches_posemb_module", h // p, width // p, patches.shape[-1], options)
  if DEC + "registers_posemb_module.posembs" in w:
    registers = registers_in(w, codes, keep_k, null)
  else:
    side = math.isqrt(codes.shape[1])
    patches = patches + codes_on_grid(w, codes, side, h // p, keep_k, null)
    registers = patches[:, :0]
  condition = silu(time_embedding(w, t, options.max_timestep))
  if options.single_null and null is not None:  # sequences have two lengths: one sample at a time
    count = np.where(null, 1, registers.shape[1])
    out = np.concatenate(
      [
        denoise(w, patches[i : i + 1], registers[i : i + 1, : count[i]], condition[i : i + 1], head_dim, options)
        for i in range(b)
      ]
    )
  else:
    out = denoise(w, patches, registers, condition, head_dim, options)
  return unpatchify(out, p, h, width)


def denoise(w, patches, registers, condition, head_dim, options):
  """Patches [b, n, d], registers [b, k, d] and condition [b, d] to the velocities of the patches [b, n, p * p * c]."""
  count = patches.shape[1]
  y = np.concatenate([patches, registers], 1)
  for i in range(num_modules(w, DEC + "transformer.blocks")):
    block = f"{DEC}transformer.blocks.{i}"
    values = linear(w, f"{block}.adaLN_modulation.1", condition)
    chunks = np.split(values, values.shape[1] // y.shape[2], -1)
    modulation = []  # six arrays [b, l, d]: patches use chunk i, registers chunk 6 + i, or i if there are only six
    for for_patches, for_registers in zip(chunks[:6], chunks[-6:]):
      modulation.append(
        np.concatenate(
          [np.repeat(for_patches[:, None], count, 1), np.repeat(for_registers[:, None], y.shape[1] - count, 1)], 1
        )
      )
    gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = modulation
    h = layer_norm(y) * (1 + scale_attn) + shift_attn
    y = y + gate_attn * attention(w, f"{block}.attn", h, head_dim, qk_norm=options.qk_norm)
    h = layer_norm(y) * (1 + scale_mlp) + shift_mlp
    y = y + gate_mlp * mlp(w, f"{block}.mlp", h, options.activation)
  y = layer_norm(y[:, :count])
  if DEC + "to_patches.adaLN_modulation.1.weight" in w:
    shift, scale = np.split(linear(w, DEC + "to_patches.adaLN_modulation.1", condition)[:, None], 2, -1)
    y = y * (1 + scale) + shift
  return linear(w, DEC + "to_patches.proj", options.readout_multiplier * y)


# Flow, guidance, sampler.


def t_from_draw(draw, mode, mode_scale):
  """Training times [b] from a normal draw ("logit_normal") or a uniform one (other modes)."""
  if mode == "uniform":
    return draw
  if mode == "mode":
    return 1 - draw - mode_scale * (np.cos(np.pi * draw / 2) ** 2 - 1 + draw)
  if mode == "stratified_logit_normal":
    draw = np.array([statistics.NormalDist().inv_cdf((i + u) / len(draw)) for i, u in enumerate(draw)])
  return 1 / (1 + np.exp(-draw))


def add_noise(x0, noise, t):
  t = np.asarray(t).reshape(-1, *[1] * (x0.ndim - 1))
  return (1 - t) * x0 + t * noise


def flow_loss(w, latents, codes, t, noise, keep_k=None, null=None):
  """Loss per sample, [b]."""
  v = velocity(w, add_noise(latents, noise, t), t, codes, keep_k, null)
  return ((v - (noise - latents)) ** 2).mean((1, 2, 3))


def cfg(v_c, v_u, scale):
  return v_u + scale * (v_c - v_u)


def apg(v_c, v_u, scale, running, momentum=-0.5, eta=0.0, threshold=2.5):
  """Returns (guided velocity, running sum), sample by sample."""
  out, sums = np.empty(v_c.shape), np.empty(v_c.shape)
  for i in range(len(v_c)):
    c, sums[i] = v_c[i], v_c[i] - v_u[i] + momentum * running[i]
    d = sums[i] * (min(1.0, threshold / np.linalg.norm(sums[i])) if threshold > 0 else 1.0)
    parallel = (d * c).sum() / (c * c).sum() * c
    out[i] = c + (scale - 1) * (d - parallel + eta * parallel)
  return out, sums


def sample(w, noise, codes, keep_k, num_steps, guidance="none", scale=1.0, head_dim=64):
  """Returns the latents after each Euler step [num_steps, b, h, w, c]; APG has its default settings."""
  x, b = noise, len(noise)
  running, states = np.zeros(noise.shape), []
  for i in range(num_steps, 0, -1):
    t = np.full(b, i / num_steps)
    v = velocity(w, x, t, codes, keep_k, head_dim=head_dim)
    if guidance != "none":
      v_u = velocity(w, x, t, codes, keep_k, np.ones(b, bool), head_dim)
      if guidance == "cfg":
        v = cfg(v, v_u, scale)
      else:
        v, running = apg(v, v_u, scale, running)
    x = x - v / num_steps
    states.append(x)
  return np.stack(states)


# VAE.


def conv(w, name, x, stride=1, pad=None):
  """x [b, h, w, c]; pad is ((top, bottom), (left, right)), by default such that the size is unchanged."""
  kernel = w[f"{name}.weight"]
  size = kernel.shape[2]
  same = (size // 2, size // 2)
  x = np.pad(x, ((0, 0), *(pad or (same, same)), (0, 0)))
  rows, cols = x.shape[1] - size + 1, x.shape[2] - size + 1
  out = sum(
    x[:, i : i + rows : stride, j : j + cols : stride] @ kernel[:, :, i, j].T
    for i, j in itertools.product(range(size), range(size))
  )
  return out + w[f"{name}.bias"]


def group_norm(w, name, x, groups):
  b, h, width, c = x.shape
  g = x.reshape(b, h * width, groups, c // groups)
  g = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-6)
  return g.reshape(x.shape) * w[f"{name}.weight"] + w[f"{name}.bias"]


def resnet(w, name, x, groups):
  h = conv(w, f"{name}.conv1", silu(group_norm(w, f"{name}.norm1", x, groups)))
  h = conv(w, f"{name}.conv2", silu(group_norm(w, f"{name}.norm2", h, groups)))
  return h + (conv(w, f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x)


def mid_block(w, name, x, groups):
  x = resnet(w, f"{name}.resnets.0", x, groups)
  tokens = group_norm(w, f"{name}.attentions.0.group_norm", x, groups).reshape(len(x), -1, x.shape[-1])
  q, k, v = (linear(w, f"{name}.attentions.0.to_{kind}", tokens) for kind in "qkv")
  out = softmax(q @ k.swapaxes(1, 2) / math.sqrt(x.shape[-1])) @ v
  x = x + linear(w, f"{name}.attentions.0.to_out.0", out).reshape(x.shape)
  return resnet(w, f"{name}.resnets.1", x, groups)


def vae_encode(w, images, groups):
  """Images [b, h, w, 3] to the mean and log-variance of the unscaled latents."""
  name = "vae.vae.encoder"
  x = conv(w, f"{name}.conv_in", images)
  for level in range(num_modules(w, f"{name}.down_blocks")):
    block = f"{name}.down_blocks.{level}"
    for i in range(num_modules(w, f"{block}.resnets")):
      x = resnet(w, f"{block}.resnets.{i}", x, groups)
    if f"{block}.downsamplers.0.conv.weight" in w:
      x = conv(w, f"{block}.downsamplers.0.conv", x, stride=2, pad=((0, 1), (0, 1)))
  x = mid_block(w, f"{name}.mid_block", x, groups)
  x = conv(w, f"{name}.conv_out", silu(group_norm(w, f"{name}.conv_norm_out", x, groups)))
  mean, logvar = np.split(conv(w, "vae.vae.quant_conv", x), 2, -1)
  return mean, np.clip(logvar, -30, 20)


def vae_decode(w, latents, groups):
  """Unscaled latents to images [b, h, w, 3], not clipped."""
  name = "vae.vae.decoder"
  x = conv(w, f"{name}.conv_in", conv(w, "vae.vae.post_quant_conv", latents))
  x = mid_block(w, f"{name}.mid_block", x, groups)
  for level in range(num_modules(w, f"{name}.up_blocks")):
    block = f"{name}.up_blocks.{level}"
    for i in range(num_modules(w, f"{block}.resnets")):
      x = resnet(w, f"{block}.resnets.{i}", x, groups)
    if f"{block}.upsamplers.0.conv.weight" in w:
      x = conv(w, f"{block}.upsamplers.0.conv", x.repeat(2, 1).repeat(2, 2))
  return conv(w, f"{name}.conv_out", silu(group_norm(w, f"{name}.conv_norm_out", x, groups)))


def mode_cdf(scale):
  """P(t <= x) for mode sampling, by inverting its decreasing map of u on a fine grid."""
  u = np.linspace(0, 1, 100_001)
  t = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
  assert (np.diff(t) < 0).all()
  return lambda x: 1 - np.interp(x, t[::-1], u[::-1])
