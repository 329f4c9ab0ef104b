"""Writes data directories: shards with their indexes, dataset.json and manifest.json."""
