"""A page in the browser that shows what ordered tokens are: python -m flextok_jax.demo."""
