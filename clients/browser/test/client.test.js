import assert from "node:assert/strict";
import { afterEach, beforeEach, mock, test } from "node:test";

import { PushError, Socket } from "../relay.js";
import { Clock, FakeWebSocket, bytes } from "./support.js";

const clock = new Clock();
let socket;

beforeEach(() => {
  FakeWebSocket.made.length = 0;
  clock.install();
  socket = makeSocket();
});

afterEach(() => {
  socket.disconnect();
  clock.remove();
  delete globalThis.document;
  delete globalThis.addEventListener;
});

function makeSocket(options = {}) {
  const steady = { reconnectAfterMs: () => 100, rejoinAfterMs: () => 100 };
  return new Socket("ws://relay.test/socket", { transport: FakeWebSocket, ...steady, ...options });
}

function connect() {
  socket.connect();
  FakeWebSocket.last.open();
  return FakeWebSocket.last;
}

function join(wire, topic = "room:1") {
  const channel = socket.channel(topic);
  channel.join();
  wire.reply(wire.take()[0], "ok");
  return channel;
}

// Names.

test("a topic or an event that is no text is an error of its caller, and reaches no wire", () => {
  const wire = connect();
  const room = join(wire);
  const reports = mock.method(console, "error", () => {});
  for (const name of [undefined, null, 7, {}]) {
    assert.throws(() => room.push(name, {}), TypeError);
    assert.throws(() => room.push(name, new ArrayBuffer(1)), TypeError);
    const refusals = [];
    const channel = socket.channel(name);
    channel.join().receive("error", ({ reason }) => refusals.push(reason));
    assert.match(refusals[0], /^TypeError/);
    channel.leave();
  }
  assert.equal(reports.mock.callCount(), 4);
  mock.restoreAll();
  assert.deepEqual([wire.sent, room.isJoined(), socket.channels], [[], true, [room]]);
});

// Connecting.

test("the URL has the parameters, nested ones as Phoenix reads them, and the version last", () => {
  socket = makeSocket({ params: () => ({ a: { b: 1, c: [2] }, d: "é&", none: null }) });
  assert.equal(
    socket.endPointURL(),
    "ws://relay.test/socket/websocket?a%5Bb%5D=1&a%5Bc%5D%5B0%5D=2&d=%C3%A9%26&vsn=2.0.0",
  );
});

test("options that are undefined or null are left out, and params may be nothing", () => {
  socket = makeSocket({ timeout: undefined, heartbeatIntervalMs: undefined, params: null, authToken: null });
  assert.deepEqual([socket.timeout, socket.heartbeatIntervalMs], [10_000, 30_000]);
  for (const params of [undefined, null, () => undefined, () => null]) {
    socket = makeSocket({ params });
    assert.equal(socket.endPointURL(), "ws://relay.test/socket/websocket?vsn=2.0.0");
  }
  const { transport } = new Socket("ws://relay.test/socket", { transport: undefined });
  assert.equal(transport, globalThis.WebSocket);
  assert.equal(new Socket("ws://relay.test/socket", null).timeout, 10_000);
});

test("an http endpoint becomes ws and keeps its own query", () => {
  socket = new Socket("https://relay.test/x/socket/?k=v");
  assert.equal(socket.endPointURL(), "wss://relay.test/x/socket/websocket?k=v&vsn=2.0.0");
});

test("the token travels as a subprotocol and is evaluated on each connect", () => {
  let count = 0;
  socket = makeSocket({ authToken: () => `token${++count}` });
  connect().end();
  clock.tick(100);
  const tokens = FakeWebSocket.made.map(({ protocols }) => protocols);
  assert.deepEqual(tokens, [
    ["phoenix", "base64url.bearer.phx.dG9rZW4x"],
    ["phoenix", "base64url.bearer.phx.dG9rZW4y"],
  ]);
});

test("a token makes no slash and no padding, which a subprotocol cannot hold", () => {
  socket = makeSocket({ authToken: "??????>" });
  connect();
  assert.equal(FakeWebSocket.last.protocols[1], "base64url.bearer.phx.Pz8_Pz8_Pg");
});

test("a lost connection is made again, and close code 1000 ends it for good", () => {
  connect().end();
  clock.tick(100);
  assert.equal(FakeWebSocket.made.length, 2);
  FakeWebSocket.last.open();
  FakeWebSocket.last.end(1000);
  clock.tick(100_000);
  assert.equal(FakeWebSocket.made.length, 2);
});

test("the default back-off is random within a growing, capped window", () => {
  const { reconnectAfterMs, rejoinAfterMs } = new Socket("ws://relay.test/socket");
  mock.method(Math, "random", () => 0.5);
  assert.deepEqual([1, 2, 5, 50].map(reconnectAfterMs), [500, 1000, 5000, 5000]);
  assert.deepEqual([1, 2, 3, 9].map(rejoinAfterMs), [500, 1000, 2500, 5000]);
  mock.restoreAll();
});

test("tries count up until a message comes, not merely an open connection", () => {
  const tries = [];
  socket = makeSocket({ reconnectAfterMs: (count) => tries.push(count) });
  for (const isTalking of [false, false, true, false]) {
    socket.connect();
    FakeWebSocket.last.open();
    if (isTalking) FakeWebSocket.last.receive([null, null, "t", "e", {}]);
    FakeWebSocket.last.end();
  }
  assert.deepEqual(tries, [1, 2, 1, 2]);
});

test("a connection that does not open in time is given up and tried again", () => {
  socket.connect();
  clock.tick(10_000);
  assert.equal(FakeWebSocket.last.closedWith.reason, "connect timeout");
  clock.tick(100);
  assert.equal(FakeWebSocket.made.length, 2);
});

test("a params function that throws stops no retry", () => {
  let isBroken = false;
  const errors = [];
  socket = makeSocket({ params: () => (isBroken ? assert.fail("no token") : {}) });
  socket.onError((error) => errors.push(error.message));
  connect();
  isBroken = true;
  FakeWebSocket.last.end();
  clock.tick(100);
  isBroken = false;
  clock.tick(100);
  assert.deepEqual([errors, FakeWebSocket.made.length], [["no token"], 2]);
});

test("a promise in place of a value is an error, and not sent as none", () => {
  const later = async () => ({ token: "t" });
  for (const options of [{ params: later }, { authToken: later }, { authToken: later() }]) {
    socket = makeSocket(options);
    assert.throws(() => socket.connect(), /expected no promise/);
  }
  assert.equal(FakeWebSocket.made.length, 0);
  socket = makeSocket();
  const wire = connect();
  const reasons = [];
  const reported = mock.method(console, "error", () => {});
  socket.channel("room:1", later).join().receive("error", ({ reason }) => reasons.push(reason));
  reported.mock.restore();
  assert.match(reasons[0], /expected no promise/);
  assert.deepEqual(wire.take(), []);
  socket.channel("room:2", { then: 1 }).join();
  assert.deepEqual(wire.take()[0][4], { then: 1 });
});

test("disconnect closes at once, calls back, and stays closed until connect", () => {
  const seen = [];
  socket.onClose(({ code, reason }) => seen.push([code, reason]));
  const wire = connect();
  socket.disconnect(() => seen.push("done"), 3000, "bye");
  assert.deepEqual(seen, [[3000, "bye"], "done"]);
  assert.deepEqual(wire.closedWith, { code: 3000, reason: "bye" });
  clock.tick(100_000);
  assert.equal(FakeWebSocket.made.length, 1);
  connect();
  assert.ok(socket.isConnected());
});

test("callbacks are called, and no more after off", () => {
  const seen = [];
  const refs = [socket.onOpen(() => seen.push("open")), socket.onMessage(({ event }) => seen.push(event))];
  const wire = connect();
  wire.receive([null, null, "room:1", "new_msg", {}]);
  socket.off(refs);
  wire.receive([null, null, "room:1", "new_msg", {}]);
  assert.deepEqual(seen, ["open", "new_msg"]);
});

test("a frame that cannot be decoded is an error of the socket, and nothing else", () => {
  const errors = [];
  socket.onError((error) => errors.push(error.name));
  const wire = connect();
  wire.receive("{");
  wire.receive(bytes("09"));
  assert.deepEqual(errors, ["SyntaxError", "TypeError"]);
  assert.ok(socket.isConnected());
});

// Heartbeats.

test("a heartbeat goes out each interval, and one without answer means a reconnect", () => {
  const wire = connect();
  for (let beat = 0; beat < 3; beat++) {
    clock.tick(30_000);
    const [heartbeat] = wire.take();
    assert.deepEqual([heartbeat[0], ...heartbeat.slice(2)], [null, "phoenix", "heartbeat", {}]);
    wire.reply(heartbeat, "ok");
  }
  clock.tick(30_000);
  clock.tick(10_000);
  assert.deepEqual(wire.closedWith, { code: 1000, reason: "heartbeat timeout" });
  clock.tick(100);
  assert.equal(FakeWebSocket.made.length, 2);
});

// The page and the network.

function makePage() {
  const page = new EventTarget();
  const network = new EventTarget();
  page.hidden = false;
  globalThis.document = page;
  globalThis.addEventListener = network.addEventListener.bind(network);
  const turn = (hidden) => {
    page.hidden = hidden;
    page.dispatchEvent(new Event("visibilitychange"));
  };
  return { turn, network };
}

test("a hidden page does not reconnect, and does so at once when it is shown", () => {
  const { turn } = makePage();
  connect();
  turn(true);
  FakeWebSocket.last.end();
  clock.tick(100_000);
  assert.equal(FakeWebSocket.made.length, 1);
  turn(false);
  assert.equal(FakeWebSocket.made.length, 2);
});

test("a page hidden while it waits to reconnect stops waiting", () => {
  const { turn } = makePage();
  connect().end();
  turn(true);
  clock.tick(100_000);
  assert.equal(FakeWebSocket.made.length, 1);
});

test("a network that is back reconnects at once; one that goes is probed", () => {
  const { network } = makePage();
  const wire = connect();
  network.dispatchEvent(new Event("offline"));
  assert.equal(wire.take()[0][3], "heartbeat");
  clock.tick(10_000);
  assert.equal(wire.closedWith.reason, "heartbeat timeout");
  network.dispatchEvent(new Event("online"));
  assert.equal(FakeWebSocket.made.length, 2);
});

test("after disconnect the page and the network are no longer followed", () => {
  const { turn, network } = makePage();
  connect();
  socket.disconnect();
  turn(false);
  network.dispatchEvent(new Event("online"));
  assert.equal(FakeWebSocket.made.length, 1);
});

// Joining.

test("a join made before the connection is sent when it opens, with join_ref equal to ref", () => {
  const channel = socket.channel("room:1", { token: "x" });
  channel.join();
  const [[joinRef, ref, ...rest]] = connect().take();
  assert.equal(joinRef, ref);
  assert.deepEqual(rest, ["room:1", "phx_join", { token: "x" }]);
});

test("an awaited join gives the response; receive is called again on each rejoin", async () => {
  const wire = connect();
  const channel = socket.channel("room:1");
  let count = 0;
  const push = channel.join().receive("ok", () => count++);
  wire.reply(wire.take()[0], "ok", { n: 1 });
  assert.deepEqual(await push, { n: 1 });
  wire.receive([channel.joinRef(), channel.joinRef(), "room:1", "phx_error", {}]);
  clock.tick(100);
  wire.reply(wire.take()[0], "ok");
  assert.deepEqual([channel.state, count], ["joined", 2]);
});

test("a refused join rejects with the reason and is tried again with new params", async () => {
  let count = 0;
  const wire = connect();
  const push = socket.channel("room:1", () => ({ try: ++count })).join();
  wire.reply(wire.take()[0], "error", { reason: "not yours" });
  await assert.rejects(push.then(), (error) => {
    assert.ok(error instanceof PushError);
    assert.deepEqual([error.status, error.reason, error.response], ["error", "not yours", { reason: "not yours" }]);
    return /phx_join on "room:1": not yours/.test(error.message);
  });
  clock.tick(100);
  assert.deepEqual(wire.take()[0][4], { try: 2 });
});

test("a join without an answer is undone by a leave, then tried again", () => {
  const wire = connect();
  let timeouts = 0;
  const channel = socket.channel("room:1");
  channel.join(500).receive("timeout", () => timeouts++);
  const [first] = wire.take();
  clock.tick(500);
  const [leave] = wire.take();
  assert.deepEqual([leave[0], leave[3], channel.state, timeouts], [first[0], "phx_leave", "errored", 1]);
  wire.reply(first, "ok"); // too late
  assert.equal(channel.state, "errored");
  clock.tick(100);
  assert.equal(wire.take()[0][3], "phx_join");
});

test("a channel is joined once", () => {
  const channel = join(connect());
  assert.throws(() => channel.join(), /joined before/);
});

test("a second channel on a topic takes it over from the first", () => {
  const wire = connect();
  const first = join(wire);
  socket.channel("room:1").join();
  const [leave, again] = wire.take();
  assert.deepEqual([leave[3], again[3], first.state], ["phx_leave", "phx_join", "leaving"]);
  wire.reply(leave, "ok");
  assert.equal(first.state, "closed");
});

test("after a lost connection every channel is joined again", () => {
  const errors = [];
  const wire = connect();
  const channel = join(wire);
  channel.onError(({ source, code }) => errors.push([source, code]));
  wire.end(1012);
  assert.deepEqual([channel.state, errors], ["errored", [["transport", 1012]]]);
  clock.tick(100);
  FakeWebSocket.last.open();
  assert.equal(FakeWebSocket.last.take()[0][3], "phx_join");
});

test("phx_close ends a channel without a rejoin", () => {
  const wire = connect();
  const channel = join(wire);
  let closed = 0;
  channel.onClose(() => closed++);
  wire.receive([channel.joinRef(), channel.joinRef(), "room:1", "phx_close", {}]);
  clock.tick(50);
  assert.deepEqual([channel.state, closed, socket.channels, wire.take()], ["closed", 1, [], []]);
});

test("leave is answered, then the channel is gone; unconnected it is gone at once", async () => {
  const wire = connect();
  const channel = join(wire);
  const push = channel.leave();
  wire.reply(wire.take()[0], "ok");
  await push;
  assert.equal(channel.state, "closed");
  const other = join(wire, "room:2");
  wire.end();
  await other.leave();
  assert.deepEqual([other.state, socket.channels], ["closed", []]);
});

// Events and pushes.

test("events reach their callbacks until off; those meant for an earlier join do not", () => {
  const wire = connect();
  const channel = join(wire);
  const seen = [];
  const ref = channel.on("new_msg", (payload) => seen.push(["first", payload]));
  channel.on("new_msg", (payload) => seen.push(["second", payload]));
  wire.receive([null, null, "room:1", "new_msg", 1]);
  channel.off("new_msg", ref);
  wire.receive([channel.joinRef(), null, "room:1", "new_msg", 2]);
  wire.receive(["0", null, "room:1", "new_msg", 3]);
  wire.receive([null, null, "room:2", "new_msg", 4]);
  channel.off("new_msg");
  wire.receive([null, null, "room:1", "new_msg", 5]);
  assert.deepEqual(seen, [["first", 1], ["second", 1], ["second", 2]]);
});

test("a push is settled by its own reply, whatever the order", async () => {
  const wire = connect();
  const channel = join(wire);
  const [first, second] = [channel.push("a"), channel.push("b", { n: 1 })];
  const [a, b] = wire.take();
  assert.deepEqual(b.slice(2), ["room:1", "b", { n: 1 }]);
  wire.reply(b, "ok", "B");
  wire.reply(a, "later", "A");
  assert.equal(await second, "B");
  assert.deepEqual(await first.catch(({ status, response }) => [status, response]), ["later", "A"]);
  let isOver = false;
  await second.finally(() => (isOver = true));
  assert.ok(isOver);
});

test("bytes are pushed and answered in binary frames", async () => {
  const wire = connect();
  const channel = join(wire);
  const push = channel.push("raw", new Uint8Array([7]));
  const frame = new Uint8Array(wire.sent.pop());
  assert.equal(frame[0], 0);
  assert.equal(frame.at(-1), 7);
  const names = [channel.joinRef(), push.ref, "room:1", "ok"];
  const head = [1, ...names.map((name) => name.length)];
  wire.receive(Uint8Array.from([...head, ...Buffer.from(names.join("")), 8]).buffer);
  assert.deepEqual(await push, Uint8Array.of(8).buffer);
});

test("a push made while not joined waits for the join, or for its timeout", async () => {
  const channel = socket.channel("room:1");
  assert.throws(() => channel.push("early"), /before join/);
  channel.join();
  const late = channel.push("late", {}, 50);
  const kept = channel.push("kept");
  clock.tick(50);
  await assert.rejects(late.then(), { status: "timeout" });
  const wire = connect();
  wire.reply(wire.take()[0], "ok");
  const sent = wire.take();
  assert.deepEqual(sent.map((message) => message[3]), ["kept"]);
  wire.reply(sent[0], "ok");
  await kept;
});

test("iterating gives every event in order, counts the lost, and ends with the channel", async () => {
  const wire = connect();
  const channel = join(wire);
  const stream = channel.events({ limit: 2 });
  for (const n of [1, 2, 3]) wire.receive([null, null, "room:1", "n", n]);
  assert.deepEqual(await stream.next(), { value: { event: "n", payload: 2, position: undefined, lost: 1 }, done: false });
  assert.equal(stream.lost, 1);
  wire.receive([channel.joinRef(), channel.joinRef(), "room:1", "phx_close", {}]);
  const rest = [];
  for await (const { payload } of stream) rest.push(payload);
  assert.deepEqual(rest, [3]);
  for await (const _ of channel) assert.fail("a closed channel has no events");
});

test("an iteration that waits is woken by an event, and leaves nothing behind when broken off", async () => {
  const wire = connect();
  const channel = join(wire);
  setImmediate(() => wire.receive([null, null, "room:1", "n", 1]));
  for await (const { payload, lost } of channel) {
    assert.deepEqual([payload, lost], [1, 0]);
    break;
  }
  const [one, two] = [channel.events(), channel.events()].map((stream) => stream.next());
  wire.receive([null, null, "room:1", "n", 2]);
  assert.deepEqual((await Promise.all([one, two])).map(({ value }) => value.payload), [2, 2]);
});

test("a channel says what state it is in, by the methods that phoenix has", () => {
  const tell = (channel) => ["Closed", "Joining", "Joined", "Errored", "Leaving"].filter((name) => channel[`is${name}`]());
  const wire = connect();
  const channel = socket.channel("room:1");
  assert.deepEqual([tell(channel), channel.canPush()], [["Closed"], false]);
  channel.join();
  assert.deepEqual([tell(channel), channel.canPush()], [["Joining"], false]);
  wire.reply(wire.take()[0], "ok");
  assert.deepEqual([tell(channel), channel.canPush()], [["Joined"], true]);
  wire.receive([channel.joinRef(), channel.joinRef(), "room:1", "phx_error", {}]);
  assert.deepEqual([tell(channel), channel.canPush()], [["Errored"], false]);
  clock.tick(100);
  wire.reply(wire.take()[0], "ok");
  channel.leave();
  assert.deepEqual([tell(channel), channel.canPush()], [["Leaving"], false]);
});

// Callbacks of the page.

/** What `reportError` was given while `work` ran. */
function reported(work) {
  const errors = [];
  globalThis.reportError = (error) => errors.push(error.message);
  try {
    work();
  } finally {
    delete globalThis.reportError;
  }
  return errors;
}

function fail(name) {
  return () => {
    throw new Error(name);
  };
}

test("callbacks of the socket that throw are reported, and events are delivered all the same", () => {
  for (const kind of ["onOpen", "onClose", "onError", "onMessage"]) socket[kind](fail(kind));
  const seen = [];
  const errors = reported(() => {
    const wire = connect();
    const room = join(wire);
    room.on("new", fail("on"));
    room.on("new", (payload) => seen.push(payload));
    room.on("new", fail("on again"));
    wire.receive([null, null, "room:1", "new", 1]);
    wire.receive("no frame");
    wire.receive([null, null, "room:1", "new", 2]);
    wire.end();
    socket.disconnect(fail("disconnect"));
  });
  assert.deepEqual(seen, [1, 2]);
  for (const name of ["onOpen", "onClose", "onError", "onMessage", "on", "on again", "disconnect"]) {
    assert.ok(errors.includes(name), name);
  }
});

test("a channel's callbacks that throw leave other channels joined again after a reconnect", () => {
  let wire = connect();
  const rooms = ["a", "b", "c"].map((topic) => join(wire, topic));
  for (const room of rooms) {
    room.onError(fail("onError"));
    room.onClose(fail("onClose"));
  }
  const seen = [];
  rooms[2].on("new", (payload) => seen.push(payload));
  const errors = reported(() => {
    wire.end();
    clock.tick(100);
    wire = FakeWebSocket.last;
    wire.open();
    for (const sent of wire.take()) wire.reply(sent, "ok");
    wire.receive([null, null, "c", "new", 1]);
    wire.receive([null, null, "a", "phx_close", {}]);
  });
  assert.deepEqual(rooms.map((room) => room.state), ["closed", "joined", "joined"]);
  assert.deepEqual(seen, [1]);
  assert.deepEqual(errors, ["onError", "onError", "onError", "onClose"]);
});

test("receive hooks that throw keep neither the others nor the join from their turn", () => {
  const wire = connect();
  const seen = [];
  const room = socket.channel("room:1");
  const errors = reported(() => {
    room.join().receive("ok", fail("join")).receive("ok", () => seen.push("join"));
    wire.reply(wire.take()[0], "ok");
    const push = room.push("new").receive("ok", fail("push")).receive("ok", () => seen.push("push"));
    wire.reply(wire.take()[0], "ok");
    push.receive("ok", fail("late"));
    room.push("slow").receive("timeout", fail("timeout")).receive("timeout", () => seen.push("timeout"));
    clock.tick(10_000);
    room.leave().receive("ok", fail("leave"));
    wire.reply(wire.take().at(-1), "ok");
  });
  assert.deepEqual(seen, ["join", "push", "timeout"]);
  assert.deepEqual(errors, ["join", "push", "late", "timeout", "leave"]);
  assert.equal(room.state, "closed");
});

test("a hook that is added by a hook is called once", () => {
  const wire = connect();
  const seen = [];
  const push = join(wire).push("new");
  push.receive("ok", () => push.receive("ok", () => seen.push("inner")));
  wire.reply(wire.take()[0], "ok");
  assert.deepEqual(seen, ["inner"]);
});

test("join params that throw are tried again, and other channels join meanwhile", () => {
  const wire = connect();
  let params = fail("params");
  const bad = socket.channel("bad", () => params());
  const reasons = [];
  const errors = reported(() => bad.join().receive("error", ({ reason }) => reasons.push(reason)));
  assert.deepEqual([errors, reasons, bad.state], [["params"], ["Error: params"], "errored"]);
  const good = join(wire, "good");
  params = () => ({ a: 1 });
  clock.tick(100);
  const [sent] = wire.take();
  assert.deepEqual(sent.slice(2), ["bad", "phx_join", { a: 1 }]);
  wire.reply(sent, "ok");
  assert.deepEqual([bad.state, good.state], ["joined", "joined"]);
});

test("join params that throw after a reconnect keep no other channel from joining", () => {
  let wire = connect();
  let params = () => ({});
  const bad = socket.channel("bad", () => params());
  bad.join();
  wire.reply(wire.take()[0], "ok");
  const good = join(wire, "good");
  params = fail("params");
  wire.end();
  clock.tick(100);
  wire = FakeWebSocket.last;
  const errors = reported(() => wire.open());
  for (const sent of wire.take()) wire.reply(sent, "ok");
  assert.deepEqual([errors, bad.state, good.state], [["params"], "errored", "joined"]);
});

test("a push that cannot be encoded throws where it is made and leaves nothing behind", () => {
  const wire = connect();
  const room = join(wire);
  const endless = {};
  endless.self = endless;
  for (const payload of [endless, 1n]) assert.throws(() => room.push("new", payload), TypeError);
  assert.throws(() => room.push("n".repeat(256), new Uint8Array(1)), RangeError);
  clock.tick(10_000);
  assert.deepEqual(wire.take(), [], "no half a message");
  room.push("new", {});
  assert.equal(wire.take().length, 1);
});

test("a push that waits for its join and cannot be encoded fails alone", () => {
  const wire = connect();
  const room = socket.channel("room:1");
  room.join();
  const seen = [];
  room.push("bad", { big: 1n }).receive("error", ({ reason }) => seen.push(reason));
  room.push("good", {});
  const errors = reported(() => wire.reply(wire.take()[0], "ok"));
  assert.equal(errors.length, 1);
  assert.match(seen[0], /BigInt/);
  assert.deepEqual(wire.take().map(([, , , event]) => event), ["good"]);
  assert.equal(room.state, "joined");
});

test("back-off functions that throw or give no time are reported, and ours takes their place", () => {
  mock.method(Math, "random", () => 0.5);
  for (const wrong of [fail("back-off"), () => undefined, () => NaN, () => -1, () => Infinity]) {
    socket = makeSocket({ reconnectAfterMs: wrong, rejoinAfterMs: wrong });
    let wire = connect();
    const room = join(wire);
    const made = FakeWebSocket.made.length;
    const errors = reported(() => {
      wire.receive([null, null, "room:1", "phx_error", {}]);
      clock.tick(500);
      assert.equal(wire.take()[0][3], "phx_join");
      wire.end();
      clock.tick(499);
      assert.equal(FakeWebSocket.made.length, made);
      clock.tick(1);
      assert.equal(FakeWebSocket.made.length, made + 1);
      wire = FakeWebSocket.last;
      wire.open();
      wire.reply(wire.take()[0], "ok");
    });
    assert.equal(room.state, "joined");
    assert.ok(errors.every((message) => message === "back-off"));
    socket.disconnect();
  }
  mock.restoreAll();
});

test("without reportError the console shows what a callback throws", () => {
  const shown = mock.method(console, "error", () => {});
  socket.onOpen(fail("onOpen"));
  connect();
  assert.deepEqual(shown.mock.calls.map(({ arguments: [error] }) => error.message), ["onOpen"]);
  mock.restoreAll();
});
