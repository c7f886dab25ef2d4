"""The adversarial loss of VQGAN (Esser et al. 2021) and of the autoencoders of latent diffusion models."""

import jax
import jax.numpy as jnp

_LARGEST = 1e4  # bound on the ratio of two gradients


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Returns the hinge loss of logits of any shape: (mean(max(0, 1 - real)) + mean(max(0, 1 + fake))) / 2."""
  return 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean())


def generator_loss(fake: jax.Array) -> jax.Array:
  """Returns minus the mean of the logits of generated images, of any shape."""
  return -fake.mean()


def adaptive_weight(of_reconstruction: jax.Array, of_generator: jax.Array) -> jax.Array:
  """Returns the weight that gives the generator's loss a gradient as large as that of the reconstruction losses.

  min(|of_reconstruction| / (|of_generator| + 1e-4), 1e4), the norms of their gradients of the kernel of the last layer.
  """
  norm = lambda x: jnp.linalg.norm(x.ravel().astype(jnp.float32))
  return jnp.minimum(norm(of_reconstruction) / (norm(of_generator) + 1e-4), _LARGEST)
