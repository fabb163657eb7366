"""`zlora inspect`: what a LoRA is, without submitting a job."""

import click

from zlora.cli.printing import json_option, print_facts, print_json
from zlora.lora.preflight import Preflight
from zlora.schema import Asset


@click.command()
@click.argument("address")
@json_option
def inspect(address: str, as_json: bool) -> None:
    """Print what the LoRA at ADDRESS is, from its header.

    Prints the format, ranks, base model, trigger words and modules. ADDRESS is a URL,
    `hf://owner/repo/file`, `owner/repo` or `civitai://<version id>`.
    """
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
            ("modules", modules),
        ]
    )
