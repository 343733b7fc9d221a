"""Snapshots put parameters, optimizer state and buffers back, bit for bit."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree

from pulseopt_hf.aees.json_checks import StateError
from pulseopt_hf.optim.snapshot import Snapshot


def make(optimizer_class: Any = torch.optim.AdamW, **kwargs: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8))
    return model, optimizer_class(model.parameters(), lr=0.1, **kwargs)


def train(model: Any, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().sum().backward()
        optimizer.step()


def everything(model: Any, optimizer: Any) -> tuple[Any, Any]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def assert_equal(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def through_a_file(snapshot: Snapshot, optimizer: Any, buffers: Any, folder: Path) -> Snapshot:
    """Return another snapshot, which was read from the file of the first."""
    snapshot.save(folder / "s.safetensors")
    other = Snapshot(optimizer, buffers)
    other.load(folder / "s.safetensors")
    return other


@pytest.mark.parametrize(
    ("optimizer_class", "kwargs"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_what_was_taken_comes_back(optimizer_class: Any, kwargs: Any, tmp_path: Path) -> None:
    model, optimizer = make(optimizer_class, **kwargs)
    snapshot = Snapshot(optimizer, model.buffers())
    train(model, optimizer, 3)
    pointers = [p.data_ptr() for p in model.parameters()]
    snapshot.take()
    then = everything(model, optimizer)
    other = through_a_file(snapshot, optimizer, model.buffers(), tmp_path)
    for each in (snapshot, snapshot, other):  # a snapshot can be restored again
        train(model, optimizer, 3)
        each.restore()
        assert_equal(everything(model, optimizer), then)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_memory_is_used_again_and_let_go() -> None:
    model, optimizer = make()
    snapshot = Snapshot(optimizer)
    train(model, optimizer, 1)
    snapshot.take()
    held = snapshot.nbytes
    pointers = {t.data_ptr() for t in snapshot._copies.values()}
    train(model, optimizer, 1)
    snapshot.take()
    assert {t.data_ptr() for t in snapshot._copies.values()} == pointers
    assert snapshot.nbytes == held
    snapshot.discard()
    assert snapshot.nbytes == 0
    with pytest.raises(RuntimeError, match="call `take` first"):
        snapshot.restore()


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    _, optimizer = make()
    snapshot = Snapshot(optimizer)
    snapshot.take()
    path = tmp_path / "s.safetensors"
    for is_there in (False, True):
        if is_there:
            snapshot.save(path)
            path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(StateError, match="cannot be read"):
            snapshot.load(path)
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    snapshot.save(path)
    with pytest.raises(StateError, match="another model's"):
        Snapshot(other).load(path)


def test_the_distance_is_of_matrices_that_moved_and_the_size_of_those_that_were_not_zero() -> None:
    model, optimizer = make()
    matrix, bias = model[0].weight, model[0].bias
    zero, still = torch.nn.Parameter(torch.zeros(3, 3)), torch.nn.Parameter(torch.ones(7, 2))
    optimizer.add_param_group({"params": [zero, still]})
    snapshot = Snapshot(optimizer, model.buffers())
    snapshot.take()
    size = matrix.square().sum().item()
    with torch.no_grad():
        matrix[0, 0] += 3.0
        matrix[1, 1] -= 4.0
        bias += 100.0
        zero += 100.0
    moved = [25.0 + 9 * 100.0**2, matrix.numel() + 9]
    assert snapshot.distance().tolist() == pytest.approx([*moved, size + 14, matrix.numel() + 14])
    with torch.no_grad():
        zero[0, 0] = torch.nan
    assert snapshot.distance().isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("read_back", [False, True])
def test_scalars_of_groups_come_back_and_what_the_scheduler_sets_stays(read_back, tmp_path):
    """Schedule-free optimizers keep a part of their state in `param_groups`."""
    model, optimizer = make(AdamWScheduleFree)
    optimizer.train()
    train(model, optimizer, 2)
    snapshot = Snapshot(optimizer)
    snapshot.take()
    names = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode", "betas")
    then = {name: optimizer.param_groups[0][name] for name in names}
    assert then["k"] == 2
    train(model, optimizer, 3)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.param_groups[0]["new"] = 1
    assert optimizer.param_groups[0]["k"] == 5
    if read_back:
        snapshot = through_a_file(snapshot, optimizer, (), tmp_path)
    snapshot.restore()
    assert {name: optimizer.param_groups[0][name] for name in names} == then
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert "new" not in optimizer.param_groups[0]


class Collecting(torch.optim.SGD):
    """Keeps state that is no tensor, and nested: a list of tensors, and counts by name."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("past", []).append(parameter.detach().mean())
                counts = state.setdefault("counts", {"steps": 0, "pair": (0, 7)})
                counts["steps"] += 1
                counts["pair"] = (counts["steps"], 7)


def test_state_that_is_no_tensor_is_a_copy_and_goes_through_a_file(tmp_path: Path) -> None:
    model, optimizer = make(Collecting)
    snapshot = Snapshot(optimizer, model.buffers())
    train(model, optimizer, 2)
    snapshot.take()
    then = everything(model, optimizer)
    train(model, optimizer, 2)
    snapshot.restore()
    assert_equal(everything(model, optimizer), then)
    state = optimizer.state[model[0].weight]
    assert len(state["past"]) == 2
    assert state["counts"] == {"steps": 2, "pair": (2, 7)}
    train(model, optimizer, 1)
    assert len(state["past"]) == 3
    through_a_file(snapshot, optimizer, model.buffers(), tmp_path).restore()
    assert_equal(everything(model, optimizer), then)


def test_state_that_json_has_no_word_for_is_kept_but_not_saved(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    optimizer.state[model[0].weight]["seen"] = {1, 2}
    snapshot = Snapshot(optimizer)
    snapshot.take()
    optimizer.state[model[0].weight]["seen"].add(3)
    snapshot.restore()
    assert optimizer.state[model[0].weight]["seen"] == {1, 2}
    with pytest.raises(TypeError, match="set"):
        snapshot.save(tmp_path / "s.safetensors")
