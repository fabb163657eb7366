"""Draw a prompt and save the pictures: a line at each step of the way, and the receipt at the end.

Beside it runs `zlora up`. From the folder of the clone:

    python examples/script.py "a lighthouse at dusk" --out pictures

`--lora https://example.com/style.safetensors:0.8` adds a LoRA, with its weight; it may be given several times.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from zlora import Client, GenerateResult, JobHandle, JobStatus, images
from zlora.errors import BrokerUnavailable, LoraError, ZloraError

PATIENCE = 600.0  # seconds


def main() -> str | None:
    """The command; returns what went wrong."""
    parser = argparse.ArgumentParser(description="Draw a prompt and save the pictures.")
    parser.add_argument("prompt")
    parser.add_argument("--lora", action="append", default=[], type=lora, metavar="URL:WEIGHT")
    parser.add_argument("--out", type=Path, default=Path("pictures"), metavar="FOLDER")
    given = parser.parse_args()
    try:
        with Client.from_env() as client:
            result = wait(
                client.submit({"prompt": given.prompt, "loras": given.lora, "num_images": 2})
            )
        print_receipt(result, images.save(result, given.out))
    except BrokerUnavailable as error:
        return f"{error}; does `zlora up` run?"
    except LoraError as error:
        return f"{error.code}: {error}; look at the LoRA"
    except ZloraError as error:
        return (
            f"{error.code}: {error}; {'it may' if error.retryable else 'it will not'} succeed later"
        )
    return None


def lora(text: str) -> dict[str, Any]:
    """`URL:WEIGHT` as a request has it."""
    url, _, weight = text.rpartition(":")
    return {"file": {"url": url}, "weight": float(weight)}


def wait(job: JobHandle) -> GenerateResult:
    """Tell how far the job is until it ends; a Ctrl-C cancels it."""
    try:
        for status in job.events(timeout=PATIENCE):
            print(f"{job.id}: {described(status)}", flush=True)
        return job.result(timeout=PATIENCE)
    except KeyboardInterrupt:
        job.cancel()
        raise


def described(status: JobStatus) -> str:
    """A status in words."""
    match status.phase:
        case "queued":
            return f"queued, {status.position} before it"
        case "denoising":
            return f"step {status.step} of {status.steps}"
        case phase:
            return phase or status.state.lower()


def print_receipt(result: GenerateResult, files: list[Path]) -> None:
    """What was drawn and where it is, and what each LoRA has changed."""
    for image, file in zip(result.images, files, strict=True):
        print(f"{file}: {image.width}x{image.height}, seed {image.seed}, sha256 {image.sha256}")
    for used in result.loras:
        print(
            f"{used.source}: weight {used.unet_weight}, rank {used.ranks}, changed {used.relative_norm}"
        )
    print(
        f"{result.model}: {result.timings['denoise']:.1f} s of denoising, base intact: {result.base_intact}"
    )


if __name__ == "__main__":
    sys.exit(main())
