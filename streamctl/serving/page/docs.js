// The API's description, drawn from openapi.json.

import { showError } from "./api.js";
import { byId, make, table } from "./dom.js";

function resolve(document, schema) {
  if (!schema?.$ref) return schema ?? {};
  return schema.$ref.slice(2).split("/").reduce((node, key) => node[key], document);
}

function kindOf(document, schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const choices = schema.anyOf ?? schema.oneOf;
  if (choices) return choices.map((one) => kindOf(document, one)).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kindOf(document, schema.items ?? {})}`;
  if (schema.type === "object" && schema.additionalProperties) {
    return `name -> ${kindOf(document, schema.additionalProperties)}`;
  }
  const low = schema.minimum ?? "";
  const high = schema.maximum ?? "";
  return `${schema.type ?? "any"}${low !== "" || high !== "" ? ` ${low}..${high}` : ""}`;
}

function fields(document, title, schema) {
  const { properties = {}, required = [] } = resolve(document, schema);
  const rows = Object.entries(properties).map(([name, field]) => [
    name + (required.includes(name) ? " *" : ""),
    kindOf(document, field),
    field.default === undefined ? "" : JSON.stringify(field.default),
    field.description ?? "",
  ]);
  return rows.length ? table(title, ["field", "kind", "default", ""], rows) : null;
}

function operation(document, path, method, about) {
  const body = about.requestBody?.content["application/json"]?.schema;
  const answer = Object.entries(about.responses).find(([status]) => status.startsWith("2"));
  const schema = answer?.[1].content?.["application/json"]?.schema;
  const parameters = (about.parameters ?? []).map((one) => [
    one.name, one.in, kindOf(document, one.schema), one.schema.default ?? "", one.schema.description ?? "",
  ]);
  const failures = Object.entries(about.responses)
    .filter(([status]) => !status.startsWith("2"))
    .map(([status, response]) => `${status} ${response.description}`);
  return make(
    "details",
    { class: "operation" },
    make(
      "summary",
      {},
      make("span", { class: "method" }, method.toUpperCase()),
      make("span", { class: "route" }, path),
      make("span", { class: "quiet" }, about.description ?? ""),
    ),
    parameters.length ? table("Parameters", ["name", "in", "kind", "default", ""], parameters) : null,
    body ? fields(document, "Body", body) : null,
    schema ? fields(document, `Answer ${answer[0]}`, schema) : null,
    failures.length ? make("p", { class: "quiet" }, `Errors, as application/problem+json: ${failures.join(", ")}`) : null,
  );
}

function example() {
  const text = `curl -X POST ${location.origin}/v1/recommend \\
  -H 'Content-Type: application/json' -H 'Authorization: Bearer KEY' \\
  -d '{"history": ["ITEM", "ITEM"], "k": 10, "think": "auto", "explain": true}'`;
  return make("section", { class: "card" }, make("h2", {}, "A call"), make("pre", { tabindex: "0" }, text));
}

try {
  const document_ = await (await fetch("openapi.json")).json();
  const groups = new Map();
  for (const [path, methods] of Object.entries(document_.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const tag = about.tags?.[0] ?? "other";
      groups.set(tag, [...(groups.get(tag) ?? []), operation(document_, path, method, about)]);
    }
  }
  byId("operations").replaceChildren(
    example(),
    ...[...groups].map(([tag, operations]) =>
      make("section", { class: "card" }, make("h2", {}, tag), ...operations),
    ),
  );
} catch {
  showError("The description of the API cannot be read.");
}
