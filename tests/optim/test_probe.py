"""Forward calls of a model in training, replayed."""

import random

import numpy as np
import torch
from torch import Tensor, nn

from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.probe import Probe

CPU = torch.device("cpu")


class Masked(nn.Module):
    """Draws which of its inputs it sees, in eval mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append(float(np.random.rand()) + random.random())
        return self.head(x * (torch.rand_like(x) < self.drawn[-1]))


def test_a_model_that_draws_in_eval_mode_draws_the_same_in_every_replay() -> None:
    model = Masked()
    probe = Probe(model, Agreement(CPU), CPU)
    probe.listen()
    for _ in range(3):  # each begins with the calls of the steps before
        model(torch.randn(4, 4))
        model(torch.randn(4, 4))
        calls = len(model.drawn)
        assert probe.begin()  # with noise and without
        assert probe.movement() == 0.0
        assert len(set(model.drawn[calls:])) == 1
        probe.end_step()
    with torch.no_grad():
        model.head.weight += 0.1
    assert probe.begin()
    assert probe.movement() > 0.0
