"""Compiling for TPUs without one."""
