"""The adversarial loss of VQGAN (Esser et al. 2021) and of the latent diffusion models' autoencoders."""

import jax
import jax.numpy as jnp

_LARGEST = 1e4  # bound on the ratio of two gradients


def discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Hinge loss of logits of any shape: half of mean(max(0, 1 - real)) + mean(max(0, 1 + fake))."""
  return 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + fake).mean())


def generator_loss(fake: jax.Array) -> jax.Array:
  """Minus the mean of the logits, of any shape, of generated images."""
  return -fake.mean()


def adaptive_weight(of_reconstruction: jax.Array, of_generator: jax.Array) -> jax.Array:
  """Returns the weight that makes the generator's loss pull at the last layer as hard as the reconstruction losses do.

  min(|of_reconstruction| / (|of_generator| + 1e-4), 1e4), the lengths of their gradients of that layer's kernel.
  """
  length = lambda x: jnp.linalg.norm(x.ravel().astype(jnp.float32))
  return jnp.minimum(length(of_reconstruction) / (length(of_generator) + 1e-4), _LARGEST)
