import assert from "node:assert/strict";
import { afterEach, beforeEach, test } from "node:test";

import { Socket } from "../relay.js";
import { Clock, FakeWebSocket } from "./support.js";

const clock = new Clock();
let socket;
let seen;

beforeEach(() => {
  FakeWebSocket.made.length = 0;
  seen = [];
  clock.install();
  socket = new Socket("ws://relay.test/socket", {
    transport: FakeWebSocket,
    reconnectAfterMs: () => 100,
    rejoinAfterMs: () => 100,
  });
  socket.connect();
  FakeWebSocket.last.open();
});

afterEach(() => {
  socket.disconnect();
  clock.remove();
});

/** A channel that notes what its page is given. */
function channel(options, params) {
  const made = socket.channel("t", params).recover(options);
  made.on("n", (payload, ref, joinRef, position) => seen.push([payload, position]));
  made.on("relay:recovered", () => seen.push("recovered"));
  made.on("relay:lost", ({ reason }) => seen.push(`lost: ${reason}`));
  made.join();
  return made;
}

/** Answer the join that was sent last; returns its params. */
function accept(response) {
  const [join] = FakeWebSocket.last.take().filter(([, , , event]) => event === "phx_join");
  FakeWebSocket.last.reply(join, "ok", response);
  return join[4];
}

const send = (payload, event = "n") => FakeWebSocket.last.receive([null, null, "t", event, payload]);
const sendPosition = (position) => send({ _position: position }, "relay:position");

function cut() {
  FakeWebSocket.last.end();
  clock.tick(100);
  FakeWebSocket.last.open();
}

const turns = async () => {
  for (let turn = 0; turn < 10; turn++) await null;
};

test("each join asks for what follows on the last event, from null on", () => {
  channel({ last: 20 }, { nick: "ada" });
  assert.deepEqual(accept({ _position: "1-0" }), { nick: "ada", since: null, last: 20 });
  send({ a: 1, _position: "1-1" });
  cut();
  assert.deepEqual(accept({ _position: "1-1", recovered: true }), { nick: "ada", since: "1-1", last: 20 });
  send({ a: 2, _position: "1-2" });
  cut();
  assert.equal(accept({ _position: "9-0", recovered: false, reason: "history expired" }).since, "1-2");
  cut();
  assert.equal(accept({ _position: "9-0", recovered: true }).since, "9-0");
  assert.deepEqual(seen, [[{ a: 1 }, "1-1"], "recovered", [{ a: 2 }, "1-2"], "lost: history expired", "recovered"]);
});

test("a position of an earlier page is recovered from, and its first join is reported", () => {
  channel({ since: "1-7" });
  assert.deepEqual(accept({ _position: "1-7", recovered: true }), { since: "1-7" });
  assert.deepEqual(seen, ["recovered"]);
});

test("params that are a function are called for each join", () => {
  let count = 0;
  channel({}, () => ({ count: ++count }));
  assert.deepEqual(accept({ _position: "1-0" }), { count: 1, since: null });
  cut();
  assert.deepEqual(accept({ _position: "1-0", recovered: true }), { count: 2, since: "1-0" });
});

test("a position is kept only if it is text", () => {
  channel();
  accept({ _position: "1-0" });
  for (const position of [null, 7, [], {}]) send({ _position: position });
  sendPosition(null);
  send(null, "relay:position");
  cut();
  assert.equal(accept({ _position: null, recovered: false, reason: "history unavailable" }).since, "1-0");
  cut();
  assert.equal(accept({ _position: "1-0", recovered: true }).since, "1-0");
});

test("the payload is the one that was published", () => {
  channel();
  accept({ _position: "1-0" });
  send({ _position: "1-1" });
  send({ a: { _position: 1 }, _position: null });
  send({ a: 1 });
  assert.deepEqual(seen, [[{}, "1-1"], [{ a: { _position: 1 } }, undefined], [{ a: 1 }, undefined]]);
});

test("without a history a `_position` is the page's own, and a rejoin is a loss", () => {
  channel();
  accept({});
  send({ _position: "mine" });
  send([1]);
  cut();
  assert.equal(accept(null).since, null);
  assert.deepEqual(seen, [[{ _position: "mine" }, undefined], [[1], undefined], "lost: nothing to recover from"]);
});

test("an event whose position follows is given with it", () => {
  channel();
  accept({ _position: "1-0" });
  for (const [number, payload] of [[1], "x", 7, null, false].entries()) {
    send(payload);
    assert.equal(seen.length, number);
    sendPosition(`1-${number}`);
    assert.deepEqual(seen.at(-1), [payload, `1-${number}`]);
  }
  FakeWebSocket.last.receive(Uint8Array.from([2, 1, 1, 116, 110, 7]).buffer);
  sendPosition("1-9");
  assert.deepEqual([...new Uint8Array(seen.at(-1)[0])], [7]);
  assert.equal(seen.at(-1)[1], "1-9");
});

test("an event without a position is given when another one comes, or soon, or before the end", () => {
  const room = channel();
  accept({ _position: "1-0" });
  send([1]);
  send({ _position: "1-1" });
  send([2]);
  clock.tick(50);
  sendPosition("1-2"); // late
  send([3]);
  assert.deepEqual(seen, [[[1], undefined], [{}, "1-1"], [[2], undefined]]);
  room.leave();
  FakeWebSocket.last.reply(FakeWebSocket.last.take().at(-1), "ok");
  assert.deepEqual(seen.at(-1), [[3], undefined]);
});

test("an event whose position was cut off comes once", () => {
  channel();
  accept({ _position: "1-0" });
  send([1]);
  cut();
  clock.tick(50);
  assert.equal(accept({ _position: "1-0", recovered: true }).since, "1-0");
  clock.tick(50);
  send([1]);
  sendPosition("1-1");
  assert.deepEqual(seen, ["recovered", [[1], "1-1"]]);
});

test("after phx_error nothing is given until the next join, which has the last position", () => {
  const room = channel();
  accept({ _position: "1-0" });
  send({ _position: "1-1" });
  const ref = room.joinRef();
  FakeWebSocket.last.receive([ref, ref, "t", "phx_error", {}]);
  send({ _position: "1-2" });
  clock.tick(100);
  assert.equal(accept({ _position: "1-1", recovered: true }).since, "1-1");
  send({ _position: "1-2" });
  assert.deepEqual(seen, [[{}, "1-1"], "recovered", [{}, "1-2"]]);
});

test("iterations get the positions and the reports, which are never dropped", async () => {
  const room = channel();
  const events = room.events({ limit: 1 });
  accept({ _position: "1-0" });
  send({ a: 1, _position: "1-1" });
  cut();
  accept({ _position: "9-0", recovered: false, reason: "history expired" });
  const values = [];
  for (let count = 0; count < 2; count++) values.push((await events.next()).value);
  assert.deepEqual(values, [
    { event: "n", payload: { a: 1 }, position: "1-1", lost: 0 },
    { event: "relay:lost", payload: { reason: "history expired" }, position: undefined, lost: 0 },
  ]);
});

test("a queue that is full takes nothing more, and once it is empty the history delivers the rest", async () => {
  const room = channel();
  const [slow, quick] = [room.events({ limit: 2 }), room.events()];
  accept({ _position: "1-0" });
  for (const n of [1, 2, 3, 4]) send({ n, _position: `1-${n}` });
  send({ live: true }); // in no history
  const wire = FakeWebSocket.last;
  assert.equal(seen.length, 2, "the others wait for it");
  for (let count = 0; count < 2; count++) {
    await quick.next();
    assert.equal((await slow.next()).value.payload.n, count + 1);
  }
  const waiting = room.push("p"); // its reply would be lost
  const next = slow.next();
  const [push] = wire.take();
  assert.equal(wire.take().length, 0);
  wire.reply(push, "ok", { answer: 1 });
  assert.deepEqual(await waiting, { answer: 1 });
  send({ n: 3, _position: "1-3" }); // of the join that ends
  assert.equal(accept({ _position: "1-2", recovered: true }).since, "1-2");
  assert.deepEqual((await next).value, { event: "relay:recovered", payload: {}, position: undefined, lost: 1 });
  for (const n of [3, 4]) {
    send({ n, _position: `1-${n}` });
    assert.equal((await slow.next()).value.payload.n, n);
  }
  assert.deepEqual(seen.slice(2), ["recovered", [{ n: 3 }, "1-3"], [{ n: 4 }, "1-4"]]);
});

test("an iteration that is broken off holds nothing up", async () => {
  const room = channel();
  const events = room.events({ limit: 1 });
  accept({ _position: "1-0" });
  for (const n of [1, 2]) send({ n, _position: `1-${n}` });
  await events.return();
  await turns();
  assert.equal(accept({ _position: "1-1", recovered: true }).since, "1-1");
  for (const n of [2, 3]) send({ n, _position: `1-${n}` });
  assert.deepEqual(seen, [[{ n: 1 }, "1-1"], "recovered", [{ n: 2 }, "1-2"], [{ n: 3 }, "1-3"]]);
});

test("a channel that does not recover asks for nothing and is given payloads as they come", () => {
  const room = socket.channel("t", { a: 1 });
  room.on("n", (payload, ref, joinRef, position) => seen.push([payload, position]));
  room.join();
  assert.deepEqual(accept({}), { a: 1 });
  send({ _position: "mine" });
  assert.deepEqual(seen, [[{ _position: "mine" }, undefined]]);
});

test("events about members are not held back by a full queue", async () => {
  const made = channel();
  accept({ _position: "1-1", recovered: false });
  const got = [];
  for (const event of ["presence_state", "presence_diff", "presence_count"]) made.on(event, () => got.push(event));
  const stream = made.events({ limit: 1 });
  for (const position of ["1-2", "1-3", "1-4"]) send({ _position: position });
  send({ joins: {}, leaves: {} }, "presence_diff");
  send({}, "presence_state");
  assert.deepEqual(got, ["presence_diff", "presence_state"]);
  assert.equal((await stream.next()).value.position, "1-2");
  assert.equal(stream.lost, 0);
});
