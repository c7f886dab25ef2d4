"""The formats of the authors and of diffusers."""
