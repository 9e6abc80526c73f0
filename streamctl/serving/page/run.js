// The page of the run: metrics table, training curves, code usage, stages.

import { byId, draw, make, number, table } from "./dom.js";

export function showRun(report) {
  byId("metrics").replaceChildren(...metrics(report.evaluation));
  byId("curves").replaceChildren(
    ...(report.curves.length ? report.curves.map(curve) : [none("No training has been logged.")]),
  );
  byId("codes").replaceChildren(report.codes ? codes(report.codes) : none("This run has no codes."));
  byId("stages").replaceChildren(
    table(
      `${report.run}, answered by ${report.method}`,
      ["stage", "seed", "seconds", "peak memory (MB)", "made by"],
      report.stages.map((s) => [s.name, s.seed ?? "", s.wall_s.toFixed(1), s.peak_memory_mb, s.git ?? ""]),
    ),
  );
}

// A control may know the answer: the best is the best of the methods.
const rivals = (rows) => rows.filter(([name]) => !name.endsWith("(control)"));

const none = (text) => make("p", { class: "empty" }, text);

function metrics(tables) {
  if (!tables.length) return [none("This run has not been evaluated: streamctl eval --run RUN")];
  return tables.map(({ title, columns, rows }) => {
    const best = columns.map((_, index) =>
      Math.max(...rivals(rows).map((row) => (typeof row[index] === "number" ? row[index] : -Infinity))),
    );
    return table(title, columns, rows, (value, index) => index > 0 && value === best[index]);
  });
}

const [WIDTH, HEIGHT, LEFT, BOTTOM, TOP] = [320, 170, 58, 22, 8];

function curve({ stage, metric, points }) {
  const xs = points.map(([x]) => x);
  const ys = points.map(([, y]) => y);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const place = (value, low, high, from, to) =>
    high === low ? (from + to) / 2 : from + ((value - low) / (high - low)) * (to - from);
  const at = points.map(([x, y]) => [
    place(x, x0, x1, LEFT + 4, WIDTH - 8),
    place(y, y0, y1, HEIGHT - BOTTOM - 4, TOP + 4),
  ]);
  const last = ys[ys.length - 1];
  const text = `${stage} ${metric}: ${points.length} points, from ${number(ys[0])} to ${number(last)}`;
  const label = (x, y, anchor, value) => draw("text", { x, y, "text-anchor": anchor }, value);
  return make(
    "figure",
    {},
    make("figcaption", {}, `${stage}: ${metric} `, make("b", {}, number(last))),
    draw(
      "svg",
      { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": text },
      draw("path", { class: "axis", fill: "none", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - 4}` }),
      draw("polyline", { class: "line", points: at.map((p) => p.join(",")).join(" ") }),
      ...(at.length < 30 ? at.map(([cx, cy]) => draw("circle", { class: "dot", cx, cy, r: 2.5 })) : []),
      label(LEFT - 4, TOP + 9, "end", number(y1)),
      label(LEFT - 4, HEIGHT - BOTTOM, "end", number(y0)),
      label(LEFT, HEIGHT - 6, "start", number(x0)),
      label(WIDTH - 6, HEIGHT - 6, "end", number(x1)),
    ),
  );
}

function codes({ levels, collision_rate, distinct, items }) {
  return make(
    "div",
    { class: "usage" },
    make("p", { class: "quiet" }, `${number(items)} items, ${number(distinct)} distinct codes, collision rate ${(100 * collision_rate).toFixed(2)}%`),
    ...levels.map((level, index) => {
      const peak = Math.max(...level.counts, 1);
      const width = 1000 / level.counts.length;
      const text = `Level ${index + 1}: ${level.used} of ${level.codes} codes used, entropy ${level.entropy.toFixed(2)} bits of ${Math.log2(level.codes).toFixed(0)}`;
      const bars = level.counts.map((count, code) =>
        draw("rect", { class: "fill", x: code * width, width: width * 0.85, y: 60 - (60 * count) / peak, height: (60 * count) / peak }),
      );
      return make(
        "figure",
        {},
        make("figcaption", {}, text),
        draw("svg", { class: "chart", viewBox: "0 0 1000 62", preserveAspectRatio: "none", role: "img", "aria-label": text }, ...bars),
      );
    }),
  );
}
