"use strict";
// Effects of stages: a waterfall for one behavior, a heat map of all.
TA.parts = {};
TA.parts.stage_effects = (part, { name }) => {
  const behaviors = [...new Set(part.means.map((m) => m.behavior))], { params } = TA.route();
  const methods = [...new Set(part.means.map((m) => m.method))];
  let behavior = behaviors.includes(params.behavior) ? params.behavior : behaviors[0], method = methods.includes(params.method) ? params.method : methods.at(-1); // the dearest comes last
  const charts = TA.h("div"), picked = () => part.means.filter((m) => m.behavior === behavior && m.method === method);
  const draw = () => {
    charts.replaceChildren(waterfall(picked(), part.interactions.find((i) => i.behavior === behavior && i.method === method), behavior, method),
      behaviors.length > 1 ? heat(part.means.filter((m) => m.method === method), behaviors, method) : "", queries(part.rows.filter((r) => r.behavior === behavior && r.method === method)));
  };
  const choose = (what) => (value) => { if (what === "behavior") behavior = value; else method = value; TA.remember({ [what]: value }); draw(); };
  draw();
  return [TA.h("h2", {}, "Effect of each stage"), TA.h("p", { class: "note" }, "What the model does with the stage minus what it would do had the stage's updates not been executed, mean over the queries. Pale bars are not reliable: their error bar is more than half of them."),
    TA.h("div", { class: "tools" }, behaviors.length > 1 && TA.select("Behavior", behaviors, behavior, choose("behavior")), methods.length > 1 && TA.select("Method", methods, method, choose("method")),
      TA.exporter(`${name}-effects`, () => ({ data: part, rows: part.rows }))), charts, TA.notes("What to keep in mind", part.caveats)];

  function waterfall(means, interaction, title, how) {
    let at = 0;
    const rows = means.map((m) => ({ name: m.stage, value: m.effect, error: m.error_bar, certain: m.reliable, from: at, to: (at += m.effect) }));
    if (interaction) {
      const rest = Math.abs(interaction.residual) < 1e-9 * Math.abs(interaction.whole) ? 0 : interaction.residual; // the last digits
      rows.push({ name: "(interaction)", value: rest, certain: true, from: at, to: at + rest });
      rows.push({ name: "all of training", value: interaction.whole, certain: true, from: 0, to: interaction.whole, total: true });
    }
    return TA.chart(`${title}, by ${how}: one stage after another, whiskers are error bars`, {
      width: 760, height: 54 + 30 * rows.length, marginLeft: TA.margin(rows.map((r) => r.name), 90), marginRight: 74, x: { grid: true, label: "change of the behavior" }, y: { domain: rows.map((r) => r.name), label: null, tickFormat: (n) => TA.short(n, 42) },
      marks: [
        Plot.barX(rows, { y: "name", x1: "from", x2: "to", fill: (r) => (r.total ? "var(--dim)" : TA.sign(r.value)), fillOpacity: (r) => (r.certain ? 0.85 : 0.35), insetTop: 5, insetBottom: 5 }),
        Plot.ruleX([0], { stroke: "var(--dim)" }),
        Plot.ruleY(rows.filter((r) => r.error), { y: "name", x1: (r) => r.to - r.error, x2: (r) => r.to + r.error, stroke: "var(--fg)", strokeWidth: 1.5 }),
        Plot.text(rows, { y: "name", x: (r) => Math.max(r.from, r.to + (r.error || 0)), text: (r) => TA.signed(r.value) + (r.certain ? "" : " ?"), dx: 6, textAnchor: "start", fill: "var(--fg)" }),
      ],
    }, [["stage", (r) => r.name], ["effect", (r) => r.value], ["± error bar", (r) => r.error ?? null], ["reliable", (r) => r.certain]], rows);
  }
  function heat(means, names, how) {
    const most = new Map(names.map((b) => [b, Math.max(1e-12, ...means.filter((m) => m.behavior === b).map((m) => Math.abs(m.effect)))]));
    const stages = [...new Set(means.map((m) => m.stage))];
    return TA.chart(`All behaviors, by ${how}: color is the share of a behavior's largest effect`, {
      width: Math.min(1100, 180 + TA.margin(names) + 110 * stages.length), height: 64 + 26 * names.length, marginLeft: TA.margin(names), x: { domain: stages, label: null, axis: "top" }, y: { domain: names, label: null, tickFormat: (n) => TA.short(n, 42) },
      marks: [
        Plot.cell(means, { x: "stage", y: "behavior", fill: (m) => TA.sign(m.effect), fillOpacity: (m) => 0.08 + 0.72 * Math.abs(m.effect) / most.get(m.behavior), inset: 1 }),
        Plot.text(means, { x: "stage", y: "behavior", text: (m) => TA.signed(m.effect) + (m.reliable ? "" : " ?"), fill: "var(--fg)" }),
      ],
    }, [["behavior", (m) => m.behavior], ["stage", (m) => m.stage], ["effect", (m) => m.effect], ["± error bar", (m) => m.error_bar], ["reliable", (m) => m.reliable]], means);
  }
  function queries(rows) {
    return TA.h("details", {}, TA.h("summary", {}, `every query (${rows.length} rows)`), TA.table([["query", (r) => r.query], ["stage", (r) => r.stage], ["effect", (r) => r.effect], ["± error bar", (r) => r.error_bar],
      ["reliable", (r) => r.reliable], ["read-out", (r) => r.read_out], ["cost", (r) => r.cost]], rows.slice(0, 500)));
  }
};
