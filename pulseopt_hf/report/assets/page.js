"use strict";
(() => {
  const { themes, plots, rows } = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const print = matchMedia("print");

  // The running means of curves. Points that are drawn as dots are few, and stay.
  const smoothed = (rows, factor) => {
    const sums = {};
    return rows.map((row) => {
      if (row.dot) return row;
      const sum = (sums[row.name] ??= { value: 0, weight: 0 });
      sum.value = factor * sum.value + (1 - factor) * row.value;
      sum.weight = factor * sum.weight + (1 - factor);
      return { ...row, value: sum.value / sum.weight };
    });
  };

  // Do to the first panel of a plot what the controls above it say.
  const adjust = (figure, spec) => {
    const [{ layer: layers }] = spec.vconcat ?? [spec];
    const control = (name) => figure.querySelector(`[data-control=${name}]`);
    if (control("log")?.checked) {
      for (const y of layers.map((layer) => layer.encoding.y).filter(Boolean)) {
        Object.assign(y, { scale: { type: "log", nice: false, padding: 10 }, axis: { tickCount: 4 } });
      }
    }
    const factor = Number(control("smooth").value);
    if (factor > 0) {
      const index = layers.findIndex((layer) => layer.name === "curves-0");
      const { name, ...logged } = layers[index];
      layers[index].data = { name: "smoothed" };
      spec.datasets.smoothed = smoothed(spec.datasets["panel-0"], factor);
      layers.splice(index, 0, { ...logged, mark: { ...logged.mark, strokeOpacity: 0.3 } });
    }
  };

  const draw = async (element) => {
    // A copy: Vega marks the rows that it takes, and controls change what is drawn.
    const { spec, columns } = structuredClone(plots[element.id]);
    const theme = structuredClone(themes[dark.matches && !print.matches ? 1 : 0]);
    const width = Math.max(120, element.clientWidth - 96); // beside the axes
    const entries = Math.max(1, Math.min(columns, Math.round((columns * width) / 720)));
    theme.axisX.tickCount = Math.ceil(width / 80);
    Object.assign(theme.legend, { columns: entries, labelLimit: width / entries - 24 });
    for (const part of spec.vconcat ?? [spec]) part.width = width;
    const figure = element.closest("figure");
    if (figure.querySelector("[data-control]")) adjust(figure, spec);
    element.drawn?.finalize();
    element.drawn = await vegaEmbed(element, spec, {
      config: theme,
      actions: false,
      renderer: Math.max(...Object.values(spec.datasets).map((rows) => rows.length)) > 2000 ? "canvas" : "svg",
      ast: true, // evaluates nothing, which the page forbids
      tooltip: { disableDefaultStyle: true },
    });
    element.width = element.clientWidth;
  };

  const canvases = document.querySelectorAll(".canvas");
  const canvasBelow = (control) => control.closest("figure").querySelector(".canvas");

  // One after the other, so that the first is there to be seen while the rest are drawn.
  (async () => {
    for (const canvas of canvases) {
      await draw(canvas);
      await new Promise((resolve) => setTimeout(resolve));
    }
    document.documentElement.dataset.drawn = "all";
  })();

  const save = async (canvas, format) => {
    const link = document.createElement("a");
    link.href = await canvas.drawn.view.toImageURL(format, 2);
    link.download = `${canvas.id}.${format}`;
    link.click();
  };
  for (const button of document.querySelectorAll("[data-save]")) {
    button.addEventListener("click", () => save(canvasBelow(button), button.dataset.save));
  }

  for (const control of document.querySelectorAll("[data-control]")) {
    control.addEventListener("change", () => draw(canvasBelow(control)));
  }

  // Long tables are filled when they are opened.
  for (const [id, table] of Object.entries(rows)) {
    const fill = () => {
      const body = document.querySelector(`#${id} tbody`);
      for (const row of table) {
        const line = body.insertRow();
        for (const cell of Object.values(row)) line.insertCell().textContent = cell;
      }
    };
    document.getElementById(id).addEventListener("toggle", fill, { once: true });
  }

  // A head's button sorts its table by that column, numbers as numbers.
  const order = new Intl.Collator(undefined, { numeric: true }).compare;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? order(a, b) : a - b);
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement;
      const up = head.ariaSort !== "ascending";
      for (const other of head.parentElement.cells) other.ariaSort = null;
      head.ariaSort = up ? "ascending" : "descending";
      const body = head.closest("table").tBodies[0];
      const cell = (row) => row.cells[head.cellIndex].textContent;
      const sorted = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(cell(a), cell(b)));
      body.append(...sorted);
    });
  }

  for (const query of [dark, print]) query.addEventListener("change", () => canvases.forEach(draw));
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      for (const canvas of canvases) if (canvas.clientWidth !== canvas.width) draw(canvas);
    }, 150);
  });
})();
