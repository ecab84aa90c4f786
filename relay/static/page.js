/** The relay's own page: host figures, a minute of events as marks on a wire, and a bench to join, push and watch. */

import { Socket } from "./relay.js";

const SHOWN_MAX = 200; // rows in the list; older ones leave
const TEXT_MAX = 4000; // characters shown of one payload
const HEX_MAX = 256; // bytes shown of a binary one
const MINUTE_MS = 60_000;
const HUES = 6; // topic-0 to topic-5 in page.css

const byId = (id) => document.getElementById(id);
const socketPath = document.querySelector('meta[name="relay-socket"]').content;
const socket = new Socket(socketPath);
const subscriptions = new Map(); // topic → {channel, hue, element}

/** Make an element: `create("b", "class name", "text", child, …)`. */
function create(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// Connection state.

function showState(state, text = state) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
  byId("listening").textContent = state === "live" ? "Listening." : "Not connected.";
}

/** A browser does not say why a handshake failed; a server that still answers HTTP has refused it. */
async function explainLoss() {
  showState("reconnecting");
  const isUp = await fetch(location.href, { method: "HEAD", cache: "no-store" }).then(() => true, () => false);
  if (isUp && !socket.isConnected()) showState("refused", "refused, trying again");
}

let hasOpened = false; // since the last attempt
socket.onOpen(() => {
  hasOpened = true;
  showState("live");
});
socket.onClose(({ code, reason }) => {
  if (code === 1000) showState("refused", reason || "closed by the server");
  else if (hasOpened) showState("reconnecting");
  else explainLoss();
  hasOpened = false;
});

// Host figures.

const figures = new Map(
  [...document.querySelectorAll("[data-figure]")].map((element) => [element.dataset.figure, { element, history: [] }]),
);

const formats = {
  cpu_percent: (value) => value.toFixed(1),
  memory_percent: (value) => value.toFixed(1),
  events_per_s: (value) => (value < 100 ? value.toFixed(1) : formatCount(value)),
  uptime_s: formatDuration,
};

function formatCount(value) {
  return Math.round(value).toLocaleString("en").replaceAll(",", "\u202f");
}

function formatDuration(seconds) {
  const [days, hours, minutes] = [seconds / 86_400, (seconds / 3600) % 24, (seconds / 60) % 60].map(Math.floor);
  if (days) return `${days}d ${hours}h`;
  if (hours) return `${hours}h ${minutes}m`;
  if (minutes) return `${minutes}m ${Math.floor(seconds % 60)}s`;
  return `${Math.floor(seconds)}s`;
}

function formatBytes(bytes) {
  const power = bytes < 1 ? 0 : Math.min(4, Math.floor(Math.log(bytes) / Math.log(1024)));
  return `${(bytes / 1024 ** power).toFixed(power > 2 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function showStats(stats) {
  for (const [name, { element, history }] of figures) {
    const value = stats[name];
    if (typeof value !== "number") continue;
    element.querySelector("b").textContent = (formats[name] ?? formatCount)(value);
    history.push(value);
    if (history.length > 60) history.shift();
    const svg = element.querySelector("svg");
    if (svg) drawSparkline(svg, history, name.endsWith("_percent") ? 10 : 4);
  }
  const note = figures.get("memory_percent").element.querySelector("span");
  if (typeof stats.memory_bytes === "number") note.textContent = formatBytes(stats.memory_bytes);
  if (typeof stats.uptime_s === "number") showStart(Date.now() - stats.uptime_s * 1000);
}

function showStart(startMs) {
  const start = new Date(startMs);
  const isToday = start.toDateString() === new Date().toDateString();
  const time = start.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  figures.get("uptime_s").element.querySelector(".since").textContent =
    `since ${isToday ? "" : `${start.toLocaleDateString()} `}${time}`;
}

/** Draw the last minute, newest on the right. `spanMin` keeps the noise of a resting figure from looking like drama. */
function drawSparkline(svg, values, spanMin) {
  const low = Math.max(0, Math.min(...values) - spanMin / 4);
  const span = Math.max(spanMin, (Math.max(...values) - low) * 1.15);
  const points = values.map((value, index) => {
    const x = 100 - ((values.length - 1 - index) * 100) / 59;
    return `${x.toFixed(2)},${(28 - ((value - low) / span) * 24).toFixed(2)}`;
  });
  const first = points[0].split(",")[0];
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(
    path("area", `M${first},30 L${points.join(" L")} L100,30 Z`),
    path("line", `M${points.join(" L")}`),
  );
}

function path(className, d) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", "path");
  element.setAttribute("class", className);
  element.setAttribute("d", d);
  return element;
}

// The wire: one mark for each event, moving left as it ages.

const marks = []; // {at, height, hue}, oldest first
const MARKS_MAX = 4000;
const canvas = byId("wire");
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");

function markEvent(hue, size) {
  marks.push({ at: performance.now(), height: Math.min(1, 0.22 + Math.log10(1 + size) / 5), hue });
  if (marks.length > MARKS_MAX) marks.shift();
}

function drawWire() {
  const now = performance.now();
  while (marks.length && now - marks[0].at > MINUTE_MS) marks.shift();
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  const colours = getComputedStyle(document.documentElement);
  const middle = height / 2;
  const end = width - 5;
  pen.scale(scale, scale);
  pen.fillStyle = colours.getPropertyValue("--rule");
  pen.fillRect(0, middle - 0.5, end, 1);
  for (const { at, height: share, hue } of marks) {
    const age = (now - at) / MINUTE_MS;
    const length = share * height * 0.9;
    pen.globalAlpha = 1 - 0.75 * age;
    pen.fillStyle = colours.getPropertyValue(`--topic-${hue}`);
    pen.beginPath();
    pen.roundRect(end - age * end - 1, middle - length / 2, 2.5, length, 1.25);
    pen.fill();
  }
  drawHead(pen, colours, end, middle, now);
  byId("wire-count").textContent =
    marks.length === 1 ? "1 event in the last minute" : `${formatCount(marks.length)} events in the last minute`;
}

/** The end where events come in: it swells when one does. */
function drawHead(pen, colours, x, y, now) {
  const since = marks.length ? now - marks.at(-1).at : Infinity;
  pen.globalAlpha = 1;
  pen.fillStyle = colours.getPropertyValue(socket.isConnected() ? "--live" : "--wait");
  pen.beginPath();
  pen.arc(x, y, 3 + 2 * Math.max(0, 1 - since / 400), 0, 2 * Math.PI);
  pen.fill();
}

// About one pixel a frame is smooth enough, and leaves the processor to what is measured here.
function animateWire() {
  if (!document.hidden) drawWire();
  setTimeout(() => requestAnimationFrame(animateWire), isCalm.matches ? 1000 : 45);
}

// Payloads.

const JSON_TOKEN = /("(?:\\.|[^"\\])*")(\s*:)?|-?\d[\d.eE+-]*|\b(?:true|false|null)\b/g;

/** JSON with its keys, strings and other words coloured; on one line where it fits. */
function prettyJson(payload) {
  const line = JSON.stringify(payload) ?? "";
  const whole = line.length <= 90 ? line : JSON.stringify(payload, null, 2);
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
function prettyBytes(buffer) {
  const bytes = new Uint8Array(buffer, 0, Math.min(buffer.byteLength, HEX_MAX));
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const rest = buffer.byteLength > HEX_MAX ? " …" : "";
  const text = new TextDecoder().decode(bytes);
  const isText = /^[\P{C}\s]+$/u.test(text) && !text.includes("\ufffd");
  const size = `${buffer.byteLength} bytes`;
  return [`${hex}${rest}`, create("span", "bytes", isText ? `${size}, as text: ${text}${rest}` : size)];
}

// The list of events, written once a frame however many come.

let waiting = [];
let heard = 0;
let isPaused = false;

const clock = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });

function showEvent(topic, hue, event, payload) {
  if (isPaused || (topic === "system" && !byId("show-system").checked)) return;
  heard++;
  waiting.push({ topic, hue, event, payload, at: new Date() });
  if (waiting.length === 1) requestAnimationFrame(flushEvents);
  if (waiting.length > SHOWN_MAX) waiting.shift(); // a hidden page is given no frames
}

function flushEvents() {
  const list = byId("events");
  list.prepend(...waiting.reverse().map(eventRow));
  waiting = [];
  while (list.children.length > SHOWN_MAX) list.lastChild.remove();
  showCount();
}

function eventRow({ topic, hue, event, payload, at }) {
  const time = create("time", "", `${clock.format(at)}.${String(at.getMilliseconds()).padStart(3, "0")}`);
  time.dateTime = at.toISOString();
  const pretty = payload instanceof ArrayBuffer ? prettyBytes(payload) : prettyJson(payload);
  const body = create("pre", "", ...pretty);
  return create("li", "", time, create("span", `topic-name topic-${hue}`, topic), create("span", "event-name", event), body);
}

function showCount() {
  const shown = byId("events").children.length;
  byId("empty").hidden = shown > 0;
  byId("events-count").textContent =
    heard > shown ? `${formatCount(heard)} heard, the last ${shown} shown` : shown ? `${shown}` : "";
}

byId("pause").addEventListener("click", ({ target }) => {
  isPaused = !isPaused;
  target.setAttribute("aria-pressed", isPaused);
  target.textContent = isPaused ? "Resume" : "Pause";
});

byId("clear").addEventListener("click", () => {
  waiting.length = heard = 0;
  byId("events").replaceChildren();
  showCount();
});

// Topics.

/** How much a payload weighs, near enough for the height of its mark. */
const sizeOf = (payload) => payload.byteLength ?? JSON.stringify(payload).length;

let joins = 0;

function join(topic) {
  if (subscriptions.has(topic)) return select(topic);
  const subscription = {
    channel: socket.channel(topic),
    hue: topic === "system" ? "system" : joins++ % HUES,
    element: create("li"),
  };
  subscriptions.set(topic, subscription);
  byId("topics").append(subscription.element);
  follow(topic, subscription);
  if (topic !== "system") select(topic);
}

function follow(topic, subscription) {
  const { channel, hue } = subscription;
  const note = (text, tone = "") => showTopic(topic, subscription, create("span", `note ${tone}`, text));
  channel
    .join()
    .receive("ok", () => note(""))
    .receive("error", (response) => note(`refused: ${reasonOf(response)}`, "bad"))
    .receive("timeout", () => note("no answer, trying again", "bad"));
  channel.onError((payload) => {
    if (payload?.source === "transport") note("waiting for the connection");
    else note(reasonOf(payload), "bad");
  });
  channel.onClose(() => forget(topic, subscription));
  listen(topic, hue, channel);
  note("joining");
}

async function listen(topic, hue, channel) {
  for await (const { event, payload } of channel) {
    markEvent(hue, sizeOf(payload));
    if (topic === "system" && event === "stats") showStats(payload);
    showEvent(topic, hue, event, payload);
  }
}

function reasonOf(response) {
  const reason = response?.reason ?? "no reason given";
  return typeof reason === "string" ? reason : JSON.stringify(reason);
}

function showTopic(topic, { channel, hue, element }, note) {
  const leave = create("button", "", "Leave");
  leave.type = "button";
  leave.setAttribute("aria-label", `Leave ${topic}`);
  leave.addEventListener("click", () => channel.leave());
  element.className = `topic-${hue}`;
  element.dataset.state = channel.state;
  element.hidden = topic === "system" && channel.state === "joined"; // its figures speak for it
  element.replaceChildren(create("span", "topic-name", topic, " ", note), leave);
  showChoices();
}

function forget(topic, { element }) {
  subscriptions.delete(topic);
  element.remove();
  showChoices();
}

function showChoices() {
  const choice = byId("push-topic");
  const chosen = choice.value;
  const topics = [...subscriptions.keys()].filter((topic) => topic !== "system");
  choice.replaceChildren(...topics.map((topic) => new Option(topic)));
  if (topics.includes(chosen)) choice.value = chosen;
  choice.form.querySelector("button").disabled = !topics.length;
  showCommand();
}

function select(topic) {
  byId("push-topic").value = topic;
  showCommand();
}

byId("join").addEventListener("submit", (submit) => {
  submit.preventDefault();
  join(byId("topic").value.trim());
});

// Push.

function showResult(tone, text) {
  byId("push-result").dataset.tone = tone;
  byId("push-result").textContent = text;
}

/** Read the payload field; on a mistake say what is wrong and return undefined. */
function readPayload() {
  const field = byId("push-payload");
  try {
    const payload = JSON.parse(field.value || "{}");
    field.setAttribute("aria-invalid", "false");
    return payload;
  } catch (error) {
    field.setAttribute("aria-invalid", "true");
    showResult("bad", `Not JSON: ${error.message}`);
    field.focus();
  }
}

byId("push").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const payload = readPayload();
  const subscription = subscriptions.get(byId("push-topic").value);
  if (payload === undefined || !subscription) return;
  showResult("", subscription.channel.state === "joined" ? "sent…" : "waits for the join…");
  const start = performance.now();
  try {
    const response = await subscription.channel.push(byId("push-event").value.trim(), payload);
    showResult("ok", `ok in ${(performance.now() - start).toFixed(0)} ms  ${JSON.stringify(response)}`);
  } catch (error) {
    showResult("bad", error.status === "timeout" ? "no reply in 10 s" : `${error.status}: ${reasonOf(error.response)}`);
  }
});

byId("push-payload").addEventListener("keydown", (key) => {
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) byId("push").requestSubmit();
});

// The line to publish with: the server's, for the topic and the event chosen here.

const command = byId("publish-command");
const template = command.textContent;

function showCommand() {
  const name = `${byId("push-topic").value || "room:1"}:${byId("push-event").value.trim()}`;
  const isSafe = /^[\w:.@%+,/-]+$/.test(name); // needs no quoting in any shell
  command.textContent = isSafe ? template.replace("room:1:new_msg", () => name) : template;
}

byId("push-topic").addEventListener("change", showCommand);
byId("push-event").addEventListener("input", showCommand);

byId("copy").addEventListener("click", async ({ target }) => {
  // No clipboard on plain http from another host: then the line is selected, ready for the keyboard.
  const isCopied = await navigator.clipboard?.writeText(command.textContent).then(() => true, () => false);
  if (!isCopied) getSelection().selectAllChildren(command);
  target.textContent = isCopied ? "Copied" : "Selected";
  setTimeout(() => (target.textContent = "Copy"), 1500);
});

socket.connect();
join("system");
join("room:1");
animateWire();
