"""The method meets a torch optimizer. May import torch and the floors below, not Transformers."""

from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.hooks import ArmHooks
from pulseopt_hf.optim.loop import AEES
from pulseopt_hf.optim.noise import GradientNoise

__all__ = ["AEES", "Agreement", "ArmHooks", "GradientNoise"]
