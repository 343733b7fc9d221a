"""Real runs of a tiny model to show, and a real browser to open the pages in."""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from pulseopt_hf import AEES, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees import EpisodeRecord
from pulseopt_hf.aees.record_format import FILE_NAME, End, Head, Log, NumberedEpisode, encode

CHROMIUM = shutil.which("chromium")
# No sandbox, since a container's root has none, and nothing that talks to the network by itself.
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--no-first-run"),
]
ARM_PLOTS = ["loss", "reward", "plays", "mean-reward", "calibration", "gradient-norm", "throughput"]
HOSTILE = "<script>alert('&amp;')</script><img src=x onerror=alert(1)>%{x}"


class Shaky(PulseOptTrainer):
    """Has a loss that is not finite at two steps, which are skipped."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        training = self.model is not None and self.model.training
        return loss * float("nan") if training and self.state.global_step in (7, 8) else loss


@pytest.fixture(scope="session")
def train(_gpt2: Any, tiny_data: Any) -> Callable[..., Path]:
    """Return a function that trains in a folder, with knobs and arguments of Trainer's.

    Without knobs it is a plain Trainer that trains.
    """

    def run(
        folder: Path, knobs: dict[str, Any] | None, cls: Any = PulseOptTrainer, **args: Any
    ) -> Path:
        settings: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "max_steps": 40,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 20,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        pulse = {} if knobs is None else {"pulse": PulseOptConfig(**knobs)}
        trainer = (Trainer if knobs is None else cls)(
            copy.deepcopy(_gpt2),
            TrainingArguments(**{**settings, **args}),
            train_dataset=tiny_data,
            eval_dataset=tiny_data[:8],
            **pulse,
        )
        trainer.train()
        return folder

    return run


@pytest.fixture(scope="session")
def calibrated(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that was set far too low, was calibrated, and had episodes of three arms."""
    knobs = {"lr_candidates": [0.5, 1.0, 2.0], "calibration": "trust_region", "episode_length": 5}
    folder = tmp_path_factory.mktemp("runs") / "calibrated"
    return train(folder, knobs, max_steps=100, learning_rate=1e-4)


@pytest.fixture(scope="session")
def one_arm(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one arm that was calibrated and evaluated twice, with a metric."""
    knobs = {"calibration": "trust_region", "episode_length": 5}
    folder = tmp_path_factory.mktemp("runs") / "one-arm"
    metrics = {"compute_metrics": lambda evaluated: {"score": float(evaluated.predictions.mean())}}
    settings = {"max_steps": 100, "learning_rate": 1e-4, "eval_steps": 50}
    return train(folder, knobs, functools.partial(PulseOptTrainer, **metrics), **settings)


@pytest.fixture(scope="session")
def eventful(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a hostile name and folder whose episodes were clipped, skipped, undone."""
    knobs = {
        "lr_candidates": [1.0, 300.0],
        "noise_candidates": [0.0, 1e-4],
        "episode_length": 4,
        "divergence": "rollback",
        "divergence_factor": 1.1,
        "reward_clip_max": 0.01,
    }
    folder = tmp_path_factory.mktemp("runs") / "<b>bold&amp;</b>"
    return train(folder, knobs, Shaky, run_name=HOSTILE)


@pytest.fixture(scope="session")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of 10,000 episodes: a real controller on a parabola, logged at every step."""
    folder = tmp_path_factory.mktemp("runs") / "long"
    folder.mkdir()
    parameter = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    aees = AEES(optimizer, lr_candidates=[0.5, 1.0, 2.0], episode_length=2, seed=0)
    rng = random.Random(0)
    records: list[EpisodeRecord] = []
    lines = [encode(Head("long", 20_000, {"episode_length": 2}, 1e-3, {}), 0.0)]
    for step in range(20_000):
        optimizer.zero_grad()
        aees.step_start(step)
        loss = (parameter**2).sum() * rng.uniform(0.8, 1.2) + 0.1
        loss.backward()
        aees.step_end(loss)
        records += [record for _, record in aees.controller.since(len(records))]
        values = {"loss": loss.item(), "learning_rate": 1e-3, "grad_norm": 1.0}
        arm = aees.controller.episode.arm if aees.controller.episode else None
        values["pulse/learning_rate"] = 1e-3 * (arm.lr_multiplier if arm else 1.0)
        lines.append(encode(Log(step + 1, dict(values)), float(step)))
    lines += [encode(NumberedEpisode(i, r), 20_000.0) for i, r in enumerate(records, 1)]
    lines.append(encode(End(20_000, True), 20_000.0))
    (folder / FILE_NAME).write_bytes(b"".join(lines))
    return folder


@pytest.fixture
def finished(calibrated: Path, tmp_path: Path) -> Path:
    """Return a copy of the calibrated run, to be changed."""
    return Path(shutil.copytree(calibrated, tmp_path / "finished"))


def edit_record(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the lines of a record; those that `change` returns `False` for are left out."""
    file = folder / FILE_NAME
    lines = [json.loads(line) for line in file.read_bytes().splitlines()]
    kept = [line for line in lines if change(line) is not False]
    (folder / "edited").write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(folder / "edited", file)


@dataclass
class Opened:
    """A page in the browser, and what it did that it should not.

    Attributes:
        page: the page, drawn.
        complaints: errors and warnings of the console, exceptions and dialogs.
        requests: addresses that were asked for.
        session: the browser's own measurements of the page.
    """

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    session: Any = None

    def processor_seconds(self) -> float:
        """Return the processor time that the page's main thread has taken so far."""
        metrics = self.session.send("Performance.getMetrics")["metrics"]
        seconds: float = {item["name"]: item["value"] for item in metrics}["ThreadTime"]
        return seconds


DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return Debian's chromium, driven by playwright; skip where one of them is not there."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium; on Debian, apt-get install chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Return a function that opens a file and waits until every plot is drawn."""
    contexts = []

    def open_file(file: Path, **context: Any) -> Opened:
        contexts.append(browser.new_context(**{**DESKTOP, **context}))
        opened = Opened(contexts[-1].new_page())
        page = opened.page
        page.on(
            "console",
            lambda m: opened.complaints.append(m.text) if m.type in ("error", "warning") else None,
        )
        page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        page.on("dialog", lambda d: (opened.complaints.append(f"dialog {d.message}"), d.dismiss()))
        page.on("request", lambda request: opened.requests.append(request.url))
        opened.session = page.context.new_cdp_session(page)
        # Before the page is opened: the clock starts here.
        opened.session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(file.as_uri())
        if context.get("java_script_enabled", True):
            page.wait_for_selector("html[data-drawn=all]", timeout=60_000)
        return opened

    yield open_file
    for context in contexts:
        context.close()
