/** The console: figures each second, topics with their events, sockets; over the relay's own WebSocket. */

import { binaryTop, Chart } from "./charts.js";
import { Socket } from "./relay.js";
import {
  byId, copy, create, formatBytes, formatCount, formatDuration, formatRate, prettyBytes, prettyJson, readPayload,
  readToken, reasonOf, showResult, timeOf,
} from "./show.js";

const KEPT = 301; // samples: five minutes
const MINUTE = 60; // samples
const SHOWN_MAX = 200; // events in the list; older ones leave
const LOOK_MS = 2000; // between two looks at the lists
const KEY = "relay-api-key";

// The door: the key, if one is needed, then the socket.

let key = sessionStorage.getItem(KEY) ?? "";
let isStarted = false;
let timer;

/** As header fields and base64 want it: a character for each byte. */
const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

const socket = new Socket("console/socket", { authToken: () => (key ? bytesOf(key) : undefined) });
const channel = socket.channel("console");

function showState(state, text = state) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

/** Ask whether this browser may look, since a WebSocket that is refused does not say why. */
async function enter() {
  clearTimeout(timer);
  const headers = key ? { authorization: `Bearer ${bytesOf(key)}` } : {};
  const answer = await fetch("console/access", { headers, cache: "no-store" }).catch(() => null);
  if (!answer) {
    showState("reconnecting");
    timer = setTimeout(enter, 2000);
    return;
  }
  byId("key").hidden = answer.status !== 401;
  byId("closed").hidden = answer.status !== 403;
  if (answer.status === 401) {
    showState("refused", "locked");
    showResult(byId("key-result"), "bad", key ? "That is not the key." : "");
    lock();
    byId("key-value").focus();
  } else if (answer.status === 403) {
    showState("refused", "closed");
    byId("closed-why").textContent = (await answer.json()).detail;
    lock();
  } else if (answer.ok) {
    if (key) sessionStorage.setItem(KEY, key);
    if (!isStarted) start();
  } else {
    showState("reconnecting");
    timer = setTimeout(enter, 2000);
  }
}

function lock() {
  sessionStorage.removeItem(KEY);
  key = "";
  isStarted = false;
  socket.disconnect();
  for (const view of document.querySelectorAll(".view")) view.hidden = true;
}

function start() {
  socket.connect();
  if (channel.state === "closed") channel.join(); // else it is joined anew by itself
  isStarted = true;
  route();
}

byId("key").addEventListener("submit", (submit) => {
  submit.preventDefault();
  key = byId("key-value").value;
  byId("key-value").value = "";
  enter();
});

let hasOpened = false;
socket.onOpen(() => {
  hasOpened = true;
  showState("live");
});
socket.onClose(() => {
  if (!isStarted) return;
  showState("reconnecting");
  if (!hasOpened) enter(); // refused: the key may be another by now
  hasOpened = false;
});

/** Ask the relay; null where it refuses or does not answer. */
const ask = (event, payload = {}) => channel.push(event, payload).then((answer) => answer, () => null);

// Samples: what has changed from one second to the next.

const samples = []; // {at_ms, figures, rates…}, oldest first

const total = (figure) => Object.values(figure ?? {}).reduce((sum, value) => sum + value, 0);
/** A histogram's observations and their seconds. */
const counted = (histogram) => (histogram ? histogram.slice(0, -1).reduce((sum, value) => sum + value, 0) : 0);

function sampleOf({ at_ms, figures }) {
  const last = samples.at(-1);
  const sample = { at_ms, figures, topics: total(figures.relay_topics), sockets: total(figures.relay_sockets) };
  sample.outbox = total(figures.relay_outbox_bytes);
  sample.lag = total(figures.relay_link_lag_seconds) * 1000 || null;
  const seconds = last ? (at_ms - last.at_ms) / 1000 : 0;
  const rate = (name) =>
    seconds > 0 ? Math.max(0, (total(figures[name]) - total(last.figures[name])) / seconds) : null;
  for (const [short, name] of [
    ["in", "relay_events_in"], ["out", "relay_deliveries"], ["pushes", "relay_pushes_in"], ["drops", "relay_dropped"],
    ["bytes", "relay_delivered_bytes"], ["cpu", "process_cpu_seconds"],
  ]) sample[short] = rate(name);
  const [now, before] = [figures.relay_fan_out_seconds[""], last?.figures.relay_fan_out_seconds[""]];
  const events = before ? counted(now) - counted(before) : 0;
  sample.fanOut = events > 0 ? (1000 * (now.at(-1) - before.at(-1))) / events : null;
  return sample;
}

// Overview.

const formatMs = (ms) => (ms < 10 ? `${ms.toFixed(ms && ms < 1 ? 2 : 1)} ms` : ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
const formatShort = (value) =>
  value >= 1e6 ? `${+(value / 1e6).toFixed(1)}M` : value >= 1e4 ? `${+(value / 1e3).toFixed(1)}k` : `${+value.toFixed(value < 10 ? 1 : 0)}`;
const formatAxisMs = (ms) => (ms >= 1000 ? `${+(ms / 1000).toFixed(1)} s` : `${+ms.toFixed(ms < 1 ? 2 : 1)} ms`);

const charts = [
  new Chart("Events in /s", [{ label: "bus", of: (s) => s.in }, { label: "pushes", of: (s) => s.pushes }], formatShort, 5),
  new Chart("Deliveries /s", [{ of: (s) => s.out }], formatShort, 5),
  new Chart("Sockets", [{ of: (s) => s.sockets }], formatShort, 5),
  new Chart("Delay", [{ label: "fan-out", of: (s) => s.fanOut }, { label: "link", of: (s) => s.lag }], formatAxisMs, 1),
  new Chart("Waiting in outboxes", [{ of: (s) => s.outbox }], formatBytes, 1024, binaryTop),
  new Chart("Drops /s", [{ of: (s) => s.drops }], formatShort, 1),
];
byId("charts").append(...charts.map(({ element }) => element));

const figures = {
  sockets: ["Sockets", (s) => [formatCount(s.sockets)]],
  topics: ["Topics", (s) => [formatCount(s.topics)]],
  in: ["Events in", (s) => [s.in === null ? "–" : formatRate(s.in), "/s"]],
  out: ["Deliveries", (s) => [s.out === null ? "–" : formatRate(s.out), "/s"]],
  bytes: ["Sent", (s) => (s.bytes === null ? ["–"] : `${formatBytes(s.bytes)}/s`.split(" "))],
  drops: ["Dropped", (s) => [formatCount(total(s.figures.relay_dropped))]],
  gaps: ["Gaps", (s) => [formatCount(total(s.figures.relay_gaps))]],
  outbox: ["Outboxes", (s) => formatBytes(s.outbox).split(" ")],
  cpu: ["CPU", (s) => [s.cpu === null ? "–" : (100 * s.cpu).toFixed(s.cpu < 0.1 ? 1 : 0), "%"]],
  memory: ["Memory", (s) => formatBytes(total(s.figures.process_resident_memory_bytes)).split(" ")],
  link: ["Link", (s, { link }) => [link.live ? "live" : "down"]],
  up: ["Up", (s) => [formatDuration(s.at_ms / 1000 - total(s.figures.process_start_time_seconds)).split(" ")[0]]],
};
const cells = Object.entries(figures).map(([name, [title, read]]) => {
  const [value, unit] = [create("b", "", "–"), create("i")];
  const cell = create("article", "", create("h2", "", title), create("p", "", value, unit));
  cell.dataset.figure = name;
  byId("figures").append(cell);
  return { cell, value, unit, read };
});

const slowest = (buckets, bounds) => {
  const place = buckets.findLastIndex((count) => count > 0);
  if (place < 0) return "–";
  return place < bounds.length ? `≤ ${formatAxisMs(bounds[place] * 1000)}` : `> ${bounds.at(-1)} s`;
};

function tableRow(...texts) {
  const row = create("tr");
  row.append(...texts.map((text) => create("td", "", text)));
  return row;
}

function fill(table, rows, empty) {
  const body = byId(table).tBodies[0];
  body.replaceChildren(...rows);
  if (rows.length) return;
  const cell = create("td", "quiet", empty);
  cell.colSpan = 5;
  body.append(create("tr", "", cell));
}

function showPlugins(now, past, bounds) {
  const { relay_plugin_calls: calls, relay_plugin_errors: errors, relay_plugin_seconds: times } = now.figures;
  const seconds = (now.at_ms - past.at_ms) / 1000;
  const rows = Object.keys(calls).sort().map((name) => {
    const [time, before] = [times[name] ?? [], past.figures.relay_plugin_seconds[name] ?? []];
    const changes = time.map((value, place) => value - (before[place] ?? 0));
    const [count, spent] = [counted(changes), changes.at(-1)];
    const called = calls[name] - (past.figures.relay_plugin_calls[name] ?? 0);
    return tableRow(
      name,
      seconds > 0 ? formatRate(called / seconds) : "–",
      count > 0 ? formatMs((1000 * spent) / count) : "–",
      slowest(changes.slice(0, -1), bounds),
      formatCount(errors[name] ?? 0),
    );
  });
  fill("plugins", rows, "No plugin has been called yet.");
}

function showLosses(now, past) {
  const rows = [];
  for (const [kind, figure] of [["dropped", "relay_dropped"], ["refused", "relay_refused"], ["malformed", "relay_malformed"]]) {
    for (const [reason, count] of Object.entries(now.figures[figure])) {
      const recent = count - (past.figures[figure][reason] ?? 0);
      rows.push([count, tableRow(`${kind}: ${reason}`, recent ? formatCount(recent) : "–", formatCount(count))]);
    }
  }
  rows.sort(([one], [other]) => other - one);
  fill("losses", rows.map(([, row]) => row), "Nothing has been dropped or refused.");
}

function showFigures(message) {
  const sample = sampleOf(message);
  samples.push(sample);
  if (samples.length > KEPT) samples.shift();
  byId("node").textContent = message.workers > 1 ? `${message.node}, one of ${message.workers} workers` : message.node;
  byId("alarm").hidden = message.link.live;
  byId("alarm").textContent = `The relay hears nothing: ${message.link.reason}`;
  for (const { cell, value, unit, read } of cells) {
    [value.textContent, unit.textContent = ""] = read(sample, message);
    if (cell.dataset.figure === "link") cell.dataset.tone = message.link.live ? "ok" : "bad";
  }
  const past = samples[Math.max(0, samples.length - 1 - MINUTE)];
  if (!byId("overview").hidden) {
    for (const chart of charts) chart.show(samples);
    showPlugins(sample, past, message.bounds_s);
    showLosses(sample, past);
  }
}

channel.on("figures", (message) => {
  const last = samples.at(-1);
  // Another process, or the same one started anew: its totals cannot be compared with these.
  const start = (figures) => total(figures.process_start_time_seconds);
  if (last && Math.abs(start(last.figures) - start(message.figures)) > 1) samples.length = 0;
  showFigures(message);
});

// Lists whose rows stay where the reader's focus is.

function showRows(list, items, keyOf, hrefOf, cellsOf, chosen) {
  const rows = new Map([...list.children].map((row) => [row.dataset.key, row]));
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const wanted = items.map((item) => {
    const key = keyOf(item);
    const row = rows.get(key) ?? create("a", "item");
    row.dataset.key = key;
    row.href = hrefOf(item);
    if (key === chosen) row.setAttribute("aria-current", "true");
    else row.removeAttribute("aria-current");
    row.replaceChildren(...cellsOf(item).map((text) => create("span", "", text)));
    return row;
  });
  const isSame = wanted.length === list.children.length && wanted.every((row, place) => row === list.children[place]);
  if (!isSame) list.replaceChildren(...wanted);
  if (focused !== null && !list.contains(document.activeElement)) {
    [...list.children].find((row) => row.dataset.key === focused)?.focus({ preventScroll: true });
  }
}

// Topics.

let topic = null; // the one that is shown
let isPaused = false;
let seen = 0; // events that came, shown or not
let waiting = []; // that came while paused

const topicHref = (name) => `#topics/${encodeURIComponent(name)}`;
const socketHref = (id) => `#sockets/${encodeURIComponent(id)}`;

async function lookAtTopics() {
  const answer = await ask("topics", { search: byId("topic-search").value.trim() });
  if (answer) {
    byId("topic-total").textContent = formatCount(answer.total);
    const cells = ({ topic, sockets, events_per_s }) => [topic, formatCount(sockets), formatRate(events_per_s)];
    showRows(byId("topic-list"), answer.topics, (item) => item.topic, (item) => topicHref(item.topic), cells, topic);
  }
  if (topic === null) return;
  const details = await ask("topic", { topic });
  if (!details || details.topic !== topic) return;
  byId("topic-figures").textContent = `${formatRate(details.events_per_s)} events/s`;
  byId("joined-count").textContent = formatCount(details.sockets);
  byId("joined").replaceChildren(
    ...details.joined.map(({ id, address }) => {
      const link = create("a", "chip", id);
      link.href = socketHref(id);
      link.title = address ?? "";
      return link;
    }),
  );
}

function showTopic(name) {
  if (topic === name) return;
  topic = name;
  byId("topic-view").hidden = name === null;
  byId("topic-name").textContent = name ?? "";
  byId("topic-figures").textContent = byId("joined-count").textContent = "";
  byId("joined").replaceChildren();
  showResult(byId("publish-result"), "", "");
  if (isPaused) pause();
  clearTail();
  ask("watch", { topic: name ?? "" });
}

channel.on("events", ({ topic: from, events, left_out }) => {
  if (from !== topic) return;
  seen += events.length + left_out;
  waiting.push(...events);
  if (waiting.length > SHOWN_MAX) waiting.splice(0, waiting.length - SHOWN_MAX);
  if (!isPaused) flushTail();
  showCount();
});

function flushTail() {
  const list = byId("tail");
  list.prepend(...waiting.reverse().map(eventRow));
  waiting = [];
  while (list.children.length > SHOWN_MAX) list.lastChild.remove();
  applyFilter();
}

function eventRow({ at_ms, event, size, frame, base64 }) {
  const [pretty, plain] = base64 === undefined ? textOf(frame) : bytesIn(base64);
  const body = create("pre", "", ...pretty);
  const button = create("button", "small", "Copy");
  button.type = "button";
  const whole = create("span", "", plain);
  whole.hidden = true;
  button.addEventListener("click", () => copy(button, whole));
  const row = create("li", "", timeOf(new Date(at_ms)), create("span", "event-name", event), body, button, whole);
  row.title = formatBytes(size);
  row.dataset.text = `${event} ${plain}`.toLowerCase();
  return row;
}

/** The payload of a frame, `[null, null, topic, event, payload]`; a long one was cut. */
function textOf(frame) {
  try {
    const payload = JSON.parse(frame)[4];
    return [prettyJson(payload), JSON.stringify(payload)];
  } catch {
    return [[frame, create("span", "bytes", "… cut here")], frame];
  }
}

/** The payload of a binary frame, `02 tl el topic event data`. */
function bytesIn(base64) {
  const frame = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const data = frame.slice(3 + frame[1] + frame[2]);
  return [prettyBytes(data.buffer), base64];
}

function applyFilter() {
  const needle = byId("filter").value.trim().toLowerCase();
  for (const row of byId("tail").children) row.hidden = !row.dataset.text.includes(needle);
  showCount();
}

function showCount() {
  const rows = [...byId("tail").children];
  const shown = rows.filter((row) => !row.hidden).length;
  const parts = [];
  if (seen > shown) parts.push(`${formatCount(shown)} of ${formatCount(seen)}`);
  else if (seen) parts.push(formatCount(seen));
  if (isPaused) parts.push(waiting.length ? `${formatCount(waiting.length)} waiting` : "paused");
  byId("tail-count").textContent = parts.join(", ");
  byId("tail-empty").hidden = rows.length > 0;
}

function clearTail() {
  seen = 0;
  waiting = [];
  byId("tail").replaceChildren();
  showCount();
}

function pause() {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", isPaused);
  byId("pause").textContent = isPaused ? "Resume" : "Pause";
  if (!isPaused) flushTail();
  showCount();
}

byId("pause").addEventListener("click", pause);
byId("clear").addEventListener("click", clearTail);
byId("filter").addEventListener("input", applyFilter);
byId("topic-search").addEventListener("input", lookAtTopics);
byId("topic-search").addEventListener("keydown", ({ key, target }) => {
  if (key === "Enter" && target.value.trim()) location.hash = topicHref(target.value.trim());
});

// Sending: to all as a backend does, or from one client as a browser does.

async function send(how) {
  const output = byId("publish-result");
  const payload = readPayload(byId("publish-payload"), output);
  const event = byId("publish-event").value.trim();
  if (payload === undefined || !topic || !event) return;
  showResult(output, "", "sent…");
  const start = performance.now();
  try {
    const response = await how(topic, event, payload);
    const took = `${(performance.now() - start).toFixed(0)} ms`;
    showResult(output, "ok", `ok in ${took}  ${response && Object.keys(response).length ? JSON.stringify(response) : ""}`);
  } catch (error) {
    showResult(output, "bad", error.status === "timeout" ? "no reply in 10 s" : `${error.status}: ${reasonOf(error.response)}`);
  }
}

const publish = (topic, event, payload) => channel.push("publish", { topic, event, payload });

async function pushAsClient(topic, event, payload) {
  // With the token that was given on the page at /, if any; what the key opens is not what clients may do.
  const client = new Socket(document.querySelector('meta[name="relay-socket"]').content, { authToken: readToken });
  const reason = "the relay lets this client in with a token alone; its page at / asks for one";
  const refused = new Promise((_, fail) => client.onClose(() => fail({ status: "refused", response: { reason } })));
  client.connect();
  try {
    const joined = client.channel(topic);
    await Promise.race([joined.join(), refused]);
    return await joined.push(event, payload);
  } finally {
    client.disconnect();
  }
}

byId("publish").addEventListener("submit", (submit) => {
  submit.preventDefault();
  send(publish);
});
byId("push").addEventListener("click", () => send(pushAsClient));
byId("publish-payload").addEventListener("keydown", (key) => {
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) byId("publish").requestSubmit();
});

// Sockets.

let socketId = null; // the one that is shown
let isAsking = false; // whether to disconnect it

async function lookAtSockets() {
  const answer = await ask("sockets", { search: byId("socket-search").value.trim() });
  if (answer) {
    byId("socket-total").textContent = formatCount(answer.total);
    const cells = ({ id, address, topics, outbox_bytes }) => [
      id, address ?? "", formatCount(topics.length), outbox_bytes ? formatBytes(outbox_bytes) : "–",
    ];
    showRows(byId("socket-list"), answer.sockets, (item) => item.id, (item) => socketHref(item.id), cells, socketId);
  }
  if (socketId === null) return;
  const id = socketId;
  const found = await ask("socket", { id });
  if (id !== socketId) return;
  byId("disconnect").disabled = !found;
  if (!found) showResult(byId("socket-result"), "", "This socket is gone.");
  else showSocketFacts(found);
}

function showSocketFacts({ address, version, path, outbox_bytes, missed, idle_s, topics }) {
  const facts = [
    ["Address", address ?? "–"], ["Protocol", `V${version}`], ["Frames", path], ["Waiting", formatBytes(outbox_bytes)], ["Events missed", formatCount(missed)],
    ["Last heard", `${formatDuration(idle_s)} ago`], ["Topics", formatCount(topics.length)],
  ];
  byId("socket-facts").replaceChildren(
    ...facts.map(([name, value]) => create("div", "", create("dt", "", name), create("dd", "", value))),
  );
  byId("socket-topics").replaceChildren(
    ...topics.map((name) => {
      const link = create("a", "chip", name);
      link.href = topicHref(name);
      return link;
    }),
  );
}

function showSocket(id) {
  if (socketId === id) return;
  socketId = id;
  askToDisconnect(false);
  byId("socket-view").hidden = id === null;
  byId("socket-name").textContent = id ?? "";
  byId("socket-facts").replaceChildren();
  byId("socket-topics").replaceChildren();
  showResult(byId("socket-result"), "", "");
}

function askToDisconnect(isAskingNow) {
  isAsking = isAskingNow;
  byId("disconnect").textContent = isAsking ? "Really disconnect?" : "Disconnect";
}

byId("disconnect").addEventListener("click", async () => {
  if (!isAsking) return askToDisconnect(true);
  askToDisconnect(false);
  const answer = await ask("disconnect", { id: socketId });
  showResult(byId("socket-result"), answer ? "ok" : "bad", answer ? "Disconnected." : "This socket is gone.");
  lookAtSockets();
});
byId("disconnect").addEventListener("blur", () => askToDisconnect(false));
byId("socket-search").addEventListener("input", lookAtSockets);

// Views, by the part of the address behind #.

const VIEWS = ["overview", "topics", "sockets"];

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = VIEWS.includes(name) ? name : "overview";
  const chosen = rest.length && rest[0] ? decodeURIComponent(rest.join("/")) : null;
  for (const other of VIEWS) byId(other).hidden = other !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  showTopic(view === "topics" ? chosen : null);
  showSocket(view === "sockets" ? chosen : null);
  byId(view).classList.toggle("chosen", chosen !== null);
  if (samples.length) for (const chart of charts) chart.show(samples);
  look();
}

function look() {
  if (!socket.isConnected() || document.hidden) return;
  if (!byId("topics").hidden) lookAtTopics();
  if (!byId("sockets").hidden) lookAtSockets();
}

addEventListener("hashchange", () => isStarted && route());
setInterval(look, LOOK_MS);
// After a reconnect the relay has forgotten what was watched.
socket.onOpen(() => {
  if (topic !== null) ask("watch", { topic });
  look();
});

// Light and dark.

const themeNow = () => document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");

byId("theme").addEventListener("click", () => {
  const theme = themeNow() === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("relay-theme", theme);
});

// Keys.

function goBack() {
  const field = document.activeElement;
  if (field?.matches("input, textarea")) {
    if (field.value && field.matches("#topic-search, #socket-search, #filter")) {
      field.value = "";
      field.dispatchEvent(new Event("input"));
    } else field.blur();
  } else if (topic !== null || socketId !== null) location.hash = topic !== null ? "#topics" : "#sockets";
}

/** Move along the rows of the list that is shown, from its search field down. */
function move(step) {
  const rows = [...document.querySelectorAll(".view:not([hidden]) .rows .item")];
  const place = rows.indexOf(document.activeElement) + step;
  if (place < 0) document.querySelector(".view:not([hidden]) .list input")?.focus();
  else rows[Math.min(place, rows.length - 1)]?.focus();
}

function search() {
  if (!byId("overview").hidden) location.hash = "#topics";
  route();
  document.querySelector(".view:not([hidden]) .list input").focus();
}

const KEYS = {
  1: () => (location.hash = "#overview"),
  2: () => (location.hash = "#topics"),
  3: () => (location.hash = "#sockets"),
  "/": search,
  f: () => topic !== null && byId("filter").focus(),
  p: () => topic !== null && pause(),
  t: () => byId("theme").click(),
};

addEventListener("keydown", (event) => {
  if (!isStarted || event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = document.activeElement?.closest(".list");
  if (event.key === "Escape") goBack();
  else if (inList && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1);
  } else if (!document.activeElement?.matches("input, textarea, select") && KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

enter();
