/** The overview: the metrics of each second, their past in charts, plugins, and what was lost. */

import { binaryTop, Chart } from "./charts.js";
import { channel, isStarted, showState, socket } from "./door.js";
import { byId, create, formatBytes, formatCount, formatDuration, formatRate } from "./show.js";

const KEPT_MS = 900_000; // fifteen minutes
const MINUTE_MS = 60_000;
const SILENCE_MS = 5000; // after which metrics are old

// What has changed from one second to the next.

const samples = []; // {at_ms, metrics, rates…}, oldest first

const total = (metric) => Object.values(metric ?? {}).reduce((sum, value) => sum + value, 0);
/** A histogram's observations and their seconds. */
const counted = (histogram) => (histogram ? histogram.slice(0, -1).reduce((sum, value) => sum + value, 0) : 0);

function sampleOf({ at_ms, metrics }) {
  const workers = total(metrics.relay_workers);
  // Others' metrics are up to a second old, and not always equally: over one second alone their rates would leap.
  const last = workers > 1 ? (samples.at(-3) ?? samples[0]) : samples.at(-1);
  const sample = { at_ms, metrics, workers, topics: total(metrics.relay_topics), sockets: total(metrics.relay_sockets) };
  sample.gaps = total(metrics.relay_gaps);
  sample.dropped = total(metrics.relay_dropped);
  sample.outbox = total(metrics.relay_outbox_bytes);
  sample.lag = total(metrics.relay_link_lag_seconds) * 1000 || null;
  const seconds = last ? (at_ms - last.at_ms) / 1000 : 0;
  const rate = (name) =>
    seconds > 0 ? Math.max(0, (total(metrics[name]) - total(last.metrics[name])) / seconds) : null;
  for (const [short, name] of [
    ["in", "relay_events_in"], ["out", "relay_deliveries"], ["pushes", "relay_pushes_in"], ["drops", "relay_dropped"],
    ["bytes", "relay_delivered_bytes"],
  ]) sample[short] = rate(name);
  const [now, before] = [metrics.relay_fan_out_seconds[""], last?.metrics.relay_fan_out_seconds[""]];
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
  new Chart("Events in /s", [{ label: "bus", of: (s) => s.in }, { label: "pushes", of: (s) => s.pushes }], formatShort, 4),
  new Chart("Deliveries /s", [{ of: (s) => s.out }], formatShort, 4),
  new Chart("Sockets", [{ of: (s) => s.sockets }], formatShort, 4),
  new Chart("Delay", [{ label: "fan-out", of: (s) => s.fanOut }, { label: "link", of: (s) => s.lag }], formatAxisMs, 1),
  new Chart("Waiting in outboxes", [{ of: (s) => s.outbox }], formatBytes, 1024, binaryTop),
  new Chart("Drops /s", [{ of: (s) => s.drops }], formatShort, 2),
];
byId("charts").append(...charts.map(({ element }) => element));

/** Metrics of the process are measured with the extra `metrics` alone. */
const hasProcess = ({ metrics }) => "" in (metrics.process_start_time_seconds ?? {});

/** How a count that should not rise is doing: bad while it rises, a warning while its last rise is in the charts. */
const toneOf = (name) => (s) => {
  const before = (ms) => samples.find(({ at_ms }) => at_ms >= s.at_ms - ms) ?? s;
  return s[name] > before(MINUTE_MS)[name] ? "bad" : s[name] > samples[0][name] ? "warn" : "";
};

const metrics = {
  link: ["Link", (s, { link }) => [link.live ? "live" : "down"], (s, { link }) => (link.live ? "ok" : "bad")],
  drops: ["Dropped", (s) => [formatCount(s.dropped)], toneOf("dropped")],
  gaps: ["Gaps", (s) => [formatCount(s.gaps)], toneOf("gaps")],
  sockets: ["Sockets", (s) => [formatCount(s.sockets)]],
  topics: ["Topics", (s) => [formatCount(s.topics)]],
  in: ["Events in", (s) => [s.in === null ? "–" : formatRate(s.in), "/s"]],
  out: ["Deliveries", (s) => [s.out === null ? "–" : formatRate(s.out), "/s"]],
  bytes: ["Sent", (s) => (s.bytes === null ? ["–"] : `${formatBytes(s.bytes)}/s`.split(" "))],
  pushes: ["Pushes", (s) => [s.pushes === null ? "–" : formatRate(s.pushes), "/s"]],
  outbox: ["Outboxes", (s) => formatBytes(s.outbox).split(" ")],
  memory: ["Memory", (s) => (hasProcess(s) ? formatBytes(total(s.metrics.process_resident_memory_bytes)).split(" ") : ["–"])],
  up: ["Up", (s) => [hasProcess(s) ? formatDuration(s.at_ms / 1000 - total(s.metrics.process_start_time_seconds)).split(" ")[0] : "–"]],
};
const cells = Object.entries(metrics).map(([name, [title, read, tone]]) => {
  const [value, unit] = [create("b", "", "–"), create("i")];
  const cell = create("article", "", create("h2", "", title), create("p", "", value, unit));
  cell.dataset.metric = name;
  byId("metrics").append(cell);
  return { cell, value, unit, read, tone };
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
  byId(table).classList.toggle("calm", !rows.length);
  if (rows.length) return;
  const cell = create("td", "quiet", empty);
  cell.colSpan = 5;
  body.append(create("tr", "", cell));
}

/** A line about something that is called: its metrics by name, now and a minute ago. */
function callRow(name, title, errors, times, timesBefore, seconds, bounds) {
  const [time, before] = [times[name] ?? [], timesBefore[name] ?? []];
  const changes = time.map((value, place) => value - (before[place] ?? 0));
  const [count, spent] = [counted(changes), changes.at(-1)];
  return (called = count) => tableRow(
    title,
    seconds > 0 ? formatRate(called / seconds) : "–",
    count > 0 ? formatMs((1000 * spent) / count) : "–",
    slowest(changes.slice(0, -1), bounds),
    formatCount(errors),
  );
}

function showPlugins(now, past, bounds) {
  const { relay_plugin_calls: calls, relay_plugin_errors: errors, relay_plugin_seconds: times } = now.metrics;
  const seconds = (now.at_ms - past.at_ms) / 1000;
  const rows = Object.keys(calls).sort().map((name) => {
    const row = callRow(name, name, errors[name] ?? 0, times, past.metrics.relay_plugin_seconds, seconds, bounds);
    return row(calls[name] - (past.metrics.relay_plugin_calls[name] ?? 0));
  });
  const { relay_webhook_requests: requests, relay_webhook_seconds: durations, relay_webhook_open: open } = now.metrics;
  rows.push(...Object.keys(open).sort().map((name) => {
    const title = `webhook ${name}${open[name] ? " (paused: it fails)" : ""}`;
    return callRow(name, title, failuresOf(name, requests), durations, past.metrics.relay_webhook_seconds, seconds, bounds)();
  }));
  fill("plugins", rows, "No plugin has been called yet.");
}

const ANSWERED = new Set(["allowed", "refused", "delivered"]);

/** Requests to a webhook without an answer, of a count by "<webhook>: <outcome>". */
function failuresOf(webhook, requests) {
  const outcomes = Object.keys(requests).filter((word) => word.slice(0, word.lastIndexOf(": ")) === webhook);
  return outcomes.reduce((sum, word) => sum + (ANSWERED.has(word.slice(webhook.length + 2)) ? 0 : requests[word]), 0);
}

/** What is wrong with frames that are answered by a close, by its code. */
const MALFORMED = {
  1002: "no WebSocket frame", 1003: "frame of an unknown kind", 1007: "no message of the protocol", 1009: "frame too large",
};
const wordsOf = (kind, reason) =>
  kind === "malformed" && MALFORMED[reason] ? `${MALFORMED[reason]} (${reason})` : reason;

function showLosses(now, past) {
  const rows = [];
  for (const [kind, metric] of [["dropped", "relay_dropped"], ["refused", "relay_refused"], ["malformed", "relay_malformed"]]) {
    for (const [reason, count] of Object.entries(now.metrics[metric])) {
      if (!count) continue;
      const recent = count - (past.metrics[metric][reason] ?? 0);
      rows.push([count, tableRow(`${kind}: ${wordsOf(kind, reason)}`, recent ? formatCount(recent) : "–", formatCount(count))]);
    }
  }
  rows.sort(([one], [other]) => other - one);
  fill("losses", rows.map(([, row]) => row), "Nothing has been dropped or refused since the start.");
}

/** A line for each master of a Redis Cluster; nothing where the bus is no cluster. */
function showShards({ metrics }, fault) {
  const live = metrics.relay_shard_live;
  const of = (name, node) => metrics[name][node] ?? 0;
  const rows = Object.keys(live).sort((one, other) => one.localeCompare(other, "en", { numeric: true })).map((node) => {
    const row = tableRow(
      node,
      live[node] ? "live" : "down",
      live[node] && of("relay_shard_lag_seconds", node) ? formatMs(1000 * of("relay_shard_lag_seconds", node)) : "–",
      ...["relay_shard_gaps", "relay_shard_topics", "relay_shard_lingering_topics"].map((name) => formatCount(of(name, node))),
    );
    row.cells[1].dataset.tone = live[node] ? "ok" : "bad";
    return row;
  });
  byId("shards-view").hidden = !rows.length;
  fill("shards", rows, "");
  if (byId("shards-fault").textContent !== fault) byId("shards-fault").textContent = fault;
}

/** Where several workers serve, the metrics are of all, the lists of the one that answers. */
function showWhose(node, workers) {
  const colon = node.lastIndexOf(":");
  const [host, rest] = workers > 1 ? [`${node.slice(0, colon)} · `, `${workers} workers`] : [node.slice(0, colon), node.slice(colon)];
  byId("node").replaceChildren(create("span", workers > 1 ? "of-several" : "", host), rest);
  for (const whose of document.querySelectorAll(".whose")) {
    whose.hidden = workers <= 1;
    whose.textContent = `Of worker ${node.slice(colon + 1)} only, one of ${workers}`;
  }
}

function showAlarm(text) {
  byId("alarm").hidden = !text;
  if (byId("alarm").textContent !== text) byId("alarm").textContent = text; // each change is read aloud
}

// Metrics that no longer come are old: they stay, and are not taken for those of now.

let heardAt; // when the last ones came
let silence; // the timer

function hear() {
  heardAt = new Date();
  clearTimeout(silence);
  silence = setTimeout(ageAll, SILENCE_MS, "no answer");
  document.body.classList.remove("old");
  showState("live");
}

function ageAll(state) {
  if (!isStarted || !heardAt) return;
  showState("reconnecting", state);
  document.body.classList.add("old");
  showAlarm(`No connection to the relay since ${heardAt.toLocaleTimeString("en-GB")}.`);
}

socket.onClose(() => ageAll("reconnecting"));

function showMetrics(message) {
  const sample = sampleOf(message);
  samples.push(Object.assign(sample, { isWhole: true }));
  while (samples[0].at_ms < sample.at_ms - KEPT_MS) samples.shift();
  showWhose(message.node, sample.workers);
  const { live, reason } = message.link;
  showAlarm(live ? "" : reason ? `The relay hears nothing: ${reason}` : "Another worker of this relay hears nothing.");
  for (const { cell, value, unit, read, tone } of cells) {
    [value.textContent, unit.textContent = ""] = read(sample, message);
    cell.dataset.tone = tone?.(sample, message) ?? "";
  }
  const past = samples.find(({ isWhole, at_ms }) => isWhole && at_ms >= sample.at_ms - MINUTE_MS);
  if (!byId("overview").hidden) {
    for (const chart of charts) chart.show(samples);
    showPlugins(sample, past, message.bounds_s);
    showLosses(sample, past);
    showShards(sample, message.link.degraded);
  }
}

let source;

/** What the relay has kept of the last minutes: sums, in the form of the metrics that they are sums of. */
channel.on("series", ({ source: from, names, rows }) => {
  source = from;
  samples.length = 0;
  for (const row of rows) {
    const [at_ms, ...values] = row;
    const sums = Object.fromEntries(values.map((value, place) => [names[place + 1], { "": value }]));
    sums.relay_fan_out_seconds = { "": values.slice(-2) };
    samples.push(sampleOf({ at_ms, metrics: sums }));
  }
});

channel.on("metrics", (message) => {
  // Of another process, or of the same one after a restart: its totals cannot be compared with these.
  if (message.source !== source) samples.length = 0;
  source = message.source;
  hear();
  showMetrics(message);
});

/** Draw the charts, where they are in sight. */
export function showCharts() {
  if (samples.length) for (const chart of charts) chart.show(samples);
}
