"""Compilation of the denoiser's transformer blocks by PyTorch, once for all LoRAs and sizes."""

from collections.abc import Callable
from typing import Any

import torch


def compile_blocks(denoiser: Any, *, with_graphs: bool) -> None:
    """Let PyTorch compile each kind of transformer block when a block of that kind first runs.

    Weights are inputs of the compiled code, not constants in it: a merge that changes them, or
    their pointers, compiles nothing. Lengths are inputs, too. Graph breaks and blocks beyond
    PyTorch's limit of variants run without compilation instead of failing a job. With `with_graphs`
    a GPU replays recorded kernels, which read each weight from its address at the recording.
    """
    options: dict[str, Any] = {"dynamic": True}
    if with_graphs:
        options["mode"] = "reduce-overhead"
        # All blocks of a step are one sequence of graphs; otherwise each block begins a new one,
        # in the memory of the block before it.
        begin: Callable[[], None] = torch.compiler.cudagraph_mark_step_begin
        denoiser.register_forward_pre_hook(lambda *_: begin())
    denoiser.compile_repeated_blocks(**options)
