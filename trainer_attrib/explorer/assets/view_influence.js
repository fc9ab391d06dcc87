"use strict";
// Which examples made the model say this: by step, by source, one by one.
TA.parts.influence = async (part, { ledger, key, name }) => {
  const facets = await TA.get(`${ledger}/facets`), { params } = TA.route();
  let number = Math.min(Math.max(0, Number(params.query) || 0), part.queries.length - 1);
  const query = () => part.queries[number];
  const overview = TA.h("div", { class: "charts" }), said = TA.h("p", { class: "note told", role: "status" }), lists = TA.h("div", { class: "sides" });
  let shown = { top: [], bottom: [] };
  const filters = TA.filters(facets, () => draw());
  let turn = 0;
  const draw = async () => {
    const mine = ++turn, asked = Object.keys(filters.now).length > 0;
    let found;
    if (asked && TA.live) {
      try { found = await TA.get(`${ledger}/answers/${key}/filtered`, { query: number, limit: 20, ...filters.now }); } catch (error) { if (error.status !== 404) { said.textContent = error.message; return; } } // 404: kept without all scores
    }
    if (mine !== turn) return; // a later filter was faster
    const among = found ? `${TA.shown(found.matching)} of ${TA.shown(found.examples)} examples` : asked ? `the ${part.kept} strongest at either end` : `${TA.shown(part.examples)} examples`;
    found ||= Object.fromEntries(["top", "bottom"].map((end) => [end, query()[end].filter((e) => TA.meets(e, filters.now))]));
    shown = Object.fromEntries(["top", "bottom"].map((end) => [end, found[end].map(coloured).slice(0, 20)]));
    said.textContent = `Recipe ${part.recipe}, among ${among}. Positive scores: training on the example made this likelier.`;
    lists.replaceChildren(...[["Proponents", "made it likelier", shown.top], ["Opponents", "made it less likely", shown.bottom]].map(([title, why, rows]) =>
      TA.h("section", {}, TA.h("h3", {}, title, " ", TA.h("small", {}, why)), TA.cards(rows))));
    TA.highlight();
  };
  const tokens = new Map();
  const coloured = (example) => ({ ...example, tokens: example.tokens || tokens.get(TA.identity(example)) });
  const choose = (value) => {
    number = Number(value); TA.remember({ query: number || null });
    tokens.clear();
    for (const e of [...query().top, ...query().bottom]) if (e.tokens) tokens.set(TA.identity(e), e.tokens);
    overview.replaceChildren(...[steps(query().steps), sources(query().sources)].filter(Boolean));
    return draw();
  };
  await choose(number);
  const records = () => [{ id: `${query().behavior}/${number}`, behavior: query().behavior, query: query().query, ...shown }];
  return [TA.h("h2", {}, "Training examples"),
    part.queries.length > 1 && TA.h("div", { class: "tools" }, TA.select("Query", part.queries.map((q, i) => [String(i), `${q.behavior}: ${q.query}`]), String(number), choose)),
    overview, filters.element, TA.h("div", { class: "tools" }, TA.marker(), TA.exporter(`${name}-examples`, () => ({
      data: { ...query(), ...shown, recipe: part.recipe, conditions: filters.now }, rows: [...shown.top, ...shown.bottom].map((e) => ({ behavior: query().behavior, query: query().query, ...e })), pair: records(),
    }), { pair: true, path: `${ledger}/answers/${key}` })), said, lists, beside(part), TA.notes("What to keep in mind", part.caveats)];

  function steps(rows) {
    if (!rows.length) return null;
    const ends = new Map(), stages = [...new Set(rows.map((r) => r.stage))];
    let at = 0;
    for (const stage of stages) { ends.set(stage, at); at += Math.max(...rows.filter((r) => r.stage === stage).map((r) => r.last_step)); }
    return TA.chart("Over training: sum of the scores of each range of steps", {
      width: 550, height: 215, marginLeft: 58, marginTop: 28, x: { label: "step, stages one after another" }, y: { label: null, grid: true, tickFormat: "~g" },
      marks: [
        Plot.rectY(rows, { x1: (r) => ends.get(r.stage) + r.first_step - 1, x2: (r) => ends.get(r.stage) + r.last_step, y: "sum", fill: (r) => TA.sign(r.sum), insetLeft: 0.5, insetRight: 0.5 }),
        Plot.ruleY([0], { stroke: "var(--dim)" }), Plot.ruleX([...ends.values()], { stroke: "var(--line)" }),
        Plot.text([...ends], { x: (e) => e[1], text: (e) => TA.short(e[0], 20), frameAnchor: "top", dy: -16, dx: 3, textAnchor: "start", fill: "var(--dim)" }),
      ],
    }, [["stage", (r) => r.stage], ["steps", (r) => `${r.first_step}–${r.last_step}`], ["sum", (r) => r.sum], ["mean", (r) => r.mean], ["rows", (r) => r.count]], rows);
  }
  function sources(rows) {
    const named = rows.filter((r) => r.source).map((r) => ({ ...r, name: `${r.source} (${r.stage})` })).sort((a, b) => Math.abs(b.sum) - Math.abs(a.sum)).slice(0, 12);
    return named.length ? TA.bars("By source: sum of the scores", named.map((r) => ({ ...r, value: r.sum })), null, { width: 540, columns: [["source", (r) => r.source], ["stage", (r) => r.stage], ["sum", (r) => r.sum], ["mean", (r) => r.mean], ["rows", (r) => r.count]] }) : null;
  }
  function beside(found) {
    if (!found.beside.length) return [];
    return [TA.h("h2", {}, "The same queries by other rankings"), TA.h("p", { class: "note" }, "What a search for words or a plain comparison of gradients finds too is no merit of the method."),
      TA.table([["ranking", (b) => b.name], [`of its first ${found.beside[0].k}, shared`, (b) => b.shared], ["standard error", (b) => b.standard_error], ["puts first", (b) => TA.short(b.first[number], 110)]], found.beside)];
  }
};
