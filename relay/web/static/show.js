/** What both pages show alike: numbers, payloads, rows of a list. */

const TEXT_MAX = 4000; // characters shown of one payload
const HEX_MAX = 256; // bytes shown of a binary one

export const byId = (id) => document.getElementById(id);

/** Make an element: `create("b", "class name", "text", child, …)`. */
export function create(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Numbers.

export function formatCount(value) {
  return Math.round(value).toLocaleString("en").replaceAll(",", "\u202f");
}

export function formatRate(value) {
  return value >= 0.05 && value < 100 ? value.toFixed(1) : formatCount(value);
}

export function formatDuration(seconds) {
  const [days, hours, minutes] = [seconds / 86_400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days}d ${hours}h`;
  if (hours) return `${hours}h ${minutes}m`;
  if (minutes) return `${minutes}m ${Math.floor(seconds % 60)}s`;
  return `${Math.floor(seconds)}s`;
}

export function formatBytes(bytes) {
  const power = bytes < 1 ? 0 : Math.min(4, Math.floor(Math.log(bytes) / Math.log(1024)));
  return `${(bytes / 1024 ** power).toFixed(power > 2 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

// Payloads.

const JSON_TOKEN = /("(?:\\.|[^"\\])*")(\s*:)?|-?\d[\d.eE+-]*|\b(?:true|false|null)\b/g;

/** JSON with its keys, strings and other words coloured; on one line where it fits. */
export function prettyJson(payload) {
  const line = JSON.stringify(payload) ?? "";
  // Newlines are only between its words: those in strings are escaped.
  const spread = JSON.stringify(payload, null, 2) ?? "";
  const whole = line.length <= 90 ? spread.replace(/\n\s*/g, " ") : spread;
  const text = whole.slice(0, TEXT_MAX);
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(JSON_TOKEN)) {
    const [token, string, colon] = match;
    const kind = colon ? "key" : string ? "string" : "word";
    parts.push(text.slice(end, match.index), create("span", kind, token));
    end = match.index + token.length;
  }
  parts.push(text.slice(end));
  if (whole.length > TEXT_MAX) parts.push(create("span", "bytes", `… ${whole.length - TEXT_MAX} more characters`));
  return parts;
}

/** Bytes as hex, with the text they spell where they are text. */
export function prettyBytes(buffer) {
  const bytes = new Uint8Array(buffer, 0, Math.min(buffer.byteLength, HEX_MAX));
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const rest = buffer.byteLength > HEX_MAX ? " …" : "";
  const text = new TextDecoder().decode(bytes);
  const isText = /^[\P{C}\s]+$/u.test(text) && !text.includes("\ufffd");
  const size = `${buffer.byteLength} bytes`;
  return [`${hex}${rest}`, create("span", "bytes", isText ? `${size}, as text: ${text}${rest}` : size)];
}

/** What `prettyJson` or `prettyBytes` give, in its box; a long one scrolls, so the keyboard has to reach it. */
export function payloadBox(parts) {
  const box = create("pre", "", ...parts);
  const text = box.textContent;
  if (text.length > 300 || text.split("\n").length > 8) box.tabIndex = 0;
  return box;
}

const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

/** The moment an event came, to the millisecond. */
export function timeOf(at) {
  const time = create("time", "", `${clock.format(at)}.${String(at.getMilliseconds()).padStart(3, "0")}`);
  time.dateTime = at.toISOString();
  return time;
}

// What a reply says.

export function reasonOf(response) {
  const reason = response?.reason ?? "no reason given";
  return typeof reason === "string" ? reason : JSON.stringify(reason);
}

/** Fill a list of names and values. */
export function showFacts(list, facts) {
  list.replaceChildren(...facts.map(([name, value]) => create("div", "", create("dt", "", name), create("dd", "", value))));
}

export function showResult(output, tone, text) {
  output.dataset.tone = tone;
  output.textContent = text;
}

/** Read a field of JSON; on a mistake say what is wrong and return undefined. */
export function readPayload(field, output) {
  try {
    const payload = JSON.parse(field.value || "{}");
    field.setAttribute("aria-invalid", "false");
    return payload;
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    showResult(output, "bad", `Not JSON: ${error.message}`);
    field.focus();
  }
}

/** Copy the text of an element; where the page may not, select it, ready for the keyboard. */
export async function copy(button, element) {
  const label = (button.dataset.label ??= button.textContent);
  const isCopied = await navigator.clipboard?.writeText(element.textContent).then(() => true, () => false);
  if (!isCopied) getSelection().selectAllChildren(element);
  button.textContent = isCopied ? "Copied" : "Selected";
  setTimeout(() => (button.textContent = label), 1500);
}

// What the pages send as `authToken`, where the relay asks for one; kept for this tab.

const TOKEN = "relay-token";

export const readToken = () => sessionStorage.getItem(TOKEN) ?? undefined;

export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);
