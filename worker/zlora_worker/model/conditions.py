"""Set CPU threads and tiling as they were for a recorded image, for `zlora replay`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from zlora_worker.model.pipeline import Pipeline

_MAX_THREADS: Final = 256  # of a CPU; the number comes from an untrusted file


@contextmanager
def recorded_conditions(model: Pipeline, *, threads: int | None, tiled: bool) -> Iterator[None]:
    """Draw inside with as many CPU threads, and decode in tiles if the image was.

    A number of threads that no machine has is ignored.
    """
    threads_before, vae = torch.get_num_threads(), model.pipeline.vae
    if model.device.type == "cpu" and threads and 0 < threads <= _MAX_THREADS:
        torch.set_num_threads(threads)
    if tiled:
        vae.enable_tiling()
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        vae.disable_tiling()
