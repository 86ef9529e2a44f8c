"use strict";

// Text of the data set reaches the page through textContent alone, never as markup.
const page = JSON.parse(document.getElementById("data").textContent);
const control = (name) => document.getElementById(name);
const HUES = { context: 212, gradient: 24, score: 145 };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Rank of every token among the T of its example, 1 for the highest value. */
function ranksOf(values) {
  const ranks = [];
  ranking(values, values.map((_, t) => t)).forEach((t, place) => (ranks[t] = place + 1));
  return ranks;
}

const cards = page.examples.map((example) => {
  const card = element("section", "card");
  const title = element("h2", "", `Row ${example.row}`);
  title.append(element("span", "id", example.id));
  const facts = element("p", "facts");
  const text = element("p", "text");
  const tokens = example.tokens.map((token, t) => {
    const span = element("span", "token", token.replace(/\n/g, "\u21b5\n"));
    span.tabIndex = 0;
    span.dataset.position = t;
    if (!example.supervised[t]) span.classList.add("unsupervised");
    text.append(span);
    return span;
  });
  card.append(title, facts, text);
  control("examples").append(card);
  const fixed = { context: ranksOf(example.context), gradient: ranksOf(example.gradient) };
  return { example, facts, text, tokens, fixed, state: null };
});

function settings() {
  const number = (name) => Number(control(name).value);
  return { ratio: number("ratio"), alpha: number("alpha"), beta: number("beta"),
           logOffset: page.logOffset, scope: control("scope").value };
}

function update() {
  const now = settings(), shade = control("shade").value;
  for (const name of ["ratio", "alpha", "beta"]) control(`${name}-value`).textContent = now[name];
  const nothing = now.alpha === 0 && now.beta === 0;
  control("warning").textContent = nothing ? "alpha and beta are both 0: every token scores the same." : "";
  for (const card of cards) {
    const { example, tokens } = card;
    const { scores, selected } = selectTop(example.context, example.gradient, example.supervised, now);
    const ranks = { ...card.fixed, score: ranksOf(scores) }, chosen = new Set(selected), count = tokens.length;
    card.state = { scores, ranks, chosen };
    tokens.forEach((span, t) => {
      span.classList.toggle("selected", chosen.has(t));
      // By rank: a few tokens take most of the context score, and would leave the rest without colour.
      const strength = shade === "none" ? 0 : (count - ranks[shade][t]) / Math.max(1, count - 1);
      span.style.backgroundColor = strength ? `hsl(${HUES[shade]} 85% 55% / ${(0.65 * strength ** 2).toFixed(3)})` : "";
    });
    const carrying = selected.filter((t) => example.supervised[t]).length;
    card.facts.textContent = `${selected.length} of ${count} tokens selected; ${carrying} of them carry a loss ` +
      `(${Math.round(100 * carrying / selected.length)} %), as do ${example.supervised.filter(Boolean).length} of all.`;
  }
  hideTip();
}

const tip = control("tip");

function showTip(span) {
  const card = cards.find((candidate) => candidate.text === span.parentElement), t = Number(span.dataset.position);
  const { example, state } = card, count = card.tokens.length;
  tip.replaceChildren(element("b", "", JSON.stringify(example.tokens[t])), element("span", "where", ` position ${t}`));
  const table = element("table");
  for (const [name, values] of [["context", example.context], ["gradient", example.gradient], ["score", state.scores]]) {
    const line = element("tr");
    const value = Number.isFinite(values[t]) ? values[t].toPrecision(4) : "-\u221e";
    line.append(element("th", "", name), element("td", "", value), element("td", "", `rank ${state.ranks[name][t]} of ${count}`));
    table.append(line);
  }
  tip.append(table, element("div", "", (state.chosen.has(t) ? "selected" : "not selected") +
    (example.supervised[t] ? "; predicts a token of the response" : "; carries no loss")));
  const box = span.getClientRects()[0];
  tip.hidden = false;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  const below = box.bottom + 6;
  tip.style.top = `${below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 6 : below}px`;
}

function hideTip() {
  tip.hidden = true;
}

for (const name of ["ratio", "alpha", "beta", "scope", "shade"]) {
  if (name in page.settings) control(name).value = page.settings[name];
  control(name).addEventListener("input", update);
}
for (const [on, off] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  control("examples").addEventListener(on, (event) => event.target.classList.contains("token") && showTip(event.target));
  control("examples").addEventListener(off, hideTip);
}
addEventListener("scroll", hideTip);
control("subtitle").textContent = page.subtitle;
update();
