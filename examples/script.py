"""Draw a prompt and save the images: a line for each step, and the receipt at the end.

It needs a running `zlora up`. From the folder of the clone:

    python examples/script.py "a lighthouse at dusk" --out images

`--lora https://example.com/style.safetensors:0.8` adds a LoRA with its weight; repeat it for more.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from zlora import Client, GenerateResult, JobHandle, JobStatus, images
from zlora.errors import BrokerUnavailable, LoraError, ZloraError

PATIENCE = 600.0  # seconds


def main() -> str | None:
    """Run the command; return the error message."""
    parser = argparse.ArgumentParser(description="Draw a prompt and save the images.")
    parser.add_argument("prompt")
    parser.add_argument("--lora", action="append", default=[], type=lora, metavar="URL:WEIGHT")
    parser.add_argument("--out", type=Path, default=Path("images"), metavar="FOLDER")
    given = parser.parse_args()
    try:
        with Client.from_env() as client:
            result = wait(
                client.submit({"prompt": given.prompt, "loras": given.lora, "num_images": 2})
            )
        print_receipt(result, images.save(result, given.out))
    except BrokerUnavailable as error:
        return f"{error}; is `zlora up` running?"
    except LoraError as error:
        return f"{error.code}: {error}; check the LoRA"
    except ZloraError as error:
        if error.retryable:
            return f"{error.code}: {error}; try again later"
        return f"{error.code}: {error}"
    return None


def lora(text: str) -> dict[str, Any]:
    """Convert `URL:WEIGHT` to a LoRA of a request."""
    url, _, weight = text.rpartition(":")
    return {"file": {"url": url}, "weight": float(weight)}


def wait(job: JobHandle) -> GenerateResult:
    """Print the progress of a job until it ends; Ctrl-C cancels the job."""
    try:
        for status in job.events(timeout=PATIENCE):
            print(f"{job.id}: {described(status)}", flush=True)
        return job.result(timeout=PATIENCE)
    except KeyboardInterrupt:
        job.cancel()
        raise


def described(status: JobStatus) -> str:
    """Describe a status."""
    match status.phase:
        case "queued":
            return f"queued behind {status.position} jobs"
        case "denoising":
            return f"step {status.step} of {status.steps}"
        case phase:
            return phase or status.state.lower()


def print_receipt(result: GenerateResult, files: list[Path]) -> None:
    """Print each image with its file, and the change by each LoRA."""
    for image, file in zip(result.images, files, strict=True):
        print(f"{file}: {image.width}x{image.height}, seed {image.seed}, sha256 {image.sha256}")
    for used in result.loras:
        change = f"rank {used.ranks}, relative change {used.relative_norm}"
        print(f"{used.source}: weight {used.unet_weight}, {change}")
    seconds = result.timings["denoise"]
    print(f"{result.model}: {seconds:.1f} s of denoising, base intact: {result.base_intact}")


if __name__ == "__main__":
    sys.exit(main())
