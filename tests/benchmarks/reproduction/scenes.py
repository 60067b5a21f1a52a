"""Synthetic scenes with captions from a grammar, as training data for captioners."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from langchain_datashunt.exceptions import ConfigurationError
from langchain_datashunt.images import Pixels

SIDE = 48
"""Height and width of a scene in pixels."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (235, 205, 40),
    "purple": (140, 60, 170),
    "grey": (120, 120, 120),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
RELATIONS = {"above": "below", "left of": "right of"}
"""Relations of the first thing to the second, with their inverse."""


@dataclass(frozen=True)
class Thing:
    """Coloured shape in a scene."""

    shape: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Image of two things and their relation.

    Attributes:
        pixels: Image, shape `[48, 48, 3]`.
        first: First thing.
        relation: Relation of the first thing to the second.
        second: Second thing.
    """

    pixels: Pixels
    first: Thing
    relation: str
    second: Thing

    def captions(self) -> list[str]:
        """Return five captions, the simplest first."""
        one, other, back = self.first, self.second, RELATIONS[self.relation]
        told = {"above": "over", "below": "under", "left of": "to the left of", "right of": "to the right of"}
        return [
            f"a {one} {self.relation} a {other}",
            f"a {other} {back} a {one}",
            f"there is a {one} {told[self.relation]} a {other}",
            f"the {one} is {self.relation} the {other}",
            f"a {one} and a {other} that is {told[back]} it",
        ]


def draw_scenes(n: int, *, seed: int = 0, noise: float = 0.0) -> list[Scene]:
    """Draw random scenes.

    Args:
        n: Number of scenes.
        seed: Random seed.
        noise: Standard deviation of the pixel noise, relative to the full range.
    """
    if noise < 0.0:
        raise ConfigurationError(f"Expected `noise` of at least 0, got {noise}.")
    rng = np.random.default_rng(seed)
    return [_scene(rng, noise) for _ in range(n)]


def _scene(rng: np.random.Generator, noise: float) -> Scene:
    colours = rng.choice(list(COLOURS), 2, replace=False).tolist()
    shapes = rng.choice(SHAPES, 2).tolist()
    sizes = rng.choice(["small", "large"], 2).tolist()
    first, second = (Thing(*one) for one in zip(shapes, colours, sizes, strict=True))
    relation = str(rng.choice(["above", "left of"]))
    along = (SIDE * 0.27, SIDE * 0.73)
    across = rng.uniform(SIDE * 0.4, SIDE * 0.6, 2)
    pixels = np.full((SIDE, SIDE, 3), 245.0) + rng.normal(0.0, 4.0, 3)
    for thing, main, side in zip((first, second), along, across, strict=True):
        y, x = (main, side) if relation == "above" else (side, main)
        radius = (6.0 if thing.size == "small" else 11.0) + rng.uniform(-0.7, 0.7)
        _paint(pixels, thing, y + rng.uniform(-1.5, 1.5), x + rng.uniform(-1.5, 1.5), radius, rng)
    pixels += rng.normal(0.0, 255.0 * noise, pixels.shape) if noise else 0.0
    return Scene(np.clip(pixels, 0, 255).astype(np.uint8), first, relation, second)


def _paint(
    pixels: np.ndarray[tuple[int, int, int], np.dtype[np.float64]],
    thing: Thing,
    y: float,
    x: float,
    radius: float,
    rng: np.random.Generator,
) -> None:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    dy, dx = (rows - y) / radius, (columns - x) / radius
    distance = np.hypot(dy, dx)
    inside = {
        "circle": distance <= 1.0,
        "ring": (distance <= 1.0) & (distance >= 0.55),
        "square": np.maximum(abs(dy), abs(dx)) <= 0.85,
        "triangle": (dy <= 0.8) & (abs(dx) <= (dy + 1.0) * 0.55),
        "cross": (np.maximum(abs(dy), abs(dx)) <= 1.0) & (np.minimum(abs(dy), abs(dx)) <= 0.3),
    }[thing.shape]
    pixels[inside] = np.array(COLOURS[thing.colour]) + rng.normal(0.0, 12.0, 3)
