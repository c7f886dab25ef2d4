"""The public interface: what a Python user calls."""
