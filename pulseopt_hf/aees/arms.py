"""Arms: what one episode runs with. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """A learning-rate multiplier and a gradient-noise level, frozen for one episode.

    Attributes:
        name: `lr<multiplier>_n<noise>` with `p` for the decimal point and `m` for a minus sign, as
            in `lr0p5_n0` and `lr1_n1em05`.
        lr_multiplier: factor on the base LR, dimensionless, > 0.
        noise_std: standard deviation of the noise added to each gradient element, >= 0. Its unit
            (absolute, or relative to the gradient's RMS) is the noise mode's.
    """

    name: str
    lr_multiplier: float
    noise_std: float

    @classmethod
    def of(cls, lr_multiplier: float, noise_std: float) -> Arm:
        """Build the arm of two values, with the name that they imply."""
        return cls(f"lr{_tag(lr_multiplier)}_n{_tag(noise_std)}", lr_multiplier, noise_std)

    @property
    def is_neutral(self) -> bool:
        """Whether an optimizer step under this arm is the plain optimizer step."""
        return self.lr_multiplier == 1.0 and self.noise_std == 0.0


def _tag(value: float) -> str:
    return f"{value:.12g}".replace(".", "p").replace("-", "m")
