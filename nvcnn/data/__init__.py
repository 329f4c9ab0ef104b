"""Reads samples of a data directory and makes uint8 batches of them on the training device."""
