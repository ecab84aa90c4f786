/**
 * Who is on a topic with presence.
 *
 * It has the interface of `Presence` in the npm package `phoenix`, and works on a channel of either client.
 * Documented in `presence.d.ts`.
 */

const EVENTS = { state: "presence_state", diff: "presence_diff", count: "presence_count" };

/** Call what belongs to the page; what it throws is reported, and the list stays right. */
function call(callback, ...args) {
  try {
    return callback(...args);
  } catch (error) {
    (globalThis.reportError ?? console.error)(error);
  }
}

/** What is listed under a key without the entries that `other` has. */
function except(presence, other) {
  const refs = new Set(other?.metas?.map(({ phx_ref }) => phx_ref));
  return { ...presence, metas: presence.metas.filter(({ phx_ref }) => !refs.has(phx_ref)) };
}

export class Presence {
  #members = new Map(); // key → {metas}; a Map, since a key may have any name
  #pending = []; // differences that came before the state, each with the ref of its join
  #joinRef = null; // of the join that the state came for
  #counted = null; // the number, where only that is sent
  #callbacks = {};

  constructor(channel, { events } = {}) {
    this.channel = channel;
    const { state, diff, count } = { ...EVENTS, ...events };
    channel.on(state, (payload) => this.#begin(payload));
    channel.on(diff, (payload) => this.#receiveDiff(payload));
    channel.on(count, (payload) => this.#showCount(payload.count));
  }

  get state() {
    return Object.fromEntries(this.#members);
  }

  get count() {
    return this.#counted ?? [...this.#members.values()].reduce((sum, { metas }) => sum + metas.length, 0);
  }

  onJoin(callback) {
    this.#callbacks.join = callback;
  }

  onLeave(callback) {
    this.#callbacks.leave = callback;
  }

  onSync(callback) {
    this.#callbacks.sync = callback;
  }

  list(by = (key, presence) => presence) {
    return [...this.#members].map(([key, presence]) => by(key, presence));
  }

  inPendingSyncState() {
    return this.#joinRef === null || this.#joinRef !== this.channel.joinRef();
  }

  #begin(state) {
    const joins = Object.entries(state).map(([key, presence]) => [key, except(presence, this.#members.get(key))]);
    const leaves = [...this.#members].map(([key, presence]) => [key, except(presence, state[key])]);
    this.#joinRef = this.channel.joinRef();
    this.#counted = null;
    this.#apply(joins, leaves);
    for (const [ref, diff] of this.#pending.splice(0)) if (ref === this.#joinRef) this.#takeDiff(diff);
    this.#tell("sync");
  }

  #receiveDiff(diff) {
    if (this.inPendingSyncState()) return void this.#pending.push([this.channel.joinRef(), diff]);
    this.#takeDiff(diff);
    this.#tell("sync");
  }

  #takeDiff({ joins, leaves }) {
    this.#apply(Object.entries(joins), Object.entries(leaves));
  }

  #apply(joins, leaves) {
    for (const [key, joined] of joins) if (joined.metas.length) this.#join(key, joined);
    for (const [key, left] of leaves) if (left.metas.length) this.#leave(key, left);
  }

  #join(key, joined) {
    const current = this.#members.get(key);
    const others = current ? except(current, joined).metas : [];
    this.#members.set(key, { ...joined, metas: [...others, ...joined.metas] });
    this.#tell("join", key, current, joined);
  }

  #leave(key, left) {
    const before = this.#members.get(key);
    if (!before) return;
    const current = except(before, left);
    if (current.metas.length) this.#members.set(key, current);
    else this.#members.delete(key);
    this.#tell("leave", key, current, left);
  }

  /** There are too many to be listed. They are still there: `onLeave` is not called. */
  #showCount(count) {
    this.#members.clear();
    this.#counted = count;
    this.#tell("sync");
  }

  #tell(kind, ...args) {
    if (this.#callbacks[kind]) call(this.#callbacks[kind], ...args);
  }
}
