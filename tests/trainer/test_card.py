"""The model card says what the method did, in valid metadata and text."""

import base64
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from transformers import Trainer

from pulseopt_hf import PulseOptConfig, with_pulseopt
from pulseopt_hf.trainer.card import BEGIN, END, TAGS, table, with_section
from tests.conftest import Make, logged, stop_after


def write_card(trainer: Any, **kwargs: Any) -> Path:
    trainer.create_model_card(**kwargs)
    return Path(trainer.args.output_dir) / "README.md"


def rows_of(text: str) -> dict[str, list[str]]:
    """Return the rows of a text's tables by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.fixture
def uploaded() -> Iterator[dict[str, bytes]]:
    """Answer the requests to the hub, and return the files that were committed to it."""
    files: dict[str, bytes] = {}

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.path
        lines = [json.loads(line) for line in request.content.splitlines()]
        if path.endswith("/repos/create"):
            return httpx.Response(200, json={"url": "https://huggingface.co/somebody/tiny"})
        if path.endswith("/validate-yaml"):
            checked.append(lines[0]["content"])
            return httpx.Response(200, json={"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            names = [file["path"] for file in lines[0]["files"]]
            modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
            return httpx.Response(200, json={"files": modes})
        assert path == "/api/models/somebody/tiny/commit/main"
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        assert checked == [files["README.md"].decode()]
        url = "https://huggingface.co/somebody/tiny/commit/1"
        return httpx.Response(200, json={"commitOid": "1", "commitUrl": url})

    checked: list[str] = []
    set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(answer)))
    yield files
    set_client_factory(default_client_factory)


@pytest.mark.parametrize("road", ["subclass", "attached"])
def test_the_card_has_plays_knobs_and_learning_rates_and_is_pushed_to_the_hub(
    train: Make, uploaded: dict[str, bytes], road: str
) -> None:
    config = PulseOptConfig(lr_candidates=[0.5, 2.0], episode_length=3, calibration="trust_region")
    hub = {"hub_model_id": "somebody/tiny", "hub_token": "hf_none"}
    trainer = train(road, config, max_steps=160, **hub)
    write_card(trainer, model_name="tiny", tags=["mine"])
    trainer.push_to_hub(tags=["mine"])  # written again, it is there once
    assert "model.safetensors" in uploaded
    card = ModelCard(uploaded["README.md"].decode())  # raises where metadata is wrong
    assert set(card.data.tags) == {*TAGS, "mine", "generated_from_trainer"}
    assert card.text.count("## Learning rate") == card.text.count(BEGIN) == 1
    rows = rows_of(card.text)

    logs = trainer.aees.get_logs()
    for value in (0.5, 2.0):
        episodes = [i for i, played in enumerate(logs["selected_lr_values"]) if played == value]
        rewards = [logs["episode_rewards"][i] for i in episodes]
        steps = [
            logs["episode_end_steps"][i] - logs["episode_start_steps"][i] + 1 for i in episodes
        ]
        assert rows[f"x{value:g}"] == [
            "0",
            str(len(episodes)),
            str(sum(steps)),
            f"{sum(rewards) / len(rewards):+.4f}",
            f"{min(rewards):+.4f} to {max(rewards):+.4f}",
        ]
    used = logged(trainer, "pulse/learning_rate")
    assert len(used) == 160
    assert rows["Effective learning rate"] == [
        f"{min(used):.4g} to {max(used):.4g}, of the 160 steps logged"
    ]
    search = trainer.aees.calibrator.search
    assert rows["Learning rate that was set"] == ["0.003"]
    assert rows["Calibrated learning rate"] == [
        f"{search.learning_rate:.4g}, found in {len(search.trials)} trials"
    ]
    assert rows["Episodes"] == [str(len(logs["episode_rewards"]))]
    assert rows["`lr_candidates`"] == ["`[0.5, 2.0]`"]


def test_a_card_says_what_happened_and_no_more(train: Make) -> None:
    """A calibrated run of one arm has no arms to list, and no knobs but those that were changed."""
    text = write_card(train(max_steps=60, learning_rate=1e-4)).read_text()
    assert "The learning rate was calibrated (`pulseopt_hf`)." in text
    for word in ("AEES", "Arms", "Knobs", "Episodes"):
        assert f"{word} " not in text.split(BEGIN)[1]
    rows = rows_of(text.split(BEGIN)[1])
    assert set(rows) == {
        *("---", "value"),
        *("Learning rate that was set", "Calibrated learning rate", "Effective learning rate"),
    }


def test_a_card_does_not_call_calibrated_what_was_given_up(train: Make) -> None:
    trainer = train(max_steps=60, callbacks=[stop_after(3)])  # amid the search
    text = write_card(trainer).read_text()
    assert "The learning rate is the one that was set (`pulseopt_hf`)." in text


def test_metadata_is_valid_trainers_scores_are_kept_and_changed_or_followed_knobs_are_listed(train):
    """As far as that can be told offline: the hub's own check is a request to it."""

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    arms = {"lr_candidates": [0.5, 1.0], "calibration": "off"}
    trainer = train(pulse=arms, compute_metrics=accuracy)
    scored = trainer.evaluate()["eval_accuracy"]
    about = {"tags": "mine", "tasks": "text-generation", "dataset_tags": "wikitext"}
    file = write_card(trainer, dataset="Wikitext", **about)
    data = yaml.safe_load(file.read_text().split("---\n")[1])
    assert set(data) <= set(inspect.signature(ModelCardData).parameters) | {"model-index"}
    assert len(data["tags"]) == len(set(data["tags"]))
    assert set(data["tags"]) == {*TAGS, "mine", "generated_from_trainer"}
    (result,) = ModelCard.load(file).data.eval_results
    assert (result.metric_type, result.dataset_type) == ("accuracy", "wikitext")
    assert result.metric_value == pytest.approx(scored, abs=1e-4)
    rows = rows_of(file.read_text())
    assert {row.strip("`") for row in rows if row.startswith("`")} == {
        *("lr_candidates", "calibration", "episode_length", "seed"),
    }
    assert rows["`episode_length`"] == ["`5`"]  # unset, and resolved by the run
    assert rows["`seed`"] == [f"`{trainer.args.seed}`"]


def test_rolled_back_episodes_and_skipped_steps_are_counted(train: Make) -> None:
    knobs = {"lr_candidates": [1.0, 1e4], "episode_length": 4, "divergence": "rollback", "seed": 0}
    trainer = train(pulse=knobs, max_steps=40)
    rows = rows_of(write_card(trainer).read_text())
    rolled_back = trainer.aees.get_logs()["episode_outcomes"].count("rolled back")
    assert rolled_back > 0
    assert rows["Episodes that were rolled back"] == [str(rolled_back)]
    assert rows["`divergence`"] == ["`rollback`"]  # of the operational knobs, what was changed
    assert "`nonfinite`" not in rows


class KeepsTheCard(Trainer):
    """A Trainer that leaves a card alone which is there, as PEFT's part of a card does."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        if not (Path(self.args.output_dir) / "README.md").exists():
            super().create_model_card(*args, **kwargs)


def test_written_again_it_takes_nothing_of_the_users(train: Make) -> None:
    trainer = train(with_pulseopt(KeepsTheCard), {"lr_candidates": [0.5, 1.0]})
    file = write_card(trainer)
    before, rest = file.read_text().split(BEGIN)
    written, after = rest.split(END)
    mine, mine_too = "## Learning rate\n\nMine: ü.\n\n", "\n## Learning rate\n\nMine too.\n"
    file.write_text(f"{before}{mine}{BEGIN}\nold\n{END}{after}{mine_too}", encoding="utf-8")
    trainer.create_model_card()
    expected = f"{before}{mine}{BEGIN}{written}{END}{after}{mine_too}"
    assert file.read_text(encoding="utf-8") == expected


def test_a_marker_that_lost_its_other_half_takes_nothing_along() -> None:
    section = f"{BEGIN}\n\nnew\n\n{END}"
    for card in (f"text\n{BEGIN}\nmine", f"text\n{END}\nmine", f"{END}\ntext\n{BEGIN}\nmine"):
        once = with_section(card, section)
        assert once == f"{card}\n\n{section}\n"
        assert with_section(once, section) == once


def test_a_cell_of_a_table_ends_neither_the_cell_nor_the_row() -> None:
    rows = table(("a", "b"), [("x|y", "two\nlines <b>")]).splitlines()
    assert rows == ["| a | b |", "| --- | --- |", "| x\\|y | two lines &lt;b> |"]


def test_a_trainer_that_has_not_trained_writes_trainers_card(make_trainer: Make) -> None:
    stock, ours = (
        write_card(make_trainer(road), model_name="tiny").read_text()
        for road in ("stock", "subclass")
    )
    assert stock == ours
