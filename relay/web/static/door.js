/** The console's door: the key, if one is needed, then the socket; and what is asked over it. */

import { Socket } from "./relay.js";
import { byId, showResult } from "./show.js";

const KEY = "relay-api-key";

let key = sessionStorage.getItem(KEY) ?? "";
export let isStarted = false;
let timer;

/** As header fields and base64 want it: a character for each byte. */
const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

export const socket = new Socket("console/socket", { authToken: () => (key ? bytesOf(key) : undefined) });
export const channel = socket.channel("console");

export function showState(state, text = state) {
  byId("state").dataset.state = state;
  byId("state-text").textContent = text;
}

let onStart = () => {};

/** Open it: `started` is called once the relay lets this browser look. */
export function openDoor(started) {
  onStart = started;
  enter();
}

/** Ask whether this browser may look, since a WebSocket that is refused does not say why. */
async function enter() {
  clearTimeout(timer);
  const headers = key ? { authorization: `Bearer ${bytesOf(key)}` } : {};
  const answer = await fetch("console/access", { headers, cache: "no-store", redirect: "error" }).catch(() => null);
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
  for (const view of document.querySelectorAll(".view, #alarm")) view.hidden = true;
}

function start() {
  socket.connect();
  if (channel.state === "closed") channel.join(); // else phoenix.js rejoins it automatically
  isStarted = true;
  onStart();
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
export const ask = (event, payload = {}) => channel.push(event, payload).then((answer) => answer, () => null);
