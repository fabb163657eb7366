"""The image that a job starts from, as the pipeline takes it."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class StartingImage:
    """An RGB image of the job's size, and the mask of what is drawn anew in it, if it has one.

    The mask has one channel, 255 for what is drawn anew; with `is_soft` values between are used as
    they are, otherwise each is taken for 0 or 255, as diffusers does.
    """

    image: Image.Image
    mask: Image.Image | None = None
    is_soft: bool = False
