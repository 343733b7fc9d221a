"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const print = matchMedia("print");
  const narrow = matchMedia("(max-width: 700px)");

  const palette = () => {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(`--${name}`).trim();
    return Object.fromEntries(
      ["card", "ink", "soft", "line", "accent", "second"].map((name) => [name, read(name)]),
    );
  };

  // Traces name a role where their colour has to follow the page's.
  const colored = (trace, colors) => {
    const color = colors[trace.meta?.role];
    if (!color) return trace;
    const copy = { ...trace };
    if (trace.line) copy.line = { ...trace.line, color };
    if (trace.marker && !Array.isArray(trace.marker.color)) copy.marker = { ...trace.marker, color };
    if (trace.error_y) copy.error_y = { ...trace.error_y, color };
    return copy;
  };

  const layoutOf = (data, layout, colors) => {
    const copy = structuredClone(layout);
    copy.paper_bgcolor = copy.plot_bgcolor = colors.card;
    copy.font = { ...copy.font, color: colors.ink };
    copy.hoverlabel = {
      ...copy.hoverlabel, bgcolor: colors.card, bordercolor: colors.soft, font: { color: colors.ink },
    };
    copy.modebar = { bgcolor: "rgba(0,0,0,0)", color: colors.soft, activecolor: colors.accent };
    for (const [name, axis] of Object.entries(copy)) {
      if (/^[xy]axis/.test(name)) {
        Object.assign(axis, { gridcolor: colors.line, linecolor: colors.line, tickcolor: colors.line });
      }
    }
    copy.legend = { ...copy.legend, font: { size: narrow.matches ? 11 : 13 } };
    if (narrow.matches) {
      copy.margin = { ...copy.margin, l: 48, r: 8 };
      // A legend takes a line for each entry here, and the curves keep their room.
      const entries = data.filter((trace) => trace.name && trace.showlegend !== false).length;
      copy.height += 18 * Math.max(0, entries - 3);
    }
    return copy;
  };

  const save = (format) => (element) =>
    Plotly.downloadImage(element, { format, filename: element.id, scale: format === "png" ? 2 : 1 });

  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: true,
    modeBarButtons: [[
      { name: "png", title: "Save as PNG", icon: Plotly.Icons.camera, click: save("png") },
      { name: "svg", title: "Save as SVG", icon: Plotly.Icons.disk, click: save("svg") },
      "resetScale2d",
    ]],
  };

  const draw = (name) => {
    const element = document.getElementById(name);
    const colors = palette();
    const { data, layout } = figures[name];
    return Plotly.react(
      element, data.map((trace) => colored(trace, colors)), layoutOf(data, layout, colors), config,
    );
  };

  const names = Object.keys(figures);
  const drawAll = () => Promise.all(names.map(draw));

  // One after the other, so that the first is there to be seen while the rest are drawn.
  const next = (index) => {
    if (index === names.length) {
      document.documentElement.dataset.drawn = "all";
      return;
    }
    draw(names[index]).then(() => setTimeout(() => next(index + 1)));
  };
  next(0);

  // Long tables are made when they are opened.
  const fill = (details, rows) => {
    const body = details.querySelector("tbody");
    for (const row of rows) {
      const line = body.insertRow();
      for (const cell of row) line.insertCell().textContent = cell;
    }
  };
  const rows = JSON.parse(document.getElementById("rows").textContent);
  for (const [id, table] of Object.entries(rows)) {
    const details = document.getElementById(id);
    details.addEventListener("toggle", () => fill(details, table), { once: true });
  }

  for (const query of [dark, print, narrow]) query.addEventListener("change", drawAll);
})();
