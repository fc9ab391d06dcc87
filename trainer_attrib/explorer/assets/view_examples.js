"use strict";
// Everything that was trained on.
TA.views.examples = async (main, { ledger, params }) => {
  const facets = await TA.get(`${ledger}/facets`), LIMIT = 50;
  let offset = Number(params.offset) || 0, found, turn = 0, cut = "";
  const list = TA.h("div"), said = TA.h("span", { class: "told", role: "status" });
  const move = (by) => { offset = Math.max(0, offset + by); TA.remember({ offset: offset || null }); draw(); };
  const [back, on] = [["Previous", -LIMIT], ["Next", LIMIT]].map(([title, by]) => TA.h("button", { click: () => move(by) }, title));
  const draw = async () => {
    const mine = ++turn;
    let data;
    if (TA.live) {
      try { data = await TA.get(`${ledger}/examples`, { ...filters.now, offset, limit: LIMIT }); } catch (error) { said.textContent = error.message; return; }
    } else {
      const all = await TA.get(`${ledger}/examples`), rows = all.rows.filter((e) => TA.meets(e, filters.now));
      data = { examples: all.rows.length, matching: rows.length, rows: rows.slice(offset, offset + LIMIT) };
      cut = all.rows.length < all.examples ? `; the report holds the first ${TA.shown(all.rows.length)} of ${TA.shown(all.examples)}` : "";
    }
    if (mine !== turn) return;
    found = data;
    said.textContent = found.matching ? `${TA.shown(offset + 1)} to ${TA.shown(Math.min(offset + LIMIT, found.matching))} of ${TA.shown(found.matching)} matching, ${TA.shown(found.examples)} in all${cut}` : `none of ${TA.shown(found.examples)} matches`;
    back.disabled = offset === 0; on.disabled = offset + LIMIT >= found.matching;
    list.replaceChildren(TA.h("ol", { class: "cards" }, found.rows.map((e) => TA.card(e))));
    TA.highlight();
    performance.mark("examples-shown");
  };
  const filters = TA.filters(facets, () => { offset = 0; TA.remember({ offset: null }); draw(); });
  main.append(TA.h("h1", {}, "Examples"), TA.h("p", { class: "sub" }, "What the stages were trained on, as it was recorded. The step is the last in which an example took part."), filters.element,
    TA.h("div", { class: "tools" }, TA.marker(), back, on, said, TA.exporter("examples", () => ({ data: found.rows, rows: found.rows }))), list);
  await draw();
};
