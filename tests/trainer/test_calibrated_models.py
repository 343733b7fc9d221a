"""Models of every kind are calibrated, or left alone with a word why."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

from pulseopt_hf import AEES, PulseOptCallback, PulseOptConfig, PulseOptTrainer
from pulseopt_hf.aees.calibration import TRUSTED
from tests.conftest import NAMED, Make, logged, take_step, without_dropout

SET_LR = 1e-6
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def ids(rows: int = 200, length: int = 8) -> Tensor:
    return torch.randint(2, 30, (rows, length), generator=torch.Generator().manual_seed(0))


def bert(**kwargs: Any) -> BertConfig:
    return BertConfig(vocab_size=32, max_position_embeddings=16, **SIZE, **kwargs)


def rows(**columns: Tensor) -> list[dict[str, Tensor]]:
    length = len(next(iter(columns.values())))
    return [{name: column[i] for name, column in columns.items()} for i in range(length)]


def masked() -> list[dict[str, Tensor]]:
    tokens = ids()
    labels = torch.where(tokens % 4 == 0, tokens, -100)
    return rows(input_ids=torch.where(tokens % 4 == 0, 1, tokens), labels=labels)


class Bare(nn.Sequential):
    """Returns a tensor, and leaves the loss to the Trainer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


class BareTrainer(PulseOptTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return F.cross_entropy(model(inputs["x"]), inputs["labels"])


class Encoder(PulseOptTrainer):
    """Pulls the embeddings of neighbouring rows apart, as an encoder is trained."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = F.normalize(model(**inputs).last_hidden_state.mean(1), dim=-1)
        return F.cross_entropy(20 * found @ found.T, torch.arange(len(found)))


def pixels() -> list[dict[str, Tensor]]:
    labels = torch.arange(200) % 3
    return rows(pixel_values=torch.randn(200, 3, 8, 8) + labels.view(-1, 1, 1, 1), labels=labels)


def points() -> list[dict[str, Tensor]]:
    return rows(x=torch.randn(200, 4), labels=torch.arange(200) % 3)


def autoencoder(tokens: float) -> nn.Module:
    """Return a model that draws which patches it masks, in eval mode, too."""
    decoder = {f"decoder_{name}": value for name, value in SIZE.items()}
    model = ViTMAEForPreTraining(ViTMAEConfig(image_size=8, patch_size=2, **SIZE, **decoder))
    nn.init.normal_(model.vit.embeddings.cls_token, std=tokens)
    nn.init.normal_(model.decoder.mask_token, std=tokens)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        lambda: rows(input_ids=ids(), labels=ids()[:, :4], decoder_input_ids=ids()[:, 1:5]),
    ),
    "vision": (
        lambda: ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZE)
        ),
        pixels,
    ),
    "classification": (
        lambda: BertForSequenceClassification(bert(num_labels=3)),
        lambda: rows(input_ids=ids(), labels=ids()[:, 0] % 3),
    ),
    "regression": (
        lambda: BertForSequenceClassification(bert(num_labels=1)),
        lambda: rows(input_ids=ids(), labels=ids()[:, 0].float() / 10),
    ),
    "multi-label": (
        lambda: BertForSequenceClassification(
            bert(num_labels=3, problem_type="multi_label_classification")
        ),
        lambda: rows(input_ids=ids(), labels=(ids()[:, :3] % 2).float()),
    ),
    "token classification": (
        lambda: BertForTokenClassification(bert(num_labels=4)),
        lambda: rows(input_ids=ids(), labels=ids() % 4),
    ),
    "masked lm": (lambda: BertForMaskedLM(bert()), masked),
    "question answering": (
        lambda: BertForQuestionAnswering(bert()),
        lambda: rows(
            input_ids=ids(), start_positions=ids()[:, 0] % 8, end_positions=ids()[:, 1] % 8
        ),
    ),
    "bare tensor": (Bare, points),
    "masked autoencoder": (
        lambda: autoencoder(1.0),
        lambda: rows(pixel_values=torch.randn(200, 3, 8, 8)),
    ),
    "encoder": (
        lambda: BertModel(bert(), add_pooling_layer=False),
        lambda: rows(input_ids=ids()),
    ),
}


SETTINGS = {"max_steps": 60, "remove_unused_columns": False}
SMOOTHING = {"label_smoothing_factor": 0.1, "label_names": ["labels"]}
TRAINERS = {"bare tensor": BareTrainer, "encoder": Encoder}


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        *((name, {}) for name in MODELS),
        # Smoothing takes the labels out of the call.
        *((name, SMOOTHING) for name in ("classification", "encoder-decoder")),
    ],
)
def test_a_model_of_any_kind_is_calibrated(name: str, extra: Any, train: Make) -> None:
    set_seed(0)
    model, data = MODELS[name]
    trainer = train(
        *(TRAINERS.get(name, PulseOptTrainer), NAMED),
        **{"model": model(), "train_dataset": data(), "per_device_train_batch_size": 8},
        **{"learning_rate": SET_LR, **SETTINGS, **extra},
    )
    search, outcome = trainer.aees.calibrator.search, trainer.aees.calibrator.outcome
    assert len({trial.step for trial in search.trials}) >= TRUSTED + 1
    assert outcome.reason is None, search.trials
    assert 50 * SET_LR < outcome.learning_rate < 0.1
    losses = logged(trainer)
    assert sum(losses[-10:]) < sum(losses[:6]) / 6 * 10


def test_tokens_of_zeros_leave_the_lr_alone(train: Make, caplog: Any) -> None:
    data = rows(pixel_values=torch.randn(200, 3, 8, 8))
    settings = {"train_dataset": data, "learning_rate": 1e-3, **SETTINGS}
    trainer = train(PulseOptTrainer, model=autoencoder(0.0), **settings)
    assert trainer.aees.calibrator.outcome.learning_rate == 1e-3
    assert "what the model computes jumps in the smallest step" in caplog.text


def test_the_unit_of_a_regression_does_not_change_the_lr(make_trainer: Make) -> None:
    """Where the head is as new, an Adam step is as long in the unit of the outputs."""
    found = []
    for unit in (1.0, 100.0):
        set_seed(0)
        model: Any = nn.Module()
        model.head = nn.Linear(8, 1)
        nn.init.normal_(model.head.weight, std=unit / 10)

        def forward(x: Tensor, labels: Tensor, model: Any = model) -> dict[str, Tensor]:
            out = model.head(x)
            return {"loss": F.mse_loss(out[:, 0], labels), "logits": out}

        model.forward = forward
        x = torch.randn(200, 8)
        data = rows(x=x, labels=unit * x[:, 0])
        settings = {"train_dataset": data, "learning_rate": 1e-3, **SETTINGS}
        trainer = make_trainer(pulse=NAMED, model=model, **settings)
        found.append(trainer.find_learning_rate().learning_rate / unit)
    assert found[0] == pytest.approx(found[1], rel=0.05)


class Mute(nn.Module):
    """Returns nothing that could be measured."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Any:
        return type("Output", (), {"__slots__": ("value",)})

    def loss(self, x: Tensor) -> Tensor:
        return (x @ self.weight).square().mean()


class Deaf(Mute):
    """Returns logits that do not depend on what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.frozen(x)}


class Bodiless(Mute):
    """Returns logits that no layer makes, so that no noise can be added to what one is given."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": torch.cat([x, -x], dim=-1)}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Mute, "the model returns no logits, embedding or loss that could be measured"),
        (Bodiless, "the model returns no logits, embedding or loss that could be measured"),
        (Deaf, "what the model computes did not answer to it in 18 trials"),
    ],
)
def test_what_cannot_be_measured_leaves_the_lr_alone(model, reason, train, caplog):
    class Aside(PulseOptTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            model(**inputs)
            return model.loss(**inputs)

    settings = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", **SETTINGS}
    data = rows(x=torch.randn(100, 4))
    trainer = train(Aside, model=model(), train_dataset=data, **settings)
    assert trainer.aees.calibrator.outcome.learning_rate == 1e-3
    assert trainer.aees.learning_rate == 1e-3
    assert reason in caplog.text


def test_events_alone_leave_a_model_alone_that_returns_no_loss(train, caplog):
    class Plain(Trainer):
        compute_loss = BareTrainer.compute_loss

    settings = {"learning_rate": 1e-3, "callbacks": [PulseOptCallback()], **SETTINGS}
    trainer = train(Plain, model=Bare(), train_dataset=points(), **settings)
    assert "the model returns no loss to watch over" in caplog.text
    assert set(trainer.lr_scheduler.base_lrs) == {1e-3}


class Replicated(nn.DataParallel):
    """Splits a batch in two and joins what comes back, as on two devices."""

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        halves = [{k: v.chunk(2)[i] for k, v in kwargs.items()} for i in range(2)]
        one, two = (self.module(**half) for half in halves)
        return {
            "loss": torch.stack([one["loss"], two["loss"]]),
            "logits": torch.cat([one["logits"], two["logits"]]),
        }


def test_replicas_count_row_by_row() -> None:
    """`nn.DataParallel` returns a loss for each replica; classes are still told apart."""
    found = []
    for wrap in (lambda model: model, Replicated):
        set_seed(0)
        inner = BertForSequenceClassification(bert(num_labels=3)).train()
        model: Any = wrap(without_dropout(inner))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        aees = AEES(optimizer, model=model, calibration="auto", seed=0)
        for step, tokens in enumerate(ids(8 * (TRUSTED + 1)).split(8)):
            batch = {"input_ids": tokens, "labels": tokens[:, 0] % 3}
            take_step(aees, step, lambda model=model, batch=batch: model(**batch)["loss"].mean())
        found.append(aees.calibrator.search.learning_rate)
    assert found[0] is not None
    # The halves of a batch are given other noise than the whole.
    assert found[0] == pytest.approx(found[1], rel=0.1)


def test_a_model_that_draws_in_eval_mode_is_measured_and_leaves_the_random_state(train):
    class Drawing(Bare):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.1 * torch.randn_like(x))

    states = []
    for pulse in (PulseOptConfig(calibration="off"), NAMED):
        set_seed(0)
        settings = {"model": Drawing(), "train_dataset": points(), "learning_rate": 1e-3}
        trainer = train(BareTrainer, pulse, **settings, **SETTINGS)
        states.append(torch.get_rng_state())
    assert trainer.aees.calibrator.outcome.reason is None
    assert torch.equal(*states)
