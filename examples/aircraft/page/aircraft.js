/** The page of the aircraft: it joins the tiles in view, and moves each aircraft from report to report. */

import { Socket } from "../../static/relay.js";
import { GroundMap, toY } from "./map.js";

const LOST_MS = 30_000; // without a report an aircraft leaves the map
const TRAIL_MAX = 90; // points
const JUMP_DEG = 2; // no aircraft flies that far between two reports: it begins a new trail
const LABELS_MAX = 40; // with more aircraft in view only the chosen one has its name beside it
const ALTITUDE_MAX_FT = 40_000;
const LEVELS = 16; // of colour
const REACH_PX = 18; // how near one must point
const PLANE = new Path2D(document.querySelector("header path").getAttribute("d"));

const byId = (id) => document.getElementById(id);
const isCalm = matchMedia("(prefers-reduced-motion: reduce)");

// Topics: one for each tile in view.

const socket = new Socket("../../socket");
const topics = new Map(); // topic → {channel, south, west, at: when it last spoke}
let topicsTimer;

function joinTiles() {
  topicsTimer = undefined;
  const wanted = new Map(map.tiles().map(([south, west]) => [`aircraft:${south}:${west}`, { south, west, at: -Infinity }]));
  for (const [topic, { channel }] of topics) {
    if (wanted.has(topic)) continue;
    topics.delete(topic);
    channel.leave();
  }
  for (const [topic, tile] of wanted) if (!topics.has(topic)) topics.set(topic, listen(topic, tile));
}

function listen(topic, tile) {
  tile.channel = socket.channel(topic);
  const take = ({ aircraft }) => {
    if (aircraft.length) tile.at = performance.now();
    for (const report of aircraft) move(topic, report);
  };
  tile.channel.on("positions", take);
  tile.channel.join().receive("ok", take);
  return tile;
}

socket.onOpen(() => showState("live"));
socket.onClose(() => showState("reconnecting"));

function showState(state) {
  byId("state").dataset.state = state;
  byId("state").textContent = state;
}

// Aircraft.

const aircraft = new Map(); // icao24 → what `move` keeps of it
let reports = 0; // since the statistics were last shown

function move(topic, report) {
  const now = performance.now();
  const [x, y] = [report.longitude, toY(report.latitude)];
  let plane = aircraft.get(report.icao24);
  if (!plane || Math.abs(plane.x - x) > JUMP_DEG || Math.abs(plane.y - y) > JUMP_DEG) {
    plane = { fromX: x, fromY: y, seen: now, trail: [], track: 0 };
    aircraft.set(report.icao24, plane);
  } else {
    [plane.fromX, plane.fromY] = whereabouts(plane, now);
    if (plane.x !== x || plane.y !== y) plane.track = Math.atan2(x - plane.x, y - plane.y);
    plane.trail.push(plane.fromX, plane.fromY, plane.level);
    if (plane.trail.length > TRAIL_MAX * 3) plane.trail.splice(0, 3);
  }
  if (typeof report.track === "number") plane.track = (report.track * Math.PI) / 180;
  const share = Math.max(0, Math.min(1, (report.altitude ?? 0) / ALTITUDE_MAX_FT));
  // It arrives when the next report is due, so it never stands still and never turns back.
  Object.assign(plane, { x, y, topic, report, level: Math.round(share * (LEVELS - 1)), took: Math.min(5000, now - plane.seen) });
  plane.seen = now;
  reports++;
}

/** Where an aircraft is shown: on its way from where it was to where it has been reported. */
function whereabouts({ fromX, fromY, x, y, seen, took }, now) {
  const share = took ? Math.min(1, (now - seen) / took) : 1;
  return [fromX + (x - fromX) * share, fromY + (y - fromY) * share];
}

// Drawing.

let colours = {};

/** The colours of the style sheet, which has those for light and dark; altitudes are mixed from its five. */
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const stops = [0, 1, 2, 3, 4].map((n) => parseInt(style.getPropertyValue(`--alt-${n}`).trim().slice(1), 16));
  const mix = (share) => {
    const low = Math.min(3, Math.floor(share * 4));
    const part = (shift) => {
      const [a, b] = [(stops[low] >> shift) & 255, (stops[low + 1] >> shift) & 255];
      return Math.round(a + (b - a) * (share * 4 - low));
    };
    return `rgb(${part(16)} ${part(8)} ${part(0)})`;
  };
  colours = { levels: Array.from({ length: LEVELS }, (_, level) => mix(level / (LEVELS - 1))) };
  for (const name of ["sea", "text", "quiet", "live"]) colours[name] = style.getPropertyValue(`--${name}`);
  colours.mono = `10px ${style.getPropertyValue("--mono")}`;
}

function draw() {
  const now = performance.now();
  const pen = map.draw();
  drawTopics(pen, now);
  const inView = [];
  for (const [icao24, plane] of aircraft) {
    if (now - plane.seen > LOST_MS) aircraft.delete(icao24);
    const [left, top] = map.place(...whereabouts(plane, now));
    plane.left = left;
    plane.top = top;
    if (left > -20 && top > -20 && left < map.width + 20 && top < map.height + 20) inView.push(plane);
  }
  drawTrails(pen, inView);
  drawPlanes(pen, inView, now);
  drawLabels(pen, inView.length > LABELS_MAX ? inView.filter((plane) => plane === chosen()) : inView);
  return inView.length;
}

/** The name of each tile, which lights up when its topic speaks. */
function drawTopics(pen, now) {
  pen.font = colours.mono;
  for (const { channel, south, west, at } of topics.values()) {
    const [left, bottom] = map.place(west, toY(south));
    const glow = Math.max(0, 1 - (now - at) / 900);
    pen.globalAlpha = channel.state === "joined" ? 0.45 + 0.55 * glow : 0.2;
    pen.fillStyle = glow ? colours.live : colours.quiet;
    pen.fillText(`${south}:${west}`, left + 6, bottom - 6);
  }
}

/** All trails, a stroke for each colour and age instead of one for each segment. */
function drawTrails(pen, planes) {
  const AGES = 4;
  const strokes = Array.from({ length: LEVELS * AGES }, () => new Path2D());
  for (const { trail, left, top, level } of planes) {
    const count = trail.length / 3;
    for (let n = 0; n < count; n++) {
      const isLast = n === count - 1;
      const stroke = strokes[trail[3 * n + 2] * AGES + Math.floor(((n + TRAIL_MAX - count) / TRAIL_MAX) * AGES)];
      stroke.moveTo(...map.place(trail[3 * n], trail[3 * n + 1]));
      stroke.lineTo(...(isLast ? [left, top] : map.place(trail[3 * n + 3], trail[3 * n + 4])));
    }
  }
  pen.lineWidth = 1.6;
  pen.lineCap = "round";
  strokes.forEach((stroke, index) => {
    pen.globalAlpha = 0.1 + 0.17 * (index % AGES);
    pen.strokeStyle = colours.levels[Math.floor(index / AGES)];
    pen.stroke(stroke);
  });
}

function drawPlanes(pen, planes, now) {
  const size = Math.min(1.15, 0.62 + map.scale / 300);
  pen.lineWidth = 2.5;
  pen.lineJoin = "round";
  pen.strokeStyle = colours.sea;
  for (const { left, top, track, level, seen } of planes) {
    pen.save();
    pen.globalAlpha = Math.min(1, 2 - (2 * (now - seen)) / LOST_MS); // fades in the second half of its wait
    pen.translate(left, top);
    pen.rotate(track);
    pen.scale(size, size);
    pen.fillStyle = colours.levels[level];
    pen.stroke(PLANE);
    pen.fill(PLANE);
    pen.restore();
  }
  const plane = chosen();
  if (!plane) return;
  pen.globalAlpha = 1;
  pen.lineWidth = 1.5;
  pen.strokeStyle = colours.text;
  pen.beginPath();
  pen.arc(plane.left, plane.top, 15, 0, 2 * Math.PI);
  pen.stroke();
}

/** Names beside the aircraft; one that would cover another is left out. */
function drawLabels(pen, planes) {
  pen.globalAlpha = 1;
  pen.font = colours.mono;
  pen.lineWidth = 3;
  pen.strokeStyle = colours.sea;
  pen.fillStyle = colours.text;
  const taken = [];
  for (const { left, top, report } of planes) {
    if (taken.some(([x, y]) => Math.abs(x - left) < 56 && Math.abs(y - top) < 14)) continue;
    taken.push([left, top]);
    pen.strokeText(nameOf(report), left + 13, top + 4);
    pen.fillText(nameOf(report), left + 13, top + 4);
  }
}

const nameOf = (report) => report.callsign?.trim() || report.icao24;

// The aircraft one points at, or else the one pressed last.

let hovered = null; // icao24
let pressed = null;

const chosen = () => aircraft.get(hovered) ?? aircraft.get(pressed);

function point(x, y, isPressed) {
  let [found, nearest] = [null, REACH_PX];
  for (const [icao24, { left, top }] of aircraft) {
    const distance = Math.hypot(left - x, top - y);
    if (distance < nearest) [found, nearest] = [icao24, distance];
  }
  hovered = found;
  if (isPressed) pressed = found;
  byId("map").classList.toggle("aiming", found !== null);
  showCard();
}

function showCard() {
  const plane = chosen();
  byId("card").hidden = !plane;
  if (!plane) return;
  const { report, topic } = plane;
  const number = (value, unit) => (typeof value === "number" ? `${Math.round(value).toLocaleString("en")}${unit}` : "–");
  byId("callsign").textContent = nameOf(report);
  byId("icao24").textContent = `${report.icao24}  ${report.latitude.toFixed(3)} ${report.longitude.toFixed(3)}`;
  byId("altitude").textContent = number(report.altitude, " ft");
  byId("speed").textContent = number(report.groundspeed, " kt");
  byId("track").textContent = number(report.track, "°");
  byId("topic").textContent = topic;
}

// Statistics, each second.

let silentFor = 0;

function showStatistics() {
  silentFor = reports ? 0 : silentFor + 1;
  byId("rate").textContent = reports.toLocaleString("en");
  byId("topics").textContent = [...topics.values()].filter(({ channel }) => channel.state === "joined").length;
  byId("empty").hidden = aircraft.size > 0 || silentFor < 3 || !socket.isConnected();
  reports = 0;
  showCard();
}

let drawnAt = 0;
let hasMoved = false; // the map, not the aircraft

/** The map follows the hand at once; the aircraft are slow, and need no more than a few pictures a second. */
function animate(now) {
  requestAnimationFrame(animate);
  if (!map.width || (!hasMoved && now - drawnAt < (isCalm.matches ? 1000 : 80))) return;
  drawnAt = now;
  hasMoved = false;
  byId("in-view").textContent = draw();
}

const map = new GroundMap(byId("map"), { longitude: 9, latitude: 48.5, widthDeg: 40 }, {
  onPoint: point,
  onChange() {
    hasMoved = true;
    topicsTimer ??= setTimeout(joinTiles, 150);
  },
});
byId("zoom").addEventListener("click", ({ target }) => target.value && map.zoom(Number(target.value)));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", readColours);
readColours();
socket.connect();
setInterval(showStatistics, 1000);
requestAnimationFrame(animate);
