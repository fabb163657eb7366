"""`pip install z-image-lora` in an empty environment is enough for a producer."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "boto3",
    "requests",
    "pillow",
    "numpy",
}
SUBMIT = """
import sys
import zlora
assert not {'torch', 'diffusers', 'boto3'} & set(sys.modules)
with zlora.Client.from_env() as client:
    handle = client.submit({"prompt": "a city"}, job_id="light-1")
    print(handle.status().state)
    try:
        client.submit({"prompt": "a city"}, preflight=True)
    except zlora.errors.InvalidSetting as error:
        print(error)
"""


def test_a_producer_is_light_and_can_submit(broker_url: str, tmp_path: Path) -> None:
    """The base install can submit jobs without the worker's libraries.

    A preflight raises an error that says what to install.
    """
    environ = os.environ | {"ZLORA_BROKER_URL": broker_url}
    empty = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
    python = empty / "bin" / "python"
    # A pip outside the environment saves its installation; few modules are ever imported.
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    subprocess.run([*pip, "install", "--quiet", "--no-compile", ROOT], check=True)

    listed = subprocess.run([*pip, "list"], check=True, capture_output=True, text=True).stdout
    submitted = subprocess.run(
        [python, "-c", SUBMIT],
        check=True,
        capture_output=True,
        text=True,
        env=environ,
        cwd=tmp_path,
    )
    worker_side = subprocess.run(
        [python, "-c", "import zlora_worker.app, sys; print('torch' in sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert "z-image-lora" in listed
    assert not HEAVY & {line.split()[0].lower() for line in listed.splitlines() if line}
    state, advice = submitted.stdout.splitlines()
    assert state == "PENDING"
    assert advice.endswith("pip install 'z-image-lora[preflight]'")
    assert worker_side.stdout.strip() == "False"
    assert list(empty.glob("lib/python*/site-packages/zlora/server/page_files/index.html"))
