"use strict";
// The tree of stages, and curves of what training did.
TA.views.ledger = async (main, { ledger }) => {
  const found = await TA.get(`${ledger}/ledger`);
  const children = new Map();
  for (const stage of found.stages) children.set(stage.parent, [...(children.get(stage.parent) || []), stage]);
  const facts = (stage) => [
    stage.status + (stage.reason ? ` (${stage.reason})` : ""), `${TA.shown(stage.steps)} steps of ${stage.optimizers.map((o) => o.split(".").at(-1)).join(" and ")}`,
    `${TA.shown(stage.rows)} rows of ${TA.shown(stage.examples)} examples`, `${(stage.bytes / 1e6).toFixed(1)} MB`, `${stage.snapshots.length} snapshots`,
    stage.coverage != null && `rows cover ${(100 * stage.coverage).toFixed(1)} % of the trainable parameters`, stage.processes > 1 && `${stage.processes} processes`, stage.link_changes,
  ].filter(Boolean).join(" · ");
  const branch = (parent) => (children.get(parent) || []).map((stage) => TA.h("li", {},
    TA.h("div", { class: "stage" }, TA.h("b", {}, stage.name), TA.h("span", { class: "facts" }, facts(stage))),
    children.has(stage.name) && TA.h("ul", {}, branch(stage.name))));
  const roots = found.stages.filter((s) => s.parent == null || !found.stages.some((o) => o.name === s.parent));
  main.append(TA.h("h1", {}, "Ledger"), TA.h("p", { class: "sub" }, `${found.ledger} · ${found.stages.length} stages of a model with ${TA.shown(found.parameters)} parameters`),
    TA.h("div", { class: "tools" }, TA.exporter("ledger", () => ({ data: found, rows: found.stages }), { path: `${ledger}/ledger` })), TA.h("ul", { class: "tree" }, [...new Set(roots.map((s) => s.parent))].flatMap(branch)));
  const curves = await Promise.all(found.stages.map((stage) => TA.get(`${ledger}/curves/${stage.name}`)));
  const rows = curves.flatMap((curve) => curve.points.map((point) => ({ stage: curve.stage, ...point })));
  main.append(TA.h("h2", {}, "What training did"), TA.legend(found.stages.map((s) => s.name)), TA.h("div", { class: "charts" }, [["loss", "loss"], ["learning_rate", "learning rate"], ["gradient_norm", "gradient norm"]].map(([name, title]) => {
    const known = rows.filter((row) => row[name] != null);
    return known.length > 0 && TA.chart(title, {
      width: 345, height: 210, marginLeft: 54, x: { label: "step" }, y: { label: null, grid: true, tickFormat: "~g" },
      color: { domain: found.stages.map((s) => s.name), range: TA.palette },
      marks: [Plot.lineY(known, { x: "step", y: name, stroke: "stage", z: "stage", strokeWidth: 1.4 }), Plot.tip(known, Plot.pointerX({ x: "step", y: name, stroke: "stage", fill: "var(--card)" }))],
    }, [["stage", (r) => r.stage], ["first", (r) => r.first], ["last", (r) => r.last], ["least", (r) => r.least], ["most", (r) => r.most]],
    found.stages.map((s) => known.filter((r) => r.stage === s.name).map((r) => r[name])).map((v, i) => ({ stage: found.stages[i].name, first: v[0], last: v.at(-1), least: d3.min(v), most: d3.max(v) })));
  })));
};
