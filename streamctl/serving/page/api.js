// Calls to the API: the key, errors in words, and only the newest answer of a series.

import { byId, make } from "./dom.js";

const STORE = "streamctl-key";

export function showError(text) {
  byId("error").replaceChildren(...(text ? [make("p", {}, text)] : []));
}

async function askForKey() {
  const dialog = byId("key-dialog");
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  const key = byId("key").value.trim();
  byId("key").value = "";
  if (!key) throw new Error("An API key is needed.");
  sessionStorage.setItem(STORE, key);
}

let asking = null;

export async function call(path, body, signal) {
  const key = sessionStorage.getItem(STORE);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (answer.status === 401) {
    sessionStorage.removeItem(STORE);
    asking ??= askForKey().finally(() => (asking = null));
    await asking;
    return call(path, body, signal);
  }
  if (answer.ok) return answer.json();
  const problem = await answer.json().catch(() => ({}));
  const wait = answer.headers.get("Retry-After");
  const again = wait ? `. Try again in ${wait} s.` : "";
  throw new Error(`${problem.detail ?? answer.statusText}${again}`);
}

// Runs of one kind cancel the ones before them; errors are shown, the last good view stays.
const running = new Map();

export async function newest(kind, work) {
  running.get(kind)?.abort();
  const control = new AbortController();
  running.set(kind, control);
  try {
    await work(control.signal);
    if (!control.signal.aborted) showError("");
  } catch (error) {
    if (error.name !== "AbortError" && !control.signal.aborted) showError(error.message);
  }
}
