"""An exponential moving average of the fp32 weights, in the optimiser's own partitions.

ema = decay * ema + (1 - decay) * weights after every update. Each rank averages the part it
updates, so nothing is communicated and it costs as much memory as one of Adam's moments. Saved,
resharded and exported like the weights. Called by train.py, if `ema_decay` is set.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch

from training.zero_state import find_buffers, publish_weights


class EMA:
    """Starts as the engine's weights.

    Attributes:
        flats: one fp32 tensor per buffer of the engine, laid out like it.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.buffers = find_buffers(engine)
        self.flats = [buffer.flat.clone() for buffer in self.buffers]

    @torch.no_grad()
    def update(self) -> None:
        """After every optimiser step; one that was skipped does not count."""
        if self.engine.was_step_applied():
            weights = [buffer.flat for buffer in self.buffers]
            torch._foreach_lerp_(self.flats, weights, 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the average inside (a collective); bit for bit as before after.

        Weights and average change places, so a save inside would be wrong.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # All first: no memory, no half swap.
        kept = [buffer.flat.clone() for buffer in self.buffers]
        for buffer, flat, weights in zip(self.buffers, self.flats, kept, strict=True):
            buffer.flat.copy_(flat)
            flat.copy_(weights)
        publish_weights(self.engine)
