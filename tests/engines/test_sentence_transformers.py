"""sentence-transformers' Trainer with in-batch negatives, which couple the rows of a batch."""

from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf import embedded, with_pulseopt
from pulseopt_hf.aees.calibration import TRUSTED
from tests.conftest import make_arguments

st = pytest.importorskip("sentence_transformers", reason="install the extra `demo` to run these")

SET_LR, STEPS = 2e-6, 80


def pairs() -> Any:
    from datasets import Dataset

    texts = [text for text in embedded.sentences() if len(text) > 60]
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    anchors, positives = zip(*halves, strict=True)
    return Dataset.from_dict({"anchor": anchors, "positive": positives}).shuffle(seed=0)


def make(out: Path, *, ours: bool) -> Any:
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = st.SentenceTransformer(str(embedded.minilm_folder()), device="cpu")
    cls = st.SentenceTransformerTrainer
    data = pairs()
    return (with_pulseopt(cls) if ours else cls)(
        model,
        args=make_arguments(
            *(out, st.SentenceTransformerTrainingArguments),
            **{"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": SET_LR},
        ),
        train_dataset=data.select(range(640)),
        eval_dataset=data.select(range(640, 768)),
        loss=MultipleNegativesRankingLoss(model),
    )


@pytest.mark.slow
def test_a_pretrained_encoder_ends_no_higher_than_at_the_lr_that_was_set(tmp_path: Path) -> None:
    stock, ours = (make(tmp_path / f"ours={ours}", ours=ours) for ours in (False, True))
    stock.train()
    ours.train()
    search = ours.aees.calibrator.search
    assert len({trial.step for trial in search.trials}) == TRUSTED + 1
    assert search.learning_rate is not None
    assert ours.aees.calibrator.outcome.reason is None
    assert search.learning_rate < 100 * SET_LR  # weights alone would allow 10,000 times that
    assert ours.evaluate()["eval_loss"] <= stock.evaluate()["eval_loss"]
