"use strict";
// What a run would change, who would do it, and what would be left without them.
TA.parts.forecast = (part, { name, parts }) => {
  const methods = [...new Set(part.rows.map((r) => r.method))], contributions = parts.find((p) => p.kind === "contributions");
  let method = methods[0];
  const chart = TA.h("div");
  const draw = () => chart.replaceChildren(TA.shifts(part.rows.filter((r) => r.method === method), method));
  draw();
  return [TA.h("h2", {}, "What the run would change"), TA.h("p", { class: "note" }, "Behavior after the run minus before it. Whiskers: error bar; grey band: noise floor, a smaller shift is below what the batches agree on. Pale: not reliable."),
    TA.h("div", { class: "tools" }, methods.length > 1 && TA.select("Method", methods, method, (value) => { method = value; draw(); }), TA.exporter(`${name}-forecast`, () => ({ data: part, rows: part.rows }))),
    chart, contributions && TA.reshaper(part.rows.filter((r) => r.method === methods[0]), contributions), TA.notes("What to keep in mind", part.caveats)];
};

TA.shifts = (rows, method, after) => TA.chart(`Predicted changes, ${method}${after ? "; outlined: as reshaped" : ""}`, {
  width: 760, height: 50 + 28 * rows.length, marginLeft: TA.margin(rows.map((r) => r.behavior), 90), marginRight: 74, x: { grid: true, label: "predicted change" }, y: { domain: rows.map((r) => r.behavior), label: null, tickFormat: (n) => TA.short(n, 42) },
  marks: [
    Plot.barX(rows.filter((r) => r.noise_floor), { y: "behavior", x1: (r) => -r.noise_floor, x2: (r) => r.noise_floor, fill: "var(--line)", insetTop: 3, insetBottom: 3 }),
    Plot.ruleX([0], { stroke: "var(--dim)" }),
    Plot.ruleY(rows.filter((r) => r.error_bar), { y: "behavior", x1: (r) => r.predicted - r.error_bar, x2: (r) => r.predicted + r.error_bar, stroke: "var(--fg)", strokeWidth: 1.5 }),
    Plot.dot(rows, { y: "behavior", x: "predicted", r: 5, fill: (r) => TA.sign(r.predicted), fillOpacity: (r) => (r.reliable ? 1 : 0.4) }),
    ...(after ? [Plot.dot(rows, { y: "behavior", x: (r) => after.get(r.behavior), r: 5, stroke: "var(--accent)", strokeWidth: 2 })] : []),
    Plot.text(rows, { y: "behavior", x: (r) => Math.max(r.predicted + (r.error_bar || 0), r.noise_floor || 0, after?.get(r.behavior) ?? -Infinity), text: (r) => TA.signed(after ? after.get(r.behavior) : r.predicted), dx: 9, textAnchor: "start", fill: after ? "var(--accent)" : "var(--fg)" }),
  ],
}, [["behavior", (r) => r.behavior], ["before", (r) => r.before], ["predicted", (r) => r.predicted], ["± error bar", (r) => r.error_bar], ["noise floor", (r) => r.noise_floor], ["reliable", (r) => r.reliable], ["regime", (r) => r.regime],
  ...(after ? [["as reshaped", (r) => after.get(r.behavior)]] : [])], rows);

/** Take away the examples that do most for a behavior and forecast again: contributions left out, in proportion to the measured prediction. */
TA.reshaper = (rows, contributions) => {
  const behaviors = contributions.behaviors.filter((b) => rows.some((r) => r.behavior === b)), { params } = TA.route();
  if (!behaviors.length) return null;
  let behavior = behaviors.includes(params.reshape) ? params.reshape : behaviors[0], share = Math.min(50, Math.max(0, Number(params.without) || 0));
  const said = TA.h("p", { class: "note", role: "status" }), chart = TA.h("div"), lists = TA.h("div", { class: "sides" });
  const slider = TA.h("input", { type: "range", min: 0, max: 50, step: 0.5, value: share, "aria-label": "share of the examples taken away, per cent", input: () => { share = Number(slider.value); TA.remember({ without: share || null }); draw(); } });
  const percent = TA.h("span");
  const order = () => { const v = contributions.values[contributions.behaviors.indexOf(behavior)]; return d3.range(v.length).sort((a, b) => v[b] - v[a]); };
  const draw = () => {
    const first = order(), count = Math.round((share / 100) * contributions.examples), gone = first.slice(0, count);
    const after = new Map(rows.map((row) => {
      const at = contributions.behaviors.indexOf(row.behavior);
      if (at < 0) return [row.behavior, null];
      const sum = contributions.sums[at], left = d3.sum(gone, (i) => contributions.values[at][i]);
      return [row.behavior, Math.abs(sum) > 1e-12 ? row.predicted * (1 - left / sum) : row.predicted - left];
    }));
    percent.textContent = `${share} %`;
    chart.replaceChildren(TA.shifts(rows, "to first order", after));
    said.textContent = `Without the ${TA.shown(count)} of ${TA.shown(contributions.examples)} examples that do most for “${behavior}”: ${TA.signed(rows.find((r) => r.behavior === behavior).predicted)} becomes ${TA.signed(after.get(behavior))}. First order: contributions left out, in proportion to the measured prediction; a plan (forecast.reshape) forecasts again in full.`;
  };
  const list = () => {
    const values = contributions.values[contributions.behaviors.indexOf(behavior)], told = (i) => ({ ...contributions.rows[i], score: values[i] }), all = order();
    lists.replaceChildren(...[["For", all.slice(0, 15)], ["Against", all.slice(-15).reverse()]].map(([title, some]) => TA.h("section", {}, TA.h("h3", {}, title), TA.cards(some.map(told)))));
    TA.highlight();
  };
  const choose = (value) => { behavior = value; TA.remember({ reshape: value }); draw(); list(); };
  draw(); list();
  return [TA.h("h2", {}, "Who would do it, and what would be left without them"),
    TA.h("div", { class: "tools" }, TA.select("Behavior", behaviors, behavior, choose), TA.h("label", {}, "Take away the strongest", TA.h("span", {}, slider, " ", percent)), TA.marker(),
      TA.exporter("contributions", () => { const v = contributions.values[contributions.behaviors.indexOf(behavior)]; const some = order().map((i) => ({ behavior, ...contributions.rows[i], contribution: v[i] })); return { data: some, rows: some }; })),
    said, chart, lists];
};
TA.parts.contributions = (part, { parts }) => (parts.some((p) => p.kind === "forecast") ? TA.notes("About the contributions", part.caveats)
  : [TA.reshaper(part.behaviors.map((b, i) => ({ behavior: b, predicted: part.sums[i], reliable: true })), part), TA.notes("What to keep in mind", part.caveats)]);
