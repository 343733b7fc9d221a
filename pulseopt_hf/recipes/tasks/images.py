"""An image to a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from pulseopt_hf.errors import UsageError, one_line
from pulseopt_hf.recipes import labels, metrics, models
from pulseopt_hf.recipes.data import Part, Parts
from pulseopt_hf.recipes.fields import RecipeArguments, RecipeTrainingArguments
from pulseopt_hf.recipes.tasks.classification import head_settings
from pulseopt_hf.recipes.tasks.prepared import Prepared

_SHIFT = 1 / 8  # of the image's side, that a training image moves at most


def prepare(recipe: RecipeArguments, training: RecipeTrainingArguments, parts: Parts) -> Prepared:
    """See `tasks.prepare`."""
    for part in parts.all:
        wanted = [recipe.image_column, recipe.label_column]
        part.need(wanted[:1] if part in parts.test else wanted)
    names = labels.class_names(recipe, parts)
    config = models.load_config(recipe, **head_settings(recipe, names))
    processor = None
    mean, deviation, size = [0.5], [0.5], recipe.image_size
    if recipe.model_type is None:
        processor = _processor(recipe)
        mean, deviation = list(processor.image_mean), list(processor.image_std)
        size = size or _side(processor.size)
    if size is None:
        raise UsageError("`image_size` must be set for a new model.")
    channels = getattr(config, "num_channels", 3)
    convert = _Converter(size, channels, mean, deviation)

    def examples(part: Part, training_part: bool = False) -> Dataset:
        rows = part.rows.select_columns([recipe.image_column])
        if part not in parts.test:
            indices = labels.class_indices(recipe, part, names)
            rows = rows.add_column("labels", indices)
        augment = training_part and recipe.image_augmentation

        def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
            result: dict[str, Any] = {
                "pixel_values": [convert(image, augment) for image in batch[recipe.image_column]]
            }
            if "labels" in batch:
                result["labels"] = batch["labels"]
            return result

        try:
            convert(rows[0][recipe.image_column], False)
        except Exception as error:  # whatever a column that is no image makes Pillow raise
            raise UsageError(
                f"{part.origin}: `{recipe.image_column}` holds no images: {one_line(error)}"
            ) from error
        return rows.with_transform(transform)

    def compute_metrics(prediction: Any) -> dict[str, float]:
        return metrics.compute(recipe.metrics, np.argmax(prediction[0], -1), prediction[1])

    def written(logits: Any) -> list[str]:
        indices = [int(index) for index in np.argmax(logits, -1)]
        return [names[index] if recipe.predict_class_names else str(index) for index in indices]

    # The columns are made by the transform, where Trainer does not see them.
    training.remove_unused_columns = False
    return Prepared(
        train=examples(parts.train, True) if parts.train else None,
        validation=[examples(part) for part in parts.validation],
        test=[examples(part) for part in parts.test],
        model=models.load_model(recipe, config),
        processing_class=processor,
        collator=_collate,
        compute_metrics=compute_metrics if recipe.metrics else None,
        written=written,
    )


class _Converter:
    """Scales an image to a square and its values to mean 0 and deviation 1.

    Args:
        size: side of the square in pixels.
        channels: 1 or 3.
        mean: of each channel, of values in 0 to 1.
        deviation: of each channel.
    """

    def __init__(self, size: int, channels: int, mean: list[float], deviation: list[float]) -> None:
        self._size, self._mode = size, "L" if channels == 1 else "RGB"
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


def _collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([example["labels"] for example in examples])
    return batch


def _processor(recipe: RecipeArguments) -> Any:
    from transformers import AutoImageProcessor

    folder = models.model_folder(recipe)
    try:
        return AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, revision=recipe.model_revision
        )
    except Exception as error:  # as in `models.load_config`
        raise UsageError(
            f"`model_name_or_path`: {folder} has no image processor: {one_line(error)}"
        ) from error


def _side(size: Any) -> int | None:
    side = size.get("shortest_edge") or size.get("height")
    return None if side is None else int(side)
