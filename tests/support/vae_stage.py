"""Stage "vae": a small config, random parameters and batches, and its losses with a separate backward pass each."""

from flax.core.meta import unbox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flextok_jax.configs import debug
from flextok_jax.models.perception.lpips import LPIPS
from flextok_jax.models.vae.autoencoder import kl_divergence, sample_posterior

START = 3  # first step with the discriminator
KEY = jax.random.key(5)


def config_of(weight=0.5, **overrides):
  """A one-level VAE for images of 8 px and a discriminator with one layer of stride 2, which compile fast."""
  c = debug.get_config()
  c.update(
    stage="vae",
    image_size=8,
    vae=dict(kind="autoencoder_kl", latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_groups=4),
    vae_loss=dict(l1_weight=1.0, l2_weight=0.3, kl_weight=1e-3, detail_weight=0.4),
    discriminator=dict(weight=weight, start_step=START, channels=4, num_layers=1),
  )
  c.update(overrides)
  return c


def params_of(stage, seed=0):
  """Returns all parts, random as those from init and init_auxiliary, with nonzero biases."""
  parts = jax.eval_shape(lambda key: [*stage.init(key), *stage.init_auxiliary(key)], KEY)
  rng = np.random.default_rng(seed)

  def draw(path, x):
    part, name = path[0].key, path[-1].key
    by_fan_in = 0.02 if part == "discriminator" else np.prod(x.shape[:-1]) ** -0.5
    deviation = dict(bias=0.1, scale=0.02).get(name, by_fan_in)
    return rng.normal(name == "scale", deviation, x.shape).astype(np.float32)

  return jax.tree.map_with_path(draw, unbox({name: part for group in parts for name, part in group.items()}))


def batch_of(rows=4, size=8):
  return {"image": np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), np.uint8)}


def plain_losses(stage, images, key, lpips=None):
  """Returns reconstruction, KL, generator and discriminator losses, each a function of the parameters it depends on."""
  w, d = stage.loss_weights, lambda params, x: stage.discriminator.apply({"params": params}, x)

  def through(vae):
    mean, logvar = stage.vae.apply({"params": vae}, images, method="encode")
    recon = stage.vae.apply({"params": vae}, sample_posterior(mean, logvar, key), method="decode")
    return recon, kl_divergence(mean, logvar).mean()

  def reconstruction(vae):
    recon = through(vae)[0]
    error = recon - images
    total = w.l1_weight * jnp.abs(error).mean() + w.l2_weight * jnp.square(error).mean()
    for axis in (1, 2) if w.detail_weight else ():  # of these small images, one window
      strength, wanted = (jnp.abs(jnp.diff(x, axis=axis)).mean((1, 2)) for x in (recon, images))
      total += w.detail_weight * jnp.abs(strength - wanted).mean() / 2
    if lpips is not None:
      a, b = ((x + 1) / 2 for x in (recon, images))
      total += w.lpips_weight * LPIPS("vgg").apply({"params": lpips}, a, b).mean()
    return total

  kl = lambda vae: through(vae)[1]
  generator = lambda vae, discriminator: -d(discriminator, through(vae)[0]).mean()

  def hinge(discriminator, vae):
    real, fake = d(discriminator, images), d(discriminator, through(vae)[0])
    return (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()) / 2

  return reconstruction, kl, generator, hinge


def plain_step(stage, params, batch, key):
  """Returns loss, gradients and adaptive weight, with a separate backward pass for each loss."""
  images = batch["image"].astype(np.float32) / 127.5 - 1
  reconstruction, kl, generator, hinge = plain_losses(stage, images, key, params.get("lpips"))
  vae, discriminator = params["vae"], params["discriminator"]
  (r, dr), (k, dk) = (jax.value_and_grad(f)(vae) for f in (reconstruction, kl))
  g, dg = jax.value_and_grad(generator)(vae, discriminator)
  h, dh = jax.value_and_grad(hinge)(discriminator, vae)
  norm = lambda grads: jnp.sqrt(jnp.square(grads["decoder"]["conv_out"]["kernel"]).sum())
  weight = stage.adversarial.weight * jnp.clip(norm(dr) / (norm(dg) + 1e-4), 0, 1e4)
  kl_weight = stage.loss_weights.kl_weight
  total = jax.tree.map(lambda a, b, c: a + kl_weight * b + weight * c, dr, dk, dg)
  return r + kl_weight * k + weight * g + h, {"vae": total, "discriminator": dh}, weight


def assert_close(ours, plain, rtol=2e-5):
  """Compares every leaf up to `rtol` of its largest entry."""
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max() + 1e-8, err_msg=jax.tree_util.keystr(path))
