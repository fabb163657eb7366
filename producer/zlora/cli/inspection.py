"""`zlora inspect`: what a LoRA is, before anybody queues it."""

from collections.abc import Iterator

import click

from zlora.cli.printing import json_option, print_facts, print_json
from zlora.lora.base_model import LoraInfo
from zlora.lora.preflight import Preflight
from zlora.schema import Asset


@click.command()
@click.argument("address")
@json_option
def inspect(address: str, as_json: bool) -> None:
    """Tell what the LoRA at ADDRESS is, by its header alone.

    ADDRESS is a URL, `hf://owner/repo/file`, `owner/repo` or `civitai://<version id>`.
    """
    info = Preflight.from_env().inspect(Asset(url=address))
    if as_json:
        print_json(info)
    else:
        print_facts(_facts(info))


def _facts(info: LoraInfo) -> Iterator[tuple[str, str]]:
    yield "source", info.source
    yield "size", f"{info.size:,} bytes"
    yield "format", info.format
    yield "kinds", ", ".join(info.kinds)
    yield "ranks", ", ".join(map(str, info.ranks)) or "none"
    yield "base", info.base or "not told"
    yield "trigger words", ", ".join(info.trigger_words) or "not told"
    yield (
        "modules",
        ", ".join(f"{count} in {component}" for component, count in info.modules.items()),
    )
