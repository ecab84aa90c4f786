/** One entry of a member: what is said of it, and references of the protocol. */
export interface Meta {
  phx_ref: string;
  phx_ref_prev?: string;
  /** The user, as authenticated by the server; missing for clients without a token. */
  user?: string;
  /** What the client says of itself, in the params of its join under `presence`; or what a plugin lists. */
  meta?: any;
  [name: string]: any;
}

/** All that is listed under one key: an entry for each socket, or as plugins list them. */
export interface Entries {
  metas: Meta[];
}

/** A channel of this client, or of the package `phoenix`. */
export interface PresenceChannel {
  on(event: string, callback: (payload: any) => void): unknown;
  /** The published types of `phoenix` do not know it. */
  joinRef?(): unknown;
}

/** The members of a topic with presence. Make it before `channel.join()`. */
export class Presence {
  /** @param options.events names of the events, where the server has others. */
  constructor(channel: PresenceChannel, options?: { events?: { state?: string; diff?: string; count?: string } });
  readonly channel: PresenceChannel;
  /** The members by key; a copy. Empty while only their number is sent. */
  readonly state: Record<string, Entries>;
  /** How many entries there are, also while only their number is sent. */
  readonly count: number;
  /** Called for each key with new entries: `current` is what was listed before, undefined for a new key. */
  onJoin(callback: (key: string, current: Entries | undefined, joined: Entries) => void): void;
  /** Called for each key that has lost entries: `current.metas` is what is left, empty if the key is gone. */
  onLeave(callback: (key: string, current: Entries, left: Entries) => void): void;
  /** Called after each change of the list, or of the number. */
  onSync(callback: () => void): void;
  /** The members in the order in which they came, each as `by` makes it. */
  list(): Entries[];
  list<T>(by: (key: string, entries: Entries) => T): T[];
  /** Whether the members have not come yet, since the last join. */
  inPendingSyncState(): boolean;
}
