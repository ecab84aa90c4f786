/** The REST interface as its schema describes it, each route with a form to try it. Nothing is asked of another host. */

import { byId, create } from "./show.js";

const address = document.querySelector("meta[name='relay-schema']").content;
const METHODS = ["get", "post", "put", "patch", "delete"];

/** As header fields want it: a character for each byte. */
const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

let schema = {};

/** Follow a reference within the schema; what stands beside it counts more. */
function resolve(part) {
  if (!part?.$ref) return part ?? {};
  const { $ref, ...own } = part;
  return { ...$ref.replace(/^#\//, "").split("/").reduce((found, name) => found[name], schema), ...own };
}

/** Text with ``code`` in it, as elements. */
function marked(text) {
  return text.split("``").map((part, place) => (place % 2 ? create("code", "", part) : part));
}

/** Make a value that fits a part of the schema: its example, its default, or the simplest of its type. */
function exampleOf(part, depth = 0) {
  const type = resolve(part);
  if (type.examples?.length) return type.examples[0];
  if ("default" in type) return type.default;
  const first = type.oneOf?.[0] ?? type.anyOf?.[0] ?? type.allOf?.[0];
  if (first) return exampleOf(first, depth);
  if (type.type === "object" && depth < 5) {
    const named = Object.entries(type.properties ?? {});
    return Object.fromEntries(named.map(([name, inner]) => [name, exampleOf(inner, depth + 1)]));
  }
  if (type.type === "array") return depth < 5 && type.items ? [exampleOf(type.items, depth + 1)] : [];
  return { string: "", integer: 0, number: 0, boolean: false, object: {} }[type.type] ?? null;
}

function field(form, label, element) {
  const id = `field-${document.querySelectorAll("[id^='field-']").length}`;
  element.id = id;
  const name = create("label", "", label);
  name.htmlFor = id;
  form.append(name, element);
  return element;
}

function fields(form, operation) {
  const given = [];
  for (const parameter of (operation.parameters ?? []).map(resolve)) {
    if (!["path", "query"].includes(parameter.in)) continue;
    const { description = "" } = parameter;
    const label = `${parameter.name}${parameter.required ? "" : ", optional"}${description && `: ${description}`}`;
    const input = field(form, label, create("input"));
    input.required = Boolean(parameter.required);
    input.spellcheck = false;
    input.autocomplete = "off";
    given.push({ name: parameter.name, place: parameter.in, input });
  }
  return given;
}

function bodyOf(form, operation) {
  const content = resolve(operation.requestBody).content?.["application/json"];
  if (!content) return null;
  const area = field(form, "JSON body", create("textarea"));
  area.value = JSON.stringify(exampleOf(content.schema), null, 2);
  area.rows = Math.min(12, area.value.split("\n").length + 1);
  area.spellcheck = false;
  return area;
}

function targetOf(path, given) {
  const query = new URLSearchParams();
  let target = path;
  for (const { name, place, input } of given) {
    if (place === "path") target = target.replace(`{${name}}`, encodeURIComponent(input.value));
    else if (input.value) query.append(name, input.value);
  }
  const base = schema.servers?.[0]?.url ?? address.replace(/\/openapi\.json$/, "");
  return `${base.replace(/\/$/, "")}${target}${query.size ? `?${query}` : ""}`;
}

async function send(method, target, body, shown) {
  const headers = {};
  const key = byId("key-value").value;
  if (key) headers.authorization = `Bearer ${bytesOf(key)}`;
  if (body !== null) headers["content-type"] = "application/json";
  shown.hidden = false;
  shown.dataset.state = "waiting";
  shown.textContent = `${method} ${target}`;
  try {
    const answer = await fetch(target, { method, headers, body, cache: "no-store", redirect: "error" });
    const text = await answer.text();
    shown.dataset.state = answer.ok ? "good" : "bad";
    shown.textContent = `${method} ${target}\n${answer.status} ${answer.statusText}\n${pretty(text)}`.trim();
  } catch (error) {
    shown.dataset.state = "bad";
    shown.textContent = `${method} ${target}\n${error.message}`;
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function routeOf(path, name, operation) {
  const method = name.toUpperCase();
  const label = create("b", "", method);
  label.dataset.method = method;
  const about = operation.description ?? operation.summary ?? "";
  const summary = create("summary", "", label, create("code", "", path), create("span", "", ...marked(about)));
  const form = create("form", "");
  const given = fields(form, operation);
  const body = bodyOf(form, operation);
  const answers = create("dl", "hint");
  for (const [status, answer] of Object.entries(operation.responses ?? {})) {
    answers.append(create("dt", "", status), create("dd", "", resolve(answer).description ?? ""));
  }
  const shown = create("pre", "answer");
  shown.hidden = true;
  form.append(create("button", "", "Send"), shown, answers);
  form.addEventListener("submit", (submit) => {
    submit.preventDefault();
    send(method, targetOf(path, given), body && body.value, shown);
  });
  return create("details", "route card", summary, form);
}

function show() {
  byId("about").textContent = schema.info?.description ?? "";
  const groups = new Map();
  for (const [path, item] of Object.entries(schema.paths ?? {})) {
    for (const name of METHODS.filter((method) => item[method])) {
      const group = item[name].tags?.[0] ?? "other";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(routeOf(path, name, item[name]));
    }
  }
  for (const [group, routes] of groups) byId("routes").append(create("h2", "", group), ...routes);
}

byId("key").addEventListener("submit", (submit) => submit.preventDefault());

try {
  const answer = await fetch(address, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
  schema = await answer.json();
  show();
} catch (error) {
  byId("failed").hidden = false;
  byId("failed").textContent = `The schema cannot be read: ${error.message}`;
}
