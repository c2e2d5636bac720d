"""Pictures and captions for training: folders, buckets, caches, batches."""
