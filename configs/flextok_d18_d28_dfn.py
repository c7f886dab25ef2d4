"""FlexTok d18-d28 on DFN, 256 px: the model of flextok_d18_d28_in1k.py on a folder of images.

DFN is a list of web addresses, not a TFDS data set: give the tree of jpg, png or webp files made from it. 5 percent of
them are held out for evaluation, or give a second tree by --config.data.sources.folder.val_path. The VAE is frozen:
train one first (configs/vae_c16.py) and start from it, its workdir or its weights file:

  python -m flextok_jax.train --config=configs/flextok_d18_d28_dfn.py --workdir=DIR --config.init_from=VAE \
      --config.data.sources.folder.path=IMAGES

REPA's teacher, DINOv2-L, comes from the Hugging Face hub, or is a folder at --config.repa.teacher; to train without it,
--config.repa.weight=0 (docs/repa.md). To evaluate on ImageNet as the paper does: --config.eval.sources="('tfds',)".
"""

from configs import flextok_d18_d28_in1k


def get_config():
  c = flextok_d18_d28_in1k.get_config()
  c.data.sources.tfds.weight = 0.0
  c.data.sources.folder.weight = 1.0
  c.eval.sources = ("folder",)
  return c
