"""The blocks of the pages for each kind of user run as they stand, one after the other."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.aees.calibration import Outcome

DOCS = Path(__file__).parents[2] / "docs"


class Page:
    """A page's blocks, and the names that those which were run have made."""

    def __init__(self, name: str) -> None:
        text = (DOCS / f"{name}.md").read_text()
        self.blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
        self.names: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """Run the next block, and return the names that there are."""
        exec(self.blocks.pop(0), self.names)
        return self.names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def calibrated(caplog: pytest.LogCaptureFixture) -> Any:
    """Return how many runs have said so far which learning rate they found."""
    caplog.set_level(logging.WARNING)
    return lambda: caplog.text.count("Learning rate calibrated: ")


def found(aees: Any) -> float:
    """Return the learning rate that a calibration found."""
    outcome: Outcome = aees.calibrator.outcome
    assert outcome.reason is None
    return outcome.learning_rate


def test_i_fine_tune_with_trainer(calibrated: Any) -> None:
    page = Page("trainer")
    page.run()
    assert found(page.run()["trainer"].aees) > 1e-4  # 5e-5 was set
    assert calibrated() == 1
    names = page.run()
    assert type(names["trainer"]) is names["Trainer"]
    assert calibrated() == 2
    names = page.run()
    assert names["suggestion"].learning_rate > 1e-4
    assert names["trainer"].state.global_step == 0
    trainer = page.run()["trainer"]
    assert trainer.aees.calibrator is None
    assert trainer.state.log_history[0]["learning_rate"] <= 5e-5
    trainer = page.run()["trainer"]
    assert found(trainer.aees) > 1e-4
    assert set(trainer.aees.get_logs()["selected_lr_values"]) == {0.5, 1.0, 2.0}
    assert page.run()["args"].calibration == "off"
    assert calibrated() == 3
    assert page.blocks == []


@pytest.mark.slow
def test_i_use_trl(calibrated: Any) -> None:
    pytest.importorskip("trl", reason="install the extra `trl` to run this")
    page = Page("trl")
    assert found(page.run()["trainer"].aees) > 1e-4
    assert page.run()["trainer"].state.global_step == 60
    assert calibrated() == 2
    names = page.run()
    assert isinstance(names["trainer"], names["DPOTrainer"])
    assert found(names["trainer"].aees) > 0.0
    assert page.blocks == []


def test_i_write_my_own_loop() -> None:
    page = Page("loop")
    names = page.run()
    assert names["suggestion"].learning_rate > 1e-4
    assert names["optimizer"].param_groups[0]["lr"] == 1e-5
    names = page.run()
    assert found(names["aees"]) == pytest.approx(names["suggestion"].learning_rate, rel=0.5)
    assert len(names["loader"]) == names["scheduler"].total_iters
    assert set(page.run()["aees"].get_logs()["selected_lr_values"]) == {0.5, 1.0, 2.0}
    assert page.blocks == []


def test_i_come_from_lightning_or_fastai() -> None:
    page = Page("lightning")
    assert page.run()["suggestion"].limited_by in ("outputs", "weights")
    assert page.blocks == []
