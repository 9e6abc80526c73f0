// The history, the thinking budget, and fast and slow recommendations side by side.

import { call, newest } from "./api.js";
import { byId, make } from "./dom.js";
import { rank } from "./ranking.js";
import { clearThought, showThought } from "./thought.js";

const K = 10;
const BUDGETS = [0, 1, 2, 4, 8, 16, 32, 64];
let budgets = BUDGETS; // what the slider's places stand for
let think = "auto"; // as many as the method thinks of by itself, until the slider is moved
let history = []; // {id, title}
let options = []; // what the search found
let chosen = -1; // which of them the arrow keys are on

export function startRecommend(health) {
  byId("method").replaceChildren(...health.methods.map((name) => make("option", { value: name }, name)));
  byId("method").value = health.method;
  byId("method").addEventListener("change", () => {
    think = "auto";
    update();
  });
  byId("methods").hidden = health.methods.length < 2;
  const search = byId("search");
  search.addEventListener("input", () => find(search.value));
  search.addEventListener("focus", () => find(search.value));
  search.addEventListener("blur", () => setTimeout(() => document.activeElement === search || closeFound(), 150));
  search.addEventListener("keydown", steer);
  byId("clear").addEventListener("click", () => setHistory([], "The history is empty."));
  byId("some-user").addEventListener("click", pickUser);
  byId("think").addEventListener("input", () => {
    think = budgets[Number(byId("think").value)];
    update();
  });
  byId("history-note").textContent = "Add some items, or take a real user's history.";
  update();
}

// Where the slider stands; a method that does not think by itself does not think at all.
function showBudget(own) {
  const slider = byId("think");
  if (think === "auto") {
    budgets = own ? [...new Set([...BUDGETS, own])].sort((a, b) => a - b) : [0];
    slider.max = budgets.length - 1;
    slider.disabled = budgets.length === 1;
  }
  slider.value = budgets.indexOf(own);
  slider.setAttribute("aria-valuetext", steps(own));
  byId("think-value").textContent = own;
}

// `3 pieces of evidence`, `1 piece of evidence`
const steps = (count) => `${count} ${count === 1 ? "piece" : "pieces"} of evidence`;

function find(words) {
  newest("search", async (signal) => {
    const path = `v1/items?limit=12&q=${encodeURIComponent(words)}`;
    const found = await call(path, undefined, signal);
    const kept = options[chosen]?.id;
    options = found.items;
    chosen = options.findIndex((item) => item.id === kept);
    showFound(found.total);
  });
}

function showFound(total) {
  const list = byId("found");
  const rows = options.map((item, index) =>
    make(
      "li",
      { role: "option", id: `option-${index}`, "aria-selected": String(index === chosen), onmousedown: () => add(item) },
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
  if (chosen < 0) byId("search").removeAttribute("aria-activedescendant");
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
  const question = { history: history.map((item) => item.id), k: K, method: byId("method").value };
  newest("recommend", async (signal) => {
    const began = performance.now();
    const fast = await call("v1/recommend", { ...question, think: 0 }, signal);
    const between = performance.now();
    const slow = await call("v1/recommend", { ...question, think }, signal);
    const ended = performance.now();
    showBudget(slow.think);
    showRanking("fast", fast, null, between - began);
    showRanking("slow", slow, fast, ended - between);
    byId("note").textContent = fast.note ?? "";
    byId("slow-title").firstChild.textContent = `Slow, ${steps(slow.think)} `;
    byId("latency").textContent =
      `${(ended - between).toFixed(0)} ms with ${steps(slow.think)}, ` +
      `${(between - began).toFixed(0)} ms with none`;
    const explained = await call("v1/recommend", { ...question, think, explain: true }, signal);
    explained.explain ? showThought(explained) : clearThought();
  });
}

function showRanking(name, answer, before, milliseconds) {
  const { compute_ms } = answer.timing;
  byId(`${name}-time`).textContent = `${milliseconds.toFixed(0)} ms, ${compute_ms.toFixed(0)} of them the model's`;
  rank(byId(name), answer.items, before?.items, add);
}
