// The thought as a path: what came to mind, one piece after another, and the ranking after each.

import { byId, make } from "./dom.js";
import { rank } from "./ranking.js";

let stops = []; // {name, words, ranking, before, step}
let at = 0;

export function clearThought() {
  byId("thought").hidden = true;
}

export function showThought(answer) {
  const { before, steps } = answer.explain;
  stops = [{ name: "History", words: "before thinking", ranking: before, before: null, step: null }];
  for (const [index, step] of steps.entries()) {
    stops.push({
      name: `${index + 1}`,
      words: step.item?.title ?? step.text,
      ranking: step.ranking,
      before: stops[stops.length - 1].ranking,
      step,
    });
  }
  byId("thought").hidden = false;
  byId("path").replaceChildren(
    ...stops.map((stop, index) =>
      make(
        "div",
        { class: "stop", role: "presentation" },
        make(
          "button",
          {
            type: "button", role: "tab", id: `stop-${index}`, "aria-controls": "step",
            onclick: () => choose(index), onkeydown: walk,
          },
          make("span", { class: "token" }, stop.name),
          make("span", { class: "words" }, stop.words),
        ),
      ),
    ),
  );
  choose(stops.length - 1);
}

function walk(event) {
  const target = {
    ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1,
    Home: 0, End: stops.length - 1,
  }[event.key];
  if (target === undefined) return;
  event.preventDefault();
  choose(Math.max(0, Math.min(stops.length - 1, target)));
  byId(`stop-${at}`).focus();
}

function choose(index) {
  at = index;
  for (const [number] of stops.entries()) {
    const button = byId(`stop-${number}`);
    button.setAttribute("aria-selected", String(number === index));
    button.tabIndex = number === index ? 0 : -1;
  }
  const { step, ranking, before } = stops[index];
  const list = make("ol", { class: "ranking" });
  rank(list, ranking, before, null);
  const title = index === 0 ? "The ranking before thinking" : `The ranking after ${index} of ${stops.length - 1}`;
  byId("step").setAttribute("aria-labelledby", `stop-${index}`);
  byId("step").replaceChildren(
    make("div", {}, ...(step ? meaning(step) : [make("p", {}, "The model has read the history and has not thought yet.")])),
    make("div", {}, make("h3", {}, title), list),
  );
}

function meaning(step) {
  const share = step.weight === null ? null : `${step.weight < 0.01 ? "<1" : (100 * step.weight).toFixed(0)}% of the thought's weight.`;
  return [
    make("h3", {}, step.item?.title ?? "Thought"),
    make("p", { class: "reason" }, `${step.text[0].toUpperCase()}${step.text.slice(1)}.`),
    make("p", { class: "quiet" }, share ?? ""),
  ];
}
