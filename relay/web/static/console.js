/** The console: metrics each second, topics with their events, sockets; over the relay's own WebSocket. */

import { isStarted, openDoor, socket } from "./door.js";
import { showCharts } from "./overview.js";
import { byId } from "./show.js";
import { lookAtSockets, showSocket, socketId } from "./sockets.js";
import { lookAtTopics, pause, showTopic, topic } from "./topics.js";

const LOOK_MS = 2000; // between two looks at the lists

// Views, by the part of the address behind #.

const VIEWS = ["overview", "topics", "sockets"];

/** What a part of an address names; null for none, and for what is no text. */
function decode(part) {
  try {
    return decodeURIComponent(part) || null;
  } catch {
    return null;
  }
}

function route() {
  const [name, ...rest] = location.hash.slice(1).split("/");
  const view = VIEWS.includes(name) ? name : "overview";
  const chosen = decode(rest.join("/"));
  for (const other of VIEWS) byId(other).hidden = other !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  showTopic(view === "topics" ? chosen : null);
  showSocket(view === "sockets" ? chosen : null);
  byId(view).classList.toggle("chosen", chosen !== null);
  showCharts();
  look();
}

function look() {
  if (!socket.isConnected() || document.hidden) return;
  if (!byId("topics").hidden) lookAtTopics();
  if (!byId("sockets").hidden) lookAtSockets();
}

addEventListener("hashchange", () => isStarted && route());
setInterval(look, LOOK_MS);
socket.onOpen(look);

// Light and dark.

const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");

function showTheme() {
  byId("theme").title = `Theme: ${root.dataset.theme || "as the system"} (t)`;
  byId("theme").setAttribute("aria-label", byId("theme").title);
}

// What the system does not say comes first, so that each press but the last is seen.
byId("theme").addEventListener("click", () => {
  const [first, second] = system.matches ? ["light", "dark"] : ["dark", "light"];
  root.dataset.theme = { "": first, [first]: second, [second]: "" }[root.dataset.theme];
  localStorage.setItem("relay-theme", root.dataset.theme);
  showTheme();
});
showTheme();

// Keys.

function goBack() {
  const field = document.activeElement;
  if (field?.matches("input, textarea, .plot")) field.blur();
  else if (topic !== null || socketId !== null) location.hash = topic !== null ? "#topics" : "#sockets";
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
  document.querySelector(".view:not([hidden]) .list input").select();
}

const KEYS = {
  1: () => (location.hash = "#overview"),
  2: () => (location.hash = "#topics"),
  3: () => (location.hash = "#sockets"),
  "/": search,
  f: () => topic !== null && byId("filter").select(),
  p: () => topic !== null && pause(),
  t: () => byId("theme").click(),
};

// Single keys can be switched off: speech and some assistive tools type them by accident.

const SHORTCUTS = "relay-shortcuts";
let hasShortcuts = localStorage.getItem(SHORTCUTS) !== "off";

function showShortcuts() {
  byId("shortcuts").setAttribute("aria-pressed", hasShortcuts);
  document.body.classList.toggle("no-shortcuts", !hasShortcuts);
}

byId("shortcuts").addEventListener("click", () => {
  hasShortcuts = !hasShortcuts;
  localStorage.setItem(SHORTCUTS, hasShortcuts ? "on" : "off");
  showShortcuts();
});
showShortcuts();

addEventListener("keydown", (event) => {
  if (!isStarted || event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = document.activeElement?.closest(".list");
  if (event.key === "Escape") goBack();
  else if (inList && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    move(event.key === "ArrowDown" ? 1 : -1);
  } else if (hasShortcuts && !document.activeElement?.matches("input, textarea, select") && KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
});

openDoor(route);
