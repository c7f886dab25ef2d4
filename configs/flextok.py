"""FlexTok as released, 256 px, by sizes of encoder and decoder and data set.

  d12_d12_in1k  768 x 12 and 768 x 12, ImageNet: 341.3M parameters with the VAE
  d18_d18_in1k  1152 x 18 and 1152 x 18, ImageNet: 949.1M
  d18_d28_in1k  1152 x 18 and 1792 x 28, ImageNet: 2,540.1M
  d18_d28_dfn   the same model on DFN
  grid_d18_d28  the 2D baseline on ImageNet: a token for each of 16 x 16 patches, without registers

The VAE is frozen: train one first (configs/vae.py) and start from its workdir or its weights file:

  python -m flextok_jax.train --config=flextok:d12_d12_in1k --workdir=DIR --config.init_from=VAE

REPA's teacher, DINOv2-L, comes from the Hugging Face hub or from a folder, --config.repa.teacher; to train without it:
--config.repa.weight=0 (docs/repa.md).

DFN is a list of web addresses and not a TFDS data set: pass the folder of jpg, png or webp files made from it by
--config.data.sources.folder.path=IMAGES. 5 percent of them are held out for evaluation, unless
--config.data.sources.folder.val_path names another folder. To evaluate on ImageNet as the paper does:
--config.eval.sources="('tfds',)".

Hardware: d12_d12 is meant for one host of accelerators, d18_d28 for a slice: its state and gradients take 49 GB, which
training shards as far as the devices need it. Compiled for 256 chips of TPU v5e (docs/scaling.md); none was trained.
"""

from flextok_jax import config as common

# The learning rate is that of width 768 times 768 / width of the decoder [ours: the 1 / width rule of muP].
_D18 = dict(width=1152, depth=18)
_D18_D28 = dict(
  encoder=_D18,
  decoder=dict(width=1792, depth=28),
  optim=dict(learning_rate=2.41e-4),
  remat="full",  # [ours] for more images per device, beside the state
)
MODELS = {
  # remat: [ours] for the 128 images per device of one host; it recomputes 1% of the FLOPs.
  "d12_d12_in1k": dict(remat="dots"),
  "d18_d18_in1k": dict(encoder=_D18, decoder=_D18, optim=dict(learning_rate=3.75e-4), remat="dots"),
  "d18_d28_in1k": _D18_D28,
  "d18_d28_dfn": _D18_D28,
  "grid_d18_d28": _D18_D28
  | dict(
    decoder=dict(width=1792, depth=28, modulation="shared"),
    tokens=dict(layout="grid", nested_dropout="none"),
    sampler=dict(guidance_scale=5.0),  # [code]
  ),
}


def get_config(model: str = ""):
  """Returns the config of one of MODELS."""
  common.check_argument("flextok", model, MODELS)
  c = common.derive(repa=dict(weight=1.0), **MODELS[model])
  if model.endswith("dfn"):
    c.update(data=dict(sources=dict(tfds=dict(weight=0.0), folder=dict(weight=1.0))), eval=dict(sources=("folder",)))
  return c
