"""One script for every launcher. Runs offline; every Trainer argument and knob is a flag.

python examples/launch_anywhere.py
torchrun --nproc_per_node 2 examples/launch_anywhere.py --use_cpu true
accelerate launch --config_file recipes/launch/fsdp2.yaml examples/launch_anywhere.py

See docs/launching.md for bf16, DeepSpeed and several machines.
"""

import json

from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    set_seed,
)

from pulseopt_hf import PulseOptTrainer, PulseOptTrainingArguments, embedded


def main() -> None:
    parser = HfArgumentParser(PulseOptTrainingArguments)
    parser.set_defaults(
        output_dir="runs/launch-anywhere",
        max_steps=60,
        episode_length=6,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
    )
    (arguments,) = parser.parse_args_into_dataclasses()
    set_seed(arguments.seed)
    tokenizer = embedded.train_tokenizer()
    data = embedded.language_modelling().map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=32),
        batched=True,
        remove_columns=["text"],
    )
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=64, n_layer=2, n_head=4)
    trainer = PulseOptTrainer(
        GPT2LMHeadModel(config),
        arguments,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data["train"],
        processing_class=tokenizer,
    )
    trainer.train()
    summary = {
        "rank": arguments.process_index,
        "world_size": arguments.world_size,
        "engine": type(trainer.model_wrapped).__name__,
        "precision": trainer.accelerator.mixed_precision,
        "arms": trainer.aees.get_logs()["selected_lr_values"],
        "loss": trainer.aees.get_logs()["episode_end_losses"][-1],
    }
    # In one call, so that the lines of several ranks do not mix.
    print(json.dumps(summary) + "\n", end="", flush=True)
    # Leaves the process group. Without this, a rank can abort when the interpreter exits.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
