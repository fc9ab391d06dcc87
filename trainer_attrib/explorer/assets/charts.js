"use strict";
// Charts by Observable Plot, each with its numbers as a table for whoever cannot or will not look.
TA.chart = (title, options, columns, rows) => {
  const svg = Plot.plot({ style: { background: "transparent", color: "var(--fg)", fontSize: "12px", overflow: "visible" }, ...options });
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${TA.clean(title)}; the numbers are in the table below`);
  return TA.h("figure", {}, TA.h("figcaption", {}, title), svg, columns && TA.h("details", {}, TA.h("summary", {}, "as a table"), TA.table(columns, rows, title)));
};
TA.sign = (value) => (value < 0 ? "var(--down)" : "var(--up)");
TA.margin = (names, least = 60) => Math.min(300, Math.max(least, 12 + 6.6 * Math.max(0, ...names.map((name) => TA.short(name, 42).length))));

/** Horizontal bars around zero with whiskers: rows of {name, value, error, certain}. Two may have one name. */
TA.bars = (title, rows, unit, more = {}) => {
  const placed = rows.map((row, place) => ({ ...row, place }));
  return TA.chart(title, {
    width: more.width || 720, height: 46 + 22 * rows.length, marginLeft: TA.margin(rows.map((r) => r.name)), marginRight: 60,
    x: { label: unit || null, grid: true }, y: { domain: d3.range(rows.length), label: null, tickFormat: (place) => TA.short(rows[place].name, 42) },
    marks: [
      Plot.barX(placed, { y: "place", x1: 0, x2: "value", fill: (r) => TA.sign(r.value), fillOpacity: (r) => (r.certain === false ? 0.35 : 0.85), insetTop: 3, insetBottom: 3 }),
      Plot.ruleX([0], { stroke: "var(--dim)" }),
      Plot.ruleY(placed.filter((r) => r.error), { y: "place", x1: (r) => r.value - r.error, x2: (r) => r.value + r.error, stroke: "var(--fg)" }),
      Plot.text(placed, { y: "place", x: (r) => Math.max(0, r.value + (r.error || 0)), text: (r) => TA.signed(r.value), dx: 6, textAnchor: "start", fill: "var(--dim)" }),
    ],
  }, more.columns || [["", (r) => r.name], ["value", (r) => r.value], ["± error bar", (r) => r.error ?? null], ["reliable", (r) => r.certain !== false]], rows);
};

/** Colours of categories, apart for the colour-blind too (Okabe and Ito). */
TA.palette = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a7f00", "#7a7a7a"];
TA.legend = (names) => TA.h("div", { class: "legend" }, names.map((name, i) => TA.h("span", {}, TA.h("i", { style: `background:${TA.palette[i % TA.palette.length]}` }), name)));
