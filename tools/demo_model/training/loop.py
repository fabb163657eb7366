"""One stage of training: a number of steps of a loss, which can be interrupted and resumed."""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from torch import Generator, Tensor, nn
from zlora.errors import InvalidSetting

_EVERY: Final = 100  # steps between two lines of the log
_KEEP: Final = 500  # steps between two checkpoints
_CLIP: Final = 1.0  # the gradient's norm
_EMA_START: Final = 10  # steps that the average lags behind in the beginning

Loss = Callable[[int, Generator], Tensor]


@dataclass(frozen=True)
class Plan:
    """Stage whose learning rate rises for `warmup` steps, holds, and falls after `hold`."""

    name: str
    seed: int
    steps: int
    rate: float
    warmup: int = 40
    hold: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    decay: float = 1e-2
    ema: float = 0.997

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        left = (1 - step / self.steps) / (1 - self.hold)
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(0.02, min(1.0, left))


class Loop:
    """Trains stages in a folder that keeps their checkpoints and losses."""

    def __init__(self, folder: Path, console: Console, *, bfloat16: bool) -> None:
        """Compute in bfloat16 with `bfloat16`; faster only if the CPU has instructions for it."""
        self.folder = folder
        self._console = console
        self._bfloat16 = bfloat16

    def run(self, plan: Plan, parameters: Iterable[nn.Parameter], loss: Loss) -> None:
        """Train the parameters, and leave the moving average of each in its place.

        The random numbers of a step depend only on the plan's seed and the step, so an interrupted
        run has the same result. Raises `InvalidSetting` if another plan began the folder's run.
        """
        run = _Run(plan, list(parameters), self.folder / f"{plan.name}.pt")
        run.resume()
        generator = torch.Generator()
        while run.step < plan.steps:
            began = time.monotonic()
            generator.manual_seed(plan.seed * 1_000_003 + run.step)
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
                value = loss(run.step, generator)
            run.advance(value, time.monotonic() - began)
            if run.step % _EVERY == 0:
                self._console.print(run.line())
            if run.step % _KEEP == 0 or run.step == plan.steps:
                run.keep()
        run.finish()
        (self.folder / f"{plan.name}.json").write_text(
            json.dumps({"losses": run.losses, "seconds": run.seconds})
        )


def save(what: Any, path: Path) -> None:
    """Write a torch file atomically: an interruption leaves the previous file or none."""
    draft = path.with_suffix(".draft")
    torch.save(what, draft)
    draft.replace(path)


class _Run:
    """State of a stage."""

    def __init__(self, plan: Plan, parameters: list[nn.Parameter], path: Path) -> None:
        self.step = 0
        self.seconds = 0.0
        self.losses: list[
            tuple[int, float]
        ] = []  # of each hundred steps: the last step, and the mean
        self._plan, self._parameters, self._path = plan, parameters, path
        self._average = [parameter.detach().clone() for parameter in parameters]
        self._optimizer = torch.optim.AdamW(
            parameters, lr=plan.rate, betas=plan.betas, weight_decay=plan.decay, fused=True
        )
        self._recent: list[float] = []

    def resume(self) -> None:
        with suppress(FileNotFoundError):
            state = torch.load(self._path)
            if state["plan"] != asdict(self._plan):
                raise InvalidSetting(
                    f"{self._path}: it was begun by another plan; remove its folder to begin anew"
                )
            self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]
            self._average = state["average"]
            self._optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for parameter, kept in zip(self._parameters, state["parameters"], strict=True):
                    parameter.copy_(kept)

    def keep(self) -> None:
        state: dict[str, Any] = {
            "plan": asdict(self._plan),
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "parameters": [parameter.detach() for parameter in self._parameters],
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
        }
        save(state, self._path)

    def advance(self, loss: Tensor, seconds: float) -> None:
        began = time.monotonic()
        for group in self._optimizer.param_groups:
            group["lr"] = self._plan.rate_at(self.step)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._parameters, _CLIP)
        self._optimizer.step()
        self.step += 1
        self._follow()
        self._recent.append(loss.item())
        self.seconds += seconds + time.monotonic() - began
        if self.step % _EVERY == 0:
            self.losses.append((self.step, sum(self._recent) / len(self._recent)))
            self._recent.clear()

    def line(self) -> str:
        step, loss = self.losses[-1]
        pace = self.seconds / step
        return f"{self._plan.name} {step}/{self._plan.steps}: loss {loss:.4f}, {pace:.3f} s a step"

    @torch.no_grad()
    def finish(self) -> None:
        for parameter, average in zip(self._parameters, self._average, strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def _follow(self) -> None:
        keep = min(self._plan.ema, (1 + self.step) / (_EMA_START + self.step))
        torch._foreach_mul_(self._average, keep)
        torch._foreach_add_(
            self._average, [one.detach() for one in self._parameters], alpha=1 - keep
        )
