"""The README's commands run, its tables are made from the code, its script is the product's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_commands_of_the_readme_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are quick run; of the others, Make's targets, scripts and keys are checked."""
    monkeypatch.chdir(tmp_path)
    for command in [line for block in blocks("bash") for line in block.strip().splitlines()]:
        program, *words = command.split()
        if program == "make":
            subprocess.run(["make", "-n", *words], check=True, cwd=ROOT, capture_output=True)
        elif program.endswith("python"):
            assert (ROOT / words[0]).exists(), command
        elif words[0] in ("train", "compare"):
            names = [word for word in words if word.endswith(".csv")]
            for name in names:
                Path(name).write_text("sentence,label\na good film,1\na bad film,0\n")
            own = words.index("--methods") if "--methods" in words else len(words)
            assert cli.main(["validate", *words[1:own]]) == 0, command
        elif words[0] != "report":  # tests/report has runs to show
            assert cli.main(words) == 0, command


def test_the_table_of_knobs_is_the_configs() -> None:
    code = "import sys; sys.path.insert(0, 'benchmarks'); import knobs_table as k;"
    code += "text = k.README.read_text(); assert k.with_table(text) == text, 'run `make readme`'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_scripts_of_the_readme_run(
    tiny_model: Any, tiny_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but for the name of the hub's model, which a local folder takes the place of."""
    from transformers import BertConfig, BertForSequenceClassification

    tiny = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertForSequenceClassification(tiny).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    rows = 6 * tiny_data  # 159 steps, enough to calibrate
    data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows)]
    scripts = blocks("python")
    assert len(scripts) == 3
    namespace: dict[str, Any] = {"train_data": data}
    exec(scripts[0].replace("distilbert-base-uncased", str(tmp_path / "model")), namespace)
    aees = namespace["trainer"].aees
    assert len(aees.calibrator.search.trials) > 5
    assert aees.calibrator.outcome.learning_rate > 1e-4  # 2e-5 was set
    assert set(aees.get_logs()["selected_lr_values"]) == {1.0}
    from transformers import Trainer, TrainingArguments

    vanilla = Trainer(tiny_model(), TrainingArguments("out", max_steps=80), train_dataset=tiny_data)
    asked: dict[str, Any] = {"trainer": vanilla}
    exec(scripts[1], asked)
    assert asked["suggestion"].learning_rate > 1e-4
    exec(scripts[2], {"trainer": vanilla})
    aees = vanilla.aees  # type: ignore[attr-defined]
    assert aees.calibrator.outcome.learning_rate == asked["suggestion"].learning_rate
    assert set(aees.get_logs()["selected_lr_values"]) == {0.5, 1.0, 2.0}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_comparison_of_the_readme_shows_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Trainer's default LR, static runs learn little and calibrated ones as from another."""
    (command,) = re.findall(r"pulseopt-hf (compare quickstart/lm .*)", README)
    monkeypatch.chdir(tmp_path)
    assert cli.main(command.split()) == 0
    content = json.loads((tmp_path / "runs/compare-quickstart-lm/compare.json").read_text())
    losses = {
        (cell["cell"]["method"], cell["cell"]["learning_rate"]): cell["loss_after"]
        for cell in content["cells"]
    }
    assert losses["static", 5e-5] > losses["static", 1e-3] + 0.5
    for learning_rate in (5e-5, 1e-3):
        assert losses["default", learning_rate] < losses["static", 1e-3] + 0.1
