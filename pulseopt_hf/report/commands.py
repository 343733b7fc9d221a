"""The commands `pulseopt-hf report` and `pulseopt-hf plot`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pulseopt_hf.command_line import Parser
from pulseopt_hf.errors import UsageError, needs_extra
from pulseopt_hf.files import write_whole
from pulseopt_hf.report.record_reader import read_run
from pulseopt_hf.report.run_data import RunData

PAGE, PICTURES = "report.html", "plots"
_PLACE = "; by default {} in the run's folder, or in the current folder for several runs"


def report(words: Sequence[str]) -> Path:
    """Write the page of one or several runs, and return where it is."""
    parser = _parser("report")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"the page{_PLACE.format(PAGE)}")
    options = parser.parse_args(list(words))
    runs = read_runs(options.runs)
    file: Path = options.out or _folder(options.runs) / PAGE
    _check_page(file)
    with needs_extra("`report`", "report"), _written_to(file):
        from pulseopt_hf.report.page import to_html

        # A name may hold half a surrogate pair, which no encoding has.
        write_whole(file, to_html(runs, distinct_names(runs)).encode("utf-8", "replace"))
    return file


def plot(words: Sequence[str]) -> list[Path]:
    """Save the charts of one run, or those of several overlaid, and return the files."""
    parser = _parser("plot")
    place = f"where the pictures go{_PLACE.format(PICTURES)}"
    parser.add_argument("--out", metavar="FOLDER", type=Path, help=place)
    kinds = ("svg", "png")
    parser.add_argument("--format", choices=kinds, default="svg", help="by default %(default)s")
    options = parser.parse_args(list(words))
    runs = read_runs(options.runs)
    folder: Path = options.out or _folder(options.runs) / PICTURES
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`--out`: {folder} is a file; name a folder.")
    files = []
    with needs_extra("`plot`", "report"), _written_to(folder):
        from pulseopt_hf.report.charts import write_chart
        from pulseopt_hf.report.run_charts import plots_of

        for drawn in plots_of(runs, distinct_names(runs)):
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{drawn.name}.{options.format}")
            write_chart(drawn.picture(), files[-1])
    if not files:
        raise UsageError(
            "`plot`: these runs have logged neither loss nor LR, so there is no curve to compare. "
            "Name a single run, or try again once they have logged."
        )
    return files


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Read runs that are to be shown, each once."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("A run was named twice; name each once.")
    runs = [read_run(folder) for folder in folders]
    for run in runs:
        if not run.episodes and not run.trials:
            raise UsageError(
                f"{run.folder}: has no finished episode at step {run.step} of {run.max_steps}. "
                "Try again once one has ended and been logged; `logging_steps` sets how often the "
                "run logs."
            )
    return runs


def distinct_names(runs: Sequence[RunData]) -> list[str]:
    """Return the runs' names, with their folders where names are alike."""
    names = [run.name for run in runs]
    return [
        run.name if names.count(run.name) == 1 else f"{run.name} ({run.folder})" for run in runs
    ]


def _parser(command: str) -> Parser:
    parser = Parser(command)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", type=Path, help="a run's folder, its `output_dir`"
    )
    return parser


def _folder(runs: Sequence[Path]) -> Path:
    return runs[0] if len(runs) == 1 else Path()


def _check_page(file: Path) -> None:
    """Refuse an invalid path, and a file that this command did not write."""
    if file.is_dir():
        raise UsageError(f"`--out`: {file} is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise UsageError(f"`--out`: {file.parent}: there is no such folder.")
    if file.exists():
        with file.open("rb") as opened:
            if b'<meta name="generator" content="pulseopt_hf' not in opened.read(1000):
                raise UsageError(
                    f"{file}: exists already and was not written by this command; choose another "
                    "file with `--out`."
                )


@contextlib.contextmanager
def _written_to(place: Path) -> Iterator[None]:
    """Say what to do where a file cannot be written."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise UsageError(
            f"{place}: cannot be written: {why}; choose another place with `--out`."
        ) from error
