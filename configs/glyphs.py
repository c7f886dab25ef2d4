"""Small models of emoji by four artists and of photographs: all three stages of the method, 64 px, on a CPU.

  glyphs:vae     the VAE: 4x down, 4 channels, 0.7M parameters; glyphs:vae_detail sharpens its decoder
  glyphs         the tokenizer of its latents: 32 tokens, 3.4M parameters; glyphs:next continues it
  glyphs:groups  a generator by group: face, animal, food, ...
  glyphs:text    a generator by caption ("strawberry, flat"), which ends its sequences itself
  glyphs:mixed   the tokenizer that ships, continued at 32, 48, 64 and 96 px (experiments/size_and_content.py)

DATA stands for --config.data.sources.emoji.path=GLYPHS --config.data.sources.photos.path=PHOTOS, two folders that
experiments/glyphs makes:

  python -m experiments.glyphs.prepare --out=GLYPHS
  python -m experiments.glyphs.photographs --out=PHOTOS
  python -m flextok_jax.train --config=glyphs:vae --workdir=VAE DATA
  python -m flextok_jax.train --config=glyphs:vae_detail --workdir=DETAIL --config.init_from=VAE DATA
  python -m flextok_jax.train --config=glyphs:vae_detail --workdir=SHARP --config.init_from=DETAIL \
      --config.vae_loss.detail_weight=80 --config.train.num_steps=600 DATA
  python -m flextok_jax.tokenize --what=latents --checkpoint=SHARP --config=glyphs --num_images=98304 --out=LATENTS DATA
  python -m flextok_jax.train --config=glyphs --workdir=DIR --config.init_from=SHARP --config.data.latents=LATENTS DATA
  python -m flextok_jax.train --config=glyphs:next --workdir=NEXT --config.init_from=DIR --config.data.latents=LATENTS \
      DATA

docs/generators.md#emoji has the commands of the generators. All but the VAE alone ship: docs/models.md says what they
reach. A code is one of 4,375 and not of 64,000: the generators' tables of 64,000 ids would be larger than all the rest,
and a generator has to see each id often enough.
"""

from ml_collections import ConfigDict

from flextok_jax import config as common
from flextok_jax.configs import shapes, shapes_ar

LEVELS = (7, 5, 5, 5, 5)  # [Mentzer et al. 2023, arXiv 2309.15505: for 2^12 codes]
NUM_IDS = 4_375
NUM_TOKENS = 32


def get_config(arg: str = ""):
  common.check_argument("glyphs", arg, ("", "next", "mixed", "vae", "vae_next", "vae_detail", "groups", "text"))
  if arg in ("groups", "text"):
    return _generator(arg)
  c = common.derive(
    image_size=64,
    dtype="float32",  # CPUs gain nothing from bfloat16
    vae=dict(latent_channels=4, block_out_channels=(16, 32, 64), layers_per_block=1, norm_groups=8, scaling_factor=0.0),
    data=dict(
      global_batch=32,
      num_threads=2,
      sources=dict(emoji=dict(weight=0.7), photos=dict(weight=0.3), tfds=dict(weight=0.0)),
    ),
    train=dict(log_every=50, checkpoint_every=250, keep_checkpoints=1, keep_period=0),
    eval=dict(sources=("emoji", "photos"), num_images=128, batch_size=64, grid_images=6),
  )
  if arg.startswith("vae"):
    _vae(c, arg)
  else:
    _tokenizer(c, continued=arg != "")
  if arg == "mixed":
    shapes.continue_mixed(c, "glyphs", num_steps=1_000)
  return c


def _vae(c: ConfigDict, arg: str):
  """Sets stage 0; its discriminator is for the runs of get_sweep, which continue a run without it."""
  c.update(
    stage="vae",
    vae_loss=dict(l1_weight=1.0, l2_weight=2.0, kl_weight=5e-7),
    discriminator=dict(start_step=0, channels=16, num_layers=2),  # weight: in get_sweep
    data=dict(global_batch=16),
    optim=dict(
      learning_rate=2e-3,
      end_learning_rate=3e-4,
      warmup_steps=100,
      weight_decay=0.0,
      ema_decay=0.998,
      discriminator=dict(learning_rate=2e-4),
    ),
    train=dict(num_steps=3_000, eval_every=1_500),
  )
  if arg != "vae":  # latents stay, so tokenizers of them can take the new decoder
    c.update(seed=1, vae_loss=dict(train_encoder=False))
  if arg == "vae_next":
    c.update(optim=dict(learning_rate=3e-4, end_learning_rate=1e-5), train=dict(num_steps=1_000))
  if arg == "vae_detail":
    c.update(
      vae_loss=dict(detail_weight=30.0),
      optim=dict(learning_rate=1e-3, end_learning_rate=1e-4, ema_decay=0.99),
      train=dict(num_steps=1_500),
    )


def get_sweep(arg: str = "") -> dict[str, dict[str, float]]:
  """Returns {run: {dotted field: value}} of glyphs:vae_next."""
  del arg
  return {"without": {"discriminator.weight": 0.0}, "with": {"discriminator.weight": 0.05}}


def _tokenizer(c: ConfigDict, continued: bool):
  """Sets stage 1."""
  c.update(
    encoder=dict(width=160, depth=3, head_dim=32, patch_size=4),
    decoder=dict(width=160, depth=5, head_dim=32, patch_size=2, modulation="shared"),
    tokens=dict(levels=LEVELS, num_registers=NUM_TOKENS, null_prob=0.1, saturation_weight=0.1),
    flow=dict(t_sampling="uniform", t_shift=4.0),
    sampler=dict(num_steps=25, guidance="cfg", guidance_scale=1.5),
    optim=dict(name="muon", learning_rate=3e-3, warmup_steps=300, b2=0.98, ema_decay=0.999),
    train=dict(num_steps=7_000, eval_every=7_000),
    remat="dots",  # 15% faster on two cores: less is written to memory
  )
  if continued:
    c.update(seed=1, optim=dict(learning_rate=2e-3, warmup_steps=100), train=dict(num_steps=9_000, eval_every=9_000))


def _generator(condition: str):
  """Returns stage 2 on token shards of centred emoji (docs/generators.md#emoji), for text with --quality."""
  text = condition == "text"
  c = shapes_ar.get_config("stop" if text else "")
  c.update(
    ar=dict(depth=5, num_ids=NUM_IDS, num_tokens=NUM_TOKENS, num_classes=13),  # groups of the source emoji
    text=dict(max_length=56),
    train=dict(keep_checkpoints=1, eval_every=1_500),
  )
  if text:  # the words of 11,000 captions; the first tokens, as later ones follow from these
    c.update(
      ar=dict(position_decay=0.5, guidance_scale=1.0, temperature=0.25),
      text=dict(ngram_rows=8_192),
      train=dict(num_steps=5_000),
    )
  return c
