"""Measures of a trained model, one module a task."""
