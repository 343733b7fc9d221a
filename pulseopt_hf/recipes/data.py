"""The rows of a run: from the hub, from local files, or from what is embedded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from pulseopt_hf import embedded
from pulseopt_hf.errors import UsageError, nearest, one_line
from pulseopt_hf.recipes.fields import RecipeArguments, RecipeTrainingArguments

_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without `keep_default_na=False` the text "null" would be no text.
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"keep_linebreaks": True}),
}
_EMBEDDED: dict[str, Callable[[], DatasetDict]] = {
    "embedded:sentences": embedded.language_modelling,
    "embedded:word_order": embedded.word_order,
    "embedded:digits": embedded.digits,
}


@dataclass(eq=False)
class Part:
    """The rows of one split, and what an error message calls them."""

    rows: Dataset
    origin: str

    def need(self, columns: list[str]) -> None:
        """Check that columns are there.

        Raises:
            UsageError: some are not; it has one line.
        """
        there = self.rows.column_names
        missing = [column for column in columns if column not in there]
        if not missing:
            return
        what = "columns" if missing[1:] else "column"
        close = nearest(missing[0], there) if len(missing) == 1 else ""
        raise UsageError(
            f"{self.origin}: has no {what} {_list(missing)}{close or ';'} its columns are "
            f"{_list(there)}. Rename them, or name yours by `text_column` and its like."
        )


@dataclass(eq=False)
class Parts:
    """All rows of a run; a part that the run does not use is empty."""

    train: Part | None
    validation: list[Part]
    test: list[Part]

    @property
    def all(self) -> list[Part]:
        """Every part, training first."""
        return [*([self.train] if self.train else []), *self.validation, *self.test]


def check(recipe: RecipeArguments, training: RecipeTrainingArguments) -> None:
    """Check that the data is named and that local files are there, without reading any.

    Raises:
        UsageError: something is wrong; it has a line for each.
    """
    name = recipe.dataset_name
    if _is_local(recipe):
        problems = list(_problems_of_files(recipe, training))
    elif name is None:
        problems = [
            "There is no data: set `train_file` and `validation_file` to local files, or "
            "`dataset_name` to a data set of the hub."
        ]
    elif name.startswith("embedded:") and name not in _EMBEDDED:
        problems = [
            f"`dataset_name`: there is no `{name}`{nearest(name, _EMBEDDED) or '.'} "
            f"There are {', '.join(_EMBEDDED)}."
        ]
    else:
        return
    if problems:
        raise UsageError(*problems)


def load(recipe: RecipeArguments, training: RecipeTrainingArguments) -> Parts:
    """Load the rows that the run uses, cut to the recipe's limits.

    Local files stand in place of the data set as a whole: a run never mixes the two.

    Raises:
        UsageError: a file, data set or split is missing, unreadable or empty.
    """
    check(recipe, training)
    read = _from_files if _is_local(recipe) else _from_data_set
    wanted = (bool(training.do_train), bool(training.do_eval), bool(training.do_predict))
    parts = read(recipe, *wanted, seed=training.seed)
    limits = ("max_train_samples", "max_eval_samples", "max_predict_samples")
    groups = ([parts.train] if parts.train else [], parts.validation, parts.test)
    for group, limit in zip(groups, limits, strict=True):
        most = getattr(recipe, limit)
        for part in group:
            if not len(part.rows):
                raise UsageError(f"{part.origin}: has no rows.")
            if most is not None and most < len(part.rows):
                part.rows = part.rows.select(range(most))
    return parts


def _is_local(recipe: RecipeArguments) -> bool:
    return bool(recipe.train_file or recipe.validation_file or recipe.test_file)


def _problems_of_files(recipe: RecipeArguments, training: RecipeTrainingArguments) -> Iterator[str]:
    if training.do_train and not recipe.train_file:
        yield "`train_file` is not set, and other local files are; set it too."
    held_out = training.do_train and recipe.validation_percentage
    if training.do_eval and not recipe.validation_file and not held_out:
        yield (
            "`validation_file` is not set, and `train_file` is; set it too, or take a share of the "
            "training data with `--validation_percentage 5`, or leave evaluation out with "
            "`--no_do_eval`."
        )
    if training.do_predict and not recipe.test_file:
        yield "`test_file` is not set, and `do_predict` is; set it too."
    wanted = (bool(training.do_train), bool(training.do_eval), bool(training.do_predict))
    for key, paths in _files(recipe, *wanted).items():
        for path in paths:
            if not path.exists():
                yield f"`{key}` {path}: there is no such file."
            elif not path.is_dir() and path.suffix.lower() not in _FORMATS:
                known = ", ".join(suffix[1:] for suffix in _FORMATS)
                yield (
                    f"`{key}` {path}: must be one of {known}, or a folder that `save_to_disk` "
                    "wrote."
                )
            elif path.stat().st_size == 0:
                yield f"`{key}` {path}: is empty."


def _files(
    recipe: RecipeArguments, train: bool, evaluate: bool, predict: bool
) -> dict[str, list[Path]]:
    """Return the local files that the run uses."""
    return {
        "train_file": [Path(recipe.train_file)] if train and recipe.train_file else [],
        "validation_file": [Path(name) for name in recipe.validation_file if evaluate],
        "test_file": [Path(name) for name in recipe.test_file if predict],
    }


def _from_files(
    recipe: RecipeArguments, train: bool, evaluate: bool, predict: bool, seed: int
) -> Parts:
    problems = []
    found: dict[str, list[Part]] = {}
    for key, paths in _files(recipe, train, evaluate, predict).items():
        found[key] = []
        for path in paths:
            try:
                found[key].append(Part(_read_file(path), f"`{key}` {path}"))
            except UsageError as error:
                problems += [f"`{key}` {problem}" for problem in error.problems]
    if problems:
        raise UsageError(*problems)
    parts = Parts(
        next(iter(found["train_file"]), None), found["validation_file"], found["test_file"]
    )
    if evaluate and not parts.validation and parts.train:
        _hold_out(parts, recipe, seed)
    return parts


def _read_file(path: Path) -> Dataset:
    if path.is_dir():
        try:
            rows = load_from_disk(str(path))
        except Exception as error:
            raise UsageError(
                f"{path}: is not a folder that `save_to_disk` wrote: {one_line(error)}"
            ) from error
        if isinstance(rows, DatasetDict):
            raise UsageError(
                f"{path}: holds several splits ({', '.join(rows)}); name the folder of one of them."
            )
        return rows
    builder, options = _FORMATS[path.suffix.lower()]
    try:
        return load_dataset(builder, data_files={"rows": str(path)}, split="rows", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if "corresponds to no data" in str(error):  # as datasets puts it
            raise UsageError(f"{path}: has no rows.") from error
        raise UsageError(f"{path}: cannot be read as {builder}: {one_line(cause)}") from error


def _from_data_set(
    recipe: RecipeArguments, train: bool, evaluate: bool, predict: bool, seed: int
) -> Parts:
    splits = _load_splits(recipe)
    config = f" ({recipe.dataset_config_name})" if recipe.dataset_config_name else ""
    title = f"{recipe.dataset_name}{config}"

    def part(split: str, key: str) -> Part:
        if split not in splits:
            raise UsageError(
                f"`{key}`: {title} has no split `{split}`{nearest(split, splits) or '.'} "
                f"Its splits are {', '.join(splits)}."
            )
        return Part(splits[split], f"{title}, split {split}")

    parts = Parts(part(recipe.train_split, "train_split") if train else None, [], [])
    held_out = recipe.validation_percentage and not set(recipe.validation_split) & set(splits)
    if evaluate and held_out and parts.train:
        _hold_out(parts, recipe, seed)
    elif evaluate:
        parts.validation = [part(split, "validation_split") for split in recipe.validation_split]
    if predict:
        parts.test = [part(split, "test_split") for split in recipe.test_split]
    return parts


def _load_splits(recipe: RecipeArguments) -> DatasetDict:
    name = recipe.dataset_name
    assert name is not None
    if name.startswith("embedded:"):
        try:
            return _EMBEDDED[name]()
        except ImportError as error:
            raise UsageError(f"`{name}` needs `pip install 'pulseopt-hf[recipes]'`.") from error
    try:
        return load_dataset(name, recipe.dataset_config_name, revision=recipe.dataset_revision)
    except Exception as error:  # the hub's client has a dozen kinds
        offline = " and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
        config = f" ({recipe.dataset_config_name})" if recipe.dataset_config_name else ""
        raise UsageError(
            f"`dataset_name`: {name}{config} could not be loaded from the hub or its local cache"
            f"{offline}: {one_line(error)} Local files do as well: set `train_file` and "
            "`validation_file`."
        ) from error


def _hold_out(parts: Parts, recipe: RecipeArguments, seed: int) -> None:
    assert parts.train is not None
    assert recipe.validation_percentage is not None
    rows, origin = parts.train.rows, parts.train.origin
    if len(rows) < 2:
        raise UsageError(f"{origin}: has {len(rows)} rows; a share for validation needs 2.")
    size = min(max(1, round(len(rows) * recipe.validation_percentage / 100)), len(rows) - 1)
    split = rows.train_test_split(test_size=size, seed=seed)
    parts.train = Part(split["train"], origin)
    parts.validation = [Part(split["test"], origin)]


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
