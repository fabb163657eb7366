"""Refuse a request that the workers of a queue would refuse, before it is queued."""

from zlora.errors import InvalidRequest, LoraNotFound
from zlora.lora.catalogue import Catalogue, CatalogueRow, lora_name
from zlora.prompt_syntax import parse
from zlora.queue_info import QueueInfo
from zlora.schema import GenerateRequest, invalid


def require_served(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise the error with which the workers of this queue would refuse the request.

    That is `InvalidRequest`, or `LoraNotFound` for the name of a LoRA or an embedding that the
    catalogue lacks. Other addresses are left to the workers.
    """
    if request.timeout is not None and request.timeout > info.timeout:
        raise _refused("timeout", request.timeout, f"up to {info.timeout}")
    if request.sampling is not None and request.sampling.name not in info.schedulers:
        names = ", ".join(info.schedulers)
        reason = f"{request.sampling.entry.class_name} is not for its base ({info.scheduler})"
        raise _refused("scheduler", request.scheduler, f"one of {names}: {reason}")
    if request.url_policy is not None and request.url_policy not in info.url_policies:
        raise _refused("url_policy", request.url_policy, f"one of {', '.join(info.url_policies)}")
    if request.url_expires_in is not None and request.url_expires_in > info.url_expires_in:
        raise _refused("url_expires_in", request.url_expires_in, f"up to {info.url_expires_in}")
    _require_names(request, info)


def _require_names(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise `LoraNotFound` for a name that is not in the catalogue."""
    loras = [lora_name(spec.file.address) for spec in request.loras]
    loras += [tag.name for tag in parse(request.prompt, request.prompt_syntax).loras]
    embeddings = [lora_name(spec.file.address) for spec in request.embeddings]
    if info.catalogue is None or not any([*loras, *embeddings]):
        return
    # Only the names are known here: the sources of the entries are the workers' own.
    catalogue = Catalogue(dict.fromkeys(info.catalogue, CatalogueRow(source="demo://any")))
    for names, further in ((loras, {}), (embeddings, {"field": "embeddings"})):
        for index, name in enumerate(names):
            try:
                if name is not None:
                    catalogue.find(name)
            except LoraNotFound as error:
                error.add_details(index=index, **further)
                raise


def _refused(field: str, value: object, expected: str) -> InvalidRequest:
    return invalid(f"$.{field}", value, f"Expected what this queue serves, {expected}")
