/** Sent as JSON, or as a binary frame where it is bytes; bytes arrive as an ArrayBuffer. */
export type Payload = unknown;

export type Params = Record<string, unknown>;

/** The five fields of one frame. */
export interface Message {
  join_ref: string | null;
  ref: string | null;
  topic: string;
  event: string;
  payload: Payload;
}

/** How a connection ended; a `CloseEvent`, or the same fields if the client itself dropped the connection. */
export interface Closing {
  code: number;
  reason: string;
  wasClean: boolean;
}

export interface SocketOptions {
  /** Query parameters of the connection; a function is called for each connection. */
  params?: Params | (() => Params);
  /** Secret sent beside the subprotocol, so that it stays out of the URL; a function is called for each connection. */
  authToken?: string | (() => string | undefined);
  /** Milliseconds to wait for a connection or a reply. Default 10 000. */
  timeout?: number;
  /** Milliseconds between heartbeats. Default 30 000. */
  heartbeatIntervalMs?: number;
  /** Milliseconds until the n-th reconnect (n from 1). Default: random, within a window growing from 1 s to 10 s. */
  reconnectAfterMs?: (tries: number) => number;
  /** Milliseconds until the n-th rejoin (n from 1). Default: random, within 1, 2, 5, then 10 s. */
  rejoinAfterMs?: (tries: number) => number;
  /** A WebSocket class, where there is no global one. */
  transport?: new (url: string, protocols?: string[]) => unknown;
  /** Options of `phoenix` for what is not here: a log, long-polling. Accepted, without effect. */
  logger?: unknown;
  debug?: unknown;
  longPollFallbackMs?: unknown;
  longpollerTimeout?: unknown;
  sessionStorage?: unknown;
}

/** One connection, kept until `disconnect()`, or until the server closes it with code 1000. */
export class Socket {
  /** @param endPoint without `/websocket`; absolute, or relative to the page. */
  constructor(endPoint: string, options?: SocketOptions);
  readonly channels: Channel[];
  connect(): void;
  /** Close and stay closed; channels rejoin after a later `connect()`. Browsers allow codes 1000 and 3000 to 4999. */
  disconnect(callback?: () => void, code?: number, reason?: string): void;
  isConnected(): boolean;
  connectionState(): "connecting" | "open" | "closing" | "closed";
  endPointURL(): string;
  /** Prepare a channel; a function for `params` is called for each join and rejoin. */
  channel(topic: string, params?: Params | (() => Params)): Channel;
  remove(channel: Channel): void;
  onOpen(callback: () => void): string;
  onClose(callback: (closing: Closing) => void): string;
  onError(callback: (error: unknown) => void): string;
  onMessage(callback: (message: Message) => void): string;
  /** Remove the callbacks of these refs. */
  off(refs: string[]): void;
  makeRef(): string;
}

export type ChannelState = "closed" | "joining" | "joined" | "errored" | "leaving";

/** One topic, joined over one socket. Iterating over it is iterating over `events()`. */
export class Channel implements AsyncIterable<ChannelEvent> {
  private constructor();
  readonly topic: string;
  readonly socket: Socket;
  readonly state: ChannelState;
  /** Join, and rejoin after every failure until `leave()`. Once per channel. */
  join(timeout?: number): Push;
  /**
   * Before `join()`: deliver, after each rejoin, what was missed from the topic's history, each event once and in order.
   * First comes an event `relay:recovered`: nothing is missing, and what was missed follows; or `relay:lost` with
   * `{reason}`: events are missing. The payload of events is the one that was published.
   *
   * @param options.since position of the last event that an earlier page was given; the first join recovers from there.
   * @param options.last how many of the newest events come first, where there is no position yet.
   */
  recover(options?: { since?: string | null; last?: number }): this;
  /** Stop; the channel cannot be joined again. */
  leave(timeout?: number): Push;
  /** Send an event; while the channel is not joined the push waits for it, until its timeout. */
  push(event: string, payload?: Payload, timeout?: number): Push;
  /**
   * Call back with each payload of this event; returns a ref for `off`. The position is that of an event in the topic's
   * history, if the channel recovers events.
   */
  on(
    event: string,
    callback: (payload: any, ref: string | null, joinRef: string | null, position?: string) => void,
  ): number;
  /** Remove the callback of this ref, or all of the event's. */
  off(event: string, ref?: number): void;
  /** The channel is gone for good: left, or closed by the server. */
  onClose(callback: (payload: any) => void): number;
  /** The channel broke and will be joined again; `{source: "transport"}` where the connection was lost. */
  onError(callback: (payload: any) => void): number;
  /**
   * All events from now on; of those not yet taken the newest `limit` (default 1000) are kept. If the channel recovers
   * events, a full queue drops none: the channel takes no more until it is empty, and then has the history deliver them.
   * So end an iteration that is not read any more, by `return()`.
   */
  events(options?: { limit?: number }): EventStream;
  joinRef(): string | null;
  /** Whether a push would be sent at once. */
  canPush(): boolean;
  isClosed(): boolean;
  isErrored(): boolean;
  isJoined(): boolean;
  isJoining(): boolean;
  isLeaving(): boolean;
  [Symbol.asyncIterator](): EventStream;
}

export interface ChannelEvent {
  event: string;
  payload: any;
  /** Its place in the topic's history, if the channel recovers events and the event is in the history. */
  position?: string;
  /** How many events this iteration has lost so far because they were not taken in time. */
  lost: number;
}

/** Ends when the channel closes; goes on across reconnects and rejoins. */
export interface EventStream extends AsyncIterableIterator<ChannelEvent> {
  readonly lost: number;
}

/** One message to the server and its reply. Awaited, it gives the response of `ok`, or throws a `PushError`. */
export class Push implements PromiseLike<any> {
  private constructor();
  readonly channel: Channel;
  readonly event: string;
  readonly ref: string | null;
  /** Call back with the response when the reply has this status (`ok`, `error`, `timeout`, or the server's own). */
  receive(status: string, callback: (response: any) => void): this;
  then<T = any, F = never>(
    onOk?: ((response: any) => T | PromiseLike<T>) | null,
    onFailure?: ((error: PushError) => F | PromiseLike<F>) | null,
  ): Promise<T | F>;
  catch<F = never>(onFailure?: ((error: PushError) => F | PromiseLike<F>) | null): Promise<any | F>;
  finally(callback?: (() => void) | null): Promise<any>;
}

export class PushError extends Error {
  private constructor();
  /** `error`, `timeout`, or a status of the server's own. */
  readonly status: string;
  readonly response: any;
  /** The response's `reason`, or the status where it gives none. */
  readonly reason: any;
}

/** To a text frame, or to a binary push where the payload is bytes. */
export function encode(message: Message): string | ArrayBuffer;

/** From a text frame, or from a binary push, reply or broadcast. Throws if the frame is not valid. */
export function decode(frame: string | ArrayBuffer): Message;
