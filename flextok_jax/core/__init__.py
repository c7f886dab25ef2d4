"""Shared utilities: files, the hub, hashing, images, accelerators, timing."""
