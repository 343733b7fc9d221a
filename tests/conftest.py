"""What all tests share: a tiny model from a config, data without downloads, quiet Trainers."""

import os
import tempfile

# Before torch and Transformers are imported: no hub, no GPU of the machine that runs the tests, and
# no run in the user's own trackio store, whose folder trackio reads when it is imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRACKIO_DIR=(_trackio := tempfile.TemporaryDirectory(prefix="trackio-")).name,
)

import copy
import inspect
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

from pulseopt_hf import AEES, PulseOptCallback, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import TRUSTED

logging.set_verbosity_error()
logging.disable_progress_bar()
# A shell's background job ignores Ctrl-C, and so would the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says something about the machine, not about the code.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
# Models this small gain nothing from threads, and ranks on the same cores lose much to them.
torch.set_num_threads(1)

VOCABULARY = 64
# A calibration that is asked for by name, and the settings of a run that is long enough for it.
NAMED = PulseOptConfig(calibration="trust_region")
SHORT: dict[str, Any] = {"max_steps": 60, "learning_rate": 1e-4}
TRIAL_STEPS = TRUSTED + 1  # one batch finds the order of magnitude
# Six arms: three of the learning rate, each with noise and without.
ARMS: dict[str, Any] = {"lr_candidates": [0.5, 1.0, 2.0], "noise_candidates": [0.0, 1e-3]}


def make_gpt2() -> GPT2LMHeadModel:
    """Return a two-layer GPT-2 with dropout, 28k parameters, the same at every call."""
    set_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def make_rows() -> list[dict[str, torch.Tensor]]:
    """Return 70 sequences of 16 tokens, from an eighth of the vocabulary, so that loss falls."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY // 8, (70, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.fixture(scope="session")
def _gpt2() -> GPT2LMHeadModel:
    return make_gpt2()


@pytest.fixture(scope="session")
def tiny_model(_gpt2: GPT2LMHeadModel) -> Callable[[], GPT2LMHeadModel]:
    """Return a maker of equal copies of `make_gpt2()`."""
    return lambda: copy.deepcopy(_gpt2)


@pytest.fixture(scope="session")
def tiny_data() -> list[dict[str, torch.Tensor]]:
    """Return `make_rows()`."""
    return make_rows()


def make_arguments(
    folder: Path, cls: type[TrainingArguments] = TrainingArguments, **overrides: Any
) -> Any:
    """Return training arguments: 24 steps of batch 4 on CPU, logged each; saved at `save_steps`."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 24,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "steps" if "save_steps" in overrides else "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(**{**settings, **overrides})


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    """Return a maker of training arguments as `make_arguments`, each in a folder of its own."""
    numbers = itertools.count(1)
    return lambda *args, **overrides: make_arguments(
        tmp_path / f"run{next(numbers)}", *args, **overrides
    )


# Makes a Trainer: (class or road, config or knobs, **what Trainer takes and training arguments).
Make = Callable[..., Any]
TRAINERS_OWN = inspect.signature(Trainer).parameters.keys()


@pytest.fixture
def make_trainer(tiny_model: Any, tiny_data: Any, arguments: Any) -> Make:
    """Return a maker of Trainers, by default of the tiny model, its data and `arguments`."""
    defaults = {"train_dataset": tiny_data, "eval_dataset": tiny_data[:8], "args": None}

    def make(cls: Any = "subclass", pulse: Any = None, **options: Any) -> Any:
        own = {name: options.pop(name) for name in TRAINERS_OWN & options.keys()}
        own = {"model": tiny_model(), **defaults, **own}
        own["args"] = own["args"] or arguments(**options)
        if pulse is not None:
            own["pulse"] = PulseOptConfig(**pulse) if isinstance(pulse, dict) else pulse
        return ROADS.get(cls, cls)(**own)

    return make


@pytest.fixture
def train(make_trainer: Make) -> Make:
    """Return a maker of Trainers as `make_trainer` is, which also trains them."""

    def make(*args: Any, resume: str | bool | None = None, **options: Any) -> Any:
        trainer = make_trainer(*args, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return make


def callback_trainer(pulse: Any = None, base: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """Return a stock Trainer with the callback attached, called as a class is."""
    trainer = base(**options)
    PulseOptCallback(pulse).attach(trainer)
    return trainer


def events_trainer(pulse: Any = None, callbacks: Any = (), **options: Any) -> Trainer:
    """Return a stock Trainer with the callback among others, which leaves it its events alone."""
    return Trainer(callbacks=[*callbacks, PulseOptCallback(pulse)], **options)


# The roads by which knobs come to a Trainer, and the one without.
ROADS: dict[Any, Callable[..., Trainer]] = {
    "stock": Trainer,
    "subclass": PulseOptTrainer,
    "attached": callback_trainer,
    "events": events_trainer,
}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 3 MB: room for two checkpoints or three."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no `mount` here: {error}")
    if done.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on(event: str, do: Callable[..., Any]) -> TrainerCallback:
    """Return a callback that calls `do(state, control=..., **kwargs)` at an event of Trainer."""

    def call(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        do(state, control=control, **kwargs)

    return type("On", (TrainerCallback,), {event: call})()


def stop_after(step: int) -> TrainerCallback:
    """Return a callback that tells Trainer to stop."""

    def stop(state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == step

    return on("on_step_end", stop)


def raise_at(step: int, error: Any = KeyboardInterrupt, event: str = "on_step_end") -> Any:
    """Return a callback that raises, as a user's own code or Ctrl-C would."""

    def fail(state: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise error

    return on(event, fail)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what this package logged."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("pulseopt_hf")]


def give_losses(aees: AEES, losses: Any, first: int = 0) -> AEES:
    """Take a step of a loop of one's own for each loss, and return what took them."""
    for step, loss in enumerate(losses, first):
        aees.step_start(step)
        aees.step_end(loss)
    return aees


def take_step(aees: AEES, step: int, compute_loss: Callable[[], Any]) -> Any:
    """Take a step of a loop of one's own, and return its loss."""
    aees.step_start(step)
    aees.optimizer.zero_grad()
    loss = compute_loss()
    loss.backward()
    aees.step_end(loss)
    return loss


def run_command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which has to be a good one."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done


def run_python(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a new interpreter as `run_command` does."""
    return run_command(sys.executable, *words, **options)


def without_dropout(model: Any) -> Any:
    """Return the model, whose dropout does nothing from now on."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def flat(model: Any) -> torch.Tensor:
    """Return a copy of all parameters, in one row."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def parameters_equal(one: Any, other: Any) -> bool:
    """Whether two models' parameters are equal bit for bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def checkpoint(trainer: Trainer, step: int) -> str:
    """Return the folder of a checkpoint of a run."""
    return str(Path(trainer.args.output_dir) / f"checkpoint-{step}")


def logged(trainer: Trainer, key: str = "loss") -> list[Any]:
    """Return the values of a key that Trainer logged with the loss of a step."""
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def history(trainer: Trainer) -> list[dict[str, float]]:
    """Return a Trainer's log history without the entries that are clock times."""
    clocks = ("runtime", "per_second")
    return [
        {key: value for key, value in entry.items() if not key.endswith(clocks)}
        for entry in trainer.state.log_history
    ]
