"""A model is new as long as nothing has trained it, whatever drew its weights."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from pulseopt_hf.embedded import minilm_folder
from pulseopt_hf.optim.agreement import Agreement
from pulseopt_hf.optim.newness import Newness, newness_of

BERT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 128,
}
MODERN: dict[str, Any] = {"vocab_size": 500, "pad_token_id": 0, **BERT}
T5: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "vocab_size": 500}
NEW: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "BERT": (3, lambda: BertForSequenceClassification(BertConfig(**BERT))),
    "ModernBERT": (3, lambda: ModernBertForMaskedLM(ModernBertConfig(**MODERN))),
    "ViT": (3, lambda: ViTForImageClassification(ViTConfig(**BERT))),
    "LLaMA": (3, lambda: LlamaForCausalLM(LlamaConfig(vocab_size=500, **BERT))),
    "T5": (4, lambda: T5ForConditionalGeneration(T5Config(num_layers=2, **T5))),
    "convolutions": (0, lambda: nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))),
}


def newness(model: nn.Module) -> Newness:
    return newness_of(model, Agreement(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NEW)
def test_new_models_are_new(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count, make = NEW[name]
    assert newness(make().to(dtype)) == Newness(layers=count)


def test_a_pretrained_model_is_not_new_with_a_new_head_or_an_adapter() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_hidden_layers=2)
    new_head = Newness(None, has_new_head=True, body=model.bert.encoder.layer[1])
    assert newness(model) == new_head
    settings = peft.LoraConfig(r=32, target_modules=["query", "key", "value"])
    assert newness(peft.get_peft_model(model, settings)) == new_head


def test_a_head_of_two_classes_alone_is_new_over_a_trained_pooler() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_hidden_layers=2)
    trained = model.bert.encoder.layer[0].attention.self.query.weight
    model.bert.pooler.dense.weight = nn.Parameter(trained.detach().clone())
    # As BERT's table of token types, it has two rows.
    assert model.classifier.weight.shape == model.bert.embeddings.token_type_embeddings.weight.shape
    assert newness(model).has_new_head


def test_a_pretrained_model_without_a_head_is_trained_all_over() -> None:
    # Its pooler was never trained, and is left out.
    model = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False)
    assert newness(model) == Newness()


@pytest.mark.parametrize("init", ["normal", "uniform"])
def test_a_model_is_new_until_it_was_trained(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    if init == "normal":
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
    assert newness(model) == Newness(layers=0)
    rows = torch.randn(512, 128) * torch.linspace(0.0, 2.0, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        loss = nn.functional.cross_entropy(model(rows), rows[:, -10:].argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert newness(model).layers is None


@pytest.mark.parametrize("name", ["T5", "LLaMA"])
def test_gains_tell_a_trained_model_whose_weights_look_new(name: str) -> None:
    torch.manual_seed(0)
    model = NEW[name][1]()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    before = [matrix.detach().clone() for matrix in matrices]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(10):
        tokens = torch.randint(500, (8, 12))
        decoder = {"decoder_input_ids": tokens} if name == "T5" else {}
        model(input_ids=tokens, labels=tokens, **decoder).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [(now - then).norm() / then.norm() for now, then in zip(matrices, before, strict=True)]
    assert 0.0 < max(moved) < 0.5
    assert newness(model) == Newness()  # and its head is as old as its table
