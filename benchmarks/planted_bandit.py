"""Measure how often each bandit plays the best arm, with the rewards of a real run.

    python benchmarks/planted_bandit.py [--write]

A small GPT is trained on `quickstart/lm` for 600 steps at one constant LR, in 60 episodes of 10
steps. Their rewards are a trend, since the loss falls more and more slowly, and noise about it.
Then 60 episodes of three arms are played: every arm is rewarded by that trend with noise drawn from
the same run, and one of them by a gap more. The gap is given in standard deviations of the noise.
`--write` puts the result into `benchmarks/results/planted-bandit.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

from pulseopt_hf import cli
from pulseopt_hf.aees import Bandit, DiscountedUCB, RandomBandit, ScaledUCB

RESULT = Path(__file__).parent / "results" / "planted-bandit.json"
EPISODES, ARMS, BEST, RUNS = 60, 3, 1, 400
GAPS = (0.5, 1.0, 2.0)
BANDITS: dict[str, type[Bandit]] = {
    "discounted_ucb": DiscountedUCB,
    "scaled_ucb": ScaledUCB,
    "random": RandomBandit,
}


def real_rewards(folder: Path, steps: int) -> list[float]:
    """Train, and return the rewards of `EPISODES` episodes of one arm."""
    words = ["train", "quickstart/lm", "--output_dir", str(folder), "--max_steps", str(steps)]
    words += ["--episode_length", str(steps // EPISODES), "--calibration", "off", "--quiet"]
    words += ["--eval_strategy", "no", "--eval_on_start", "false"]
    if cli.main(words):
        raise SystemExit("The run failed.")
    logs = json.loads((folder / "episodes.json").read_text(encoding="utf-8"))
    rewards: list[float] = logs["episode_rewards"][:EPISODES]
    return rewards


def trend_and_noise(rewards: list[float]) -> tuple[list[float], list[float]]:
    """Split rewards into their moving mean over nine episodes and what is left."""
    trend = [statistics.fmean(rewards[max(0, i - 4) : i + 5]) for i in range(len(rewards))]
    return trend, [reward - mean for reward, mean in zip(rewards, trend, strict=True)]


def share(make: type[Bandit], trend: list[float], noise: list[float], gap: float) -> float:
    """Return the best arm's share of the episodes, mean over `RUNS` seeds."""
    plays = 0
    for seed in range(RUNS):
        bandit, rng = make(ARMS, seed), random.Random(10_000 + seed)
        for mean in trend:
            arm = bandit.select()
            plays += arm == BEST
            bandit.update(arm, mean + rng.choice(noise) + gap * (arm == BEST))
    return plays / RUNS / len(trend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--write", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rewards = real_rewards(Path(folder) / "run", options.steps)
    trend, noise = trend_and_noise(rewards)
    deviation = statistics.pstdev(noise)
    shares = {
        name: {str(gap): round(share(make, trend, noise, gap * deviation), 3) for gap in GAPS}
        for name, make in BANDITS.items()
    }
    result = {"steps": options.steps, "noise": round(deviation, 5), "shares": shares}
    print(to_markdown(result))
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def to_markdown(result: dict) -> str:
    """Return a table with a row for each bandit of what `main` measured."""
    lines = ["| bandit | " + " | ".join(f"gap {gap:g} sd" for gap in GAPS) + " |"]
    lines.append("|---|" + "---|" * len(GAPS))
    for name, shares in result["shares"].items():
        lines.append(f"| `{name}` | " + " | ".join(f"{v:.0%}" for v in shares.values()) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
