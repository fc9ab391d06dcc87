"use strict";
// Any other result: the blocks that it describes itself in.
TA.parts.blocks = (part, { name }) => [
  TA.h("div", { class: "tools" }, TA.exporter(name, () => ({ data: part, rows: part.blocks.filter((b) => b.block === "grid").flatMap((b) => b.rows.map((row) => Object.fromEntries(b.columns.map((c, i) => [c, row[i]])))) }))),
  part.blocks.map((block) => {
    const head = TA.h("h2", {}, block.title), note = block.note ? TA.h("p", { class: "note" }, block.note) : null;
    switch (block.block) {
      case "notes": return TA.notes(block.title, block.lines);
      case "grid": return [head, TA.table(block.columns.map((c, i) => [c, (row) => row[i]]), block.rows), note];
      case "bars": return [TA.bars(block.title, block.bars.map((b) => ({ name: b.group === b.series ? b.group : `${b.group} · ${b.series}`, ...b })), block.unit), note];
      case "curves": return [head, TA.h("div", { class: "charts" }, block.curves.map((c) => TA.chart(c.name, { width: 300, height: 160, x: { label: null }, y: { label: null, grid: true }, marks: [Plot.lineY(c.x.map((x, i) => ({ x, y: c.y[i] })), { x: "x", y: "y" })] }))), note];
      case "rankings": return [head, note, block.rankings.map((r, i) => TA.h("details", { open: i === 0 }, TA.h("summary", {}, r.query), TA.h("div", { class: "sides" },
        [["Proponents", r.top], ["Opponents", r.bottom]].map(([title, rows]) => TA.h("section", {}, TA.h("h3", {}, title), TA.cards(rows.map((e) => ({ ...e, example: e.name }))))))))];
      default: return TA.h("p", { class: "error" }, `A block of kind ${block.block} cannot be drawn by this version.`);
    }
  })];
