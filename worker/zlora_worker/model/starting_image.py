"""The image that a job starts from, as the pipeline takes it."""

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class StartingImage:
    """An RGB image of the job's size, and the mask of what is drawn anew in it, if it has one.

    The mask has one channel: diffusers draws anew what is above the half of 255. With `keeps` the
    image itself is laid over the drawn one: as much of each pixel as its mask is below 255.
    """

    image: Image.Image
    mask: Image.Image | None = None
    keeps: bool = False
