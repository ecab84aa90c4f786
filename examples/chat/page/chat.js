/** The page of the chat: one socket, and one channel for the room one is in. The room is the address's `#hash`. */

import { Presence } from "../../static/presence.js";
import { Socket } from "../../static/relay.js";

const KEPT_MAX = 500; // messages shown
const TYPING_MS = 3000; // from the last key until one is said to type no more
const HUES = 8; // hue-0 to hue-7 in chat.css

const byId = (id) => document.getElementById(id);
const socket = new Socket("../../socket");
let channel = null;
let presence = null;
let me = "";
let members = []; // nicks
const typists = new Set(); // nicks that say so of themselves
let amTyping = false; // as the others know it
let typingTimer;

function showState(state) {
  byId("state").dataset.state = state;
  byId("state").textContent = state;
}

socket.onOpen(() => showState("live"));
socket.onClose(() => showState("reconnecting"));
socket.connect();

// In and out of a room.

function enter(nick, room) {
  channel?.leave();
  channel = socket.channel(`chat:${room}`, { nick });
  channel.on("new_msg", show);
  channel.on("typing", ({ nick, typing }) => {
    if (typing) typists.add(nick);
    else typists.delete(nick);
    showTyping();
  });
  presence = new Presence(channel);
  presence.onSync(showMembers);
  channel
    .join()
    .receive("ok", (response) => showRoom(response.nick, room))
    .receive("error", ({ reason }) => {
      if (byId("enter").hidden) return note(`Not let in again yet: ${reason}.`); // it goes on trying
      channel.leave();
      byId("refusal").textContent = `Refused: ${reason}.`;
    });
}

function showRoom(nick, room) {
  me = nick;
  amTyping = false;
  location.hash = room;
  document.title = byId("title").textContent = `#${room}`;
  if (!byId("enter").hidden) byId("messages").replaceChildren();
  toggle(true);
  note(`You are in, as ${nick}. What was said before is not kept.`);
  byId("text").focus();
}

function toggle(isIn) {
  byId("enter").hidden = isIn;
  for (const id of ["members", "messages", "say", "leave"]) byId(id).hidden = !isIn;
}

byId("enter").addEventListener("submit", (submit) => {
  submit.preventDefault();
  byId("refusal").textContent = "";
  enter(byId("nick").value.trim(), byId("room").value.trim());
});

byId("leave").addEventListener("click", () => {
  channel.leave();
  toggle(false);
  document.title = byId("title").textContent = "Chat";
});

byId("room").value = decodeURIComponent(location.hash.slice(1)) || "lobby";

// Who is here, and who is typing.

function showMembers() {
  members = presence.list((id, { metas: [{ meta }] }) => meta.nick);
  byId("members").replaceChildren(...members.map((nick) => create("li", `hue-${hueOf(nick)}`, nick)));
  for (const nick of typists) if (!members.includes(nick)) typists.delete(nick);
  showTyping();
}

function showTyping() {
  const typing = members.filter((nick) => typists.has(nick) && nick !== me);
  const who = typing.length > 2 ? "Several people" : typing.join(" and ");
  byId("typing").textContent = who && `${who} ${typing.length > 1 ? "are" : "is"} typing…`;
}

function setTyping(isTyping) {
  clearTimeout(typingTimer);
  if (isTyping) typingTimer = setTimeout(() => setTyping(false), TYPING_MS);
  if (isTyping !== amTyping && channel.canPush()) channel.push("typing", { nick: me, typing: (amTyping = isTyping) });
}

byId("text").addEventListener("input", () => setTyping(byId("text").value !== ""));

// What is said.

byId("say").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const text = byId("text").value;
  byId("text").value = "";
  setTyping(false);
  byId("failure").textContent = "";
  try {
    await channel.push("new_msg", { text });
  } catch (error) {
    byId("text").value ||= text;
    byId("failure").textContent = error.status === "timeout" ? "No answer: not sent." : `Not sent: ${error.reason}.`;
  }
});

function create(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function show({ nick, text, at }) {
  const item = create("li", `hue-${hueOf(nick)}`, "");
  const time = create("time", "", new Date(at).toLocaleTimeString("en-GB", { timeStyle: "short" }));
  time.dateTime = at;
  item.classList.toggle("mine", nick === me);
  item.classList.toggle("more", byId("messages").lastChild?.dataset.nick === nick); // the name is there already
  item.dataset.nick = nick;
  item.append(create("b", "", nick), create("p", "", text), time);
  add(item);
}

function note(text) {
  add(create("li", "note", text));
}

function add(item) {
  const list = byId("messages");
  const isAtEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40; // who reads further up stays there
  list.append(item);
  if (list.children.length > KEPT_MAX) list.firstChild.remove();
  if (isAtEnd) list.scrollTop = list.scrollHeight;
}

/** A nick has its colour on every screen. */
function hueOf(nick) {
  let sum = 0;
  for (const letter of nick.toLowerCase()) sum = (sum * 31 + letter.codePointAt(0)) % 9973;
  return sum % HUES;
}
