"use strict";
// Conditions on examples: stage, source, steps, text. Kept in the address.
TA.CONDITIONS = ["stage", "source", "first", "last", "text"];
TA.filters = (facets, changed) => {
  const { params } = TA.route();
  const now = Object.fromEntries(TA.CONDITIONS.filter((name) => name in params).map((name) => [name, name === "source" ? params[name].slice(1) : params[name]]));
  const set = (name) => (value) => {
    if (value === "*" || value === "") delete now[name]; else now[name] = name === "source" ? value.slice(1) : value;
    TA.remember(Object.fromEntries(TA.CONDITIONS.map((n) => [n, n === "source" && now[n] != null ? "=" + now[n] : now[n] ?? null])));
    changed(now);
  };
  const typed = (name, type, label) => TA.h("label", {}, label, TA.h("input", { type, min: type === "number" ? 0 : null, value: now[name] ?? "", input: TA.later((event) => set(name)(event.target.value)) }));
  const sources = Object.entries(facets.sources);
  return { now, element: TA.h("div", { class: "tools", role: "search" },
    Object.keys(facets.stages).length > 1 && TA.select("Stage", [["*", "all"], ...Object.keys(facets.stages)], now.stage ?? "*", set("stage")),
    sources.length > 1 && TA.select("Source", [["*", "all"], ...sources.map(([name, count]) => ["=" + name, `${name || "(none)"} (${count.toLocaleString("en")})`])], now.source != null ? "=" + now.source : "*", set("source")),
    typed("first", "number", "From step"), typed("last", "number", "To step"), typed("text", "search", "Text contains")) };
};
/** The same conditions on examples at hand. */
TA.meets = (example, wanted) => (wanted.stage == null || example.stage === wanted.stage) && (wanted.source == null || (example.source ?? "") === wanted.source)
  && (wanted.first == null || example.step >= Number(wanted.first)) && (wanted.last == null || example.step <= Number(wanted.last))
  && (!wanted.text || (example.text || "").toLowerCase().includes(wanted.text.toLowerCase()));
