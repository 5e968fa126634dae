"""How fast a run is, in steps that it has made, over what its chips could."""

import time

from jax.sharding import Mesh

from moe.config import Config
from moe.models import Variables
from moe.plan.analytic import active_flops, tokens_per_step
from moe.plan.chips import peak_flops


class Rates:
    """Speed between log points: examples and tokens a second, and of the chips' peak what the model itself needs."""

    def __init__(self, config: Config, abstract: Variables, mesh: Mesh, start: int) -> None:
        """abstract: shapes of the model's variables. start: the step that the run goes on from."""
        self._examples = config.batch_size
        self._tokens = tokens_per_step(config)
        self._flops = active_flops(config, abstract)
        self._peak = mesh.size * peak_flops(mesh.devices.flat[0].device_kind)
        self._last, self._time = start, time.monotonic()

    def since_last(self, step: int) -> dict[str, float]:
        """examples_per_second, tokens_per_second and, of devices whose peak is known, mfu (PaLM, 2204.02311)."""
        now = time.monotonic()
        steps_per_second = (step - self._last) / (now - self._time)
        self._last, self._time = step, now
        speed = {"examples": self._examples, "tokens": self._tokens}
        values = {f"{name}_per_second": steps_per_second * count for name, count in speed.items()}
        return values | ({"mfu": steps_per_second * self._flops / self._peak} if self._peak else {})
