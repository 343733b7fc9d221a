"""The commands `pulseopt-hf report` and `pulseopt-hf plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pulseopt_hf.command_line import Parser
from pulseopt_hf.errors import UsageError
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.reading import read_run, require_episodes

PAGE, PICTURES = "report.html", "plots"
_RUN = "a run's folder, its `output_dir`"
_IN_THE_FOLDER = ", in the run's folder if there is one run and else in the working folder"


def report(words: Sequence[str]) -> Path:
    """Write the page of one or several runs.

    Args:
        words: the folders and the option `--out`.

    Returns:
        The page: `report.html` in the run's folder, or in the working folder for several runs.

    Raises:
        UsageError: a folder is no run, the page has no place, or plotly is not installed.
    """
    parser = Parser("report")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    parser.add_argument(
        "--out", metavar="FILE", help=f"the page; by default {PAGE}{_IN_THE_FOLDER}"
    )
    options = parser.parse_args(list(words))
    folders = [Path(name) for name in options.runs]
    runs = read_runs(folders)
    file = Path(options.out) if options.out is not None else _default(folders)
    _check_place(file)
    try:
        from pulseopt_hf.report.page import write_page
    except ModuleNotFoundError as error:
        raise _missing("report", error) from error
    try:
        write_page(runs, file)
    except OSError as error:
        raise _unwritable(file, error) from error
    return file


def plot(words: Sequence[str]) -> list[Path]:
    """Save the pictures of one run, or those of several overlaid.

    Args:
        words: the folders and the options `--out` and `--format`.

    Returns:
        The files, in `plots` in the run's folder, or in the working folder for several runs.

    Raises:
        UsageError: a folder is no run, there is nothing to draw, the pictures have no place, or a
            library is not installed.
    """
    parser = Parser("plot")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=_RUN)
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help=f"where the pictures go; by default {PICTURES}{_IN_THE_FOLDER}",
    )
    parser.add_argument(
        "--format", choices=("svg", "png"), default="svg", help="by default %(default)s"
    )
    options = parser.parse_args(list(words))
    folders = [Path(name) for name in options.runs]
    runs = read_runs(folders)
    folder = Path(PICTURES) if len(folders) > 1 else folders[0] / PICTURES
    folder = folder if options.out is None else Path(options.out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`--out`: {folder} is a file; name a folder.")
    try:
        from pulseopt_hf.report.page import distinct_names
        from pulseopt_hf.report.pictures import write_pictures
    except ModuleNotFoundError as error:
        raise _missing("plot", error) from error
    try:
        files = write_pictures(runs, distinct_names(runs), folder, options.format)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not files:
        raise UsageError(
            "`plot`: these runs have logged no loss and no LR to be laid over each other. Name one "
            "run for a picture of its own, or look again when they have logged."
        )
    return files


def _missing(command: str, error: ModuleNotFoundError) -> UsageError:
    return UsageError(
        f"`{command}` needs {error.name}, which is not installed: "
        "pip install 'pulseopt-hf[report]'."
    )


def _unwritable(place: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{place}: cannot be written: {error.strerror or error}; name another place by `--out`."
    )


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs to be shown: each once, and none that has yet to finish an episode.

    Beside a run with episodes a plain Trainer's is welcome, as what to compare with.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("A run was named twice; name each once.")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if run.knobs or all(not other.knobs for other in runs):
            require_episodes(run)
    return runs


def _default(folders: Sequence[Path]) -> Path:
    return folders[0] / PAGE if len(folders) == 1 else Path(PAGE)


def _check_place(file: Path) -> None:
    """Refuse a place that is none, and what is no page of ours."""
    if file.is_dir():
        raise UsageError(f"`--out`: {file} is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise UsageError(f"`--out`: {file.parent}: there is no such folder.")
    if file.exists():
        with file.open("rb") as opened:
            if b'<meta name="generator" content="pulseopt_hf' not in opened.read(1000):
                raise UsageError(
                    f"{file}: exists already and was not written by this command; name another "
                    "place by `--out`."
                )
