/**
 * A browser client for the relay, and for any server that speaks Phoenix Channels V2.
 *
 * It has the interface of `phoenix`, documented in `relay.d.ts`; `_name` is for this module alone.
 */

const VSN = "2.0.0";
const PUSH = 0, REPLY = 1, BROADCAST = 2; // first byte of a binary frame
const NORMAL = 1000, ABNORMAL = 1006; // close codes
const TOKEN_PREFIX = "base64url.bearer.phx.";
const POSITION_MS = 50; // how long an event waits for its position

// Full jitter: clients come back spread over the whole window, not in waves.
const jitter = (windowMs) => Math.random() * windowMs;

const DEFAULTS = {
  params: {},
  timeout: 10_000,
  heartbeatIntervalMs: 30_000,
  reconnectAfterMs: (tries) => jitter(Math.min(10_000, 500 * 2 ** tries)),
  rejoinAfterMs: (tries) => jitter([1000, 2000, 5000][tries - 1] ?? 10_000),
};

const valueOf = (value) => {
  const found = typeof value === "function" ? value() : value;
  if (found?.then?.call) throw new TypeError("expected no promise");
  return found;
};

/** Show an error like an uncaught one. */
const report = (error) => (globalThis.reportError ?? console.error)(error);

/** Call what belongs to the page; what it throws is reported. */
function call(callback, ...args) {
  try {
    return callback(...args);
  } catch (error) {
    report(error);
  }
}

/** Milliseconds until the next try: ours where the page's function gives no time. */
function delay(kind, options, tries) {
  const ms = call(() => options[kind](tries));
  return ms >= 0 && ms < Infinity ? ms : DEFAULTS[kind](tries);
}

const isText = (value) => typeof value === "string";

const isBinary = (payload) => payload instanceof ArrayBuffer || ArrayBuffer.isView(payload);

// Frames.

/** To a text frame, or to a binary push: `00 jl rl tl el join_ref ref topic event data`. */
export function encode({ join_ref, ref, topic, event, payload }) {
  if (!isText(topic) || !isText(event)) throw new TypeError("topic and event: expected text");
  if (!isBinary(payload)) return JSON.stringify([join_ref, ref, topic, event, payload]);
  const names = [join_ref ?? "", ref ?? "", topic, event].map(encodeName);
  const data = new Uint8Array(payload.buffer ?? payload, payload.byteOffset ?? 0, payload.byteLength);
  const parts = [[PUSH, ...names.map((name) => name.length)], ...names, data];
  const frame = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  let end = 0;
  for (const part of parts) {
    frame.set(part, end);
    end += part.length;
  }
  return frame.buffer;
}

function encodeName(name) {
  const bytes = new TextEncoder().encode(name);
  if (bytes.length > 255) throw new RangeError(`"${name}" has over 255 bytes`);
  return bytes;
}

/** From a text frame, or from a binary push, reply or broadcast. */
export function decode(frame) {
  if (isText(frame)) {
    const [join_ref, ref, topic, event, payload] = JSON.parse(frame);
    return { join_ref, ref, topic, event, payload };
  }
  const [kind] = new Uint8Array(frame);
  if (kind === PUSH) {
    const [[join_ref, topic, event], payload] = decodeNames(frame, 3);
    return { join_ref: join_ref || null, ref: null, topic, event, payload };
  }
  if (kind === REPLY) {
    const [[join_ref, ref, topic, status], response] = decodeNames(frame, 4);
    return { join_ref: join_ref || null, ref: ref || null, topic, event: "phx_reply", payload: { status, response } };
  }
  if (kind === BROADCAST) {
    const [[topic, event], payload] = decodeNames(frame, 2);
    return { join_ref: null, ref: null, topic, event, payload };
  }
  throw new TypeError(`binary frame of unknown kind ${kind}`);
}

function decodeNames(frame, count) {
  const lengths = new Uint8Array(frame).slice(1, 1 + count);
  let end = 1 + count;
  const names = Array.from(lengths, (length) => {
    const name = new Uint8Array(frame, end, length); // a RangeError, where the frame was cut short
    end += length;
    return new TextDecoder().decode(name);
  });
  return [names, frame.slice(end)];
}

/** `{a: {b: 1}}` becomes `a[b]=1`. */
function* flatten(params, prefix) {
  for (const [key, value] of Object.entries(params ?? {})) {
    const name = prefix ? `${prefix}[${key}]` : key;
    if (typeof value === "object") yield* flatten(value, name);
    else if (value !== undefined) yield [name, value];
  }
}

// Pushes.

export class PushError extends Error {
  name = "PushError";

  constructor(push, status, response) {
    const reason = response?.reason ?? status;
    super(`${push.event} on "${push.channel.topic}": ${isText(reason) ? reason : JSON.stringify(reason)}`);
    Object.assign(this, { status, response, reason });
  }
}

export class Push {
  ref = null;
  #hooks = [];
  #received = null;
  #timer;

  constructor(channel, event, payload, timeout) {
    Object.assign(this, { channel, event, payload, timeout });
  }

  receive(status, callback) {
    return this.#on((came, response) => came === status && callback(response));
  }

  // Made on demand: without an awaiting caller nothing may be an unhandled rejection.
  then(onOk, onFailure) {
    const reply = new Promise((resolve, reject) => {
      this.#on((status, response) =>
        status === "ok" ? resolve(response) : reject(new PushError(this, status, response)),
      );
    });
    return reply.then(onOk, onFailure);
  }

  catch(onFailure) {
    return this.then(undefined, onFailure);
  }

  finally(callback) {
    return this.then().finally(callback);
  }

  #on(hook) {
    if (this.#received) call(hook, ...this.#received);
    this.#hooks.push(hook); // kept: a join is answered again after each rejoin
    return this;
  }

  _wait() {
    this._cancel();
    this.#received = null;
    this.#timer = setTimeout(() => this._settle("timeout", {}), this.timeout);
  }

  _cancel() {
    clearTimeout(this.#timer);
    this.channel._forget(this);
  }

  /** Throws what cannot be encoded, or what a function of the page throws, and leaves nothing behind then. */
  _send() {
    const { channel, event } = this;
    const payload = valueOf(this.payload);
    this._cancel();
    this.ref = channel.socket.makeRef();
    channel.socket._send({ join_ref: channel.joinRef(), ref: this.ref, topic: channel.topic, event, payload });
    this._wait();
    channel._expect(this);
  }

  /** Send unattended: what cannot be sent is reported, and answered with "error". */
  _trySend() {
    try {
      this._send();
    } catch (error) {
      report(error);
      this._settle("error", { reason: String(error) });
    }
  }

  _settle(status, response) {
    this._cancel();
    this.#received = [status, response];
    for (const hook of [...this.#hooks]) call(hook, status, response);
    this.channel._catchUp();
  }
}

// Channels.

export class Channel {
  state = "closed"; // joining, joined, errored, leaving
  #join = null; // the join's Push, sent again on each rejoin
  #bindings = new Map(); // ref → [event, callback]
  #lastBinding = 0;
  #pending = new Map(); // ref → the Push that awaits its reply
  #buffer = new Set(); // pushes made while not joined
  #streams = new Set();
  #timer; // for the next rejoin
  #tries = 0;
  #history = null; // what each join adds to its params; null where events are not recovered
  #isRejoin = false; // whether the next join has something to recover
  #isPositioned = false; // whether the server sends positions
  #isBehind = false; // whether events were not taken, which the history has
  #held = null; // the message whose position may be the next one

  constructor(topic, params, socket) {
    Object.assign(this, { topic, params, socket });
  }

  join(timeout = this.socket.timeout) {
    if (this.#join) throw new Error(`"${this.topic}" was joined before: make a new channel`);
    const params = () => ({ ...valueOf(this.params), ...this.#history });
    this.#join = new Push(this, "phx_join", this.#history ? params : this.params, timeout)
      .receive("ok", (response) => this.#joined(response))
      .receive("error", () => this.#rejoinLater())
      .receive("timeout", () => this.#unanswered());
    this.#rejoin();
    return this.#join;
  }

  recover({ since = null, last } = {}) {
    this.#history = { since, last };
    this.#isRejoin = since !== null;
    return this;
  }

  leave(timeout = this.socket.timeout) {
    const isKnown = this.socket.isConnected() && (this.isJoined() || this.isJoining());
    this.#stopJoining();
    this.state = "leaving";
    const leave = new Push(this, "phx_leave", {}, timeout);
    for (const status of ["ok", "error", "timeout"]) leave.receive(status, () => this.#close({ reason: "leave" }));
    if (isKnown) leave._trySend();
    else leave._settle("ok", {});
    return leave;
  }

  push(event, payload = {}, timeout = this.socket.timeout) {
    if (!this.#join) throw new Error(`cannot push "${event}" to "${this.topic}" before join()`);
    const push = new Push(this, event, payload, timeout);
    if (this.canPush()) push._send();
    else {
      push._wait();
      this.#buffer.add(push);
    }
    return push;
  }

  on(event, callback) {
    this.#bindings.set(++this.#lastBinding, [event, callback]);
    return this.#lastBinding;
  }

  off(event, ref) {
    for (const [key, [name]] of this.#bindings) {
      if (name === event && (ref === undefined || ref === key)) this.#bindings.delete(key);
    }
  }

  onClose(callback) {
    return this.on("phx_close", callback);
  }

  onError(callback) {
    return this.on("phx_error", callback);
  }

  events({ limit = 1000 } = {}) {
    const stream = new EventStream(limit, (isOver) => {
      if (isOver) this.#streams.delete(stream);
      this._catchUp();
    });
    if (this.#join && this.state === "closed") stream.return();
    else this.#streams.add(stream);
    return stream;
  }

  [Symbol.asyncIterator]() {
    return this.events();
  }

  joinRef() {
    return this.#join?.ref ?? null;
  }

  canPush() {
    return this.socket.isConnected() && this.isJoined();
  }

  isClosed() {
    return this.state === "closed";
  }

  isErrored() {
    return this.state === "errored";
  }

  isJoined() {
    return this.state === "joined";
  }

  isJoining() {
    return this.state === "joining";
  }

  isLeaving() {
    return this.state === "leaving";
  }

  _opened() {
    if (this.state === "joining" || this.state === "errored") this.#rejoin();
  }

  _lost({ code, reason }) {
    if (this.state === "joining" || this.state === "joined" || this.state === "leaving") {
      this.#fail({ source: "transport", code, reason });
    }
    clearTimeout(this.#timer);
  }

  _expect(push) {
    this.#pending.set(push.ref, push);
  }

  _forget(push) {
    this.#pending.delete(push.ref);
    this.#buffer.delete(push);
  }

  _receive(message) {
    const { join_ref, ref, event, payload } = message;
    if (join_ref && join_ref !== this.joinRef()) return; // meant for an earlier join
    if (event === "phx_reply") this.#pending.get(ref)?._settle(payload?.status, payload?.response);
    else if (event === "phx_close") this.#close(payload);
    else if (event === "phx_error") this.#fail(payload);
    else if (!this.#history) this.#give(message);
    else if (event.startsWith("presence_")) this.#trigger(event, payload); // not held
    else if (this.isJoined()) this.#locate(message);
  }

  #give({ event, payload, ref, join_ref, position }) {
    this.#trigger(event, payload, ref, join_ref, position);
    for (const stream of this.#streams) stream._add({ event, payload, position }, this.#history);
  }

  // Recovery: each join asks for what follows on the last event that the page was given.

  #locate(message) {
    const { event, payload } = message;
    if (!this.#isPositioned) return this.#give(message); // a `_position` is the page's own
    if (event === "relay:position") return this.#release(payload?._position);
    this.#release();
    if (Object.prototype.toString.call(payload) === "[object Object]") {
      const { _position, ...published } = payload;
      return this.#take({ ...message, payload: published }, _position);
    }
    this.#held = message;
    setTimeout(() => this.#held === message && this.isJoined() && this.#release(), POSITION_MS);
  }

  #release(position) {
    const held = this.#held;
    this.#held = null;
    if (held) this.#take(held, position);
    else if (!this.#isBehind) this.#keep(position); // it came late, if at all
  }

  #take(message, position) {
    const streams = [...this.#streams];
    if (!this.#isBehind && !streams.some((stream) => stream._isFull)) {
      this.#give({ ...message, position: position ?? undefined });
      this.#keep(position);
    } else if (isText(position)) this.#isBehind = true;
    else for (const stream of streams) stream.lost++; // it is in no history
  }

  #keep(position) {
    if (isText(position)) this.#history.since = position;
  }

  /** Rejoin once the page has taken what waited; not before the replies to pushes, which would be lost. */
  _catchUp() {
    const isReady = this.#isBehind && this.isJoined() && !this.#pending.size;
    if (isReady && [...this.#streams].every((stream) => stream._isIdle)) this.#rejoin();
  }

  #resume({ _position, recovered, reason = "nothing to recover from" }) {
    this.#held = null; // if it has a position, it comes again
    this.#isBehind = false;
    this.#isPositioned = _position !== undefined;
    this.#keep(_position);
    const [event, payload] = this.#isPositioned && recovered ? ["relay:recovered", {}] : ["relay:lost", { reason }];
    if (this.#isRejoin) this.#give({ event, payload });
    this.#isRejoin = true;
  }

  #trigger(event, ...args) {
    for (const [name, callback] of [...this.#bindings.values()]) if (name === event) call(callback, ...args);
  }

  #rejoin() {
    clearTimeout(this.#timer);
    this.socket._leaveOthers(this);
    this.state = "joining";
    if (this.socket.isConnected()) this.#join._trySend();
    else this.#join._wait(); // `_opened` sends it
  }

  #rejoinLater() {
    this.state = "errored";
    if (!this.socket.isConnected()) return; // `_opened` rejoins
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#rejoin(), delay("rejoinAfterMs", this.socket, ++this.#tries));
  }

  #joined(response) {
    this.state = "joined";
    this.#tries = 0;
    if (this.#history) this.#resume(response ?? {});
    for (const push of [...this.#buffer]) push._trySend();
  }

  #unanswered() {
    // The server may have joined us all the same: undo that, or the next join is a duplicate.
    if (this.socket.isConnected()) new Push(this, "phx_leave", {}, this.socket.timeout)._trySend();
    this.#rejoinLater();
  }

  #fail(payload) {
    if (this.state === "closed") return;
    if (this.state === "leaving") return this.#close(payload);
    this.#join._cancel();
    this.#rejoinLater();
    this.#trigger("phx_error", payload);
  }

  #close(payload) {
    if (this.state === "closed") return;
    this.#release();
    this.#stopJoining();
    this.state = "closed";
    this.socket.remove(this);
    for (const stream of [...this.#streams]) stream.return();
    this.#trigger("phx_close", payload);
  }

  #stopJoining() {
    clearTimeout(this.#timer);
    this.#join?._cancel();
  }
}

/** A bounded queue for `for await`. */
class EventStream {
  lost = 0;
  #queue = [];
  #wakes = []; // one for each next() that waits
  #isOver = false;
  #limit;
  #onIdle; // called when it is empty, and when it is over

  constructor(limit, onIdle) {
    this.#limit = limit;
    this.#onIdle = onIdle;
  }

  get _isFull() {
    return this.#queue.length >= this.#limit;
  }

  get _isIdle() {
    return !this.#queue.length;
  }

  _add(event, isKept) {
    this.#queue.push(event);
    if (!isKept && this.#queue.length > this.#limit) {
      this.#queue.shift();
      this.lost++;
    }
    this.#wake();
  }

  async next() {
    while (this._isIdle && !this.#isOver) {
      this.#onIdle(false);
      await new Promise((wake) => this.#wakes.push(wake));
    }
    const done = this._isIdle;
    return { value: done ? undefined : { ...this.#queue.shift(), lost: this.lost }, done };
  }

  async return() {
    this.#isOver = true;
    this.#onIdle(true);
    this.#wake();
    return { value: undefined, done: true };
  }

  #wake() {
    for (const wake of this.#wakes.splice(0)) wake();
  }

  [Symbol.asyncIterator]() {
    return this;
  }
}

// The socket.

export class Socket {
  channels = [];
  #transport = null; // the WebSocket in use
  #isWanted = false; // between connect() and disconnect()
  #tries = 0;
  #ref = 0;
  #retryTimer;
  #aliveTimer; // at most one of: time to open, until the next heartbeat, for its answer
  #heartbeatRef = null;
  #callbacks = new Map(); // ref → [kind, callback]
  #page = null; // the AbortController of `#watchPage`

  constructor(endPoint, options) {
    Object.assign(this, DEFAULTS, { transport: globalThis.WebSocket, endPoint });
    for (const name in options) this[name] = options[name] ?? this[name];
  }

  connect() {
    this.#isWanted = true;
    this.#watchPage();
    if (!this.#transport) this.#dial();
  }

  disconnect(callback, code = NORMAL, reason = "") {
    this.#giveUp();
    this.#letGo({ code, reason, wasClean: true }, code);
    if (callback) call(callback);
  }

  isConnected() {
    return this.connectionState() === "open";
  }

  connectionState() {
    return ["connecting", "open", "closing", "closed"][this.#transport?.readyState ?? 3];
  }

  endPointURL() {
    const url = new URL(this.endPoint, globalThis.location?.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.pathname = `${url.pathname.replace(/\/$/, "")}/websocket`;
    for (const [name, value] of flatten(valueOf(this.params))) url.searchParams.append(name, value);
    url.searchParams.append("vsn", VSN);
    return url.href;
  }

  channel(topic, params = {}) {
    const channel = new Channel(topic, params, this);
    this.channels.push(channel);
    return channel;
  }

  remove(channel) {
    this.channels = this.channels.filter((other) => other !== channel);
  }

  onOpen(callback) {
    return this.#on("open", callback);
  }

  onClose(callback) {
    return this.#on("close", callback);
  }

  onError(callback) {
    return this.#on("error", callback);
  }

  onMessage(callback) {
    return this.#on("message", callback);
  }

  off(refs) {
    for (const ref of refs) this.#callbacks.delete(ref);
  }

  makeRef() {
    return String(++this.#ref);
  }

  _send(message) {
    this.#transport.send(encode(message));
  }

  /** A topic is joined once per socket, so the channel that joins now takes it over. */
  _leaveOthers(channel) {
    const others = this.channels.filter((other) => other !== channel && other.topic === channel.topic);
    for (const other of others) if (other.isJoined() || other.isJoining()) other.leave();
  }

  #on(kind, callback) {
    const ref = this.makeRef();
    this.#callbacks.set(ref, [kind, callback]);
    return ref;
  }

  #tell(kind, ...args) {
    for (const [name, callback] of [...this.#callbacks.values()]) if (name === kind) call(callback, ...args);
  }

  #dial() {
    clearTimeout(this.#retryTimer);
    const transport = new this.transport(this.endPointURL(), this.#protocols());
    transport.binaryType = "arraybuffer";
    transport.onopen = () => this.#opened();
    transport.onmessage = ({ data }) => this.#received(data);
    transport.onerror = (error) => this.#tell("error", error);
    transport.onclose = (event) => this.#closed(event);
    this.#transport = transport;
    this.#aliveTimer = setTimeout(() => this.#drop("connect timeout"), this.timeout);
  }

  /** A browser cannot set headers on a WebSocket: the token travels beside the subprotocol. */
  #protocols() {
    const token = valueOf(this.authToken);
    if (!token) return [];
    // A subprotocol must not contain a slash: base64, but for this letter of base64url.
    return ["phoenix", TOKEN_PREFIX + btoa(token).replace(/=/g, "").replace(/\//g, "_")];
  }

  #opened() {
    this.#beatLater();
    for (const channel of [...this.channels]) channel._opened();
    this.#tell("open");
  }

  #received(frame) {
    let message;
    try {
      message = decode(frame);
    } catch (error) {
      return this.#tell("error", error);
    }
    this.#tries = 0; // not before: a server may accept and close at once, again and again
    this.#tell("message", message);
    if (message.topic === "phoenix" && message.ref === this.#heartbeatRef) this.#beatLater();
    for (const channel of [...this.channels]) if (channel.topic === message.topic) channel._receive(message);
  }

  #closed(event) {
    this.#transport = null;
    clearTimeout(this.#aliveTimer);
    if (event.code === NORMAL) this.#giveUp();
    if (this.#isWanted) this.#dialLater();
    for (const channel of [...this.channels]) channel._lost(event);
    this.#tell("close", event);
  }

  #giveUp() {
    this.#isWanted = false;
    clearTimeout(this.#retryTimer);
    this.#page?.abort();
    this.#page = null;
  }

  /** Close without waiting for the peer, which may be out of reach. */
  #letGo(event, code) {
    const transport = this.#transport;
    if (!transport) return;
    transport.close(code, event.reason);
    transport.onopen = transport.onmessage = transport.onerror = transport.onclose = () => {};
    this.#closed(event);
  }

  #drop(reason) {
    this.#letGo({ code: ABNORMAL, reason, wasClean: false }, NORMAL);
  }

  #dialLater() {
    if (globalThis.document?.hidden) return; // `#watchPage` dials when the page becomes visible
    this.#retryTimer = setTimeout(() => this.#redial(), delay("reconnectAfterMs", this, ++this.#tries));
  }

  /** Dial unattended: what throws (a params function, say) is reported, and tried again. */
  #redial() {
    try {
      this.#dial();
    } catch (error) {
      this.#tell("error", error);
      this.#dialLater();
    }
  }

  #beatLater() {
    clearTimeout(this.#aliveTimer);
    this.#heartbeatRef = null;
    this.#aliveTimer = setTimeout(() => this.#beat(), this.heartbeatIntervalMs);
  }

  #beat() {
    if (!this.isConnected()) return;
    clearTimeout(this.#aliveTimer);
    this.#heartbeatRef = this.makeRef();
    this._send({ join_ref: null, ref: this.#heartbeatRef, topic: "phoenix", event: "heartbeat", payload: {} });
    const patience = Math.min(this.timeout, this.heartbeatIntervalMs);
    this.#aliveTimer = setTimeout(() => this.#drop("heartbeat timeout"), patience);
  }

  /**
   * Follow the page and the network: a hidden page does not reconnect, a page that is back does so at once.
   * Being offline stops no retry: the relay may be on this machine.
   */
  #watchPage() {
    if (this.#page) return;
    this.#page = new AbortController();
    const { signal } = this.#page;
    const revive = () => (this.#transport ? this.#beat() : this.#redial());
    const turn = () => (document.hidden ? clearTimeout(this.#retryTimer) : revive());
    globalThis.document?.addEventListener("visibilitychange", turn, { signal });
    globalThis.addEventListener?.("online", revive, { signal });
    globalThis.addEventListener?.("offline", () => this.#beat(), { signal });
  }
}
