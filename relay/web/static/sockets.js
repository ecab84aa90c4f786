/** Sockets: those that are open, and what one of them has joined; and disconnecting it. */

import { ask } from "./door.js";
import { showChips, showRows, socketHref, topicHref } from "./lists.js";
import { byId, formatBytes, formatCount, formatDuration, showFacts, showResult } from "./show.js";

export let socketId = null; // the one that is shown
let isAsking = false; // whether to disconnect it

export async function lookAtSockets() {
  const search = byId("socket-search").value.trim();
  const answer = await ask("sockets", { search });
  if (answer) {
    byId("socket-total").textContent = formatCount(answer.total);
    const cells = ({ id, user, address, topics, outbox_bytes }) => [
      id, user ?? address ?? "", formatCount(topics.length), outbox_bytes ? formatBytes(outbox_bytes) : "–",
    ];
    showRows(byId("socket-list"), answer.sockets, (item) => item.id, (item) => socketHref(item.id), cells, socketId,
      search ? "No socket matches." : "No socket is connected.");
  }
  if (socketId === null) return;
  const id = socketId;
  const found = await ask("socket", { id });
  if (id !== socketId) return;
  byId("disconnect").disabled = !found;
  if (!found) showResult(byId("socket-result"), "", "This socket is gone.");
  else showSocketFacts(found);
}

function showSocketFacts({ user, open_s, address, version, path, outbox_bytes, missed, idle_s, topics, positions }) {
  const facts = [
    ["User", user ?? "anonymous"], ["Connected", `${formatDuration(open_s)} ago`], ["Last heard", `${formatDuration(idle_s)} ago`],
    ["Address", address ?? "–"], ["Protocol", `V${version}`], ["Frames", path],
    ["Waiting", formatBytes(outbox_bytes)], ["Events missed", formatCount(missed)], ["Topics", formatCount(topics.length)],
  ];
  showFacts(byId("socket-facts"), facts);
  showChips(byId("socket-topics"), topics.map((name) => ({ href: topicHref(name), text: name, ...placeOf(positions[name]) })));
}

/** Where a socket stands in a topic's history, if it has one. */
function placeOf(place) {
  if (place === undefined) return {};
  return { title: `at ${place.position ?? "no position yet"}`, bold: place.is_catching_up ? "catching up" : "" };
}

export function showSocket(id) {
  if (socketId === id) return;
  socketId = id;
  askToDisconnect(false);
  byId("socket-view").hidden = id === null;
  byId("socket-name").textContent = id ?? "";
  byId("socket-facts").replaceChildren();
  showChips(byId("socket-topics"), []);
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
