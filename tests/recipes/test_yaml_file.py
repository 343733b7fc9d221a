"""What a YAML file from anywhere may hold, and what it is read as."""

import time
from pathlib import Path
from typing import Any

import pytest

from pulseopt_hf.errors import UsageError
from pulseopt_hf.recipes.yaml_file import read_yaml


def read(tmp_path: Path, content: str | bytes) -> dict[str, Any]:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 1e-4), ("2E+3", 2000.0), ("-1.5e3", -1500.0), (".5", 0.5), ("7", 7)),
        *(("true", True), ("no", "no"), ("off", "off"), ("'1e-4'", "1e-4"), ("1e", "1e")),
        *(("e5", "e5"), ("[1e-4, 2]", [1e-4, 2]), ("{a: 1e-4}", {"a": 1e-4})),
    ],
)
def test_numbers_are_numbers_and_no_is_a_word(text: str, value: object, tmp_path: Path) -> None:
    found = read(tmp_path, f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n- b\n", "a list; a recipe is a mapping"),
        ("just words", "a str; a recipe is a mapping"),
        ("", "empty; a recipe is a mapping"),
        ("a: 1\nb: 2\na: 3\n", "line 3: `a` is set twice, before on line 1"),
        ("a: {b: 1, b: 2}", "`b` is set twice"),
        ("a: [1, 2", "line 1: not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
        ("1: a", "keys must be words"),
        ("? [a, b]\n: c", "keys must be words"),
        ("a: *b", "aliases such as `*b` are not allowed"),
        ("a: &a [*a]", "aliases such as `*a` are not allowed"),
        (BOMB, "line 2: aliases such as `*a` are not allowed"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("a: \x00", "not valid YAML"),
        ("a: 2026-13-45", "not valid YAML"),
        (b"a: \xff\xfe", "not valid YAML"),
        ("# filler\n" * 1_200_000, "10,800,000 bytes long; a recipe has at most 65,536"),
    ],
)
def test_what_is_no_recipe_gets_one_line_that_says_why(content, says, tmp_path):
    started = time.process_time()
    with pytest.raises(UsageError) as error:
        read(tmp_path, content)
    (problem,) = error.value.problems
    assert says in problem
    assert problem.startswith(str(tmp_path / "recipe.yaml"))
    assert "\n" not in problem
    assert not Path("pwned").exists()
    assert time.process_time() - started < 2


def test_the_largest_file_that_is_read_is_read_in_seconds(tmp_path: Path) -> None:
    started = time.process_time()
    assert len(read(tmp_path, "".join(f"key{i}: {i}\n" for i in range(3500)))) == 3500
    assert time.process_time() - started < 10
