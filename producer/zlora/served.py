"""Refuse a request that the workers of a queue would refuse, before it is queued."""

from zlora.errors import InvalidRequest, LoraNotFound
from zlora.lora.catalogue import Catalogue, CatalogueRow, lora_name
from zlora.prompt_syntax import parse
from zlora.queue_info import QueueInfo
from zlora.schema import GenerateRequest, invalid


def require_served(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise the error with which the workers of this queue would refuse the request.

    That is `InvalidRequest`, or `LoraNotFound` for a name that the catalogue lacks. LoRAs of
    other addresses are left to the workers.
    """
    if request.timeout is not None and request.timeout > info.timeout:
        raise _refused("timeout", request.timeout, f"up to {info.timeout}")
    if request.sampling is not None and request.sampling.name not in info.schedulers:
        raise _refused("scheduler", request.scheduler, f"one of {', '.join(info.schedulers)}")
    if request.url_policy is not None and request.url_policy not in info.url_policies:
        raise _refused("url_policy", request.url_policy, f"one of {', '.join(info.url_policies)}")
    if request.url_expires_in is not None and request.url_expires_in > info.url_expires_in:
        raise _refused("url_expires_in", request.url_expires_in, f"up to {info.url_expires_in}")
    _require_names(request, info)


def _require_names(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise `LoraNotFound` for a name that is not in the catalogue."""
    names = [lora_name(spec.file.address) for spec in request.loras]
    names += [tag.name for tag in parse(request.prompt, request.prompt_syntax).loras]
    if info.catalogue is None or not any(names):
        return
    # The sources of the entries are the workers' own.
    catalogue = Catalogue(dict.fromkeys(info.catalogue, CatalogueRow(source="demo://any")))
    for index, name in enumerate(names):
        try:
            if name is not None:
                catalogue.find(name)
        except LoraNotFound as error:
            error.add_details(index=index)
            raise


def _refused(field: str, value: object, expected: str) -> InvalidRequest:
    return invalid(f"$.{field}", value, f"Expected {expected}, which this queue serves")
