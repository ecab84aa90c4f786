import assert from "node:assert/strict";
import { beforeEach, mock, test } from "node:test";

import { Presence } from "../presence.js";

let channel;
let presence;
let seen;

/** A channel that the test speaks for. */
class FakeChannel {
  #callbacks = {};
  ref = "1";

  on(event, callback) {
    this.#callbacks[event] = callback;
  }

  joinRef() {
    return this.ref;
  }

  receive(event, payload) {
    this.#callbacks[event](JSON.parse(JSON.stringify(payload)));
  }
}

beforeEach(() => {
  channel = new FakeChannel();
  presence = new Presence(channel);
  seen = [];
  presence.onJoin((key, current, { metas }) => seen.push(`+${key} ${current?.metas.length ?? 0} ${refsOf(metas)}`));
  presence.onLeave((key, current, { metas }) => seen.push(`-${key} ${current.metas.length} ${refsOf(metas)}`));
  presence.onSync(() => seen.push("sync"));
});

const entry = (...refs) => ({ metas: refs.map((phx_ref) => ({ phx_ref, n: 1 })) });
const refsOf = (metas) => metas.map(({ phx_ref }) => phx_ref).join();
const keys = () => presence.list((key, { metas }) => `${key} ${refsOf(metas)}`);
const state = (entries) => channel.receive("presence_state", entries);
const diff = (joins, leaves = {}) => channel.receive("presence_diff", { joins, leaves });

function expect(...what) {
  assert.deepEqual(seen.splice(0), what);
}

test("the state and what changes it", () => {
  assert.equal(presence.inPendingSyncState(), true);
  state({ ada: entry("1") });
  expect("+ada 0 1", "sync");
  diff({ bob: entry("2"), ada: entry("3") });
  expect("+bob 0 2", "+ada 1 3", "sync");
  assert.deepEqual(keys(), ["ada 1,3", "bob 2"]);
  assert.equal(presence.count, 3);
  diff({}, { ada: entry("1"), bob: entry("2"), eve: entry("9") });
  expect("-ada 1 1", "-bob 0 2", "sync");
  assert.deepEqual(presence.state, { ada: entry("3") });
  assert.equal(presence.inPendingSyncState(), false);
});

test("an update is a join and a leave of one key, which stays", () => {
  state({ ada: entry("1") });
  seen.length = 0;
  diff({ ada: entry("2") }, { ada: entry("1") });
  expect("+ada 1 2", "-ada 1 1", "sync");
  assert.deepEqual(keys(), ["ada 2"]);
});

test("an entry that is joined twice is listed once", () => {
  state({ ada: entry("1") });
  diff({ ada: entry("1") });
  assert.deepEqual(keys(), ["ada 1"]);
});

test("a state after a rejoin tells the difference alone", () => {
  state({ ada: entry("1"), bob: entry("2") });
  seen.length = 0;
  channel.ref = "2";
  assert.equal(presence.inPendingSyncState(), true);
  diff({ eve: entry("5") });
  expect();
  state({ ada: entry("1"), eve: entry("4") });
  expect("+eve 0 4", "-bob 0 2", "+eve 1 5", "sync");
  assert.deepEqual(keys(), ["ada 1", "eve 4,5"]);
});

test("a difference of an earlier join is forgotten", () => {
  state({ ada: entry("1") });
  channel.ref = "2";
  diff({ eve: entry("5") });
  channel.ref = "3";
  state({ ada: entry("1") });
  assert.deepEqual(keys(), ["ada 1"]);
});

test("a number in place of a list: onLeave is not called", () => {
  state({ ada: entry("1") });
  seen.length = 0;
  channel.receive("presence_count", { count: 1001 });
  expect("sync");
  assert.equal(presence.count, 1001);
  assert.deepEqual(presence.state, {});
  state({ ada: entry("1") });
  expect("+ada 0 1", "sync");
  assert.equal(presence.count, 1);
});

test("keys may have any name", () => {
  const hostile = '{"__proto__":{"metas":[{"phx_ref":"1"}]},"constructor":{"metas":[{"phx_ref":"2"}]}}';
  state(JSON.parse(hostile));
  assert.deepEqual(keys(), ["__proto__ 1", "constructor 2"]);
  assert.equal(JSON.stringify(presence.state), hostile);
  state({});
  assert.deepEqual(keys(), []);
  assert.equal({}.metas, undefined, "no prototype was changed");
});

test("a callback that throws is reported and changes nothing", () => {
  const report = mock.method(console, "error", () => {});
  const own = globalThis.reportError;
  globalThis.reportError = undefined;
  presence.onJoin(() => {
    throw new Error("the page's");
  });
  state({ ada: entry("1"), bob: entry("2") });
  diff({ eve: entry("3") });
  globalThis.reportError = own;
  assert.deepEqual(keys(), ["ada 1", "bob 2", "eve 3"]);
  assert.equal(report.mock.callCount(), 3);
  report.mock.restore();
});

test("events of other names, and no callbacks at all", () => {
  const other = new Presence(channel, { events: { state: "s", diff: "d" } });
  channel.receive("s", { ada: entry("1") });
  channel.receive("d", { joins: { bob: entry("2") }, leaves: {} });
  assert.deepEqual(other.list().length, 2);
});
