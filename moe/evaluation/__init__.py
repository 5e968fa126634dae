"""Measures of a trained model."""

from moe.evaluation.classify import evaluate

__all__ = ["evaluate"]
