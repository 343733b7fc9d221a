"""An image to a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoImageProcessor, default_data_collator

from pulseopt_hf.errors import usage_error
from pulseopt_hf.recipes import metrics, models
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.labels import Labels
from pulseopt_hf.recipes.splits import Split, need
from pulseopt_hf.recipes.tasks import Task

_SHIFT = 1 / 8  # of the image's side, that a training image moves at most


def prepare(
    recipe: RecipeArguments, training: RecipeTrainingArguments, splits: list[Split]
) -> Task:
    """Prepare an image classification."""
    column = recipe.image_column
    need(splits, column, target=recipe.label_column)
    labels = Labels(recipe, splits)
    config = labels.load_config()
    processor: Any = None
    if recipe.model_type is None:
        folder = models.model_folder(recipe)
        with usage_error(f"`model_name_or_path`: {folder} has no image processor"):
            processor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                folder, revision=recipe.model_revision
            )
    with usage_error("`image_size` must be set for this model"):
        convert = _Converter(recipe, processor, getattr(config, "num_channels", 3))

    def examples(split: Split) -> Dataset:
        rows = split.rows.select_columns([column])
        if split in labels.of:
            rows = rows.add_column("labels", labels.of[split])
        augment = recipe.image_augmentation and split.role == "train"

        def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
            images = batch.pop(column)
            return {"pixel_values": [convert(image, augment) for image in images], **batch}

        with usage_error(f"{split.origin}: `{column}` holds no images"):
            convert(rows[0][column], augment=False)
        return rows.with_transform(transform)

    # The columns are made by the transform, where Trainer does not see them.
    training.remove_unused_columns = False
    return Task(
        config=config,
        processing_class=processor,
        examples=examples,
        settings={
            "data_collator": default_data_collator,
            "compute_metrics": metrics.computing(recipe.metrics, labels.predicted),
        },
        to_lines=labels.to_lines,
    )


class _Converter:
    """Scales an image to the recipe's size, or the processor's, and normalises its values."""

    def __init__(self, recipe: RecipeArguments, processor: Any, channels: int) -> None:
        mean, deviation = [0.5], [0.5]
        sizes = {}
        if processor is not None:
            mean, deviation, sizes = processor.image_mean, processor.image_std, processor.size
        self._size = int(recipe.image_size or sizes.get("shortest_edge") or sizes["height"])
        self._mode = "L" if channels == 1 else "RGB"
        self._mean = torch.tensor(mean).view(-1, 1, 1)
        self._deviation = torch.tensor(deviation).view(-1, 1, 1)

    def __call__(self, image: Any, augment: bool) -> torch.Tensor:
        """Return the image, shape (channels, size, size), float32."""
        from PIL import Image

        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image, dtype=np.uint8))
        image = image.convert(self._mode)
        if image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
        values = values.unsqueeze(0) if values.ndim == 2 else values.permute(2, 0, 1)
        values = (values - self._mean) / self._deviation
        return _moved(values) if augment else values


def _moved(values: torch.Tensor) -> torch.Tensor:
    """Flip an image with probability one half, and shift it; what moves in is the mean."""
    if torch.rand(()) < 0.5:
        values = values.flip(-1)
    size = values.shape[-1]
    most = max(1, int(size * _SHIFT))
    padded = torch.nn.functional.pad(values, (most,) * 4)
    top, left = (int(torch.randint(0, 2 * most + 1, ())) for _ in range(2))
    return padded[:, top : top + size, left : left + size]
