"""The maths without parameters."""
