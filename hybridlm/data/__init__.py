"""From text to batches: sources (documents), shards (tokens on disk), sampler (a sample number to tokens)."""
