// A ranking as list rows, with each item's movement since another ranking.

import { make } from "./dom.js";

export function rank(list, items, before, onpick) {
  const best = items.length ? items[0].score : 0;
  const rows = items.map((item, index) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${(100 * Math.exp(item.score - best)).toFixed(1)}%`;
    return make(
      "li",
      { "data-id": item.id },
      bar,
      make("span", { class: "place" }, `${index + 1}`),
      onpick
        ? make("button", { type: "button", class: "title", title: "Add to the history", onclick: () => onpick(item) }, item.title)
        : make("span", {}, item.title),
      before ? shift(before.findIndex((other) => other.id === item.id), index) : make("span"),
    );
  });
  list.replaceChildren(...(rows.length ? rows : [make("li", { class: "empty" }, "", "No items.")]));
}

function shift(was, is) {
  if (was < 0) return make("span", { class: "shift up" }, "new");
  if (was === is) return make("span", { class: "shift" }, make("span", { "aria-label": "same place" }, "="));
  const [kind, sign, word] = was > is ? ["up", "▲", "up"] : ["down", "▼", "down"];
  const steps = Math.abs(was - is);
  return make("span", { class: `shift ${kind}`, "aria-label": `${word} ${steps}` }, `${sign} ${steps}`);
}
