"""The maths without parameters: free functions on arrays, importing nothing but jax."""
