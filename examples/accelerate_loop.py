"""Your own Accelerate loop, with `AEES` and gradient accumulation. Runs offline."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    get_scheduler,
    set_seed,
)

from pulseopt_hf import AEES, embedded

STEPS, ACCUMULATION = 60, 2

set_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
tokenizer = embedded.train_tokenizer()
data = embedded.language_modelling()["train"].map(
    lambda batch: tokenizer(batch["text"], truncation=True, max_length=64),
    batched=True,
    remove_columns=["text"],
)
loader = DataLoader(
    data,
    batch_size=8,
    shuffle=True,
    drop_last=True,
    collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=96, n_layer=2, n_head=4)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = get_scheduler("linear", optimizer, num_warmup_steps=5, num_training_steps=STEPS)
model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

aees = AEES(
    optimizer, lr_candidates=[0.5, 1.0, 2.0], episode_length=10, lr_scheduler=scheduler, seed=0
)
accelerator.register_for_checkpointing(aees)  # so that `save_state` saves it too

step = 0
while step < STEPS:
    for batch in loader:
        with accelerator.accumulate(model):
            aees.step_start(step)
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            aees.step_end(loss)  # steps optimizer and scheduler after the last micro-batch
            optimizer.zero_grad()
        step += accelerator.sync_gradients
        if step == STEPS:
            break
aees.finalize()

logs = aees.get_logs()
for name, first, last, reward in zip(
    logs["selected_combined_names"],
    logs["episode_start_losses"],
    logs["episode_end_losses"],
    logs["episode_rewards"],
    strict=True,
):
    accelerator.print(f"{name:<10} loss {first:.3f} to {last:.3f}  reward {reward:+.4f}")
accelerator.end_training()  # leaves the process group, if there are several processes
