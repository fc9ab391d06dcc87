"use strict";
// Which page is on screen.
(() => {
  const PAGES = [["ledger", "Ledger"], ["answers", "Answers"], ["examples", "Examples"], ["map", "Map"], ["compare", "Compare"], ["ask", "Ask"]];
  const main = document.getElementById("main");
  let turn = 0, before = "";
  const show = async () => {
    const mine = ++turn, route = TA.route(), page = `${route.ledger}/${route.view}/${route.key}`;
    TA.highlighted = route.params.mark || "";
    const place = TA.h("div");
    try {
      const session = await TA.get("session"), here = session.ledgers[Number(route.ledger)] ?? session.ledgers[0];
      const asking = Object.keys(session.desks).length > 0;
      document.getElementById("ledger-name").replaceChildren(session.ledgers.length > 1
        ? TA.select("Ledger", session.ledgers.map((name, i) => [String(i), name]), route.ledger, (value) => { location.hash = TA.link(value, "ledger"); }, true) : here);
      document.getElementById("nav").replaceChildren(...PAGES.filter(([name]) => name !== "ask" || asking).map(([name, title]) => TA.h("a", { href: TA.link(route.ledger, name), "aria-current": name === route.view ? "page" : null }, title)));
      document.getElementById("foot").textContent = `trainer-attrib ${session.version}. ${TA.live ? "Served by this computer for this computer." : "This page is one file and loads nothing."}`;
      const view = Object.hasOwn(TA.views, route.view) ? TA.views[route.view] : null;
      if (!view) throw new Error(`There is no page ${route.view}.`);
      await view(place, route);
      document.title = `${place.querySelector("h1")?.textContent || route.view} · ${here} · trainer-attrib`;
    } catch (error) {
      place.replaceChildren(TA.h("p", { class: "error", role: "alert" }, error.message));
    }
    if (mine !== turn) return; // the reader went on meanwhile
    main.replaceChildren(place);
    TA.highlight();
    if (before && before !== page) { main.focus(); scrollTo(0, 0); }
    before = page;
    performance.mark("page-shown");
    document.body.dataset.shown = page;
  };
  addEventListener("hashchange", show);
  show();
})();
