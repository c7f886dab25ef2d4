"""Speed, memory and FLOPs of every job."""
