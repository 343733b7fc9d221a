"""A run in a terminal, drawn anew as it goes on. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from types import TracebackType

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pulseopt_hf.report.arms import ArmStyles, shown
from pulseopt_hf.report.data import RunData
from pulseopt_hf.report.tables import progress, status_line
from pulseopt_hf.report.watch import ENDED, News, silence
from pulseopt_hf.report.wording import described, moved, printable

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_BESIDE = 100  # columns from which on the two tables stand beside each other
_COLORS = {"finished": "green", "running": "cyan", "stopped": "yellow", "silent": "yellow"}


class LiveView:
    """Keeps a picture of a run at the end of the terminal's text, and leaves the last one there."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._drawn: object = None  # state of the run and size of the terminal in the last picture

    def __enter__(self) -> LiveView:
        """Begin to draw."""
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last picture, and give the cursor back."""
        self._live.stop()

    def wait(self, line: str) -> None:
        """Say what is waited for."""
        self._draw(lambda: Text(line), line)

    def show(self, run: RunData, news: News, replaced: int) -> None:
        """Draw the run, where there is something new to see."""
        state = (run.updated, run.step, len(run.logs), run.status, replaced)
        self._draw(lambda: picture(run, self._console.width), state)

    def _draw(self, make: Callable[[], RenderableType], state: object) -> None:
        now = (state, self._console.size)
        if self._drawn != now:
            self._live.update(make(), refresh=True)
            self._drawn = now


class Sparkline:
    """A curve of blocks on one line, as wide as there is room.

    Args:
        values: at least one.
    """

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Draw: each block is the mean of its stretch, from the lowest to the highest."""
        blocks = _ASCII if options.ascii_only else _BLOCKS
        count, values = min(options.max_width, len(self._values)), self._values
        edges = [index * len(values) // count for index in range(count + 1)]
        means = [sum(values[start:end]) / (end - start) for start, end in pairwise(edges)]
        lowest, span = min(means), max(means) - min(means)
        heights = [(mean - lowest) / span * (len(blocks) - 1) if span else 0.0 for mean in means]
        yield Text("".join(blocks[round(height)] for height in heights), no_wrap=True)


def picture(run: RunData, width: int) -> RenderableType:
    """Return a run as it is drawn in a terminal of this many columns."""
    parts: list[RenderableType] = [_title(run), _progress(run)]
    if run.loss:
        loss = Table.grid(padding=(0, 1), expand=True)
        loss.add_column()
        loss.add_column(ratio=1)
        values = [value for _, value in run.loss]
        loss.add_row("loss", Sparkline(values))
        parts += [loss, Text(f"     {shown(values[0])} → {shown(values[-1])}")]
    parts.append(_facts(run))
    tables = [table for table in (_arms(run), _trials(run)) if table is not None]
    if len(tables) > 1 and width >= _BESIDE:
        beside = Table.grid(padding=(0, 3))
        beside.add_row(*tables)
        tables = [beside]
    parts += tables
    if run.status in ENDED or run.status == "silent":
        parts.append(_ending(run))
    return Group(*parts)


def _title(run: RunData) -> Text:
    title = Text.assemble(
        (printable(run.name), "bold"), "  ", (run.status, _COLORS.get(run.status, "red"))
    )
    if run.resumed_from is not None:
        title.append(f"  resumed from step {run.resumed_from:,}")
    return title


def _progress(run: RunData) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    bar = ProgressBar(total=max(1, run.max_steps), completed=run.step)
    grid.add_row(f"step {progress(run)}", bar)
    return grid


def _facts(run: RunData) -> RenderableType:
    facts = [] if run.base_lr is None else [("LR that was set", shown(run.base_lr))]
    for name, series in (("base LR now", run.base_lrs), ("effective LR", run.effective_lrs)):
        if series:
            facts.append((name, shown(series[-1][1])))
    if run.calibrated_lr is not None:
        facts.append(("calibrated LR", shown(run.calibrated_lr)))
    multipliers = run.series("pulse/lr_multiplier")
    if multipliers and run.status == "running":
        facts.append(("arm now", f"×{multipliers[-1][1]:g}"))  # noqa: RUF001
    facts += [("episodes", f"{len(run.episodes):,}"), ("skipped steps", f"{run.skipped_steps:,}")]
    pairs = [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in facts]
    columns = Columns(pairs, padding=(0, 3))
    if not run.metrics:
        return columns
    return Group(columns, Text(printable(described(run.metrics))))


def _arms(run: RunData) -> Table | None:
    if not run.episodes:
        return None
    table = Table("arm", title="Arms", title_justify="left", box=SIMPLE_HEAD)
    for name in ("plays", "mean reward", "spread"):
        table.add_column(name, justify="right")
    for arm, style in zip(run.arms(), ArmStyles(run.episodes), strict=True):
        table.add_row(
            Text.assemble(("■ ", style.color), style.label),
            f"{arm.plays:,}",
            f"{arm.mean:+.4f}",
            "–" if arm.spread is None else f"{arm.spread:.4f}",  # noqa: RUF001
        )
    return table


def _trials(run: RunData) -> Table | None:
    if not run.trials:
        return None
    table = Table("trial", title="Calibration", title_justify="left", box=SIMPLE_HEAD)
    for name in ("LR", "outputs moved", "weights moved"):
        table.add_column(name, justify="right")
    for number, trial in enumerate(run.trials, 1):
        table.add_row(
            str(number),
            f"{trial.learning_rate:.2e}",
            moved(trial.movement),
            moved(trial.weight_movement),
        )
    if run.calibrated_lr is not None:
        table.add_section()
        table.add_row("found", Text(f"{run.calibrated_lr:.2e}", "bold"), "", "")
    return table


def _ending(run: RunData) -> Text:
    line = silence(run) if run.status == "silent" else status_line(run)
    return Text(line, _COLORS.get(run.status, "red"))
