"""Lack of memory, which torch and Python report by several classes of errors."""

import traceback
from typing import Final

import torch
from zlora.errors import OutOfMemory

from zlora_worker.monitoring.logs import said_by

# Messages of torch without a class of their own: a CPU's allocator, pinned memory, cuBLAS.
_MESSAGES: Final = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _MESSAGES)


def free_tensors(error: BaseException) -> None:
    """Free the tensors that the frames of an error's traceback hold."""
    traceback.clear_frames(error.__traceback__)
    torch.cuda.empty_cache()  # does nothing if no GPU is used


def out_of_memory(error: BaseException, size: tuple[int, int] | None) -> OutOfMemory:
    """Return the error of a job; `size` is the width and height of its images, if known."""
    width, height = size or (None, None)
    where = f" at {width} x {height} pixels" if size else ""
    return OutOfMemory(
        f"the job needs more memory than this worker has{where}: "
        f"{type(error).__name__}: {said_by(error)}",
        {"width": width, "height": height},
    )
