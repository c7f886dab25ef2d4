"""FlexTok d18-d28 on ImageNet, 256 px: 2,540.1M parameters with the VAE.

The VAE is frozen: train one first (configs/vae_c16.py) and start from it, its workdir or its weights file:

  python -m flextok_jax.train --config=configs/flextok_d18_d28_in1k.py --workdir=DIR --config.init_from=VAE

REPA's teacher, DINOv2-L, comes from the Hugging Face hub, or is a folder at --config.repa.teacher; to train without it,
--config.repa.weight=0 (docs/repa.md).
"""

from flextok_jax import config as common


def get_config():
  return common.derive(
    repa=dict(weight=1.0),
    remat="full",  # [ours] so that a device holds more images beside about 50 GB of state and gradients
    encoder=dict(width=1152, depth=18),
    decoder=dict(width=1792, depth=28),
    optim=dict(learning_rate=2.41e-4),  # d12-d12's, times 768 / the decoder's width [ours: the 1 / width rule of muP]
  )
