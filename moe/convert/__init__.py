"""Weights of Hugging Face models in and out: `python -m moe.convert --help`."""

from moe.convert.convert import from_hf, to_hf

__all__ = ["from_hf", "to_hf"]
