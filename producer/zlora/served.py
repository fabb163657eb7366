"""Refuse a request that the workers of a queue would refuse, before it is queued."""

from functools import lru_cache

from msgspec import structs

from zlora.base_limits import require_honoured
from zlora.errors import InvalidRequest
from zlora.lora.catalogue import Catalogue, CatalogueRow, lora_name
from zlora.prompt_syntax import parse
from zlora.queue_info import QueueInfo
from zlora.schedulers import find_scheduler, unsupported
from zlora.schema import (
    GenerateRequest,
    invalid,
    require_drawn_steps,
    require_steps_of_loras,
    require_upscaled_size,
)
from zlora.sweeps import naming_image


def require_served(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise the error with which the workers of this queue would refuse the request.

    That is `InvalidRequest`, or `LoraNotFound` for the name of a LoRA or an embedding that the
    catalogue lacks. Files of other addresses, and what the recipe of a LoRA may set, are left to
    the workers.
    """
    if request.model is not None and request.model not in info.models:
        names = ", ".join(info.models)
        expected = f"one of {names}" if names else "no `model`: its workers are of an older version"
        raise _refused("model", request.model, expected)
    if request.timeout is not None and request.timeout > info.timeout:
        raise _refused("timeout", request.timeout, f"up to {info.timeout}")
    if request.url_policy is not None and request.url_policy not in info.url_policies:
        raise _refused("url_policy", request.url_policy, f"one of {', '.join(info.url_policies)}")
    if request.url_expires_in is not None and request.url_expires_in > info.url_expires_in:
        raise _refused("url_expires_in", request.url_expires_in, f"up to {info.url_expires_in}")
    for index, cell in enumerate(request.cells):
        whole = cell.with_defaults(
            steps=info.num_inference_steps, guidance_scale=info.guidance_scale
        )
        with naming_image(request.sweep, index):
            if request.model in (
                None,
                info.model,
            ):  # the record has size and schedulers of this one
                if request.image is None:
                    width, height = whole.width or info.width, whole.height or info.height
                    whole = structs.replace(whole, width=width, height=height)
                    require_upscaled_size(whole)
                _require_schedulers(cell, info)
            require_honoured(whole, info.limits, base=info.base or info.model)
            if not _may_have_recipe(cell):
                require_drawn_steps(whole)
                require_steps_of_loras(whole)
            _require_names(cell, info)


def _require_schedulers(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise `InvalidRequest` for a scheduler that is not for the base.

    And for a field that the model's own scheduler, if the request names none, does not take.
    """
    if request.sampling is not None and request.sampling.name not in info.schedulers:
        names = ", ".join(info.schedulers)
        wanted = request.sampling.entry.class_name
        reason = f"its base model ({info.scheduler}) is not drawn with {wanted}"
        raise _refused("scheduler", request.scheduler, f"one of {names}: {reason}")
    own = find_scheduler(info.scheduler)
    if request.scheduler is not None or own is None or _may_have_recipe(request):
        return
    given = request.given_sampling
    if (missing := unsupported(own.name, schedule=request.schedule, given=given)) is not None:
        field, expected = missing
        raise invalid(f"$.{field}", getattr(request, field), expected)


def _require_names(request: GenerateRequest, info: QueueInfo) -> None:
    """Raise `LoraNotFound` for a name that is not in the catalogue."""
    files = [spec.file for spec in request.loras] + [spec.file for spec in request.embeddings]
    has_names = any(lora_name(file.address) is not None for file in files)
    if info.catalogue is None or not (has_names or _has_tags(request)):
        return
    if (catalogue := _catalogue_of(info.catalogue)) is not None:
        catalogue.resolve(request)


@lru_cache(maxsize=1)  # it takes milliseconds, and many requests have the same queue
def _catalogue_of(names: tuple[str, ...]) -> Catalogue | None:
    """Return a catalogue of these names; None for names of another version."""
    try:  # the sources of the entries are the workers' own
        return Catalogue(dict.fromkeys(names, CatalogueRow(source="demo://any")))
    except ValueError:
        return None


def _has_tags(request: GenerateRequest) -> bool:
    return bool(parse(request.prompt, request.prompt_syntax).loras)


def _may_have_recipe(request: GenerateRequest) -> bool:
    return request.recipes == "auto" and (bool(request.loras) or _has_tags(request))


def _refused(field: str, value: object, expected: str) -> InvalidRequest:
    return invalid(f"$.{field}", value, f"Expected what this queue serves, {expected}")
