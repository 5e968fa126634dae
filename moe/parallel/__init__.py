"""The device mesh, the map from logical to mesh axes, and dispatch across devices."""
