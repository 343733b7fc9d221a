"""The charts of one run, and of several over each other. Needs the extra `report`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import altair as alt

from pulseopt_hf.aees.calibration import OUTPUT_RADIUS, WEIGHT_RADIUS, Trial
from pulseopt_hf.report.charts import (
    FREE,
    NARROW,
    WIDE,
    Panel,
    Plot,
    Rows,
    curves,
    log_axis,
    rounded,
    step_axis,
)
from pulseopt_hf.report.palette import FOUND, PLAIN, arm_styles
from pulseopt_hf.report.run_data import RunData, Series
from pulseopt_hf.report.tables import MOST_METRICS, Row, arm_rows, episode_rows, trial_rows
from pulseopt_hf.report.wording import counted, course, finding, metric_name

_MEASURES = {
    "outputs": ("movement", OUTPUT_RADIUS, "circle"),
    "weights": ("weight_movement", WEIGHT_RADIUS, "diamond"),
}
_STAR = (
    "M0,-1L.235,-.324L.951,-.309L.38,.124L.588,.809L0,.4L-.588,.809L-.38,.124L-.951,-.309"
    "L-.235,-.324Z"
)
_MARKS = ("triangle-up", "square", "cross", "diamond")
_LONGEST_TICKS = 30  # letters that stand side by side below a narrow chart
_HEIGHT, _ROOM, _FOUND_AT, _SET_AT = 300, 60, 258, 290  # pixels; labels of LRs are in the room


def plots_of(runs: Sequence[RunData], names: Sequence[str]) -> list[Plot]:
    """Return the plots that one run has data for, or the curves of several over each other.

    What is special to this method comes first: the calibration of a run, or what its arms did where
    there are several.
    """
    run, one = runs[0], len(runs) == 1

    def panel(title: str, height: int, series: Callable[[RunData], Series]) -> Panel:
        own = {title if one else n: series(r) for n, r in zip(names, runs, strict=True)}
        dots = own if title in metrics.values() else ()
        is_lr, is_loss = title == "learning rate", title == "training loss"
        return Panel(title, own, height, is_lr, tuple(dots), adjustable=is_loss)

    def logged(key: str, title: str, height: int) -> Panel:
        return panel(title, height, lambda run: run.series(key))

    metrics = {key: metric_name(key) for run in runs for key in run.metrics}
    others = [logged(key, name, 110) for key, name in metrics.items() if key != "eval_loss"]
    found = [
        curves("metrics", "Metrics", _told(others), others[:MOST_METRICS]),
        _alone("gradient-norm", logged("grad_norm", "gradient norm", 180), wide=not one),
        _alone("throughput", panel("steps per second", 180, lambda run: run.speed), wide=not one),
    ]
    if not one:
        both = [
            panel("training loss", 240, lambda run: run.loss),
            panel("learning rate", 120, lambda run: run.effective_lrs or run.base_lrs),
        ]
        loss = curves("loss", "Training loss and learning rate", _told(both), both)
        first = [loss, _alone("eval-loss", logged("eval_loss", "evaluation loss", 240))]
    elif run.has_arms:
        first = [loss_plot(run), reward_plot(run), *arm_plots(run), calibration_plot(run)]
    else:
        first = [calibration_plot(run), loss_plot(run)]
    return [plot for plot in [*first, *found] if plot is not None]


def _alone(name: str, panel: Panel, *, wide: bool = True) -> Plot | None:
    return curves(name, panel.title.capitalize(), _told([panel]), [panel], wide=wide)


def _told(panels: Sequence[Panel]) -> str:
    """Say in words what the curves did."""
    said = []
    for panel in panels:
        told = [course(name, series) for name, series in panel.curves.items() if series]
        alone = list(panel.curves) == [panel.title]
        said += [f"{'' if alone else panel.title + ': '}{'; '.join(told)}"] if told else []
    return ". ".join(text[0].upper() + text[1:] for text in said) + "."


def calibration_plot(run: RunData) -> Plot | None:
    """How far each trial of the calibration went, and the LR that was found."""
    if not run.trials:
        return None
    outcome, found = run.outcome, run.calibrated_lr
    failed = outcome is not None and found is None
    title = "Why no learning rate was found" if failed else "How the learning rate was found"
    limit, factor = (None, 1.0) if outcome is None else (outcome.limited_by, outcome.factor)
    return trials_plot(run.trials, found, limit, run.base_lr, factor, title, finding(run))


def trials_plot(
    trials: Sequence[Trial],
    found: float | None,
    limited_by: str | None,
    set_lr: float,
    factor: float = 1.0,
    title: str = "Calibration",
    text: str = "",
) -> Plot:
    """Draw how far each trial went, over its LR.

    A line leads to where the limit `limited_by`, `outputs` or `weights`, is reached. The LR that
    was found is marked on it, at `factor` times the limit. Where `limited_by` is `None` nothing was
    found.
    """
    points = [row for measure in _MEASURES for row in _movements(trials, measure)]
    data: dict[str, Rows] = {"trials": points, "limit": [{"share": 1.0, "label": "the limit"}]}
    rates: list[dict[str, Any]] = []
    if set_lr > 0:
        rates.append({"rate": rounded(set_lr), "label": f"set: {set_lr:.3g}", "top": _SET_AT})
    if found is not None and limited_by is not None:
        label = f"found: {found:.3g}\nlimited by the {limited_by}"
        rates.append({"rate": rounded(found), "label": label, "top": _FOUND_AT, "found": True})
        lowest = min([found, *(trial.learning_rate for trial in trials)])
        highest = found / factor
        data["star"] = [{"rate": rounded(found), "share": rounded(factor)}]
        data["line"] = [
            {"rate": rounded(r), "share": rounded(r / highest), "measure": f"{limited_by} moved"}
            for r in (lowest, max(found, highest))  # movements grow in proportion to the LR
        ]
    all_rates = [row["rate"] for row in [*points, *rates, *data.get("line", [])]]
    middle = math.sqrt(min(all_rates) * max(all_rates)) if all_rates else 1.0
    data["rates"] = [{**row, "left": row["rate"] > middle} for row in rates]
    labels = [f"{measure} moved" for measure in _MEASURES]
    shapes = alt.Scale(domain=labels, range=[shape for _, _, shape in _MEASURES.values()])
    x_axis = log_axis(all_rates)
    shares = [row["share"] for name in ("limit", "trials", "line") for row in data.get(name, [])]
    y_axis = log_axis(shares, "~%")
    y_axis["scale"] = alt.Scale(type="log", nice=False, domain=_with_room(min(shares), max(shares)))
    x = alt.X("rate:Q", title="learning rate of the trial", **x_axis)
    y = alt.Y("share:Q", title="share of what one step may move", **y_axis)
    color = alt.Color("measure:N", scale=alt.Scale(domain=labels))
    shape = alt.Shape("measure:N", scale=shapes)
    charts = {name: alt.Chart(alt.NamedData(name)) for name in data}
    by_kind = alt.condition("datum.found", alt.value(FOUND), alt.value(PLAIN))
    marked, limit = charts["rates"].encode(x=x, color=by_kind), charts["limit"].encode(y=y)
    top = alt.Y("top:Q", scale=None)
    align, dx = alt.expr("datum.left ? 'right' : 'left'"), alt.expr("datum.left ? -5 : 5")
    layers = [
        limit.mark_rule(),
        limit.mark_text(align="left", dx=4, dy=-8).encode(x=alt.value(0), text="label:N"),
        marked.mark_rule(strokeDash=[5, 4], strokeWidth=1.5),
        *(
            charts["rates"]
            .mark_text(align=align, dx=dx, fontWeight="bold", lineBreak="\n", style=style)
            .encode(x=x, y=top, text="label:N")
            for style in ("halo", "label")
        ),
        charts["trials"]
        .mark_point(filled=True, size=70, opacity=0.85)
        .encode(x=x, y=y, color=color, shape=shape, tooltip=_tips(trial_rows(trials)))
        .properties(name="trials"),
    ]
    if "star" in charts:
        star = charts["star"].mark_point(shape=_STAR, filled=True, size=250, opacity=1, color=FOUND)
        tip = [alt.Tooltip("rate:Q", title="LR found", format=".3e")]
        tip.append(alt.Tooltip("share:Q", title="share of the limit", format=".0%"))
        layers.append(charts["line"].mark_line(strokeWidth=1.2).encode(x=x, y=y, color=color))
        layers.append(star.encode(x=x, y=y, tooltip=tip).properties(name="found"))
    chart = alt.layer(*layers).properties(width=WIDE, height=_HEIGHT)
    return Plot("calibration", title, text, [chart], data, legend=labels)


def _with_room(lowest: float, highest: float) -> list[float]:
    """Return the domain of shares that leaves room for labels below the lowest."""
    decades = max(0.5, math.log10(highest / lowest))
    pixel = decades / (_HEIGHT - _ROOM - 12)
    return [lowest / 10 ** (_ROOM * pixel), highest * 10 ** (12 * pixel)]


def _movements(trials: Sequence[Trial], measure: str) -> Iterator[dict[str, Any]]:
    attribute, radius, _ = _MEASURES[measure]
    for trial, row in zip(trials, trial_rows(trials), strict=True):
        if (share := getattr(trial, attribute) / radius) > 0:
            # Outputs that are not finite, a huge number, stay within sight.
            place = {"rate": rounded(trial.learning_rate), "share": rounded(min(share, 1e3))}
            yield {**row, **place, "measure": f"{measure} moved"}


def loss_plot(run: RunData) -> Plot | None:
    """Loss and learning rate over the same steps, with the episodes of several arms behind."""
    losses = {"training loss": run.loss, "evaluation loss": run.series("eval_loss")}
    text = [f"The {course(name, series)}." for name, series in losses.items() if series]
    if run.logged_seldom:
        text.append(
            "Too little was logged for a curve, so the first and the last step loss of each "
            "episode are shown. Lower `logging_steps` for a full curve."
        )
    if rates := [rate for _, rate in run.effective_lrs or run.base_lrs]:
        found = "" if run.calibrated_lr is None else f" and calibrated to {run.calibrated_lr:.3g}"
        text.append(
            f"The LR was set to {run.base_lr:.3g}{found}. It ranged from {min(rates):.3g} to "
            f"{max(rates):.3g}. Its axis is logarithmic."
        )
    text += [f"{counted(sum(own), 'episode')} {name}." for name, own in _undone(run).items()]
    lrs = {"effective LR": run.effective_lrs, "base LR": run.base_lrs}
    if all(record.lr_value == 1.0 for record in run.episodes):  # the two are the same
        lrs = {"learning rate": max(lrs.values(), key=len)}
    behind = None
    if run.has_arms:
        text.append(f"Behind the loss {counted(len(run.episodes), 'episode')} are shaded by arm.")
        x, fill = step_axis("start:Q", labels=False), alt.Fill("arm:N", **_by_arm(run))
        shade = _episodes(run).mark_rect(opacity=0.3).encode(x=x, x2="end:Q", fill=fill)
        behind = Plot("", "", "", [shade], {"episodes": _placed(run)}, legend=_arm_legend(run))
    panels = [
        Panel("loss", losses, 240, dots=["evaluation loss"], adjustable=True),
        Panel("learning rate", lrs, 120, log=True),
    ]
    return curves("loss", "Loss and learning rate", " ".join(text), panels, behind=behind)


def reward_plot(run: RunData) -> Plot:
    """Reward of each episode, with marks on those that were clipped, skipped or undone."""
    rows = _placed(run)
    marks = {"clipped": [run.was_clipped(record) for record in run.episodes]}
    marks |= {"with skipped steps": [count > 0 for count in run.skips()], **_undone(run)}
    marks = {name: own for name, own in marks.items() if any(own)}
    marked = [
        {"end": row["end"], "value": row["value"], "mark": name}
        for name, own in marks.items()
        for row, is_so in zip(rows, own, strict=True)
        if is_so
    ]
    x, y = step_axis("end:Q"), alt.Y("value:Q", title="reward", scale=FREE)
    points = _episodes(run).mark_point(filled=True, size=50 if len(rows) < 200 else 16, opacity=1)
    layers = [points.encode(x=x, y=y, color=alt.Color("arm:N", **_by_arm(run)))]
    if marked:
        shapes = alt.Scale(domain=list(marks), range=_MARKS[: len(marks)])
        rings = alt.Chart(alt.NamedData("marked"), name="marks").mark_point(
            filled=False, size=130, strokeWidth=1.6, color=PLAIN
        )
        layers.append(rings.encode(x=x, y=y, shape=alt.Shape("mark:N", scale=shapes)))
    rewards = [record.reward for record in run.episodes]
    text = (
        f"Rewards of {counted(len(rewards), 'episode')}, from {min(rewards):+.4f} to "
        f"{max(rewards):+.4f}, {sum(rewards) / len(rewards):+.4f} on average."
    )
    text += "".join(f" {counted(sum(own), 'episode')} {name}." for name, own in marks.items())
    chart = alt.layer(*layers).properties(width=WIDE, height=240)
    data, legend = {"episodes": rows, "marked": marked}, [*_arm_legend(run), *marks]
    title = "Reward of each episode"
    if run.left_out:
        title = f"Reward of {len(rows):,} of {run.episode_count:,} episodes"
    return Plot("reward", title, text, [chart], data, legend=legend, zoomed=["episodes"])


def arm_plots(run: RunData) -> list[Plot]:
    """How often each arm was played, and the mean and spread of its rewards."""
    rows = arm_rows(run)
    data = [
        {**row, "plays": arm.plays, "mean": rounded(arm.mean)}
        | {"low": arm.mean - (arm.spread or 0.0), "high": arm.mean + (arm.spread or 0.0)}
        for row, arm in zip(rows, run.arms(), strict=True)
    ]
    labels = [row["arm"] for row in rows]
    angle = -30 if sum(map(len, labels)) > _LONGEST_TICKS else 0  # long names are slanted
    axis = alt.Axis(labelAngle=angle, labelOverlap=False, title=None)
    base = alt.Chart(alt.NamedData("arms"), width=NARROW, height=220).encode(
        x=alt.X("arm:N", sort=labels, axis=axis),
        color=alt.Color("arm:N", **{**_by_arm(run), "legend": None}),
        tooltip=_tips(rows),
    )
    plays = base.mark_bar().encode(y=alt.Y("plays:Q", title="episodes"))
    spread = base.mark_rule(strokeWidth=1.6).encode(
        y=alt.Y("low:Q", title="reward", scale=FREE), y2="high:Q"
    )
    means = base.mark_point(filled=True, size=110, opacity=1).encode(y="mean:Q")
    played = ", ".join(f"{row['arm']} in {row['episodes']}" for row in rows)
    text = f"Episodes of each arm: {played}."
    bars = Plot("plays", "Plays of each arm", text, [plays], {"arms": data}, wide=False)
    rewards = "; ".join(f"{row['arm']} {row['mean reward']} ± {row['spread']}" for row in rows)
    text = f"Mean reward and standard deviation: {rewards}."
    points, title = alt.layer(spread, means), "Mean reward and spread"
    return [bars, Plot("mean-reward", title, text, [points], {"arms": data}, wide=False)]


def _undone(run: RunData) -> dict[str, list[bool]]:
    """Return which episodes the divergence guard touched, by what it did."""
    outcomes = sorted({r.outcome for r in run.episodes if r.outcome is not None})
    return {outcome: [r.outcome == outcome for r in run.episodes] for outcome in outcomes}


def _episodes(run: RunData) -> Any:
    chart = alt.Chart(alt.NamedData("episodes"), name="episodes")
    return chart.encode(tooltip=_tips(episode_rows(run)))


def _placed(run: RunData) -> list[dict[str, Any]]:
    """Return the rows of the episodes with their places; step 1 lies between 0 and 1."""
    return [
        {**row, "start": r.start_step, "end": r.end_step + 1, "value": rounded(r.reward)}
        for row, r in zip(episode_rows(run), run.episodes, strict=True)
    ]


def _by_arm(run: RunData) -> dict[str, Any]:
    """Return the settings of a channel that shows arms."""
    labels, colors = zip(*arm_styles(run.arms()).values(), strict=True)
    legend = alt.Legend(labelExpr="'LR ' + datum.label")
    return {"scale": alt.Scale(domain=labels, range=colors), "legend": legend}


def _arm_legend(run: RunData) -> list[str]:
    return [f"LR {style.label}" for style in arm_styles(run.arms()).values()]


def _tips(rows: Sequence[Row]) -> list[alt.Tooltip]:
    """Return hovers that show what a table's row does."""
    return [alt.Tooltip(f"{column}:N") for column in (rows[0] if rows else ())]
