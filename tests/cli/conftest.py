import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pulseopt_hf.cli import main
from tests.recipes.tiny import bert, gpt2, t5, write_glue

__all__ = ["bert", "gpt2", "t5"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the empty working folder; what is temporary lies beside it."""
    folder, beside = tmp_path / "work", tmp_path / "temporary"
    folder.mkdir()
    beside.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(beside))
    return folder


@pytest.fixture
def local(tmp_path: Path, bert: str) -> Callable[..., list[str]]:
    """Return a maker of a recipe and its keys for local files, some of them with other content."""

    def words(task: str = "sst2", model: str = "", **content: str) -> list[str]:
        files = write_glue(tmp_path / "data", task)
        for split, text in content.items():
            files[split].write_text(text)
        return [
            *(f"glue/{task}", "--model_name_or_path", model or bert, "--use_cpu"),
            *("--per_device_train_batch_size", "8", "--train_file", str(files["train"])),
            *("--validation_file", str(files["validation"])),
        ]

    return words


@pytest.fixture
def refused(work: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused and write nothing, and return the one line it says."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(list(words)) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("pulseopt-hf: error: ")
        assert captured.out == ""
        assert list(work.iterdir()) == [], "something was written"
        return line

    return run
