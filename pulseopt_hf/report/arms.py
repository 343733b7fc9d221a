"""How arms and numbers are shown, alike on every page and plot. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pulseopt_hf.aees.records import EpisodeRecord

Rgb = tuple[int, int, int]

# Readable on light and on dark, and apart for colour-blind eyes: below, at and above the base LR.
_LOWER: tuple[Rgb, Rgb] = ((134, 184, 238), (46, 112, 208))
_EQUAL: Rgb = (130, 136, 146)
_HIGHER: tuple[Rgb, Rgb] = ((240, 178, 102), (208, 84, 24))
_NOISE: Rgb = (124, 58, 180)  # what colours are mixed with as the noise grows


@dataclass(frozen=True)
class ArmStyle:
    """How one arm looks.

    Attributes:
        label: what it is called, such as `x0.5` or `x2, noise 0.01`.
        color: a hexadecimal colour.
    """

    label: str
    color: str


class ArmStyles:
    """Colours and labels of the arms that were played, lowest LR multiplier first.

    Args:
        episodes: the episodes that are shown.
    """

    def __init__(self, episodes: Sequence[EpisodeRecord]) -> None:
        self.keys = sorted({(record.lr_value, record.noise_value) for record in episodes})
        noises = sorted({noise for _, noise in self.keys})
        rates = sorted({lr for lr, _ in self.keys})
        self._styles = [
            ArmStyle(
                label(lr, noise, with_noise=noises != [0.0]),
                _hex(
                    _mix(_color(lr, rates), _NOISE, 0.6 * noises.index(noise) / max(1, len(noises)))
                ),
            )
            for lr, noise in self.keys
        ]

    def __len__(self) -> int:
        """Return the number of arms."""
        return len(self._styles)

    def __iter__(self) -> Iterator[ArmStyle]:
        """Go through the styles in order."""
        return iter(self._styles)

    def __getitem__(self, index: int) -> ArmStyle:
        """Return the style of an arm by its place in the order."""
        return self._styles[index]

    def index(self, record: EpisodeRecord) -> int:
        """Return the place of an episode's arm in the order."""
        return self.keys.index((record.lr_value, record.noise_value))


def label(lr_multiplier: float, noise_std: float, *, with_noise: bool) -> str:
    """Name an arm for people."""
    name = f"×{lr_multiplier:g}"  # noqa: RUF001
    return f"{name}, noise {noise_std:g}" if with_noise else name


def shown(value: float | None) -> str:
    """Write a number in at most five figures, or a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"  # noqa: RUF001
    return f"{value:.5g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"


def _color(lr: float, rates: Sequence[float]) -> Rgb:
    lower, higher = [r for r in rates if r < 1.0], [r for r in rates if r > 1.0]
    if lr < 1.0:
        return _mix(*_LOWER, (len(lower) - lower.index(lr)) / len(lower))
    if lr > 1.0:
        return _mix(*_HIGHER, (higher.index(lr) + 1) / len(higher))
    return _EQUAL


def _mix(one: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _hex(color: Rgb) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
