// The history, the thinking budget, and fast and slow recommendations side by side.

import { call, newest } from "./api.js";
import { byId, make } from "./dom.js";
import { clearThought, showThought } from "./thought.js";

const K = 10;
let history = []; // {id, title}
let options = []; // what the search found
let chosen = -1; // which of them the arrow keys are on

export function startRecommend({ think, most }) {
  const slider = byId("think");
  slider.max = most;
  slider.value = think;
  slider.disabled = most === 0;
  byId("think-value").textContent = slider.value;
  const search = byId("search");
  search.addEventListener("input", () => find(search.value));
  search.addEventListener("focus", () => find(search.value));
  search.addEventListener("blur", () => setTimeout(() => document.activeElement === search || closeFound(), 150));
  search.addEventListener("keydown", steer);
  byId("clear").addEventListener("click", () => setHistory([], "The history is empty."));
  byId("some-user").addEventListener("click", pickUser);
  byId("think").addEventListener("input", () => {
    byId("think-value").textContent = byId("think").value;
    update();
  });
  byId("history-note").textContent = "Add some items, or take a real user's history.";
  update();
}

// `3 think tokens`, `1 think token`
const steps = (count) => `${count} think token${count === 1 ? "" : "s"}`;

function find(words) {
  newest("search", async (signal) => {
    const path = `v1/items?limit=12&q=${encodeURIComponent(words)}`;
    const found = await call(path, undefined, signal);
    options = found.items;
    chosen = -1;
    showFound(found.total);
  });
}

function showFound(total) {
  const list = byId("found");
  const rows = options.map((item, index) =>
    make(
      "li",
      { role: "option", id: `option-${index}`, "aria-selected": "false", onmousedown: () => add(item) },
      item.title,
    ),
  );
  if (!rows.length) rows.push(make("li", { class: "none" }, "No title has these words."));
  if (total > options.length) {
    rows.push(make("li", { class: "none" }, `and ${total - options.length} more`));
  }
  list.replaceChildren(...rows);
  list.hidden = document.activeElement !== byId("search");
  byId("search").setAttribute("aria-expanded", String(!list.hidden));
  byId("search").removeAttribute("aria-activedescendant");
}

function closeFound() {
  byId("found").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
}

function steer(event) {
  if (event.key === "Escape") return closeFound();
  if (event.key === "Enter" && chosen >= 0) {
    event.preventDefault();
    return add(options[chosen]);
  }
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || !options.length) return;
  event.preventDefault();
  byId("found").hidden = false;
  chosen = (chosen + step + options.length) % options.length;
  for (const [index, row] of [...byId("found").children].entries()) {
    row.setAttribute("aria-selected", String(index === chosen));
  }
  byId(`option-${chosen}`).scrollIntoView({ block: "nearest" });
  byId("search").setAttribute("aria-activedescendant", `option-${chosen}`);
}

function add(item) {
  byId("search").value = "";
  closeFound();
  setHistory([...history, { id: item.id, title: item.title }], `Added ${item.title}.`);
}

function remove(index) {
  const [gone] = history.splice(index, 1);
  setHistory([...history], `Removed ${gone.title}.`);
  const buttons = byId("history").querySelectorAll("button");
  (buttons[Math.min(index, buttons.length - 1)] ?? byId("search")).focus();
}

function setHistory(items, note) {
  history = items;
  byId("history-note").textContent = note;
  byId("history").replaceChildren(
    ...items.map((item, index) =>
      make(
        "li",
        {},
        make("span", { title: item.title }, item.title),
        make("button", { type: "button", "aria-label": `Remove ${item.title}`, onclick: () => remove(index) }, "×"),
      ),
    ),
  );
  update();
}

function pickUser() {
  newest("user", async (signal) => {
    const { users } = await call("v1/users?limit=100", undefined, signal);
    const id = users[Math.floor(Math.random() * users.length)];
    const user = await call(`v1/users/${encodeURIComponent(id)}`, undefined, signal);
    setHistory(
      user.history.map(({ id, title }) => ({ id, title })),
      `User ${user.id}: ${user.interactions} interactions, the latest ${user.history.length} are read.`,
    );
  });
}

function update() {
  const think = Number(byId("think").value);
  if (!history.length) {
    running("Nothing to read yet.");
    return newest("recommend", async () => {});
  }
  newest("recommend", async (signal) => {
    const question = { history: history.map((item) => item.id), k: K };
    const began = performance.now();
    const fast = await call("v1/recommend", { ...question, think: 0 }, signal);
    const between = performance.now();
    const slow = await call("v1/recommend", { ...question, think }, signal);
    const ended = performance.now();
    const explained = await call("v1/recommend", { ...question, think, explain: true }, signal);
    showRanking("fast", fast, null, between - began);
    showRanking("slow", slow, fast, ended - between);
    byId("slow-title").firstChild.textContent = `Slow, ${steps(think)} `;
    byId("latency").textContent =
      `${(ended - between).toFixed(0)} ms with ${steps(think)}, ` +
      `${(between - began).toFixed(0)} ms with none`;
    showThought(explained);
  });
}

function running(text) {
  for (const name of ["fast", "slow"]) {
    byId(name).replaceChildren(make("li", { class: "empty" }, "", text));
    byId(`${name}-time`).textContent = "";
  }
  byId("latency").textContent = "";
  clearThought();
}

function showRanking(name, answer, before, milliseconds) {
  const { compute_ms } = answer.timing;
  byId(`${name}-time`).textContent = `${milliseconds.toFixed(0)} ms, ${compute_ms.toFixed(0)} of them the model's`;
  rank(byId(name), answer.items, before?.items, add);
}

// A ranking as list rows, with each item's movement since another ranking.
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
