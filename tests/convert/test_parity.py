"""Conversions held against transformers, and files against the package safetensors."""

from pathlib import Path

import numpy as np
import pytest

from moe.convert import from_hf, to_hf
from moe.convert.logits import write_logits
from tests.convert import reference

pytestmark = [
    pytest.mark.parity,
    # Warnings of torch's own making.
    pytest.mark.filterwarnings("default"),
]


def save(folder: Path, name: str, dtype: str = "float32") -> None:
    """A model's folder as transformers writes it."""
    import torch

    reference.make_model(name).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="10KB")


def load_model(folder: Path):  # type: ignore[no-untyped-def]
    """The model as transformers reads it; in float32, since its bfloat16 wants widths that these don't have."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(workdir: Path, tokens_BL: np.ndarray, *overrides: str) -> np.ndarray:
    np.save(workdir.parent / "tokens.npy", tokens_BL)
    write_logits(workdir, workdir.parent / "tokens.npy", workdir.parent / "logits.npy", None, overrides)
    return np.load(workdir.parent / "logits.npy")


@pytest.mark.parametrize("name", reference.MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    save(tmp_path / "hf", name)
    from_hf(tmp_path / "hf", tmp_path / "workdir")
    tokens_BL = reference.make_tokens()
    wanted_BLV = reference.run(reference.make_model(name), tokens_BL)
    got_BLV = logits_of(tmp_path / "workdir", tokens_BL)
    assert got_BLV.dtype == np.float32
    assert np.std(wanted_BLV) > 0.1
    np.testing.assert_allclose(got_BLV, wanted_BLV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", reference.MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_keeps_every_bit(name: str, dtype: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    save(tmp_path / "hf", name, dtype)
    from_hf(tmp_path / "hf", tmp_path / "workdir")
    to_hf(tmp_path / "workdir", tmp_path / "back", shard_bytes=8_000)

    def load(folder: Path) -> dict[str, torch.Tensor]:
        files = sorted(folder.glob("*.safetensors"))
        assert len(files) > 1
        return {key: value for file in files for key, value in load_file(file).items()}

    old, new = load(tmp_path / "hf"), load(tmp_path / "back")
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert value.dtype == new[key].dtype == getattr(torch, dtype)
        assert torch.equal(value, new[key]), key
    tokens_BL = reference.make_tokens(1, 12)
    first, second = (reference.run(load_model(tmp_path / folder), tokens_BL) for folder in ("hf", "back"))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", reference.MODELS)
def test_a_model_without_its_source_is_read_by_transformers(name: str, tmp_path: Path) -> None:
    save(tmp_path / "hf", name)
    from_hf(tmp_path / "hf", tmp_path / "workdir")
    for file in (tmp_path / "workdir" / "huggingface").iterdir():
        file.unlink()
    to_hf(tmp_path / "workdir", tmp_path / "back")
    tokens_BL = reference.make_tokens()
    first, second = (reference.run(load_model(tmp_path / folder), tokens_BL) for folder in ("hf", "back"))
    np.testing.assert_allclose(first, second, atol=1e-6, rtol=0)


def test_bfloat16_logits_agree_in_float32(tmp_path: Path) -> None:
    save(tmp_path / "hf", "qwen", "bfloat16")
    from_hf(tmp_path / "hf", tmp_path / "workdir")
    tokens_BL = reference.make_tokens()
    wanted_BLV = reference.run(load_model(tmp_path / "hf"), tokens_BL)
    got_BLV = logits_of(tmp_path / "workdir", tokens_BL, "model.dtype=float32")
    np.testing.assert_allclose(got_BLV, wanted_BLV, atol=1e-4, rtol=0)


def test_padding_at_the_end_changes_nothing(tmp_path: Path) -> None:
    import torch

    save(tmp_path / "hf", "mixtral")
    from_hf(tmp_path / "hf", tmp_path / "workdir")
    tokens_BL = reference.make_tokens()
    mask_BL = torch.ones(tokens_BL.shape, dtype=torch.long)
    mask_BL[1, 20:] = 0
    with torch.no_grad():
        padded = reference.make_model("mixtral")(torch.tensor(tokens_BL), attention_mask=mask_BL, use_cache=False)
    got_BLV = logits_of(tmp_path / "workdir", tokens_BL)
    keep = mask_BL.numpy() > 0
    np.testing.assert_allclose(got_BLV[keep], padded.logits.numpy()[keep], atol=1e-4, rtol=0)
