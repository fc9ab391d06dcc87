"use strict";
// Answers that were kept, and one of them.
TA.views.answers = async (main, { ledger, key }) => {
  if (key) return answer(main, ledger, key);
  const { answers } = await TA.get(`${ledger}/answers`);
  main.append(TA.h("h1", {}, "Answers"), TA.h("p", { class: "sub" }, answers.length ? `${answers.length} kept in this ledger, newest first.` : "None is kept in this ledger yet."),
    answers.length ? TA.table([["answer", (a) => TA.h("a", { href: TA.link(ledger, "answers", a.key) }, TA.short(a.title, 110))], ["what", (a) => a.kinds.map((k) => k.replace("_", " ")).join(", ")], ["made", (a) => a.made.replace("T", " ").slice(0, 16)]], answers)
      : TA.h("p", {}, "Keep results by ", TA.h("code", {}, "trainer_attrib.keep(ledger, result)"), ", or start this page with a model and ask: ", TA.h("code", {}, "trainer-attrib explore LEDGER --model FOLDER"), "."));

  async function answer(place, which, name) {
    const found = await TA.get(`${which}/answers/${name}`);
    place.append(TA.h("h1", {}, TA.short(found.title, 300)), TA.h("p", { class: "sub" }, `${found.parts.map((p) => p.kind.replace("_", " ")).join(", ")} · ${found.made.replace("T", " ").slice(0, 16)} · `, TA.h("a", { href: TA.link(which, "answers") }, "all answers")));
    const file = found.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40) || "answer";
    for (const part of found.parts) {
      const draw = TA.parts[part.kind] || (() => TA.h("p", { class: "error" }, `Part of kind ${part.kind} cannot be drawn by this version.`));
      place.append(TA.h("section", {}, [await draw(part, { ledger: which, key: name, name: file, parts: found.parts })].flat(Infinity).filter(Boolean)));
    }
    TA.highlight();
  }
};
