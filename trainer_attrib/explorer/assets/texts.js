"use strict";
// Training examples: cards with scored tokens, duplicates folded, words highlighted wherever they are.
(() => {
  const SHOWN = 700; // characters before "more"

  /** Text of an example, its tokens coloured by their scores where these are known. */
  const body = (example) => {
    const strongest = Math.max(0, ...(example.tokens || []).map(([, score]) => Math.abs(score)));
    if (strongest > 0) {
      return TA.h("p", { class: "text", dir: "auto" }, example.tokens.map(([piece, score]) => (score
        ? TA.h("span", { class: `t ${score > 0 ? "up" : "down"}`, style: `--w:${(Math.abs(score) / strongest).toFixed(2)}`, title: TA.signed(score) }, piece)
        : piece)));
    }
    const text = TA.clean(example.text || "(no text)"), paragraph = TA.h("p", { class: "text", dir: "auto" }, text.slice(0, SHOWN));
    if (text.length > SHOWN) {
      const more = TA.h("button", { class: "plain", click: () => { paragraph.replaceChildren(text); TA.highlight(); } }, ` … all ${text.length.toLocaleString("en")} characters`);
      paragraph.append(more);
    }
    return paragraph;
  };

  TA.card = (example, { shared = false } = {}) => TA.h("li", { class: `card${shared ? " shared" : ""}` },
    example.score != null && TA.h("span", { class: `score ${example.score < 0 ? "down" : "up"}` }, TA.signed(example.score)),
    body(example),
    TA.h("p", { class: "facts" }, [example.example, example.source, example.stage && (example.step ? `${example.stage}, step ${example.step}` : example.stage),
      shared && "in both lists"].filter(Boolean).join(" · ")),
    example.also?.length > 0 && TA.h("details", {}, TA.h("summary", {}, `${example.also.length} more with the same text`),
      TA.h("ul", {}, example.also.map((one) => TA.h("li", { class: "facts" }, `${one.example} · ${TA.signed(one.score)}${one.step ? ` · step ${one.step}` : ""}`)))));

  /** Examples of the same text become one, the strongest first. */
  TA.folded = (examples) => {
    const seen = new Map();
    for (const example of examples) {
      const same = (example.text || example.example).toLowerCase().replace(/\s+/g, " ").trim();
      if (seen.has(same)) seen.get(same).also.push(example);
      else seen.set(same, { ...example, also: [] });
    }
    return [...seen.values()];
  };

  TA.cards = (examples, options = {}) => (examples.length
    ? TA.h("ol", { class: "cards" }, TA.folded(examples).map((e) => TA.card(e, { shared: options.shared?.has(TA.identity(e)) })))
    : TA.h("p", { class: "note" }, "No example."));
  TA.identity = (example) => `${example.stage}\u0000${example.example}`;

  /** Mark every place of the highlighted words, in all texts on the page; says in how many texts. */
  TA.highlight = (words) => {
    if (words !== undefined) { TA.highlighted = words; TA.remember({ mark: words }); }
    const wanted = (TA.highlighted || "").toLowerCase(), ranges = [];
    let texts = 0;
    for (const paragraph of wanted ? document.querySelectorAll(".text") : []) {
      const nodes = [], walker = document.createTreeWalker(paragraph, NodeFilter.SHOW_TEXT);
      let all = "";
      while (walker.nextNode()) { nodes.push([all.length, walker.currentNode]); all += walker.currentNode.data; }
      const lower = all.toLowerCase(), before = ranges.length;
      const at = (offset) => { const [first, node] = nodes.findLast(([start]) => start <= offset); return [node, Math.min(offset - first, node.data.length)]; };
      for (let from = lower.indexOf(wanted); from >= 0 && ranges.length < 5000; from = lower.indexOf(wanted, from + wanted.length)) {
        const range = new Range();
        range.setStart(...at(from)); range.setEnd(...at(from + wanted.length));
        ranges.push(range);
      }
      texts += ranges.length > before;
    }
    if (CSS.highlights) CSS.highlights.set("found", new Highlight(...ranges));
    const said = document.getElementById("marked"), box = document.getElementById("mark");
    if (said) said.textContent = wanted ? `in ${texts} texts` : "";
    if (box && box.value !== (TA.highlighted || "")) box.value = TA.highlighted || "";
  };

  /** The word that was clicked, or the words that were selected. */
  const chosen = (event) => {
    const selected = String(getSelection()).trim();
    if (selected) return selected;
    const caret = document.caretPositionFromPoint ? document.caretPositionFromPoint(event.clientX, event.clientY) : null;
    const range = caret ? null : document.caretRangeFromPoint?.(event.clientX, event.clientY);
    const node = caret?.offsetNode ?? range?.startContainer, offset = caret?.offset ?? range?.startOffset;
    if (node?.nodeType !== Node.TEXT_NODE) return "";
    const letter = /[\p{L}\p{N}'’-]/u;
    let first = offset, last = offset;
    while (first > 0 && letter.test(node.data[first - 1])) first--;
    while (last < node.data.length && letter.test(node.data[last])) last++;
    return node.data.slice(first, last);
  };
  document.addEventListener("mouseup", (event) => {
    if (!event.target.closest?.(".text") || event.target.closest("button")) return;
    const word = chosen(event).slice(0, 200);
    if (word) TA.highlight(word.toLowerCase() === (TA.highlighted || "").toLowerCase() ? "" : word);
  });

  TA.marker = () => [
    TA.h("label", {}, "Highlight (or click a word)", TA.h("input", { id: "mark", type: "search", value: TA.highlighted || "", input: TA.later((event) => TA.highlight(event.target.value)) })),
    TA.h("span", { id: "marked", class: "note", role: "status" })];
})();
