"""A plain Trainer with AEES attached. Runs offline in half a minute."""

from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from pulseopt_hf import PulseOptCallback, PulseOptConfig, embedded

tokenizer = embedded.train_tokenizer()
data = embedded.language_modelling().map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=64),
    batched=True,
    remove_columns=["text"],
)
config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=96, n_layer=2, n_head=4)

trainer = Trainer(
    GPT2LMHeadModel(config),
    TrainingArguments("runs/example-callback", max_steps=120, learning_rate=1e-3, report_to="none"),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    train_dataset=data["train"],
    eval_dataset=data["validation"],
)
PulseOptCallback(PulseOptConfig(lr_candidates=[0.5, 1.0, 2.0], episode_length=10)).attach(trainer)
trainer.train()
print(trainer.evaluate())
print(trainer.aees.get_logs()["selected_lr_values"])
