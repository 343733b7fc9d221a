"""Measure how often each bandit plays the best arm, with the losses of a real run.

    python -m benchmarks.planted_bandit [--write]

A small GPT is trained on `quickstart/lm` for 1,200 steps at one constant LR, which are 60 episodes
of 20 steps. Its losses are a trend, since they fall more and more slowly, and noise about it. Then
60 episodes of three arms are played: in each, the losses are that trend with noise of 20 steps in a
row drawn from the run, and under one of the arms the loss falls by a gap more. The gap is given in
standard deviations of the published reward's noise. `--write` puts the result into
`benchmarks/results/planted-bandit.json`.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import tempfile
from pathlib import Path

from benchmarks import common
from pulseopt_hf import PulseOptConfig, cli
from pulseopt_hf.aees import (
    Bandit,
    ConservativeUCB,
    DiscountedUCB,
    RandomBandit,
    ScaledUCB,
    episode_reward,
)
from pulseopt_hf.compare.summary import markdown

RESULT = common.RESULTS / "planted-bandit.json"
EPISODES, ARMS, BEST, RUNS = 60, 3, 1, 400
GAPS = (0.5, 1.0, 2.0)
SMOOTHED = 2  # episodes before and after that the trend is a mean of
BANDITS: dict[str, tuple[type[Bandit], str]] = {
    "`discounted_ucb`, `smoothed`: published": (DiscountedUCB, "smoothed"),
    "`discounted_ucb`, `slope`": (DiscountedUCB, "slope"),
    "`scaled_ucb`, `smoothed`": (ScaledUCB, "smoothed"),
    "`scaled_ucb`, `slope`": (ScaledUCB, "slope"),
    "`conservative_ucb`, `slope`": (ConservativeUCB, "slope"),
    "random": (RandomBandit, "smoothed"),
}


def real_losses(folder: Path, steps: int) -> list[float]:
    """Train at a constant LR, and return the loss of every step."""
    words = ["train", "quickstart/lm", "--output_dir", str(folder), "--max_steps", str(steps)]
    words += ["--calibration", "off", "--learning_rate", "1e-3", "--quiet", "--logging_steps", "1"]
    words += ["--eval_strategy", "no", "--eval_on_start", "false"]
    if cli.main(words):
        raise SystemExit("The run failed.")
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


class PlantedEpisodes:
    """Losses of episodes as the run could have had them, with one arm better than the others.

    Args:
        losses: of every step of the run.
    """

    def __init__(self, losses: list[float]) -> None:
        self._length = len(losses) // EPISODES
        reach = SMOOTHED * self._length
        self._trend = [
            statistics.fmean(losses[max(0, i - reach) : i + reach + 1]) for i in range(len(losses))
        ]
        self._noise = [loss / mean for loss, mean in zip(losses, self._trend, strict=True)]

    def losses(self, number: int, gap: float, rng: random.Random) -> list[float]:
        """Return the losses of one episode, whose logarithm falls by `gap` more than the trend."""
        begin, length = number * self._length, self._length
        drawn = rng.randrange(len(self._noise) - length + 1)
        return [
            self._trend[begin + k] * self._noise[drawn + k] * math.exp(-gap * k / (length - 1))
            for k in range(length)
        ]

    def deviation(self, kind: str) -> float:
        """Return the standard deviation of a reward's noise, mean over the episodes."""
        rng = random.Random(0)
        return statistics.fmean(
            statistics.pstdev(reward(self.losses(i, 0.0, rng), kind) for _ in range(200))
            for i in range(EPISODES)
        )

    def share(self, make: type[Bandit], kind: str, gap: float) -> float:
        """Return the best arm's share of the episodes, mean over `RUNS` seeds."""
        plays = 0
        for seed in range(RUNS):
            bandit, rng = make(ARMS, seed), random.Random(10_000 + seed)
            for number in range(EPISODES):
                arm = bandit.select()
                plays += arm == BEST
                losses = self.losses(number, gap * (arm == BEST), rng)
                bandit.update(arm, reward(losses, kind))
        return plays / RUNS / EPISODES


def reward(losses: list[float], kind: str) -> float:
    """Return an episode's reward with the other knobs as they are by default."""
    knobs = PulseOptConfig()
    return episode_reward(
        losses,
        kind=kind,
        ema_alpha=knobs.ema_alpha,
        instability_lambda=knobs.reward_instability_lambda,
        epsilon=knobs.reward_epsilon,
        clip_min=knobs.reward_clip_min,
        clip_max=knobs.reward_clip_max,
    ).reward


def main() -> None:
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--steps", type=int, default=20 * EPISODES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        episodes = PlantedEpisodes(real_losses(Path(folder) / "run", options.steps))
    noise = {kind: episodes.deviation(kind) for kind in ("smoothed", "slope")}
    shares = {
        name: {str(gap): round(episodes.share(*player, gap * noise["smoothed"]), 3) for gap in GAPS}
        for name, player in BANDITS.items()
    }
    noise = {kind: round(deviation, 5) for kind, deviation in noise.items()}
    print(json.dumps(noise))
    result = {"steps": options.steps, "noise": noise, "shares": shares}
    common.finish(result, to_markdown, options.write)


def to_markdown(result: dict) -> str:
    """Return a table with a row for each bandit of what `main` measured."""
    rows = [("bandit and reward", *(f"gap {gap:g} sd" for gap in GAPS))]
    rows += [
        (name, *(f"{share:.0%}" for share in shares.values()))
        for name, shares in result["shares"].items()
    ]
    return markdown(rows) + "\n"


if __name__ == "__main__":
    main()
