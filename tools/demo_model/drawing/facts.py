"""Names of the facts of a scene, with their RGB if they have one."""

from typing import Final

COLOURS: Final = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.13, 0.68, 0.22),
    "blue": (0.15, 0.28, 0.92),
    "yellow": (0.96, 0.85, 0.12),
    "orange": (0.97, 0.52, 0.10),
    "purple": (0.55, 0.18, 0.75),
    "pink": (0.97, 0.55, 0.75),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.07),
    "gray": (0.50, 0.50, 0.52),
}
HAIRS: Final = {
    "black": (0.09, 0.08, 0.09),
    "brown": (0.38, 0.21, 0.10),
    "blonde": (0.93, 0.78, 0.35),
    "red": (0.80, 0.25, 0.10),
    "gray": (0.62, 0.62, 0.65),
    "blue": (0.20, 0.35, 0.85),
}
EYES: Final = {"blue": (0.15, 0.40, 0.95), "green": (0.10, 0.65, 0.25), "brown": (0.38, 0.20, 0.08)}
PEOPLE: Final = ("man", "woman")
TIMES: Final = ("sunset", "night", "noon", "sunrise")
LANDS: Final = ("hills", "mountains", "sea")
OBJECTS: Final = ("bottle", "cup", "box", "ball")
SHAPES: Final = ("circle", "square", "triangle", "star")
