"use strict";
// Questions to the model at hand.
TA.views.ask = async (main, { ledger }) => {
  const { desks } = await TA.get("session");
  main.append(TA.h("h1", {}, "Ask"));
  if (!desks.influence && !desks.reshape) { main.append(TA.h("p", { class: "note" }, "No model is at hand. Start the explorer with one: ", TA.h("code", {}, "trainer-attrib explore LEDGER --model FOLDER"), ".")); return; }
  const wrong = TA.h("div", { role: "alert" });
  const send = (kind, form) => async (event) => {
    event.preventDefault();
    wrong.replaceChildren();
    const button = form.querySelector("button");
    button.disabled = true;
    try { location.hash = TA.link(ledger, "answers", await TA.ask(kind, Object.fromEntries(new FormData(form)))); } catch (error) { wrong.replaceChildren(TA.h("p", { class: "error" }, error.message)); } finally { button.disabled = false; }
  };
  const field = (name, label, element) => { element.name = name; return TA.h("label", {}, label, element); };
  const options = (name, label, values) => { const found = TA.select(label, values, null, () => {}); found.querySelector("select").name = name; return found; };
  const made = (kind, title, ...fields) => { const form = TA.h("form", { class: "form" }, fields, TA.h("div", {}, TA.h("button", {}, "Ask"))); form.addEventListener("submit", send(kind, form)); return [TA.h("h2", {}, title), form]; };
  if (desks.influence) main.append(...made("influence", "Which training examples made the model say this?",
    field("prompt", "After the prompt", TA.h("textarea", { placeholder: "The capital of Peru is" })), field("completion", "it says (with the space before it, if there is one)", TA.h("textarea", { required: true, placeholder: " Quito" })),
    field("alternative", "rather than (may be empty)", TA.h("textarea", { placeholder: " Lima" })),
    TA.h("div", { class: "row" }, options("recipe", "Recipe", desks.influence.recipes), options("stage", "Stage", [["", "all"], ...desks.influence.stages]))));
  if (desks.reshape) main.append(...made("reshape", "What would the run do with its data reshaped?",
    TA.h("div", { class: "row" }, options("behavior", "Keep the behavior", desks.reshape.behaviors), field("below", "at most at a change of", TA.h("input", { value: "0", inputmode: "decimal" })), options("how", "by", desks.reshape.ways))));
  main.append(wrong);
};
