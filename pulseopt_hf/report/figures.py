"""The plots of one run, as plotly figures. Needs the extra `report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from pulseopt_hf.aees.calibration import OUTPUT_RADIUS, WEIGHT_RADIUS, Trial
from pulseopt_hf.report.arms import ArmStyles, shown
from pulseopt_hf.report.data import RunData, Series
from pulseopt_hf.report.drawing import (
    ACCENT,
    INK,
    ROLES,
    SECOND,
    Plot,
    add_line,
    axis,
    log_axis,
    new_figure,
    plain,
    rounded,
)
from pulseopt_hf.report.tables import notes_on
from pulseopt_hf.report.wording import moved

# Numbers with a sign are written in Python: plotly 6 shows them unrounded if asked for `+.4f`.
_EPISODE = (
    "<b>Episode %{customdata[0]}</b>, steps %{customdata[1]} to %{customdata[2]}<br>"
    "LR %{customdata[3]}<br>loss %{customdata[4]:.4f} to %{customdata[5]:.4f}<br>"
    "reward %{customdata[6]}%{customdata[7]}<extra></extra>"
)
_TRIAL = (
    "<b>Trial %{customdata[0]}</b>, step %{customdata[1]}<br>LR %{x:.3e}<br>"
    "outputs moved by %{customdata[2]}, weights by %{customdata[3]}<extra></extra>"
)
_MOST_MARKERS = 2000  # a browser takes seconds to draw more
_MOVEMENT = {"outputs": "movement", "weights": "weight_movement"}


def plots_of_run(run: RunData) -> list[Plot]:
    """Return the plots that a run has data for: loss, LR, reward, arms, calibration."""
    styles = ArmStyles(run.episodes)
    makers: list[Callable[[RunData, ArmStyles], Plot | None]] = [
        loss_plot,
        learning_rate_plot,
        reward_plot,
        plays_plot,
        mean_reward_plot,
        calibration_plot,
    ]
    return [plot for make in makers if (plot := make(run, styles)) is not None]


def loss_plot(run: RunData, styles: ArmStyles) -> Plot | None:
    """Training and evaluation loss, with the episodes behind them shaded by arm."""
    if not run.loss and not run.eval_loss:
        return None
    figure = new_figure("loss")
    if run.episodes:
        figure.add_trace(_shading(run, styles))
        for style in styles:
            figure.add_trace(
                go.Scatter(
                    x=[None],
                    y=[None],
                    name=f"LR {style.label}",
                    mode="markers",
                    marker={"color": style.color, "symbol": "square", "size": 11, "opacity": 0.6},
                )
            )
        # The strip has an axis of its own from 0 to 1, below the loss. Near a curve a hover tells
        # of the curve, and elsewhere of the episode.
        figure.update_layout(
            hovermode="closest",
            yaxis={"visible": False, "fixedrange": True, "range": [0, 1]},
            yaxis2={**axis("loss"), "overlaying": "y", "side": "left", "tickmode": "auto"},
        )
    own_axis = "y2" if run.episodes else "y"
    add_line(figure, run.loss, "training loss", INK, yaxis=own_axis)
    add_line(figure, run.eval_loss, "evaluation loss", SECOND, yaxis=own_axis, points=True)
    parts = [_course("The training loss", run.loss), _course("The evaluation loss", run.eval_loss)]
    if run.logged_seldom:
        parts.append(
            "Too little was logged for a curve of means: these are the first and the last step "
            "loss of each episode. Smaller `logging_steps` give such a curve."
        )
    if run.episodes:
        count = len(run.episodes)
        parts.append(f"Behind it {_count(count, 'episode')} are shaded by arm.")
        if run.trials:
            parts.append("Before the first, the LR was calibrated and watched.")
    return Plot("loss", "Loss", " ".join(filter(None, parts)), figure)


def learning_rate_plot(run: RunData, styles: ArmStyles) -> Plot | None:
    """Base and effective LR on a logarithmic axis."""
    base = [(step, value) for step, value in run.base_lrs if value > 0]
    effective = [(step, value) for step, value in run.effective_lrs if value > 0]
    if not base and not effective:
        return None
    figure = new_figure("learning rate")
    figure.update_yaxes(log_axis(value for _, value in base + effective))
    add_line(figure, effective, "effective LR", ACCENT, format=".3e")
    add_line(figure, base, "base LR", INK, dash="dot", format=".3e")
    text = "Both on a logarithmic axis." if base and effective else "On a logarithmic axis."
    if effective:
        values = [value for _, value in effective]
        text = f"The effective LR lay between {min(values):.3g} and {max(values):.3g}. " + text
    if run.base_lr is not None:
        found = "" if run.calibrated_lr is None else f" and calibrated to {run.calibrated_lr:.3g}"
        text = f"The LR was set to {run.base_lr:.3g}{found}. " + text
    return Plot("learning-rate", "Learning rate", text, figure)


def reward_plot(run: RunData, styles: ArmStyles) -> Plot | None:
    """Reward of each episode, with marks on those that were clipped, skipped or undone."""
    if not run.episodes:
        return None
    figure = new_figure("reward")
    rows = _rows(run, styles)
    chosen = [styles.index(record) for record in run.episodes]
    for index in range(len(styles)):
        style = styles[index]
        own = [i for i, arm in enumerate(chosen) if arm == index]
        name = f"LR {style.label}"
        trace = _markers(run, rows, own, name, color=style.color, size=_size(run))
        if len(rows) > _MOST_MARKERS:
            figure.add_trace(_stems(run, own, name, style.color))
            trace.update(mode="none", showlegend=False)
        figure.add_trace(trace)
    skips = run.skips()
    marks = {
        "clipped": [i for i, r in enumerate(run.episodes) if run.was_clipped(r)],
        "with skipped steps": [i for i, count in enumerate(skips) if count],
    }
    for outcome in sorted({r.outcome for r in run.episodes if r.outcome is not None}):
        marks[outcome] = [i for i, r in enumerate(run.episodes) if r.outcome == outcome]
    symbols = ("triangle-up-open", "square-open", "x-thin-open", "diamond-open")
    for (name, own), symbol in zip(marks.items(), symbols, strict=False):
        if own:
            trace = _markers(run, rows, own, name, color=INK, size=11, symbol=symbol)
            # The episode's own point tells what happened to it.
            figure.add_trace(trace.update(hoverinfo="skip", hovertemplate=None, customdata=None))
    rewards = [record.reward for record in run.episodes]
    text = (
        f"Rewards of {_count(len(rewards), 'episode')}, from {min(rewards):+.4f} to "
        f"{max(rewards):+.4f}, {sum(rewards) / len(rewards):+.4f} on average."
    )
    text += "".join(f" {_count(len(own), 'episode')} {name}." for name, own in marks.items() if own)
    return Plot("reward", "Reward of each episode", text, figure)


def plays_plot(run: RunData, styles: ArmStyles) -> Plot | None:
    """How often each arm was played."""
    arms = run.arms()
    if not arms:
        return None
    figure = new_figure("episodes", "arm")
    labels = [style.label for style in styles]
    figure.add_trace(
        go.Bar(
            x=labels,
            y=[arm.plays for arm in arms],
            customdata=[[arm.steps] for arm in arms],
            marker={"color": [style.color for style in styles]},
            hovertemplate="LR %{x}<br>%{y} episodes, %{customdata[0]} steps<extra></extra>",
            showlegend=False,
        )
    )
    figure.update_xaxes(type="category")
    plays = ", ".join(
        f"{label} {_times(arm.plays)}" for label, arm in zip(labels, arms, strict=True)
    )
    return Plot("plays", "Plays of each arm", f"Played: {plays}.", figure, wide=False)


def mean_reward_plot(run: RunData, styles: ArmStyles) -> Plot | None:
    """Mean and spread of each arm's rewards."""
    arms = run.arms()
    if not arms:
        return None
    figure = new_figure("reward", "arm")
    labels = [style.label for style in styles]
    figure.add_trace(
        go.Scatter(
            x=labels,
            y=[arm.mean for arm in arms],
            error_y={
                "type": "data",
                "array": [arm.spread or 0.0 for arm in arms],
                "color": INK,
                "thickness": 1.5,
            },
            customdata=[
                [
                    *(f"{x:+.4f}" for x in (arm.mean, arm.lowest, arm.highest)),
                    arm.spread or 0.0,
                    arm.plays,
                ]
                for arm in arms
            ],
            mode="markers",
            marker={"color": [style.color for style in styles], "size": 13},
            hovertemplate=(
                "LR %{x}<br>mean %{customdata[0]}, standard deviation %{customdata[3]:.4f}<br>"
                "from %{customdata[1]} to %{customdata[2]} in %{customdata[4]} episodes"
                "<extra></extra>"
            ),
            meta={"role": "ink"},
            showlegend=False,
        )
    )
    figure.update_xaxes(type="category")
    means = "; ".join(
        f"{label} {arm.mean:+.4f}" + ("" if arm.spread is None else f" ± {arm.spread:.4f}")
        for label, arm in zip(labels, arms, strict=True)
    )
    text = f"Mean reward and standard deviation: {means}."
    return Plot("mean-reward", "Mean reward and spread", text, figure, wide=False)


def calibration_plot(run: RunData, styles: ArmStyles) -> Plot | None:
    """How far each trial of the calibration went, and the LR that was found."""
    if not run.trials:
        return None
    limited_by = None if run.outcome is None else run.outcome.limited_by
    figure = trials_figure(run.trials, run.calibrated_lr, limited_by)
    text = (
        f"{_count(len(run.trials), 'trial')}. The LR found is where the first of the two movements "
        f"reaches 1: {OUTPUT_RADIUS:.0%} of what the model computes, {WEIGHT_RADIUS:.0%} of the "
        "weights."
    )
    return Plot("calibration", "Calibration", f"{text} {run.outcome or ''}".strip(), figure)


def trials_figure(
    trials: Sequence[Trial], found: float | None, limited_by: str | None
) -> go.Figure:
    """Draw how far each trial went, over its LR.

    Args:
        trials: the trials.
        found: the LR that was found, which is marked where its limit is reached, or `None`.
        limited_by: which limit that is, `outputs` or `weights`; `None` where nothing was found, and
            then nothing is marked.
    """
    figure = new_figure("movement, share of what is allowed", "learning rate of the trial")
    figure.update_layout(hovermode="closest")
    for name, role, radius in (
        ("outputs", "accent", OUTPUT_RADIUS),
        ("weights", "second", WEIGHT_RADIUS),
    ):
        figure.add_trace(_movements(trials, name, role, radius))
    figure.update_xaxes(log_axis(x for trace in figure.data for x in trace.x or [1.0]))
    figure.update_yaxes(log_axis([1.0, *(y for trace in figure.data for y in trace.y if y)]))
    figure.add_hline(1.0, line={"color": "#82889a", "width": 1})
    if found is not None and limited_by is not None:
        figure.add_trace(
            go.Scatter(
                x=[rounded(found)],
                y=[1.0],
                name=f"found: {found:.3g}, limited by the {limited_by}",
                mode="markers",
                marker={"symbol": "star", "size": 16, "color": "#c9453d"},
                hovertemplate="LR found %{x:.3e}<extra></extra>",
            )
        )
        figure.add_vline(found, line={"color": "#82889a", "dash": "dash", "width": 2})
    return figure


def _movements(trials: Sequence[Trial], name: str, role: str, radius: float) -> go.Scatter:
    return go.Scatter(
        x=[rounded(trial.learning_rate) for trial in trials],
        y=[rounded(_visible(getattr(trial, _MOVEMENT[name]) / radius)) or None for trial in trials],
        customdata=[
            [number, t.step, moved(t.movement), moved(t.weight_movement)]
            for number, t in enumerate(trials, 1)
        ],
        name=f"{name} moved",
        mode="markers",
        marker={
            "symbol": "circle" if name == "outputs" else "diamond",
            "size": 11,
            "color": ACCENT if role == "accent" else SECOND,
        },
        meta={"role": role},
        hovertemplate=_TRIAL,
    )


def _shading(run: RunData, styles: ArmStyles) -> go.Heatmap:
    """Return one strip for all episodes; steps between them, as calibration takes, stay empty."""
    rows = _rows(run, styles)
    edges: list[int] = []
    cells: list[int | None] = []
    data: list[Sequence[Any]] = []
    for record, row in zip(run.episodes, rows, strict=True):
        if edges and record.start_step > edges[-1]:
            cells.append(None)
            data.append([None] * len(row))
            edges.append(record.start_step)
        elif not edges:
            edges.append(record.start_step)
        cells.append(styles.index(record))
        data.append(row)
        edges.append(max(record.end_step + 1, edges[-1] + 1))
    count = len(styles)
    scale: list[tuple[float, str]] = []
    for index in range(count):
        color = styles[index].color
        scale += [(index / count, color), ((index + 1) / count, color)]
    return go.Heatmap(
        x=edges,
        y=[0, 1],
        z=[cells],
        customdata=[data],
        zmin=-0.5,
        zmax=count - 0.5,
        colorscale=scale,
        showscale=False,
        opacity=0.3,
        hoverongaps=False,
        hovertemplate=_EPISODE,
        name="episodes",
    )


def _rows(run: RunData, styles: ArmStyles) -> list[list[Any]]:
    """Return what `_EPISODE` shows of each episode."""
    rows: list[list[Any]] = []
    for index, (record, skipped) in enumerate(zip(run.episodes, run.skips(), strict=True)):
        notes = notes_on(run, index, skipped)
        rows.append(
            [
                index + 1,
                record.start_step,
                record.end_step,
                styles[styles.index(record)].label,
                rounded(record.start_loss),
                rounded(record.end_loss),
                f"{record.reward:+.4f}",
                "".join(f"<br>{plain(note)}" for note in notes),
            ]
        )
    return rows


def _markers(
    run: RunData,
    rows: list[list[Any]],
    own: list[int],
    name: str,
    *,
    color: str,
    size: float,
    symbol: str = "circle",
) -> go.Scatter:
    return go.Scatter(
        x=[run.episodes[i].end_step + 1 for i in own],
        y=[rounded(run.episodes[i].reward) for i in own],
        customdata=[rows[i] for i in own],
        name=plain(name),
        mode="markers",
        marker={"color": color, "size": size, "symbol": symbol, "line": {"width": 1.5}}
        if symbol != "circle"
        else {"color": color, "size": size},
        meta={"role": ROLES.get(color)},
        hovertemplate=_EPISODE,
    )


def _stems(run: RunData, own: list[int], name: str, color: str) -> go.Scatter:
    """Return one path that goes from 0 to each reward and back, in place of markers."""
    steps: list[int] = []
    rewards: list[float] = []
    for i in own:
        steps += [run.episodes[i].end_step + 1] * 3
        rewards += [0.0, rounded(run.episodes[i].reward), 0.0]
    return go.Scatter(
        x=steps,
        y=rewards,
        name=plain(name),
        mode="lines",
        line={"color": color, "width": 1},
        hoverinfo="skip",
    )


def _size(run: RunData) -> float:
    return 8.0 if len(run.episodes) < 200 else 5.0


def _course(subject: str, series: Series) -> str:
    if not series:
        return ""
    (first, start), (last, end) = series[0], series[-1]
    verb = "fell" if end < start else "rose" if end > start else "stayed"
    return (
        f"{subject} {verb} from {shown(start)} at step {first} to {shown(end)} at step {last}."
        if len(series) > 1
        else f"{subject} was {shown(end)} at step {last}."
    )


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _visible(share: float) -> float:
    """Keep within sight how far a step went whose outputs are not finite, a huge number."""
    return min(share, 1e3)
