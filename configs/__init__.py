"""The configs by name: --config=NAME or --config=NAME:ARGUMENT; in an installed package, flextok_jax.configs."""
