/** Topics: those that are joined, and the events of one as they pass; and sending some. */

import { ask, channel, socket } from "./door.js";
import { showChips, showRows, socketHref, topicHref } from "./lists.js";
import { Socket } from "./relay.js";
import {
  byId, copy, create, formatBytes, formatCount, formatDuration, formatRate, payloadBox, prettyBytes, prettyJson, readPayload, readToken, reasonOf,
  showFacts, showResult, timeOf,
} from "./show.js";

const SHOWN_MAX = 200; // events in the list; older ones leave

export let topic = null; // the one that is shown
let isPaused = false;
let seen = 0; // events that came, shown or not
let waiting = []; // that came while paused; {left_out} for some that are not shown

export async function lookAtTopics() {
  const search = byId("topic-search").value.trim();
  const answer = await ask("topics", { search });
  if (answer) {
    byId("topic-total").textContent = formatCount(answer.total);
    const cells = ({ topic, sockets, events_per_s }) => [topic, formatCount(sockets), formatRate(events_per_s)];
    showRows(byId("topic-list"), answer.topics, (item) => item.topic, (item) => topicHref(item.topic), cells, topic,
      search ? "No topic matches. Enter opens the one you have named." : "No topic is joined yet. Name one and press Enter.");
  }
  if (topic === null) return;
  const details = await ask("topic", { topic });
  if (!details || details.topic !== topic) return;
  byId("topic-metrics").textContent = `${formatRate(details.events_per_s)} events/s`;
  byId("joined-count").textContent = formatCount(details.sockets);
  const linkOf = ({ id, address, user }) => ({ href: socketHref(id), title: address, bold: user, text: id });
  showChips(byId("joined"), details.joined.map(linkOf));
  showHistoryFacts(details.history);
  showMembers(details.presence);
}

export function showTopic(name) {
  if (topic === name) return;
  topic = name;
  byId("topic-view").hidden = name === null;
  byId("topic-name").textContent = name ?? "";
  byId("topic-metrics").textContent = byId("joined-count").textContent = "";
  showChips(byId("joined"), []);
  showResult(byId("publish-result"), "", "");
  showHistoryFacts(null);
  showMembers(null);
  byId("history-events").hidden = true;
  byId("history-events").replaceChildren();
  if (isPaused) pause();
  clearTail();
  ask("watch", { topic: name ?? "" });
}

channel.on("events", ({ topic: from, events, left_out }) => {
  if (from !== topic) return;
  seen += events.length + left_out;
  waiting.push(...events);
  if (left_out) waiting.push({ left_out });
  if (waiting.length > SHOWN_MAX) {
    const first = waiting.splice(0, waiting.length - SHOWN_MAX + 1);
    waiting.unshift({ left_out: numberOf(first) });
  }
  if (!isPaused) flushTail();
  showCount();
});

const numberOf = (events) => events.reduce((sum, { left_out = 1 }) => sum + left_out, 0);

function flushTail() {
  const list = byId("tail");
  list.prepend(...waiting.reverse().map((one) => (one.left_out ? gapRow(one) : eventRow(one))));
  waiting = [];
  while (list.children.length > SHOWN_MAX) list.lastChild.remove();
  applyFilter();
}

/** Where events came too fast to be shown, or too many while paused. */
const gapRow = ({ left_out }) => create("li", "left-out", `… ${formatCount(left_out)} not shown`);

function eventRow({ at_ms, event, size, frame, base64 }) {
  const [pretty, plain] = base64 === undefined ? textOf(frame) : bytesIn(base64);
  const body = payloadBox(pretty);
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
  for (const row of byId("tail").children) row.hidden = needle !== "" && !row.dataset.text?.includes(needle);
  showCount();
}

function showCount() {
  const rows = [...byId("tail").children];
  const events = rows.filter((row) => row.dataset.text !== undefined);
  const shown = events.filter((row) => !row.hidden).length;
  const isFiltered = byId("filter").value.trim() !== "";
  const parts = [];
  if (isFiltered && rows.length) parts.push(`${shown} of ${events.length} match`);
  else if (seen) parts.push(`${formatCount(seen)} heard`);
  if (!isFiltered && rows.length >= SHOWN_MAX) parts.push(`last ${shown} shown`);
  if (isPaused) parts.push(waiting.length ? `${formatCount(numberOf(waiting))} waiting` : "paused");
  byId("tail-count").textContent = parts.join(", ");
  byId("tail-empty").hidden = rows.some((row) => !row.hidden);
  byId("tail-empty").textContent = rows.length
    ? "No event matches the filter."
    : isPaused ? "Paused. What comes waits."
    : socket.isConnected() ? "Listening. What is published on this topic shows here."
    : "Not connected: nothing is heard of this topic.";
}

function clearTail() {
  seen = 0;
  waiting = [];
  byId("tail").replaceChildren();
  showCount();
}

export function pause() {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", isPaused);
  byId("pause").textContent = isPaused ? "Resume" : "Pause";
  if (!isPaused) flushTail();
  showCount();
}

socket.onOpen(showCount);
socket.onClose(showCount);
byId("pause").addEventListener("click", pause);
byId("clear").addEventListener("click", clearTail);
byId("filter").addEventListener("input", applyFilter);
byId("topic-search").addEventListener("input", lookAtTopics);
byId("topic-search").addEventListener("keydown", ({ key, target }) => {
  if (key === "Enter" && target.value.trim()) location.hash = topicHref(target.value.trim());
});

// What is stored of the topic.

function showHistoryFacts(history) {
  byId("history").hidden = !history;
  if (!history) return;
  const { size, ttl_s, events, first, last, bytes, unavailable } = history;
  showResult(byId("history-result"), "bad", unavailable === null ? "" : `It cannot be read: ${unavailable}`);
  const facts = [
    ["Events", events === null ? "–" : `${formatCount(events)} of ${formatCount(size)}`], ["Kept for", formatDuration(ttl_s)],
    ["Memory", bytes === null ? "–" : formatBytes(bytes)], ["First", first ?? "–"], ["Last", last ?? "–"],
  ];
  showFacts(byId("history-facts"), facts);
}

// Who is listed as a member, on all nodes.

function showMembers(presence) {
  byId("members").hidden = !presence;
  if (!presence) return;
  const { count, members, unavailable } = presence;
  showResult(byId("members-result"), "bad", unavailable === null ? "" : `They cannot be read: ${unavailable}`);
  byId("members-count").textContent = count === null ? "" : formatCount(count);
  byId("members-list").hidden = !members.length && count !== 0;
  showChips(byId("members-list"), members.map(({ key, meta }) => ({ title: meta, text: key })));
}

byId("history-show").addEventListener("click", async () => {
  const answer = await ask("history", { topic });
  if (!answer || answer.topic !== topic) return;
  const list = byId("history-events");
  list.hidden = false;
  list.replaceChildren(...answer.events.reverse().map(storedRow));
  if (!answer.events.length) list.append(create("li", "left-out", "No event is stored."));
});

function storedRow(event) {
  const row = eventRow(event);
  row.title = `${row.title}, at ${event.position}`;
  return row;
}

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

// After a reconnect the relay has forgotten what was watched.
socket.onOpen(() => topic !== null && ask("watch", { topic }));
