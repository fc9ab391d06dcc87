"use strict";
// Two answers side by side: two recipes, two ledgers.
TA.views.compare = async (main, { ledger, params }) => {
  const session = await TA.get("session");
  const lists = await Promise.all(session.ledgers.map((_, i) => TA.get(`${i}/answers`)));
  const choices = lists.flatMap(({ answers }, i) => answers.map((a) => [`${i}/${a.key}`, `${session.ledgers.length > 1 ? session.ledgers[i] + ": " : ""}${a.title}`, a.kinds]));
  main.append(TA.h("h1", {}, "Compare"));
  if (choices.length < 2) { main.append(TA.h("p", { class: "note" }, "Two answers are needed: ask the same question by two recipes, or open two ledgers.")); return; }
  const kind = (pair) => choices.find(([at]) => at === pair[0])[2][0];
  const known = (value, other) => (choices.some(([at]) => at === value) ? value : other);
  const drawn = ["influence", "stage_effects", "forecast"], pairs = choices.flatMap((c, i) => choices.slice(i + 1).filter((o) => o[2][0] === c[2][0] && drawn.includes(c[2][0])).map((o) => [c[0], o[0]]));
  const [first, second] = pairs.sort((x, y) => drawn.indexOf(kind(x)) - drawn.indexOf(kind(y)))[0] || choices.map((c) => c[0]);
  let [a, b] = [known(params.a, first), known(params.b, second)], number = Number(params.query) || 0;
  const place = TA.h("div"), tools = TA.h("div", { class: "tools" });
  const draw = async () => {
    const both = await Promise.all([a, b].map((at) => TA.get(at.replace("/", "/answers/")))), parts = both.map((one) => one.parts[0]);
    place.replaceChildren();
    if (parts.every((p) => p.kind === "influence")) place.append(...influence(both, parts));
    else if (parts.every((p) => p.kind === "stage_effects")) place.append(effects(both, parts));
    else if (parts.every((p) => p.kind === "forecast")) place.append(TA.h("div", { class: "sides" }, both.map((one, i) => TA.h("section", {}, TA.h("h3", {}, TA.short(one.title)), TA.shifts(parts[i].rows.filter((r) => r.method === parts[i].rows[0].method), parts[i].rows[0].method)))));
    else place.append(TA.h("p", { class: "note" }, "These are answers to different kinds of questions: choose two of one kind."));
    TA.highlight();
  };
  const set = (name) => (value) => { if (name === "a") a = value; else b = value; TA.remember({ [name]: value }); draw(); };
  tools.append(TA.select("Left", choices, a, set("a")), TA.select("Right", choices, b, set("b")), ...TA.marker());
  main.append(tools, place);
  await draw();

  function influence(both, parts) {
    const count = Math.min(...parts.map((p) => p.queries.length)), queries = parts.map((p) => p.queries[Math.min(number, p.queries.length - 1)]);
    const agreement = ["top", "bottom"].map((end) => {
      const sets = queries.map((q) => new Set(q[end].slice(0, 20).map(TA.identity)));
      return { end, k: Math.min(...sets.map((s) => s.size)), shared: [...sets[0]].filter((i) => sets[1].has(i)).length };
    });
    const shared = Object.fromEntries(["top", "bottom"].map((end) => { const sets = queries.map((q) => new Set(q[end].slice(0, 20).map(TA.identity))); return [end, new Set([...sets[0]].filter((i) => sets[1].has(i)))]; }));
    return [count > 1 ? TA.h("div", { class: "tools" }, TA.select("Query", d3.range(count).map((i) => [String(i), parts[0].queries[i].query]), String(number), (v) => { number = Number(v); TA.remember({ query: number || null }); draw(); })) : "",
      TA.h("p", { class: "note" }, agreement.map((g) => `Of the first ${g.k} ${g.end === "top" ? "proponents" : "opponents"}, ${g.shared} are in both.`).join(" ")),
      ...["top", "bottom"].map((end) => TA.h("div", {}, TA.h("h2", {}, end === "top" ? "Proponents" : "Opponents"), TA.h("div", { class: "sides" },
        both.map((one, i) => TA.h("section", {}, TA.h("h3", {}, TA.short(one.title, 80), " ", TA.h("small", {}, parts[i].recipe)), TA.cards(queries[i][end].slice(0, 20), { shared: shared[end] }))))))];
  }
  function effects(both, parts) {
    const rows = parts[0].means.map((m) => ({ ...m, other: parts[1].means.find((o) => o.behavior === m.behavior && o.stage === m.stage) }));
    return TA.table([["behavior", (r) => r.behavior], ["stage", (r) => r.stage], [`${TA.short(both[0].title, 40)}: ${parts[0].means[0]?.method}`, (r) => r.effect], ["± error bar", (r) => r.error_bar],
      [`${TA.short(both[1].title, 40)}: ${parts[1].means[0]?.method}`, (r) => r.other?.effect ?? null], ["± error bar", (r) => r.other?.error_bar ?? null]], rows);
  }
};
