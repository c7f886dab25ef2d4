"""Images, captions and shards to batches."""
