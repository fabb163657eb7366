"""Fields of A1111's `txt2img` and `img2img`, and the requests that they stand for.

Names and defaults are those of the web UI 1.10. `docs/a1111.md` has the table of what is done with
each of them.
"""

import math
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct, structs

from zlora.errors import InvalidRequest
from zlora.lora.base_model import last_layer
from zlora.queue_info import QueueInfo
from zlora.redaction import field_name
from zlora.schedulers import SCHEDULE_TYPES, find_schedule, find_scheduler
from zlora.schema import MAX_IMAGES, MAX_STEPS, BatchSize, invalid

AUTOMATIC: Final = "automatic"  # schedule type: that of the sampler
MODEL: Final = "sd_model_checkpoint"
CLIP_SKIP: Final = "CLIP_stop_at_last_layers"
UPSCALERS: Final[dict[str, str]] = {"Latent": "latent", "Lanczos": "image", "None": "image"}
_NOISE: Final = 1  # `eta` of samplers that add noise and have no such setting in diffusers
_INPAINT_ORIGINAL: Final = 1  # `inpainting_fill`: what is masked begins as the image


class Fields(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields that both have."""

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    batch_size: int = 1
    n_iter: int = 1
    steps: int = 50
    cfg_scale: float = 7.0
    width: int = 512
    height: int = 512
    sampler_name: str = ""
    sampler_index: str = ""
    scheduler: str = AUTOMATIC
    eta: float | None = None
    denoising_strength: float = 0.75
    override_settings: dict[str, Any] = {}
    send_images: bool = True
    save_images: bool = False
    do_not_save_samples: bool = False
    do_not_save_grid: bool = False
    refiner_switch_at: float | None = None
    styles: list[str] = []
    subseed: int = -1
    subseed_strength: float = 0
    seed_resize_from_h: int = -1
    seed_resize_from_w: int = -1
    restore_faces: bool = False
    tiling: bool = False
    s_min_uncond: float = 0
    s_churn: float = 0
    s_tmax: float = 0
    s_tmin: float = 0
    s_noise: float = 1
    override_settings_restore_afterwards: bool = True
    refiner_checkpoint: str = ""
    disable_extra_networks: bool = False
    firstpass_image: str | None = None
    comments: dict[str, Any] = {}
    script_name: str = ""
    script_args: list[Any] = []
    alwayson_scripts: dict[str, Any] = {}
    force_task_id: str | None = None
    infotext: str = ""


class Txt2Img(Fields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of `txt2img`."""

    enable_hr: bool = False
    hr_scale: float = 2.0
    hr_upscaler: str = "Latent"
    hr_second_pass_steps: int = 0
    hr_resize_x: int = 0
    hr_resize_y: int = 0
    hr_checkpoint_name: str = "Use same checkpoint"
    hr_sampler_name: str = "Use same sampler"
    hr_scheduler: str = "Use same scheduler"
    hr_prompt: str = ""
    hr_negative_prompt: str = ""
    firstphase_width: int = 0
    firstphase_height: int = 0


class Img2Img(Fields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of `img2img`."""

    init_images: list[str] = []
    mask: str | None = None
    mask_blur: float = 4
    inpainting_mask_invert: bool = False
    inpainting_fill: int = 0
    inpaint_full_res: bool = True
    inpaint_full_res_padding: int = 0
    include_init_images: bool = False
    resize_mode: int = 0
    image_cfg_scale: float = 1.5
    initial_noise_multiplier: float = 1
    mask_blur_x: float = 4
    mask_blur_y: float = 4
    mask_round: bool = True
    latent_mask: str | None = None


F = TypeVar("F", bound=Fields)

# Values of the fields of which nothing else can be honoured.
ONLY: Final[dict[str, tuple[object, ...]]] = {
    "styles": ([],),
    "subseed": (-1, 0),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "restore_faces": (False,),
    "tiling": (False,),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "s_noise": (1,),
    "override_settings_restore_afterwards": (True,),
    "refiner_checkpoint": ("", "None"),
    "disable_extra_networks": (False,),
    "firstpass_image": (None,),
    "comments": ({},),
    "script_name": ("",),
    "script_args": ([],),
    "alwayson_scripts": ({},),
    "force_task_id": (None,),
    "infotext": ("",),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("Use same checkpoint",),
    "hr_sampler_name": ("Use same sampler",),
    "hr_scheduler": ("Use same scheduler",),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "resize_mode": (0,),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1,),
    "mask_blur_x": (4,),
    "mask_blur_y": (4,),
    "mask_round": (True,),
    "latent_mask": (None,),
}
# The same of settings, beside the two that are honoured.
SETTINGS: Final[dict[str, tuple[object, ...]]] = {
    "samples_format": ("png",),
    "randn_source": ("CPU",),
    "sd_vae": ("Automatic", "None"),
    "eta_noise_seed_delta": (0,),
}
# Fields by the path in a request, for its errors; the rest have the same names.
_NAMES: Final = {
    "$.num_inference_steps": "$.steps",
    "$.guidance_scale": "$.cfg_scale",
    "$.scheduler": "$.sampler_name",
    "$.schedule": "$.scheduler",
    "$.num_images": "$.n_iter",
    "$.strength": "$.denoising_strength",
    "$.image": "$.init_images[0]",
    "$.mask_invert": "$.inpainting_mask_invert",
    "$.model": f"$.override_settings.{MODEL}",
    "$.clip_skip": f"$.override_settings.{CLIP_SKIP}",
    "$.upscale": "$.enable_hr",
    "$.upscale.factor": "$.hr_scale",
    "$.upscale.strength": "$.denoising_strength",
    "$.upscale.steps": "$.hr_second_pass_steps",
    "$.upscale.mode": "$.hr_upscaler",
}


def parse(document: object, kind: type[F]) -> F:
    """Return the fields of a body; null is as an absent field.

    Numbers may be texts, as for the web UI. Raises `InvalidRequest` for a field that is unknown, of
    another type, or with a value that cannot be honoured.
    """
    if not isinstance(document, Mapping):
        raise invalid("$", document, "Expected an object")
    given = {name: value for name, value in document.items() if value is not None}
    names = {field.name for field in structs.fields(kind)}
    if unknown := sorted(given.keys() - names):
        raise invalid(f"$.{field_name(unknown[0])}", _shown(given[unknown[0]]), "Expected no field")
    try:
        fields = msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at `$.")
        place = place.rstrip("`")
        value = given.get(place.partition("[")[0])
        raise invalid(f"$.{place}", _shown(value), expected) from None
    for name in names & ONLY.keys():
        require_one(f"$.{name}", getattr(fields, name), ONLY[name])
    if isinstance(fields, Img2Img):
        _require_inpainting(fields)
    return fields


def require_one(path: str, value: object, values: tuple[object, ...]) -> None:
    """Raise `InvalidRequest` for a value that is not one of these."""
    if value not in values:
        choices = " or ".join(msgspec.json.encode(one).decode() for one in values)
        raise invalid(path, _shown(value), f"Expected {choices}: nothing else can be honoured")


def request_of(fields: Fields, info: QueueInfo | None) -> dict[str, Any]:
    """Return the request that the fields stand for, without its images.

    Raises `InvalidRequest` for what cannot be honoured, named as the web UI names it.
    """
    return {
        "prompt": fields.prompt,
        "negative_prompt": fields.negative_prompt,
        "prompt_syntax": "a1111",
        "num_inference_steps": fields.steps,
        "guidance_scale": fields.cfg_scale,
        "width": fields.width,
        "height": fields.height,
        "seed": None if fields.seed == -1 else fields.seed,
        "num_images": _image_count(fields),
        "batch_size": _drawn_at_once(fields.batch_size),
        **_sampling(fields),
        **_settings(fields.override_settings, info),
        **_second_pass(fields),
    }


def renamed(error: InvalidRequest) -> InvalidRequest:
    """Return the error of a request with the name that the web UI has for the field."""
    path = str(error.details.get("path"))
    if path not in _NAMES:
        return error
    details = {**error.details, "path": _NAMES[path]}
    text = f"{details['path']}: {details.get('expected')}; the value is {details.get('value')}"
    return InvalidRequest(text, details)


def _shown(value: object) -> object:
    """Return a value for an error; texts may be prompts, of which errors have the length only."""
    return f"a text of {len(value)} characters" if isinstance(value, str) else value


def _require_inpainting(fields: Img2Img) -> None:
    if fields.mask is None:
        return
    if fields.inpainting_fill != _INPAINT_ORIGINAL:
        expected = "Expected 1 with a mask: what is masked begins as the image"
        raise invalid("$.inpainting_fill", fields.inpainting_fill, expected)
    if fields.inpaint_full_res:
        expected = "Expected false with a mask: the whole image is drawn"
        raise invalid("$.inpaint_full_res", fields.inpaint_full_res, expected)


def _image_count(fields: Fields) -> int:
    for name in ("batch_size", "n_iter"):
        if not 1 <= (count := getattr(fields, name)) <= MAX_IMAGES:
            raise invalid(f"$.{name}", count, f"Expected a number from 1 to {MAX_IMAGES}")
    return fields.batch_size * fields.n_iter


def _drawn_at_once(batch_size: int) -> BatchSize:
    sizes: tuple[BatchSize, ...] = (8, 4, 2)
    return next((size for size in sizes if size <= batch_size), 1)


def _sampling(fields: Fields) -> dict[str, Any]:
    """Return scheduler, schedule and eta."""
    name = fields.sampler_name or fields.sampler_index
    choice = find_scheduler(name) if name else None
    found: dict[str, Any] = {"scheduler": name or None}
    if fields.scheduler.lower() != AUTOMATIC:
        found["schedule"] = find_schedule(fields.scheduler)
        if found["schedule"] is None:
            expected = f"Expected one of {', '.join(['Automatic', *SCHEDULE_TYPES.values()])}"
            raise invalid("$.scheduler", fields.scheduler, expected)
    elif choice is not None and choice.schedule is None:
        found["schedule"] = choice.entry.automatic
    if fields.eta is not None:
        if choice is not None and "eta" in choice.entry.takes:
            found["eta"] = fields.eta
        else:
            require_one("$.eta", fields.eta, (_NOISE, None))
    return found


def _settings(given: Mapping[str, Any], info: QueueInfo | None) -> dict[str, Any]:
    """Return model and clip skip."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        path = f"$.override_settings.{field_name(name)}"
        if name == MODEL:
            found["model"] = value
        elif name == CLIP_SKIP:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise invalid(path, value, "Expected a whole number from 1")
            found["clip_skip"] = max(value - last_layer(info.base if info else None), 0) or None
        elif name in SETTINGS:
            require_one(path, value, SETTINGS[name])
        else:
            names = ", ".join([MODEL, CLIP_SKIP, *SETTINGS])
            raise invalid(path, _shown(value), f"Expected no setting but {names}")
    return found


def _second_pass(fields: Fields) -> dict[str, Any]:
    if not isinstance(fields, Txt2Img) or not fields.enable_hr:
        return {}
    if fields.hr_upscaler not in UPSCALERS:
        expected = f"Expected one of {', '.join(UPSCALERS)}"
        raise invalid("$.hr_upscaler", fields.hr_upscaler, expected)
    strength, drawn = fields.denoising_strength, fields.hr_second_pass_steps or fields.steps
    upscale: dict[str, Any] = {
        "factor": fields.hr_scale,
        "strength": strength,
        "mode": UPSCALERS[fields.hr_upscaler],
    }
    if 0 < strength <= 1:  # other strengths are refused with the request
        if drawn > (most := int(MAX_STEPS * strength)):
            expected = f"Expected at most {most} drawn steps with this `denoising_strength`"
            raise invalid("$.hr_second_pass_steps", drawn, expected)
        # The web UI draws all of these steps; a request has a number of which it draws a share.
        steps = math.ceil(drawn / strength)
        upscale["steps"] = steps if int(steps * strength) >= drawn else steps + 1
    return {"upscale": upscale}
