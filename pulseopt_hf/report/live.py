"""A run in a terminal, drawn anew as it goes on. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pulseopt_hf.report.palette import arm_styles
from pulseopt_hf.report.record_reader import News
from pulseopt_hf.report.run_data import RunData, Series
from pulseopt_hf.report.tables import Row, arm_rows, trial_rows
from pulseopt_hf.report.wording import described, printable, progress, shown, silence, status_line

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_BESIDE = 100  # columns from which on the two tables stand beside each other
_COLORS = {"finished": "green", "running": "cyan", "stopped": "yellow", "silent": "yellow"}


class LiveView(Live):
    """Keeps a picture of a run at the end of the terminal's text, and leaves the last one there."""

    def __init__(self) -> None:
        super().__init__(console=Console(highlight=False), auto_refresh=False)
        self._drawn: object = None  # state of the run and size of the terminal in the last picture

    def wait(self, line: str) -> None:
        """Say what is waited for."""
        self._draw(lambda: Text(line), line)

    def show(self, run: RunData, news: News, replaced: int) -> None:
        """Draw the run, where there is something new to see."""
        state = (run.updated, run.step, len(run.logs), run.status, replaced)
        self._draw(lambda: picture(run, self.console), state)

    def _draw(self, make: Callable[[], RenderableType], state: object) -> None:
        now = (state, self.console.size)
        if self._drawn != now:
            self.update(make(), refresh=True)
            self._drawn = now


def sparkline(series: Series, width: int, blocks: str = _BLOCKS) -> str:
    """Draw a curve on one line: each block is the mean of its stretch of steps."""
    (first, _), (last, _) = series[0], series[-1]
    count = max(1, min(width, len(series)))
    stretches: list[list[float]] = [[] for _ in range(count)]
    for step, value in series:  # a long run's record has fewer points of its beginning
        stretches[(step - first) * count // (last - first + 1)].append(value)
    means = [sum(values) / len(values) for values in stretches if values]
    lowest, span = min(means), max(means) - min(means)
    heights = [(mean - lowest) / span * (len(blocks) - 1) if span else 0.0 for mean in means]
    return "".join(blocks[round(height)] for height in heights)


def picture(run: RunData, console: Console) -> RenderableType:
    """Return a run as it is drawn in a terminal."""
    color = _COLORS.get(run.status, "red")
    title = Text.assemble((printable(run.name), "bold"), "  ", (run.status, color))
    if run.resumed_from is not None:
        title.append(f"  resumed from step {run.resumed_from:,}")
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    steps = ProgressBar(total=max(1, run.max_steps), completed=run.step)
    bar.add_row(f"step {progress(run)}", steps)
    parts: list[RenderableType] = [title, bar]
    if loss := run.loss:
        blocks = _ASCII if console.options.ascii_only else _BLOCKS
        parts.append(Text(f"loss {sparkline(loss, console.width - 5, blocks)}"))
        parts.append(Text(f"     {shown(loss[0][1])} → {shown(loss[-1][1])}"))
    parts.append(Columns(_facts(run), padding=(0, 3)))
    if run.metrics:
        parts.append(Text(printable(described(run.metrics))))
    tables = [_arms(run)] if run.has_arms else []
    tables += [_trials(run)] if run.trials else []
    if len(tables) > 1 and console.width >= _BESIDE:
        beside = Table.grid(padding=(0, 3))
        beside.add_row(*tables)
        tables = [beside]
    parts += tables
    if run.status != "running":
        parts.append(Text(silence(run) if run.status == "silent" else status_line(run), color))
    return Group(*parts)


def _facts(run: RunData) -> list[Text]:
    facts = {"LR that was set": shown(run.base_lr)}
    for name, series in (("base LR now", run.base_lrs), ("effective LR", run.effective_lrs)):
        facts |= {name: shown(series[-1][1])} if series else {}
    if run.calibrated_lr is not None:
        facts["calibrated LR"] = shown(run.calibrated_lr)
    multipliers = run.series("pulse/lr_multiplier")
    if multipliers and run.status == "running":
        facts["arm now"] = f"×{multipliers[-1][1]:g}"  # noqa: RUF001
    facts |= {"episodes": f"{run.episode_count:,}", "skipped steps": f"{run.skipped_steps:,}"}
    return [Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in facts.items()]


def _arms(run: RunData) -> Table:
    marks = [Text("■ ", style.color) for style in arm_styles(run.arms()).values()]
    return _table("Arms", arm_rows(run), ["arm", "episodes", "mean reward", "spread"], marks)


def _trials(run: RunData) -> Table:
    rows = trial_rows(run.trials)
    table = _table("Calibration", rows, ["trial", "LR", "outputs moved", "weights moved"])
    if run.calibrated_lr is not None:
        table.add_section()
        table.add_row("found", Text(f"{run.calibrated_lr:.2e}", "bold"), "", "")
    return table


def _table(title: str, rows: list[Row], columns: list[str], marks: Sequence[Text] = ()) -> Table:
    table = Table(columns[0], title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in columns[1:]:
        table.add_column(name, justify="right")
    for mark, row in zip(marks or [Text()] * len(rows), rows, strict=False):
        first, *others = (row[name] for name in columns)
        table.add_row(mark + Text(first), *others)
    return table
