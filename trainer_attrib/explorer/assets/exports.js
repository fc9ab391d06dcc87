"use strict";
// What is on screen, as a file.
(() => {
  const save = (name, type, text) => {
    const at = URL.createObjectURL(new Blob([text], { type }));
    TA.h("a", { href: at, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(at), 10000);
  };
  // A cell that begins like a formula would be run by a spreadsheet.
  const cell = (value) => { let text = value == null ? "" : String(value); if (/^[=+\-@\t\r]/.test(text) && typeof value !== "number") text = "'" + text; return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text; };
  TA.csv = (rows) => {
    const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((c) => rows.some((row) => typeof row[c] !== "object" || row[c] == null));
    return [columns, ...rows.map((row) => columns.map((c) => row[c]))].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  };
  /** Records that the viewer of PAIR's pretraining-tda opens. */
  TA.pair = (records) => records.map((r) => JSON.stringify({
    example_id: r.id, query_set: r.behavior, inputs_plaintext: r.query, targets_plaintext: "",
    ...Object.fromEntries([["proponent", r.top], ["opponent", r.bottom]].flatMap(([kind, rows]) => [
      [`${kind}s`, rows.map((e) => e.text)], [`${kind}_ids`, rows.map((e) => `${e.stage}/${e.example}`)], [`${kind}_scores`, rows.map((e) => e.score)]])),
  })).join("\n") + "\n";

  /** Buttons; `now` gives {data, rows, pair?} of what is on screen when one is pressed. */
  TA.exporter = (name, now, { pair = false, path = "" } = {}) => TA.h("div", { class: "export", role: "group", "aria-label": "Export what is on screen" },
    TA.h("button", { click: () => save(`${name}.json`, "application/json", JSON.stringify(now().data, null, 1)) }, "JSON"),
    TA.h("button", { click: () => save(`${name}.csv`, "text/csv", TA.csv(now().rows)) }, "CSV"),
    pair && TA.h("button", { title: "for the viewer of PAIR's pretraining-tda", click: () => save(`${name}.jsonl`, "application/jsonl", TA.pair(now().pair)) }, "PAIR"),
    TA.h("button", { click: (event) => navigator.clipboard?.writeText(location.href).then(() => { event.target.textContent = "Copied"; }) }, "Link"),
    TA.live && path && TA.h("a", { href: TA.address(path), class: "note" }, "data"));
})();
