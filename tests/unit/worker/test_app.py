"""What the parent imports before it forks: nothing uses a device or leaves a thread behind."""

import subprocess
import sys
from pathlib import Path

from support.processes import clean_environ

# The parent's import, then a fork as Celery's. Prints what must not have happened in the parent.
PARENT = """
import os, sys, threading
import numpy  # its library of linear algebra has threads, which it ends and starts at a fork

def threads():
    return set(os.listdir("/proc/self/task"))

before = threads()
import torch

used = []
for name in ("init", "_lazy_init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, lambda *_, name=name: used.append(name))

from celery.signals import worker_before_create_process
import zlora_worker.app
assert "diffusers" not in sys.modules
worker_before_create_process.send(sender=None)
assert "diffusers" in sys.modules and "zlora_worker.model.loader" in sys.modules
assert not torch.cuda.is_initialized()
print("device:", used, "threads:", len(threads() - before), threading.active_count(), flush=True)
print("compiled code:", os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
"""
CHILD = """
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    weights = torch.ones(512, 512, requires_grad=True)
    (weights @ weights).sum().backward()
    one = numpy.ones((512, 512))
    print("child:", weights.grad[0, 0].item(), (one @ one)[0, 0], len(threads()) > 1, flush=True)
    os._exit(0)
print("exit status:", os.waitpid(child, 0)[1])
"""


def test_parent_imports_torch_without_device_or_thread_and_its_child_computes(
    tmp_path: Path,
) -> None:
    """CUDA, and threads of torch, would not survive the fork: the child would hang.

    What the child compiles is kept in the data folder for the next one.
    """
    environ = clean_environ({"ZLORA_HOME": str(tmp_path), "ZLORA_COMPILE": "blocks"})
    environ.pop("TORCHINDUCTOR_CACHE_DIR", None)  # PyTorch sets it in this process
    done = subprocess.run(
        [sys.executable, "-c", PARENT + CHILD],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=tmp_path,
        env=environ,
        check=False,
    )

    assert done.stdout.splitlines() == [
        "device: [] threads: 0 1",
        f"compiled code: {tmp_path / 'compiled'}",
        "child: 1024.0 512.0 True",
        "exit status: 0",
    ], done.stderr


LOADED = """
import sys
import zlora_worker.generate
import zlora_worker.task
print([name for name in ("torch", "numpy", "diffusers") if name in sys.modules])
"""


def test_only_the_engine_imports_torch() -> None:
    """The tests with a fake engine start hundreds of children: each would import it."""
    engines = Path(__file__).parents[2] / "faults" / "engines"
    loaded = subprocess.run(
        [sys.executable, "-c", LOADED],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environ({"PYTHONPATH": f"{engines}:{engines.parents[1]}"}),
        check=True,
    )

    assert loaded.stdout.strip() == "[]"
