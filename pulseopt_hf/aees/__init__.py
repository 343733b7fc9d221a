"""The method: Adaptive Episodic Exploration Scheduling, without any tensor.

This floor knows losses as floats and arms as pairs of numbers. It imports the standard library
only, so it can be read, tested and reused apart from torch and Transformers.
"""

from pulseopt_hf.aees.arms import Arm
from pulseopt_hf.aees.bandits import Bandit, DiscountedUCB, RandomBandit, ScaledUCB
from pulseopt_hf.aees.conservative import ConservativeUCB
from pulseopt_hf.aees.context import TrendBandit, loss_trend
from pulseopt_hf.aees.controller import Controller, Selection
from pulseopt_hf.aees.episode_record import LOG_KEYS, EpisodeRecord, to_logs
from pulseopt_hf.aees.json_checks import StateError
from pulseopt_hf.aees.reward import Reward, episode_reward

__all__ = [
    "LOG_KEYS",
    "Arm",
    "Bandit",
    "ConservativeUCB",
    "Controller",
    "DiscountedUCB",
    "EpisodeRecord",
    "RandomBandit",
    "Reward",
    "ScaledUCB",
    "Selection",
    "StateError",
    "TrendBandit",
    "episode_reward",
    "loss_trend",
    "to_logs",
]
