"""Logits of a workdir's model, to hold it against another implementation."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from moe.files import AnyPath
from moe.models import LmConfig
from moe.parallel.mesh import batch_shards
from moe.workdir import load_model


def write_logits(
    workdir: AnyPath, tokens: Path, logits: Path, step: int | None = None, overrides: Sequence[str] = ()
) -> None:
    """Runs the model on token ids [B, L] of a .npy file and writes float32 logits [B, L, V] to another.

    Evaluation mode: no noise, and no token is dropped, whatever the config's capacity. Rows go through the devices a
    few at a time. Raises ValueError where the ids don't fit the model.
    """
    if logits.exists():
        raise ValueError(f"{logits} exists: choose another name, or remove it.")
    try:
        with open(tokens, "rb") as file:
            tokens_BL = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, OverflowError) as error:
        raise ValueError(f"{tokens} is not a .npy file of numbers: {error}.") from None
    loaded = load_model(workdir, step, ["moe.evaluation_capacity_factor=0", *overrides])
    config = loaded.config.model
    if not isinstance(config, LmConfig):
        raise ValueError(f"{workdir} holds a model of images, which reads no tokens.")
    if tokens_BL.ndim != 2 or not np.issubdtype(tokens_BL.dtype, np.integer) or not tokens_BL.size:
        raise ValueError(f"{tokens} holds {tokens_BL.dtype} of shape {tokens_BL.shape}: it must be integers [B, L].")
    if tokens_BL.min() < 0 or tokens_BL.max() >= config.vocab_size:
        raise ValueError(
            f"{tokens} holds ids from {tokens_BL.min()} to {tokens_BL.max()}: model.vocab_size is {config.vocab_size}."
        )
    if tokens_BL.shape[1] > config.length:
        raise ValueError(f"sequences of {tokens_BL.shape[1]} tokens exceed model.length = {config.length}.")

    @jax.jit
    def run(variables, rows_BL):  # type: ignore[no-untyped-def]
        return loaded.model.apply(variables, rows_BL, keys=None, mesh=loaded.mesh).logits

    rows = batch_shards(loaded.mesh)
    temporary = logits.with_name(f".{logits.name}.tmp")
    shape = (*tokens_BL.shape, config.vocab_size)
    temporary.unlink(missing_ok=True)
    try:
        out_BLV = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, len(tokens_BL), rows):
            part_BL = tokens_BL[start : start + rows].astype(np.int32)
            padded_BL = np.pad(part_BL, ((0, rows - len(part_BL)), (0, 0)))
            out_BLV[start : start + rows] = np.asarray(run(loaded.variables, padded_BL))[: len(part_BL)]
        out_BLV.flush()
        temporary.replace(logits)
    finally:
        temporary.unlink(missing_ok=True)
