"""Data sets as tfds builders, and the Grain pipelines that turn them into batches of NumPy arrays."""
