"""`zlora inspect` and `zlora info`: what a LoRA is and what a queue serves, without a job."""

import os
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import click

from zlora.cli.printing import json_option, print_facts, print_json
from zlora.client import Client
from zlora.errors import ModelUnavailable, NotSafetensors
from zlora.lora.preflight import Preflight, describe
from zlora.lora.safetensors_header import read_header
from zlora.queue_info import QueueInfo
from zlora.redaction import on_one_line
from zlora.schema import Asset

_PROMPTS: Final = {"windows": "windows of 75 tokens", "chat": "one message of a chat"}


@click.command()
@click.argument("address")
@json_option
def inspect(address: str, as_json: bool) -> None:
    """Print what the LoRA at ADDRESS is, from its header.

    Prints the format, ranks, base model, trigger words and modules. ADDRESS is a URL, a file on
    this machine, `hf://owner/repo/file`, `owner/repo` or `civitai://<version id>`.
    """
    path = Path(unquote(urlsplit(address).path) if address.startswith("file:///") else address)
    if os.path.isfile(path):
        name = on_one_line(path)
        try:
            info = describe(read_header(path), source=name, size=path.stat().st_size)
        except NotSafetensors as error:
            raise NotSafetensors(f"{name}: {error}", error.details) from None
    else:
        info = Preflight.from_env().inspect(Asset(url=address))
    if as_json:
        print_json(info)
        return
    modules = ", ".join(f"{count} in {component}" for component, count in info.modules.items())
    print_facts(
        [
            ("source", info.source),
            ("size", f"{info.size:,} bytes"),
            ("format", info.format),
            ("kinds", ", ".join(info.kinds)),
            ("ranks", ", ".join(map(str, info.ranks)) or "none"),
            ("base", info.base or "unknown"),
            ("trigger words", ", ".join(info.trigger_words) or "unknown"),
            ("recipe", info.recipe or "none"),
            ("modules", modules),
        ]
    )


@click.command()
@json_option
def info(as_json: bool) -> None:
    """Print what the queue serves: its base model, bounds, defaults and schedulers.

    The workers of the queue write this record; it expires an hour after the last one has ended.
    """
    with Client.from_env() as client:
        found = client.queue_info()
        if found is None:
            raise ModelUnavailable(f"no worker has served the queue {client.queue} lately")
    if as_json:
        print_json(found)
        return
    print_facts(
        [
            ("base", found.base or "unknown"),
            ("model", found.model),
            ("models", ", ".join(found.models) or "requests cannot name one"),
            ("weights", f"sha256 {found.base_sha256}"),
            ("native size", f"{found.width}x{found.height}"),
            ("sides", f"multiples of {found.limits.side_step}"),
            ("prompts", _PROMPTS[found.limits.prompts]),
            ("scheduler", f"{found.scheduler} unless a request names one"),
            ("schedulers", ", ".join(found.schedulers)),
            ("steps", f"{found.num_inference_steps} by default"),
            ("guidance scale", f"{found.guidance_scale:g} by default"),
            ("timeout", f"at most {found.timeout} s"),
            ("URLs", f"{', '.join(found.url_policies)}; at most {found.url_expires_in} s"),
            ("catalogue", _catalogue(found)),
            ("versions", ", ".join(f"{name} {text}" for name, text in found.versions.items())),
        ]
    )


def _catalogue(found: QueueInfo) -> str:
    if found.catalogue is None:
        names = "more than 1,000 LoRAs"
    else:
        names = ", ".join(found.catalogue) or "none"
    return f"{names}; no other LoRAs are served" if found.serves_catalogue_only else names
