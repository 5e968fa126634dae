"""How many tokens a second does a whole training step take in, beside transformers and beside a dense twin?

    python -m benchmarks.train_step [--cases small large] [--skip NAME …] [--memory] [--json FILE] [--markdown FILE]

Forward, backward, clipping and AdamW of a byte-level decoder in float32, on random bytes. `small` has the shapes of
configs/stdlib_lm.py, `large` twice the width, 6 layers and 32 experts. `moe`: the step of `train.py` for that config
without QK-norm, which Mixtral doesn't have; `moe_dropless`: the same without capacity, where `moe` has one.
`dense`: its twin of equal active FLOPs, every MLP k times as wide as an expert. With the extra `parity` the same run
times Mixtral of transformers (`hf_grouped_mm`, `hf_eager`) and Mistral (`hf_dense`), which is the twin of those.
Ratios are over hf_grouped_mm, or over `dense` without it; those of `moe / dense` stand in rows of their own.
Steps run in turns of two, of which the second counts, as in training a step follows one of its own; every time is a
median.
Rows `…, share of peak`: the matrix products that a step needs (attention counts only the keys that a token sees), a
second, over the fastest product measured in the same run, `peak, …`.

--memory instead measures what a process with nothing but one of these steps adds to its resident memory at most, from
before the parameters exist to the end of the third step, the libraries and XLA's compiler not counted (Linux only);
rows `…, XLA`: arguments and temporaries as the compiler states them.
"""

import argparse
import concurrent.futures
import ctypes
import dataclasses
import gc
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))  # for a call by path, which finds no packages beside this folder

from benchmarks import common, moe_layer, torch_models
from benchmarks.common import Row
from moe import config as config_lib
from moe.parallel.dispatch import sorts_fast
from moe.parallel.mesh import MeshConfig, make_mesh
from train import Step, make_step, to_devices

CONFIG = Path(__file__).parents[1] / "configs" / "stdlib_lm.py"


@dataclasses.dataclass(frozen=True)
class Case:
    """The shapes of a model and of its batch; heads are width / heads wide, and `hidden` is the width of an expert."""

    width: int = 256
    depth: int = 4
    experts: int = 8
    hidden: int = 512
    k: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 257
    length: int = 256
    batch: int = 16

    def flops(self, *, dense: bool) -> float:
        """Of the matrix products of a step, forward and twice that backward."""
        width = self.width
        projections = 2 * width * (2 * width + 2 * width * self.kv_heads // self.heads)
        scores = 2 * 2 * width * (self.length + 1) / 2
        mlp = 2 * 3 * width * self.k * self.hidden + (0 if dense else 2 * width * self.experts)
        per_token = self.depth * (projections + scores + mlp) + 2 * width * self.vocabulary
        return 3.0 * self.batch * self.length * per_token


CASES = {"small": Case(), "large": Case(width=512, depth=6, experts=32)}


def tokens(case: Case) -> np.ndarray:
    """Random bytes, [B, L]."""
    return np.random.default_rng(0).integers(256, size=(case.batch, case.length), dtype=np.int32)


def config_of(name: str, case: Case) -> config_lib.Config:
    """The config of `moe`, `moe_dropless` or `dense`."""
    table = config_lib.load_file(str(CONFIG))
    settings: dict[str, Any] = {
        "model.width": case.width,
        "model.depth": case.depth,
        "model.heads": case.heads,
        "model.kv_heads": case.kv_heads,
        "model.mlp_width": case.k * case.hidden,
        "model.moe_every": 0 if name == "dense" else 1,
        "model.vocab_size": case.vocabulary,
        "model.length": case.length,
        "model.qk_norm": "none",
        "data.length": case.length,
        "moe.num_experts": case.experts,
        "moe.expert_width": case.hidden,
        "moe.group_size": case.batch,
        "moe.dispatch": "dropless" if name == "moe_dropless" else "auto",
        "router.k": case.k,
        "batch_size": case.batch,
    }
    config_lib.override(table, [f"{field}={value}" for field, value in settings.items()])
    return config_lib.resolve(table)


class Trainer:
    """Our training step as a call without arguments, as the state goes from one call into the next."""

    def __init__(self, name: str, case: Case) -> None:
        config = config_of(name, case)
        mesh = make_mesh(config.mesh, jax.devices()[:1])
        self.step: Step = make_step(config, mesh)
        loop = self.step.loop
        lowered = loop.train.lower(loop.abstract_state, self.step.abstract_batch)
        self.train = lowered.compile(self.step.compiler_options)
        token_BL = tokens(case)
        batch = {
            "tokens": token_BL,
            "targets": np.roll(token_BL, -1, axis=1),
            "segment": np.ones_like(token_BL),
            "position": np.broadcast_to(np.arange(case.length, dtype=np.int32), token_BL.shape),
            "loss_mask": np.broadcast_to(np.arange(case.length) < case.length - 1, token_BL.shape),
        }
        self.batch = to_devices(batch, tuple(self.step.abstract_batch), mesh)
        self.state: Any = None

    def __call__(self) -> Any:
        """One step, the first from fresh parameters."""
        if self.state is None:
            self.state = self.step.loop.enter(self.step.init(jax.random.key(0)))
        self.state, metrics = self.train(self.state, self.batch)
        return self.state, metrics

    def stated_bytes(self) -> int:
        """Arguments and temporaries of the compiled step."""
        sizes = self.train.memory_analysis()
        return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes


def names(case: Case, skipped: Sequence[str] = ()) -> list[str]:
    """The steps to compare; `moe_dropless` only where `moe` isn't the same."""
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    queues = not sorts_fast(mesh, case.batch * case.length * case.k, case.experts)
    ours = ["moe", *(["moe_dropless"] if queues else []), "dense"]
    return [name for name in (*ours, *torch_models.NAMES) if name not in skipped]


def make(name: str, case: Case) -> Callable[[], Any]:
    """The step of that name."""
    if name in torch_models.NAMES:
        return torch_models.training_step(name, case, tokens(case))
    return Trainer(name, case)


def speeds(label: str, case: Case, skipped: Sequence[str], clock: Callable[[], float], seconds: float) -> list[Row]:
    """Tokens a second of all steps, in turns, with their ratios and shares of the peak."""
    steps = {name: make(name, case) for name in names(case, skipped)}
    rows = case.batch * case.length
    peaks = moe_layer.products(rows, case.width, case.k * case.hidden)
    calls = steps | {name: call for name, (_, call) in peaks.items()}
    # The threads of one library rest before another's begin.
    times = common.interleaved(calls, repeats=9, seconds=seconds, clock=clock, rest=0.05, warm=1)
    rates = {name: 1e-6 * flops / times[name] for name, (flops, _) in peaks.items()}
    fastest = max(rates, key=lambda name: rates[name])
    per_second = {name: 1e3 * rows / times[name] for name in steps}
    result = [
        Row(name=name, case=label, value=value, unit="tokens/s", ratio=value / per_second[baseline(steps)])
        for name, value in per_second.items()
    ]
    for name in steps:
        share = 1e-6 * case.flops(dense="dense" in name) / times[name] / rates[fastest]
        result.append(Row(name=f"{name}, share of peak", case=label, value=share, unit="", ratio=None))
    for one, twin in (("moe", "dense"), ("moe_dropless", "dense"), ("hf_grouped_mm", "hf_dense")):
        if one in steps and twin in steps:
            ratio = per_second[one] / per_second[twin]
            result.append(Row(name=f"{one} / {twin}", case=label, value=ratio, unit="", ratio=None))
    return [*result, Row(name=fastest, case=label, value=rates[fastest], unit="GFLOP/s", ratio=None)]


def baseline(steps: Any) -> str:
    """What ratios are over."""
    return next(name for name in ("hf_grouped_mm", "dense", *steps) if name in steps)


def resident(name: str, case: Case) -> tuple[float, float | None]:
    """MiB that the step adds to this process's memory at most, and MiB that XLA states, None for other libraries."""
    step = None
    if name not in torch_models.NAMES:
        step = make(name, case)
    else:
        import torch
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401

        torch.ones(1).sum()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far, proc(5)
    before = _status("VmRSS")
    step = step or make(name, case)
    for _ in range(3):
        jax.block_until_ready(step())
    stated = step.stated_bytes() / 2**20 if isinstance(step, Trainer) else None
    return (_status("VmHWM") - before) / 1024, stated


def _status(field: str) -> float:
    """KiB of a line of /proc/self/status."""
    return float(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory(label: str, case: Case, skipped: Sequence[str]) -> list[Row]:
    """Each step's memory, measured in a process of its own."""
    found: dict[str, tuple[float, float | None]] = {}
    for name in names(case, skipped):
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            found[name] = pool.submit(resident, name, case).result()
    base = found[baseline(found)][0]
    rows = [Row(name=n, case=label, value=size, unit="MiB", ratio=size / base) for n, (size, _) in found.items()]
    return rows + [
        Row(name=f"{name}, XLA", case=label, value=stated, unit="MiB", ratio=None)
        for name, (_, stated) in found.items()
        if stated is not None
    ]


def main() -> None:
    """Compare all steps, case by case."""
    options = common.parser(__doc__)
    options.formatter_class = argparse.RawDescriptionHelpFormatter
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which sizes")
    options.add_argument("--skip", nargs="+", default=[], metavar="NAME", help="steps to leave out")
    options.add_argument("--memory", action="store_true", help="measure memory, not time")
    options.add_argument("--seconds", type=float, default=150.0, help="of a case, after which three rounds are enough")
    arguments = options.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if torch_models.MISSING:
        print(f"without transformers' models: {' and '.join(torch_models.MISSING)} not installed (extra parity)")
    rows: list[Row] = []
    for label in arguments.cases:
        case = CASES[label]
        if arguments.memory:
            rows += memory(label, case, arguments.skip)
        else:
            rows += speeds(label, case, arguments.skip, clock, arguments.seconds)
    common.report(rows, arguments)


if __name__ == "__main__":
    main()
