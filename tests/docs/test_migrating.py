"""What docs/migrating.md says of `pulseopt` and of this package is so in both."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pulseopt
import pytest
import torch
from accelerate import Accelerator

import pulseopt_hf
from pulseopt_hf import PulseOptConfig

PAGE = (Path(__file__).parents[2] / "docs" / "migrating.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CLASSES = {"pulseopt": pulseopt.AEES, "here": pulseopt_hf.AEES}


def table(head: str) -> list[list[str]]:
    """Return the rows of the table whose head begins with `head`, without their backticks."""
    (text,) = re.findall(rf"^\| {re.escape(head)} .*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[c.strip("` ") for c in row.strip("|").split(" | ")] for row in text.splitlines()]


def test_the_loop_ends_equal_with_either_import() -> None:
    ours: dict[str, Any] = {}
    published: dict[str, Any] = {}
    exec(BLOCKS[0], ours)
    exec(BLOCKS[0].replace("from pulseopt_hf import AEES", "from pulseopt import AEES"), published)
    assert published["AEES"] is pulseopt.AEES
    assert len(set(ours["logs"]["selected_lr_values"])) == 3
    for logs in (ours["logs"], published["logs"]):
        norms = logs.pop("mean_update_norms")
        assert (set(norms) == {None}) == (logs is ours["logs"])
    assert ours["logs"] == published["logs"]
    pairs = zip(ours["model"].parameters(), published["model"].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_blocks_on_saving_and_skipping_run(capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    for block in BLOCKS[:3]:
        exec(block, namespace)
    assert namespace["resumed"].get_logs() == namespace["logs"]
    assert capsys.readouterr().out == "1\n"


def test_the_block_on_trainer_runs_with_the_published_defaults(
    tiny_model: Any, tiny_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 4
    namespace = {"model": tiny_model(), "train_data": tiny_data}
    exec(BLOCKS[3], namespace)
    assert len(namespace["logs"]["episode_rewards"]) == 12
    published = {k: p.default for k, p in inspect.signature(pulseopt.AEES).parameters.items()}
    config = namespace["trainer"].aees.config
    given = {"optimizer", "lr_scheduler", "lr_candidates", "episode_length", "seed"}
    for name in set(published) - given:
        value = getattr(config, name)
        assert (tuple(value) if isinstance(value, list) else value) == published[name]


def test_the_arguments_are_those_of_both() -> None:
    rows = table("argument")
    for aees_class in CLASSES.values():
        parameters = inspect.signature(aees_class).parameters
        for name, default, _ in rows:
            value = parameters[name].default
            assert repr(tuple(value) if isinstance(value, list) else value) == default
    theirs = inspect.signature(pulseopt.AEES).parameters
    assert len(rows) == len(theirs) - 1
    recommended = PulseOptConfig()
    for name, _, default in rows:
        assert default == repr(getattr(recommended, name, "not there")) or name == "lr_scheduler"
    assert not hasattr(recommended, "lr_scheduler")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("what", "published", "here"), table("what"))
def test_both_raise_what_the_page_says(what: str, published: str, here: str) -> None:
    for name, expected in (("pulseopt", published), ("here", here)):
        parameters = [torch.nn.Parameter(torch.ones(1))]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        namespace = {
            "AEES": CLASSES[name],
            "aees": CLASSES[name](optimizer, lr_candidates=[0.5, 1.0], episode_length=2, seed=0),
            "optimizer": optimizer,
            "parameters": parameters,
            "torch": torch,
        }
        raised = "passes"
        try:
            eval(what, namespace)
        except Exception as error:
            raised = type(error).__name__
        assert raised == expected, name


@pytest.mark.parametrize(("name", "episodes"), [("pulseopt", 2), ("here", 1)])
def test_under_accumulation_an_episode_counts_what_the_page_says(name: str, episodes: int) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    layer = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    aees = CLASSES[name](optimizer, lr_candidates=[0.5, 1.0], episode_length=2, seed=0)
    for micro_batch in range(4):
        with accelerator.accumulate(model):
            aees.step_start(micro_batch)
            loss = model(torch.ones(1, 2)).pow(2).mean() + 1.0
            accelerator.backward(loss)
            aees.step_end(loss)
            optimizer.zero_grad()
    aees.finalize()
    assert len(aees.get_logs()["episode_rewards"]) == episodes


def test_every_name_of_pulseopt_has_a_row_that_leads_somewhere() -> None:
    rows = dict(table("`pulseopt`"))
    assert set(rows) == set(pulseopt.__all__)
    for target in rows.values():
        found = re.search(r"pulseopt_hf[\w.]*", target)
        if found is not None:
            module, _, name = found[0].rpartition(".")
            assert hasattr(importlib.import_module(module), name)
