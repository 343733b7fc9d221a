"""Compare static LRs and the default on small models that are no Transformers.

    python -m benchmarks.small_models [--tasks diabetes,...] [--seeds 0,1,2] [--steps 600] [--write]

The data ships with scikit-learn, so nothing is downloaded. The models are plain torch modules
under `Trainer` and `PulseOptTrainer`, from every base LR of a grid of half decades, at equal cost.
Nothing in the package was set by looking at these tasks. `--write` puts the result into
`benchmarks/results/small-models.json`.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sklearn import datasets as sklearn_data
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks import common, compare_tasks
from pulseopt_hf import PulseOptTrainer
from pulseopt_hf.compare.cells import steps_after_calibration
from pulseopt_hf.compare.methods import METHODS
from pulseopt_hf.compare.scores import score

RESULT = common.RESULTS / "small-models.json"
LEARNING_RATES = "3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1"
TRAINERS: dict[str, Callable[..., Trainer]] = {"static": Trainer, "default": PulseOptTrainer}
BATCH = 16
WARMUP = 30


class Model(nn.Module):
    """A body, with the loss that the labels ask for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss, shape (), and the outputs, shape (rows, classes or 1)."""
        outputs = self.body(inputs)
        if labels.is_floating_point():
            return {"loss": functional.mse_loss(outputs[:, 0], labels), "outputs": outputs}
        return {"loss": functional.cross_entropy(outputs, labels), "outputs": outputs}


def mlp(inputs: int, outputs: int) -> nn.Module:
    """Return a perceptron of two hidden layers."""
    hidden = (nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def convolutions(_: int, outputs: int) -> nn.Module:
    """Return a network of two convolutions over images of 8 x 8 pixels."""
    first = (nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    second = (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *first, *second, nn.Linear(512, outputs))


@dataclass(frozen=True)
class Task:
    """What to learn, and the network to learn it with: from inputs and outputs to a module."""

    load: Callable[..., tuple[Any, Any]]
    network: Callable[[int, int], nn.Module]


TASKS = {
    "digits_mlp": Task(sklearn_data.load_digits, mlp),
    "digits_conv": Task(sklearn_data.load_digits, convolutions),
    "breast_cancer": Task(sklearn_data.load_breast_cancer, mlp),
    "diabetes": Task(sklearn_data.load_diabetes, mlp),
}


def load(task: Task) -> tuple[list[Any], list[Any], Callable[[], Model]]:
    """Return training and validation rows, a fifth of all, and what makes a new model."""
    inputs, labels = (torch.tensor(array) for array in task.load(return_X_y=True))
    inputs = ((inputs - inputs.mean(0)) / inputs.std(0).clamp(min=1e-6)).float()
    classes = 1 if labels.is_floating_point() else int(labels.max()) + 1
    if classes == 1:
        labels = (labels / labels.std()).float()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    rows = [{"inputs": inputs[index], "labels": labels[index]} for index in order]
    validation, train = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    return train, validation, lambda: Model(task.network(inputs.shape[1], classes))


def run(name: str, method: str, learning_rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Train once; return what `compare.scores.score` asks for."""
    train, validation, new_model = load(TASKS[name])
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            learning_rate=learning_rate,
            max_steps=steps,
            warmup_steps=WARMUP,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            seed=seed,
            label_names=["labels"],
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = TRAINERS[method](
            model=new_model(), args=arguments, train_dataset=train, eval_dataset=validation
        )
        if METHODS[method].calibrates:
            arguments.max_steps = steps_after_calibration(trainer, steps, BATCH)
        before = trainer.evaluate()["eval_loss"]
        begin = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begin
        after = trainer.evaluate()["eval_loss"]
    return {
        "cell": {"method": method, "learning_rate": learning_rate, "seed": seed, "steps": steps},
        "loss_before": before,
        "loss_after": after if math.isfinite(after) else None,
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "paid_steps": steps - arguments.max_steps,
        "peak_mib": 0.0,
    }


def main() -> None:
    parser = common.parser(str(__doc__), RESULT)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--learning_rates", default=LEARNING_RATES)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {}
    for name in options.tasks.split(","):
        cells = [
            run(name, method, float(rate), int(seed), options.steps)
            for method in TRAINERS
            for rate in options.learning_rates.split(",")
            for seed in options.seeds.split(",")
        ]
        tasks[name] = compare_tasks.summary(cells, asdict(score(cells)))
    result = {"versions": compare_tasks.packages(), "tasks": tasks}
    common.finish(result, compare_tasks.to_markdown, options.write)


if __name__ == "__main__":
    main()
