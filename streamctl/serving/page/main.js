// Which of the two views is shown, and the model's name.

import { call, newest } from "./api.js";
import { byId } from "./dom.js";
import { startRecommend } from "./recommend.js";
import { showRun } from "./run.js";

let runShown = false;

function show() {
  const run = location.hash === "#run";
  byId("view-run").hidden = !run;
  byId("view-recommend").hidden = run;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.getAttribute("href") === (run ? "#run" : "#recommend");
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  document.title = run ? "This run · streamctl" : "streamctl";
  if (run && !runShown) {
    runShown = true;
    newest("run", async (signal) => showRun(await call("v1/run", undefined, signal)));
  }
}

window.addEventListener("hashchange", show);
show();
newest("model", async (signal) => {
  const health = await call("readyz", undefined, signal);
  byId("model").textContent = `${health.model.run}, answered by ${health.method}`;
  startRecommend(health);
});
