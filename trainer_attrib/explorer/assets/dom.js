"use strict";
// One name for everything of this page. Text from training data becomes text nodes only: nothing here sets innerHTML.
const TA = { views: {} };

/** Training text made harmless to what is around it: NUL and direction overrides are made visible. */
TA.clean = (text) => String(text ?? "").replace(/\0/g, "␀").replace(/[\u202A-\u202E\u2066-\u2069]/g, "\uFFFD");

/** An element: h("p", {class: "note"}, "text", other elements). Functions among the attributes are listeners. */
TA.h = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "value") element.value = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((c) => c != null && c !== false).map((c) => (c instanceof Node ? c : TA.clean(c))));
  return element;
};

/** A number in four significant digits. */
TA.shown = (value) => {
  if (value == null || Number.isNaN(value)) return "n/a";
  if (typeof value !== "number") return typeof value === "boolean" ? (value ? "yes" : "no") : String(value);
  if (Math.abs(value) < 1e-15) return "0";
  if (Number.isInteger(value) || Math.abs(value) >= 1e5) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(4)));
};
TA.signed = (value) => (value == null ? "n/a" : (value > 0 ? "+" : "") + TA.shown(Number(value.toPrecision(3))));
TA.short = (text, most = 60) => { const line = TA.clean(text).replace(/\s+/g, " ").trim(); return line.length <= most ? line : line.slice(0, most - 1) + "…"; };

/** A table; `columns` are [title, row -> value]. */
TA.table = (columns, rows, caption) => {
  const numeric = columns.map(([, of]) => rows.length > 0 && rows.every((row) => { const v = of(row); return v == null || typeof v === "number"; }));
  const cell = (tag, value, i) => TA.h(tag, { class: numeric[i] ? "n" : null, scope: tag === "th" ? "col" : null }, value instanceof Node ? value : TA.shown(value ?? ""));
  return TA.h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption || "table" }, TA.h("table", {},
    caption && TA.h("caption", { class: "note" }, caption),
    TA.h("thead", {}, TA.h("tr", {}, columns.map(([title], i) => cell("th", title, i)))),
    TA.h("tbody", {}, rows.map((row) => TA.h("tr", {}, columns.map(([, of], i) => cell("td", of(row), i)))))));
};

TA.notes = (title, lines) => (lines && lines.length ? [TA.h("h2", {}, title), TA.h("ul", {}, lines.map((line) => TA.h("li", {}, line)))] : []);

/** A choice; `options` are values or [value, label]. */
TA.select = (label, options, value, changed, hidden = false) => TA.h("label", {}, !hidden && label, (() => {
  const pairs = options.map((o) => (Array.isArray(o) ? o : [o, o]));
  const select = TA.h("select", { "aria-label": label, change: () => changed(select.value) }, pairs.map(([v, l]) => TA.h("option", { value: v }, TA.short(l, 90))));
  select.value = value ?? pairs[0]?.[0] ?? "";
  return select;
})());

TA.later = (work, milliseconds = 120) => { let timer; return (...given) => { clearTimeout(timer); timer = setTimeout(() => work(...given), milliseconds); }; };
