"use strict";
// The examples of a stage on a plane, drawn on a canvas: an SVG is slow beyond some thousand points.
TA.views.map = async (main, { ledger, key }) => {
  const facets = await TA.get(`${ledger}/facets`), stages = Object.keys(facets.stages);
  const stage = stages.includes(key) ? key : stages[0];
  main.append(TA.h("h1", {}, "Map of the examples"));
  if (!stage) { main.append(TA.h("p", { class: "note" }, "No examples were recorded.")); return; }
  const found = await TA.get(`${ledger}/map/${stage}`), SIZE = 680, PAD = 14;
  const counts = d3.rollup(found.source, (all) => all.length, (s) => s), order = d3.range(found.sources.length).sort((a, b) => counts.get(b) - counts.get(a));
  const color = (source) => TA.palette[Math.min(order.indexOf(source), TA.palette.length - 1)], hidden = new Set();
  const at = (i) => found.points[i].map((v) => PAD + (v / 1023) * (SIZE - 2 * PAD));
  const known = d3.range(found.points.length).filter((i) => found.points[i]);
  const canvas = TA.h("canvas", { width: SIZE * devicePixelRatio, height: SIZE * devicePixelRatio, style: `width:${SIZE}px;aspect-ratio:1`, tabindex: 0, role: "img", "aria-label": `Map of ${known.length} examples of ${stage}; arrow keys go from example to example, the selected one is told below` });
  const told = TA.h("div", { "aria-live": "polite" }, TA.h("p", { class: "note" }, "Point at an example, or select one by the arrow keys."));
  let selected = null, tree;
  const visible = () => known.filter((i) => !hidden.has(found.source[i]));
  const draw = () => {
    const context = canvas.getContext("2d"), some = visible();
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, SIZE, SIZE);
    context.globalAlpha = some.length > 5000 ? 0.35 : 0.7;
    const radius = some.length > 20000 ? 1 : some.length > 2000 ? 1.6 : 3;
    for (const source of order.toReversed()) {
      context.fillStyle = color(source);
      context.beginPath();
      for (const i of some) if (found.source[i] === source) { const [x, y] = at(i); context.moveTo(x + radius, y); context.arc(x, y, radius, 0, 7); }
      context.fill();
    }
    context.globalAlpha = 1;
    if (selected != null) { const [x, y] = at(selected); context.strokeStyle = getComputedStyle(canvas).color; context.lineWidth = 2; context.beginPath(); context.arc(x, y, 7, 0, 7); context.stroke(); }
    tree = d3.quadtree(some, (i) => at(i)[0], (i) => at(i)[1]);
  };
  let turn = 0;
  const select = async (i) => {
    if (i == null || i === selected) return;
    selected = i; draw();
    const mine = ++turn, first = d3.sum(stages.slice(0, stages.indexOf(stage)), (name) => facets.stages[name].examples);
    const page = TA.live ? await TA.get(`${ledger}/examples`, { stage, offset: i, limit: 1 }) : { rows: (await TA.get(`${ledger}/examples`)).rows.slice(first + i, first + i + 1) };
    if (mine !== turn) return;
    told.replaceChildren(TA.h("ol", { class: "cards" }, page.rows.length ? TA.card(page.rows[0]) : TA.h("li", { class: "note" }, "This example is not in the report.")));
    TA.highlight();
  };
  const pointed = TA.later((event) => { const box = canvas.getBoundingClientRect(), scale = SIZE / box.width; select(tree.find((event.clientX - box.left) * scale, (event.clientY - box.top) * scale, 20)); }, 15);
  canvas.addEventListener("pointermove", pointed); canvas.addEventListener("pointerdown", pointed);
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const some = visible();
    select(some[(some.indexOf(selected) + step + some.length) % some.length]);
  });
  const legend = order.map((source, place) => TA.h("button", { "aria-pressed": "true", click: (event) => {
    if (!hidden.delete(source)) hidden.add(source);
    event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(source))); draw();
  } }, TA.h("i", { style: `background:${color(source)}` }), `${found.sources[source] || "(no source)"} ${TA.shown(counts.get(source))}`)).slice(0, 40);
  main.append(TA.h("p", { class: "sub" }, `Gradient sketches of ${TA.shown(known.length)} examples of ${stage} along the two directions in which they differ most; the plane holds ${(100 * found.variance_shown).toFixed(0)} % of their variance. Near does not mean alike where that is little.`),
    TA.h("div", { class: "tools" }, stages.length > 1 && TA.select("Stage", stages, stage, (value) => { location.hash = TA.link(ledger, "map", value); }),
      TA.exporter(`map-${stage}`, () => ({ data: found, rows: known.map((i) => ({ x: found.points[i][0], y: found.points[i][1], source: found.sources[found.source[i]] })) }))),
    TA.h("div", { class: "legend" }, legend), TA.h("div", { class: "sides" }, canvas, told));
  draw();
};
