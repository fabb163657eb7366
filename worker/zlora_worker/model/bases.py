"""The base models that requests may name: one is resident, copies of others are in host memory."""

import _thread
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal

import torch
from zlora.errors import BaseNotRestored, ModelUnavailable, ZloraError

from zlora_worker.model import loader
from zlora_worker.model.base import BaseModel
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.logs import said_by
from zlora_worker.settings import Settings

_LOOK: Final = 0.05  # seconds between two looks at a base that is read

logger = logging.getLogger(__name__)

Load = Callable[[], BaseModel]  # reads a base into host memory


class BaseModels:
    """Base models of one layout by name, the default first.

    Copies have at most `max_bytes` together; the least recently used one goes first. A base that is
    read from disk is in memory beside them until its bytes are copied, even if it never fits.
    """

    def __init__(self, model: Pipeline, loads: Mapping[str, Load], *, max_bytes: int) -> None:
        self._model, self._loads, self._max_bytes = model, loads, max_bytes
        self._copies: OrderedDict[str, BaseModel] = OrderedDict()
        self._reading: _Reading | None = None  # also after the job that began it was interrupted

    @classmethod
    def open(cls, settings: Settings, model: Pipeline) -> "BaseModels":
        """Read as many bases into host memory as fit, in their order.

        `model` has the first one. Raises `ModelUnavailable`.
        """
        loads = {
            chosen.name: partial(loader.load_copy, settings.with_model(chosen), model.resident)
            for chosen in settings.models
        }
        bases = cls(model, loads, max_bytes=settings.models_bytes)
        bases.fill()
        return bases

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may have."""
        return tuple(self._loads)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def fill(self) -> None:
        """Read as many bases as fit, in their order; raise `ModelUnavailable`."""
        room = self._max_bytes // self._model.resident.nbytes
        for name, load in list(self._loads.items())[:room]:
            self._copies[name] = load()
        # Also with room for one copy: in place, it is the pristine one, else in memory twice.
        if (first := self._copies.get(self._model.name)) is not None:
            self._model.change_to(first)
        logger.info("base models in host memory: %s", ", ".join(self._copies) or "none")

    def make_resident(
        self, name: str, *, waiting: Callable[[], None]
    ) -> Literal["memory", "disk"] | None:
        """Change to the base of this name; return where it was found, None if it was resident.

        `waiting` is called while a base is read from disk, and may raise. Raises `ModelUnavailable`
        with the resident base unchanged, and `BaseNotRestored`.
        """
        read = self._finish_reading(waiting)  # for a job that was interrupted
        if not self._model.is_ready():
            raise BaseNotRestored
        if name == self._model.name:
            return None
        if read is None or read.name != name:
            if (copy := self._copies.get(name)) is not None:
                self._copies.move_to_end(name)
                self._model.change_to(copy)
                return "memory"
            read = _Reading(name, self._loads[name])
            _thread.start_new_thread(read.run, (self._begin,))
            self._reading = read
            self._finish_reading(waiting)
        if read.base is None:
            if isinstance(read.error, ZloraError):
                raise read.error
            raise ModelUnavailable(
                f"{name} cannot be loaded: {type(read.error).__name__}: {said_by(read.error)}"
            ) from read.error
        self._model.change_to(read.base)
        return "disk"

    def _begin(self, reading: "_Reading") -> None:
        """Remember a reading (in its thread): a signal may interrupt the thread that starts it."""
        self._reading = reading

    def _finish_reading(self, waiting: Callable[[], None]) -> "_Reading | None":
        """Wait for the base that is read, if any; keep its copy if the bound allows one.

        Nothing is drawn meanwhile: the threads of the reader would slow it down.
        """
        if (reading := self._reading) is None:
            return None
        while not reading.has_ended:
            waiting()
            time.sleep(_LOOK)
        torch.set_num_threads(reading.torch_threads)  # the reader may have changed it for all
        self._reading = None
        if reading.base is None:
            logger.warning("base model %s cannot be loaded: %s", reading.name, reading.error)
        elif (needed := reading.base.nbytes) <= self._max_bytes:
            while self.nbytes + needed > self._max_bytes:
                self._copies.popitem(last=False)
            self._copies[reading.name] = reading.base
        return reading


class _Reading:
    """A base that a thread reads.

    The exception of a signal is raised in the main thread, and would leave locks of the libraries
    acquired for ever.
    """

    def __init__(self, name: str, load: Load) -> None:
        self.name, self._load = name, load
        self.torch_threads = torch.get_num_threads()
        self.base: BaseModel | None = None
        self.error: BaseException = RuntimeError("the thread has not ended")
        self.has_ended = False

    def run(self, begin: Callable[["_Reading"], None]) -> None:
        """Read the base (thread)."""
        begin(self)
        try:
            self.base = self._load()
        except BaseException as error:  # noqa: BLE001 - thread boundary: `make_resident` raises it
            self.error = error
        self.has_ended = True
