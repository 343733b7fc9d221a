"""Find only the learning rate, for a Trainer and for your own loop. Runs offline."""

import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pulseopt_hf import embedded, find_learning_rate

set_seed(0)
tokenizer = embedded.train_tokenizer()
data = embedded.language_modelling()["train"].map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=64),
    batched=True,
    remove_columns=["text"],
)
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=96, n_layer=2, n_head=4)
)

trainer = Trainer(
    model,
    TrainingArguments("runs/find-lr", per_device_train_batch_size=8, report_to="none"),
    train_dataset=data,
    data_collator=collator,
)
suggestion = find_learning_rate(trainer)
print(f"Trainer: {suggestion.learning_rate:.2e}, limited by the {suggestion.limited_by}")

suggestion = find_learning_rate(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5),
    batches=DataLoader(data, batch_size=8, shuffle=True, collate_fn=collator),
    loss=lambda model, batch: model(**batch).loss,
)
print(f"loop: {suggestion.learning_rate:.2e}, limited by the {suggestion.limited_by}")
