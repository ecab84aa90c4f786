/** The overview: the figures of each second, their past in charts, plugins, and what was lost. */

import { binaryTop, Chart } from "./charts.js";
import { channel } from "./door.js";
import { byId, create, formatBytes, formatCount, formatDuration, formatRate } from "./show.js";

const KEPT = 301; // samples: five minutes
const MINUTE = 60; // samples

// What has changed from one second to the next.

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

/** Draw the charts, where they are in sight. */
export function showCharts() {
  if (samples.length) for (const chart of charts) chart.show(samples);
}
