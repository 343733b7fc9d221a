"""The rows of a run: from the hub, from local files, or embedded in this package.

What is missing or cannot be read is named in a `UsageError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from pulseopt_hf import embedded
from pulseopt_hf.errors import UsageError, call_all, nearest, needs_extra, one_line, usage_error
from pulseopt_hf.recipes.keys import RecipeArguments, RecipeTrainingArguments

_Value = TypeVar("_Value")
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
# What rows are for: the key that asks for them, and the key of their highest number.
ROLES = {
    "train": ("do_train", "max_train_samples"),
    "validation": ("do_eval", "max_eval_samples"),
    "test": ("do_predict", "max_predict_samples"),
}


@dataclass(eq=False)
class Split:
    """The rows of one split."""

    rows: Dataset
    role: str  # `train`, `validation` or `test`
    origin: str  # what an error message calls it

    def values(self, column: str, convert: Callable[[Any], _Value], allowed: str) -> list[_Value]:
        """Return a column, each value converted.

        `convert` raises a `LookupError`, `TypeError` or `ValueError` for one that is not `allowed`.
        """
        result = []
        for row, value in enumerate(self.rows[column], 1):
            try:
                result.append(convert(value))
            except (LookupError, TypeError, ValueError):
                raise UsageError(
                    f"{self.origin}: row {row}: `{column}` must be {allowed}, got {value!r}."
                ) from None
        return result

    def texts(self, column: str) -> list[str]:
        """Return a column of texts, as `values` does."""

        def text(value: Any) -> str:
            if value is None or isinstance(value, dict | list):
                raise ValueError
            return str(value)

        return self.values(column, text, "a text")


def need(splits: Sequence[Split], *columns: str, target: str | None = None) -> None:
    """Refuse splits that lack one of these columns, or, outside of tests, the target."""
    call_all(
        partial(_need, split, [*columns, *([target] if target and split.role != "test" else [])])
        for split in splits
    )


def _need(split: Split, columns: list[str]) -> None:
    there = split.rows.column_names
    missing = [column for column in columns if column not in there]
    if missing:
        what = "columns" if missing[1:] else "column"
        close = "" if missing[1:] else nearest(missing[0], there)
        raise UsageError(
            f"{split.origin}: has no {what} {listed(missing)}{close or ';'} its columns are "
            f"{listed(there)}. Rename them, or name yours by `text_column` and the like."
        )


def listed(names: Sequence[str]) -> str:
    """Return names as an error message lists them."""
    return ", ".join(f"`{name}`" for name in names)


def check(recipe: RecipeArguments, training: RecipeTrainingArguments) -> None:
    """Check that the data is named and that local files exist, without reading any."""
    name = recipe.dataset_name
    if _is_local(recipe):
        if problems := list(_problems_of_files(recipe, training)):
            raise UsageError(*problems)
    elif name is None:
        raise UsageError(
            "There is no data: set `train_file` and `validation_file` to local files, or "
            "`dataset_name` to a data set on the hub."
        )
    elif name.startswith("embedded:") and name not in _EMBEDDED:
        raise UsageError(
            f"`dataset_name`: there is no `{name}`{nearest(name, _EMBEDDED) or '.'} "
            f"There are {', '.join(_EMBEDDED)}."
        )


def load(recipe: RecipeArguments, training: RecipeTrainingArguments) -> list[Split]:
    """Load the training, validation and test rows that the run uses, cut to the recipe's limits.

    Local files replace the data set as a whole: a run never mixes the two.
    """
    splits = (_from_files if _is_local(recipe) else _from_data_set)(recipe, training)
    share = recipe.validation_percentage
    if share and training.do_train and training.do_eval:
        if all(split.role != "validation" for split in splits):
            splits[:1] = _held_out(splits[0], share, training.seed)
    for split in splits:
        if not len(split.rows):
            raise UsageError(f"{split.origin}: has no rows.")
        most = getattr(recipe, ROLES[split.role][1])
        if most is not None and most < len(split.rows):
            split.rows = split.rows.select(range(most))
    return splits


def _is_local(recipe: RecipeArguments) -> bool:
    return bool(recipe.train_file or recipe.validation_file or recipe.test_file)


def _names(
    recipe: RecipeArguments, training: RecipeTrainingArguments, kind: str
) -> dict[str, list[str]]:
    """Return what the recipe names for each role that the run uses, of the kind file or split."""
    result = {}
    for role, (flag, _) in ROLES.items():
        named = getattr(recipe, f"{role}_{kind}") or []
        if getattr(training, flag):
            result[role] = [named] if isinstance(named, str) else named
    return result


def _problems_of_files(recipe: RecipeArguments, training: RecipeTrainingArguments) -> Iterator[str]:
    for role, names in _names(recipe, training, "file").items():
        key = f"`{role}_file`"
        is_validation = role == "validation"
        if not names and not (is_validation and training.do_train and recipe.validation_percentage):
            or_share = ", set `validation_percentage`" if is_validation else ""
            yield (
                f"{key} is not set, but other local files are; set it{or_share}, or turn off "
                f"`{ROLES[role][0]}`."
            )
        for path in map(Path, names):
            if not os.path.exists(path):  # which a name that is too long does not break
                yield f"{key} {path}: there is no such file."
            elif not path.is_dir() and path.suffix.lower() not in _FORMATS:
                known = ", ".join(suffix[1:] for suffix in _FORMATS)
                yield f"{key} {path}: must be one of {known}, or a `save_to_disk` folder."
            elif path.stat().st_size == 0:
                yield f"{key} {path}: is empty."


def _from_files(recipe: RecipeArguments, training: RecipeTrainingArguments) -> list[Split]:
    named = _names(recipe, training, "file")
    return call_all(partial(_read_file, Path(n), role) for role in named for n in named[role])


def _read_file(path: Path, role: str) -> Split:
    origin = f"`{role}_file` {path}"
    if path.is_dir():
        with usage_error(f"{origin}: is not a folder that `save_to_disk` wrote"):
            rows = load_from_disk(str(path))
        if isinstance(rows, DatasetDict):
            raise UsageError(
                f"{origin}: holds several splits ({', '.join(rows)}); name the folder of one."
            )
        return Split(rows, role, origin)
    builder, options = _FORMATS[path.suffix.lower()]
    try:
        rows = load_dataset(builder, data_files={"rows": str(path)}, split="rows", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if "corresponds to no data" in str(error):  # as datasets puts it
            raise UsageError(f"{origin}: has no rows.") from error
        cause = one_line(error.__cause__ or error)
        raise UsageError(f"{origin}: cannot be read as {builder}: {cause}") from error
    return Split(rows, role, origin)


def _from_data_set(recipe: RecipeArguments, training: RecipeTrainingArguments) -> list[Split]:
    name, config = str(recipe.dataset_name), recipe.dataset_config_name
    title = f"{name} ({config})" if config else name
    if name.startswith("embedded:"):
        with needs_extra(f"`{name}`", "recipes"):
            there = _EMBEDDED[name]()
    else:
        offline = " and HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else ""
        with usage_error(
            f"`dataset_name`: {title} could not be loaded from the hub or its local cache{offline}",
            hint=" Or use local files: set `train_file` and `validation_file`.",
        ):
            there = load_dataset(name, config, revision=recipe.dataset_revision)
    splits = []
    for role, names in _names(recipe, training, "split").items():
        if role == "validation" and training.do_train and recipe.validation_percentage:
            if not set(names) & set(there):
                continue
        for split in names:
            if split not in there:
                raise UsageError(
                    f"`{role}_split`: {title} has no split `{split}`"
                    f"{nearest(split, there) or '.'} Its splits are {', '.join(there)}."
                )
            splits.append(Split(there[split], role, f"{title}, split {split}"))
    return splits


def _held_out(split: Split, share: float, seed: int) -> list[Split]:
    """Return the training split without a share for validation, and that share."""
    rows = len(split.rows)
    if rows < 2:
        raise UsageError(f"{split.origin}: has {rows} rows; a share for validation needs 2.")
    size = min(max(1, round(rows * share / 100)), rows - 1)
    parts = split.rows.train_test_split(test_size=size, seed=seed)
    return [
        Split(parts["train"], "train", split.origin),
        Split(parts["test"], "validation", split.origin),
    ]
