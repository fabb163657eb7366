"""Blocks of one UNet by diffusers' names, and by the letters of A1111's LoRA Block Weight."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from zlora.unet_blocks import canonical

from zlora_worker.lora.key_map import LdmNames

_LETTERS: Final = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}


class BlockNames:
    """Names of the blocks around each module of a UNet; some modules are in no block."""

    def __init__(self, modules: Iterable[str]) -> None:
        """Take diffusers' names of the modules."""
        names = dict.fromkeys(modules)
        ldm = LdmNames(names)
        self._blocks = {name: tuple(_blocks_around(name, ldm)) for name in names}
        self._known = {block for blocks in self._blocks.values() for block in blocks}

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Return the names that no block of this UNet has."""
        return [name for name in names if canonical(name) not in self._known]

    def factor(self, module: str, factors: Mapping[str, float]) -> float:
        """Return the factor of a module by that of its innermost block; names are canonical."""
        blocks = self._blocks.get(module, ())
        return next((factors[block] for block in blocks if block in factors), 1.0)


def _blocks_around(module: str, ldm: LdmNames) -> Iterator[str]:
    """Yield the names of the blocks that a module is in, the innermost first."""
    kind, *rest = module.split(".")
    if kind in ("down_blocks", "mid_block", "up_blocks"):
        parts = [kind.partition("_")[0], *rest]
        for depth in range(len(parts), 0, -1):
            yield ".".join(parts[:depth])
    ldm_kind, _, ldm_rest = (ldm.of(module) or "").partition(".")
    if ldm_kind in _LETTERS:
        number = 0 if ldm_kind == "middle_block" else int(ldm_rest.partition(".")[0])
        yield f"{_LETTERS[ldm_kind]}{number:02}"
