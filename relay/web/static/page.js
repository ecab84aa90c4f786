/** The page that lets people try the relay: host metrics, and a bench to join, push and watch. */

import { Socket } from "./relay.js";
import {
  byId, copy, create, formatBytes, formatCount, formatDuration, formatRate, keepToken, payloadBox, prettyBytes, prettyJson, readPayload,
  readToken, reasonOf, showResult, timeOf,
} from "./show.js";

const SHOWN_MAX = 200; // rows in the list; older ones leave
const HUES = 6; // topic-0 to topic-5 in base.css

const socketPath = document.querySelector('meta[name="relay-socket"]').content;
const socket = new Socket(socketPath, { authToken: readToken });
const subscriptions = new Map(); // topic → {channel, hue, element}

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
  if (!isUp || socket.isConnected()) return;
  showState("refused", "refused, trying again");
  byId("who").hidden = false;
  if (readToken()) showResult(byId("who-result"), "bad", "The relay does not accept connections with this token.");
}

byId("who").addEventListener("submit", (submit) => {
  submit.preventDefault();
  keepToken(byId("token").value.trim());
  showResult(byId("who-result"), "", "");
  socket.disconnect(() => socket.connect());
});

let hasOpened = false; // since the last attempt
socket.onOpen(() => {
  hasOpened = true;
  byId("who").hidden = true;
  showState("live");
});
socket.onClose(({ code, reason }) => {
  if (code === 1000) showState("refused", reason || "closed by the server");
  else if (hasOpened) showState("reconnecting");
  else explainLoss();
  hasOpened = false;
});

// Host metrics.

const formats = {
  cpu_percent: (value) => value.toFixed(1),
  memory_percent: (value) => value.toFixed(1),
  events_per_s: formatRate,
  uptime_s: formatDuration,
};

function showStats(stats) {
  for (const element of document.querySelectorAll("[data-metric]")) {
    const name = element.dataset.metric;
    const value = stats[name];
    if (typeof value === "number") element.querySelector("b").textContent = (formats[name] ?? formatCount)(value);
  }
  if (typeof stats.memory_bytes === "number") byId("memory").textContent = formatBytes(stats.memory_bytes);
}

// The list of events, written once a frame however many come.

let waiting = [];
let heard = 0;
let isPaused = false;

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
  const pretty = payload instanceof ArrayBuffer ? prettyBytes(payload) : prettyJson(payload);
  const body = payloadBox(pretty);
  return create("li", "", timeOf(at), create("span", `topic-name topic-${hue}`, topic), create("span", "event-name", event), body);
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
    if (topic === "system" && event === "stats") showStats(payload);
    showEvent(topic, hue, event, payload);
  }
}

function showTopic(topic, { channel, hue, element }, note) {
  const leave = create("button", "", "Leave");
  leave.type = "button";
  leave.setAttribute("aria-label", `Leave ${topic}`);
  leave.addEventListener("click", () => channel.leave());
  element.className = `topic-${hue}`;
  element.dataset.state = channel.state;
  element.hidden = topic === "system" && channel.state === "joined"; // its metrics speak for it
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

const tell = (tone, text) => showResult(byId("push-result"), tone, text);

byId("push").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const payload = readPayload(byId("push-payload"), byId("push-result"));
  const subscription = subscriptions.get(byId("push-topic").value);
  if (payload === undefined || !subscription) return;
  tell("", subscription.channel.state === "joined" ? "sent…" : "waits for the join…");
  const start = performance.now();
  try {
    const response = await subscription.channel.push(byId("push-event").value.trim(), payload);
    tell("ok", `ok in ${(performance.now() - start).toFixed(0)} ms  ${JSON.stringify(response)}`);
  } catch (error) {
    tell("bad", error.status === "timeout" ? "no reply in 10 s" : `${error.status}: ${reasonOf(error.response)}`);
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

byId("copy").addEventListener("click", ({ target }) => copy(target, command));

byId("to-console").hidden = !byId("to-console").getAttribute("href"); // where it is turned off
socket.connect();
join("system");
join("room:1");
