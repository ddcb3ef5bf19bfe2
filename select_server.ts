/**
 * One process, no threads, two listening ports, and one loop that serves every
 * client: the select-based echo server of *Programming Python* (4th edition,
 * Example 12-9), for Deno 2.6 or later.
 *
 * The loop asks `select` which operations have completed: accepts, reads,
 * replies and writes. It decides which come next, and `select` starts them. It
 * awaits `select` alone, and never one operation. So a client that does not
 * read, or a reply that takes its time in a promise, delays only itself. A
 * reply that computes for a second delays every client for a second, as in any
 * single thread: keep it short, or use a Worker.
 *
 * Three words for time. A *turn* is one pass of the runtime's own event loop. A
 * *round* starts the reads and writes that wait for it, at most one of each per
 * client. A *tick* comes 100 ms after the one before, or a little later if the
 * server is busy, while there is something to time. Time is counted in ticks.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { setImmediate } from "node:timers";
import { setTimeout as delay } from "node:timers/promises";

// ---- What can complete, and what a client is

type Completion =
  | { type: "accepted"; listener: Deno.Listener; conn: Connection }
  | { type: "accept failed"; listener: Deno.Listener; error: unknown }
  | { type: "received"; client: Client; count: number | null }
  | { type: "replied"; client: Client; bytes: Uint8Array | null }
  | { type: "owed"; client: Client }
  | { type: "written"; client: Client; count: number }
  | { type: "failed"; client: Client; why: string; level: Level }
  | { type: "tick" | "abort" };

type Level = "error" | "info" | "debug";
type Connection = Deno.Conn | Deno.TcpConn; // a TCP connection has options

/**
 * What a {@linkcode Handler} replies: bytes, or a string, which is sent as
 * UTF-8. An empty reply, or none, sends nothing. Null says goodbye: what the
 * client is owed goes out, then its stream ends.
 */
export type Reply = Uint8Array | string | null | void;

/**
 * Replies to what one read has brought, at once or in a promise. For the same
 * client it is called again when the system has taken its reply, so replies
 * stay in order. Until then the server uses `bytes` and the reply: do not
 * change, reuse or transfer what you have returned. Afterwards the next message
 * overwrites `bytes`: copy what you keep of it. A message may be a part of a
 * line, or many lines.
 */
export type Handler = (bytes: Uint8Array) => Reply | PromiseLike<Reply>;

/**
 * A client, as its protocol sees it.
 * @example A chat: each client hears what the others say, and who leaves.
 * ```ts
 * import { listen, type Peer, serve } from "./select_server.ts";
 * const peers = new Set<Peer>();
 * await serve(listen({ port: 0 }), {
 *   protocol(peer) {
 *     const tell = (data: Uint8Array | string) => {
 *       for (const other of peers) if (other !== peer) other.send(data);
 *     };
 *     peers.add(peer);
 *     peer.send(`Hello! ${peers.size} are here.\n`);
 *     peer.closed.then(() => {
 *       peers.delete(peer);
 *       tell("One has left.\n");
 *     });
 *     return tell;
 *   },
 *   signal: AbortSignal.timeout(100),
 * });
 * ```
 */
export interface Peer {
  /** The address of the client. */
  readonly remoteAddr: Deno.Addr;
  /** The address that it has connected to. */
  readonly localAddr: Deno.Addr;
  /** How many bytes it is owed: the system has not taken them yet. */
  readonly bufferedAmount: number;
  /** Resolves when it has left, for whatever reason. It never rejects. */
  readonly closed: Promise<void>;
  /**
   * Sends bytes, or a string as UTF-8, after all that the client is owed
   * already. Bytes are copied. If more wait then than the `sendLimit` of the
   * server, the client is closed. After a goodbye, `send` does nothing.
   *
   * @throws {TypeError} If `data` is neither bytes nor a string.
   */
  send(data: Uint8Array | string): void;
  /** Says goodbye: what the client is owed goes out, then its stream ends. */
  close(): void;
}

// A pending read keeps its buffer, so a client has a small one at first. A read
// that fills it makes the next one large. A read that would have fitted into a
// small one makes the next one small.
const SMALL_BUFFER = 4 * 1024;
const LARGE_BUFFER = 32 * 1024;

const EMPTY = new Uint8Array(0);
const encoder = new TextEncoder();

class Client implements Peer {
  reading = false; // a read is pending, or waits for the next round
  replying = false; // its handler has been called, its reply is not ready
  writing = false; // a write is pending, or waits for the next round
  leaving = false; // goodbye, by it or us: no more messages, no more sends
  theyEnded = false; // it has ended its stream: there is nothing more to read
  weEnded = false; // we have ended ours
  ticks = 0; // since it last made progress
  ticksLeaving = 0; // since the stop, or since we ended our stream
  buffer = new Uint8Array(SMALL_BUFFER);
  bufferSize = SMALL_BUFFER; // from the next read on
  unsent: Uint8Array = EMPTY; // what the pending write writes, or its rest
  waiting: Uint8Array[] = []; // what comes after it
  pieces = 0; // how many have waited so far
  bufferedAmount = 0; // how many bytes are in both: it is owed so many
  replyLength = 0; // how many of those `sendLimit` does not count: a reply
  handle: Handler = echo; // until its protocol has returned another one
  readonly end = Promise.withResolvers<void>();
  readonly closed = this.end.promise;

  constructor(
    readonly name: string,
    readonly conn: Connection,
    readonly sendLimit: number,
    readonly push: (completion: Completion) => void,
    readonly remoteAddr = conn.remoteAddr,
    readonly localAddr = conn.localAddr,
  ) {}

  // Its operations. There is one set of these functions per client, not per
  // call, as they are passed on. Arrow functions keep `this`.
  startRead = () => {
    if (this.buffer.length !== this.bufferSize) {
      this.buffer = new Uint8Array(this.bufferSize);
    }
    this.conn.read(this.buffer).then(this.onReceived, this.onFailed);
  };
  startWrite = () => {
    // When the last write is out, the next takes all that waits. If each line
    // were a write of its own, a client that is sent many lines would fall
    // behind, however fast it reads.
    if (this.unsent.length === 0) {
      this.unsent = Buffer.concat(this.waiting.splice(0));
    }
    this.conn.write(this.unsent).then(this.onWritten, this.onFailed);
  };
  onReceived = (count: number | null) =>
    this.push({ type: "received", client: this, count });
  onReplied = (reply: Reply) =>
    this.push({ type: "replied", client: this, bytes: bytesOfReply(reply) });
  onWritten = (count: number) =>
    this.push({ type: "written", client: this, count });
  // A reply that fails is our own mistake: say where it was made.
  onReplyFailed = (error: unknown) => this.fail(describe(error, true), "error");
  onFailed = (error: unknown) => this.fail(describe(error), "info");
  fail(why: string, level: Level): void {
    this.push({ type: "failed", client: this, why, level });
  }

  // What its protocol may do with it. The loop goes on from there.
  send(data: Uint8Array | string): void {
    const bytes = bytesOf(data);
    if (this.leaving) return;
    // If bytes wait already, the loop knows.
    if (this.bufferedAmount === 0) this.push({ type: "owed", client: this });
    this.owe(bytes === data ? new Uint8Array(bytes) : bytes); // a copy
    const sent = this.bufferedAmount - this.replyLength;
    if (sent <= this.sendLimit) return;
    this.leaving = true;
    this.onFailed(new RangeError(`${sent} bytes wait, too many to send`));
  }
  close(): void {
    if (this.leaving) return; // once: to say it again gives no more time
    this.leaving = true;
    this.ticks = 0;
    this.push({ type: "owed", client: this });
  }

  /** Adds a piece to what waits: a copy, which nobody else can change. */
  owe(bytes: Uint8Array): void {
    this.bufferedAmount += bytes.length;
    this.waiting.push(bytes);
    this.pieces++;
    // A short piece costs more memory than its bytes: join each thousand.
    if (this.pieces % 1000 === 0) {
      this.waiting.push(Buffer.concat(this.waiting.splice(-1000)));
    }
  }
}

/** What {@linkcode serve} has done. A message is what one read has brought. */
export type Totals = { clients: number; messages: number; bytes: number };

/** How to {@linkcode serve}. Times are in milliseconds. */
export interface ServeOptions {
  /**
   * Is called when a client connects, and returns the function that replies to
   * it. So its local variables belong to that client. By default every client
   * gets {@linkcode echo}.
   */
  protocol?: (peer: Peer) => Handler;
  /**
   * Closes a client that makes no progress for so long. Progress is a message
   * that comes, a reply that is ready, or room in the system's buffer, which is
   * there when the client has read enough. A goodbye starts the time anew, but
   * only once. A client whose reply takes longer is closed, too. By default
   * there is no such limit.
   */
  idleTimeout?: number;
  /**
   * Closes a client when more than so many bytes wait that were sent to it. A
   * reply does not count, as there is only one at a time. Behind a reply, the
   * limit is up to its length higher until all is out. By default 1 MiB.
   */
  sendLimit?: number;
  /** Stops the server when it aborts. */
  signal?: AbortSignal;
  /**
   * How long a goodbye may take. A stop closes every client that is still there
   * after this time. After any other goodbye, a client is closed when it makes
   * no progress for this time, or is still there so long after the end of our
   * stream to it; but not before 500 ms. After that end, a client that is
   * silent for 500 ms is closed in any case. By default 5,000.
   */
  grace?: number;
  /**
   * Where to log. A level without a method is not logged. `debug` is a line for
   * each message. By default errors go to the console.
   */
  logger?: Partial<Pick<Console, "error" | "info" | "debug">>;
}

const TICK = 100; // ms
const LINGER = 500; // ms of silence, after we have ended our stream to a client

// ---- The server

/**
 * Serves every client of every listener in one loop. Resolves when all the
 * listeners are closed and all the clients have left. An abort of the signal
 * closes the listeners, and says goodbye to the clients. Trouble with one
 * client closes that client and no other.
 *
 * @throws {RangeError} If `idleTimeout` is not above 0, or `grace` or
 * `sendLimit` is not 0 or more.
 * @example A greeting, an answer, and a last word.
 * ```ts
 * import { listen, serve } from "./select_server.ts";
 * const totals = await serve(listen({ port: 0 }), {
 *   protocol(peer) {
 *     peer.send("Say something!\n");
 *     return (bytes) => {
 *       peer.send(`You said ${bytes.length} bytes. Goodbye!\n`);
 *       return null;
 *     };
 *   },
 *   signal: AbortSignal.timeout(100),
 * });
 * console.log(totals); // nobody came: { clients: 0, messages: 0, bytes: 0 }
 * ```
 */
export async function serve(
  listeners: Deno.Listener[],
  options: ServeOptions = {},
): Promise<Totals> {
  const { protocol = () => echo, idleTimeout = Infinity, signal } = options;
  const { sendLimit = 2 ** 20, grace = 5000 } = options;
  const logger: NonNullable<ServeOptions["logger"]> = options.logger ??
    { error: console.error };
  check("idleTimeout", idleTimeout, idleTimeout > 0, "milliseconds above 0");
  check("grace", grace, grace >= 0, "milliseconds from 0 up");
  check("sendLimit", sendLimit, sendLimit >= 0, "bytes from 0 up");
  const selector = new Selector<Completion>();
  const push = (completion: Completion) => selector.push(completion);
  const listening = new Set(listeners);
  const clients = new Set<Client>();
  const totals: Totals = { clients: 0, messages: 0, bytes: 0 };
  let nextTick: ReturnType<typeof setTimeout> | undefined;
  // While descriptors are short: this timer logs that they are back.
  let shortage: ReturnType<typeof setTimeout> | undefined;
  const onAbort = () => push({ type: "abort" });
  signal?.addEventListener("abort", onAbort);
  if (signal?.aborted) onAbort();
  for (const listener of listening) {
    log("info", `listening on ${formatAddress(listener.addr)}`);
    startAccept(listener);
  }

  while (listening.size > 0 || clients.size > 0) {
    for (const completion of await selector.select()) {
      // The client may have left already.
      if ("client" in completion && !clients.has(completion.client)) continue;
      switch (completion.type) {
        case "accepted": // a client has connected: wait for the next one, too
          startAccept(completion.listener);
          welcome(completion.conn);
          break;
        case "received": // null is the end of its stream
          receive(completion.client, completion.count);
          break;
        case "replied": // a reply that has taken its time in a promise
          takeReply(completion.client, completion.bytes);
          break;
        case "owed": // something was sent to it, or goodbye was said to it
          goOn(completion.client);
          break;
        case "written": // perhaps a part only: the rest goes out next
          takeWritten(completion.client, completion.count);
          break;
        case "failed": // reset, broken pipe, handler: it ends this client
          disconnect(completion.client, completion.why, completion.level);
          break;
        case "accept failed": // client gone, port closed, or no descriptors
          acceptFailed(completion.listener, completion.error);
          break;
        case "tick": // some time has passed: which clients are overdue?
          tick();
          break;
        case "abort": // no more clients, no more messages: say goodbye to all
          stop();
          break;
        default: // the compiler checks that no case is missing
          completion satisfies never;
      }
    }
  }
  clearTimeout(nextTick);
  clearTimeout(shortage);
  signal?.removeEventListener("abort", onAbort);
  const { clients: served, messages, bytes } = totals;
  log("info", `served ${served} clients, ${messages} messages, ${bytes} bytes`);
  return totals;

  // Only the steps of the loop follow. A function may be called above its
  // declaration, so the loop could come first.

  function startAccept(listener: Deno.Listener): void {
    listener.accept().then(
      (conn) => push({ type: "accepted", listener, conn }),
      (error) => push({ type: "accept failed", listener, error }),
    );
  }

  function welcome(conn: Connection): void {
    const id = ++totals.clients;
    const name = `client ${id} (${formatAddress(conn.remoteAddr)})`;
    const client = new Client(name, conn, sendLimit, push);
    clients.add(client);
    log("info", `${name} connected`);
    try {
      // Without the first, a reply may wait until the client has acknowledged
      // the one before (RFC 896). Without the second, a client whose machine
      // has vanished stays for ever.
      if ("setNoDelay" in conn) conn.setNoDelay();
      if ("setKeepAlive" in conn) conn.setKeepAlive();
    } catch { /* a client that has reset already: its first read says so */ }
    if (idleTimeout < Infinity) startTick();
    client.leaving = signal?.aborted ?? false; // accepted just before the stop
    try {
      client.handle = protocol(client);
      goOn(client);
    } catch (error) {
      client.onReplyFailed(error);
    }
  }

  /**
   * Decides what comes next for a client, and is called after every change of
   * it. What it decides starts in the next round. While a client is owed
   * something, it asks for no new read. So a client that does not read cannot
   * make us keep more and more (back-pressure).
   */
  function goOn(client: Client): void {
    if (client.leaving) startTick();
    if (client.bufferedAmount > 0) {
      if (client.writing) return;
      client.writing = true;
      selector.nextRound(client.startWrite);
    } else if (client.theyEnded) {
      disconnect(client, "end of stream", "info");
    } else if (!client.replying) {
      if (client.leaving && !client.weEnded) {
        // Ends our stream. Theirs is read to its end, unanswered: to close with
        // bytes unread would reset the connection, and a reply on its way would
        // be lost (RFC 1122, 4.2.2.13).
        client.weEnded = true;
        client.ticks = 0;
        client.conn.closeWrite().catch(client.onFailed);
      }
      if (client.reading) return;
      client.reading = true;
      selector.nextRound(client.startRead);
    }
  }

  function receive(client: Client, count: number | null): void {
    client.reading = false;
    client.ticks = 0;
    if (count === null) client.theyEnded = client.leaving = true;
    if (count === null || client.leaving) return goOn(client);
    if (count === client.buffer.length) client.bufferSize = LARGE_BUFFER;
    else if (count < SMALL_BUFFER) client.bufferSize = SMALL_BUFFER;
    totals.messages++;
    totals.bytes += count;
    if (logger.debug) log("debug", `${client.name} sent ${count} bytes`);
    client.replying = true;
    try {
      const reply = client.handle(client.buffer.subarray(0, count));
      const isReady = reply instanceof Uint8Array ||
        typeof reply !== "object" || reply === null;
      if (isReady) return takeReply(client, bytesOfReply(reply));
      const later = Promise.resolve(reply).then(client.onReplied);
      later.catch(client.onReplyFailed);
    } catch (error) {
      client.onReplyFailed(error);
    }
  }

  function takeReply(client: Client, bytes: Uint8Array | null): void {
    client.replying = false;
    client.ticks = 0;
    client.replyLength = bytes?.length ?? 0;
    if (bytes === null) client.leaving = true;
    else if (client.bufferedAmount > 0) client.owe(new Uint8Array(bytes));
    else if (bytes.length > 0) {
      // The usual case: no copy is made, and no round is waited for.
      client.bufferedAmount = bytes.length;
      client.unsent = bytes;
      client.writing = true;
      client.startWrite();
    }
    goOn(client);
  }

  function takeWritten(client: Client, count: number): void {
    client.writing = false;
    client.ticks = 0;
    client.bufferedAmount -= count;
    client.replyLength = Math.min(client.replyLength, client.bufferedAmount);
    const isOut = count === client.unsent.length;
    client.unsent = isOut ? EMPTY : client.unsent.subarray(count);
    goOn(client);
  }

  function disconnect(client: Client, why: string, level: Level): void {
    const { name, conn, writing, replying } = client;
    const doing = writing ? "writing" : replying ? "replying" : "reading";
    log(level, `${name} disconnected while ${doing}: ${why}`);
    client.unsent = EMPTY; // its peer may be kept: keep no bytes for it
    client.waiting = [];
    client.bufferedAmount = 0;
    clients.delete(client);
    client.leaving = true;
    client.end.resolve();
    // Deno 2.8 leaves a connection open that is closed while it is read from,
    // so end its stream first. This fails if it has been reset: no matter.
    conn.closeWrite().catch(() => {});
    conn[Symbol.dispose](); // unlike close, it may find the connection closed
  }

  function acceptFailed(listener: Deno.Listener, error: unknown): void {
    if (GAVE_UP.some((kind) => error instanceof kind)) {
      // In a round: a crowd that does only this must not hold up the loop.
      selector.nextRound(() => startAccept(listener));
    } else if (error instanceof Deno.errors.BadResource) {
      listening.delete(listener); // a stop has closed it, or somebody else
      log("info", `${formatAddress(listener.addr)} is closed`);
    } else { // descriptors are short, most likely
      if (!shortage) log("error", `accepting pauses: ${describe(error)}`);
      clearTimeout(shortage);
      shortage = selector.after(2 * TICK, () => {
        shortage = undefined;
        log("error", "accepting again"); // as severe as the line before it
      });
      // After a stop it finds that the listener is closed.
      selector.after(TICK, () => startAccept(listener));
    }
  }

  function startTick(): void {
    nextTick ??= selector.after(TICK, () => push({ type: "tick" }));
  }

  /**
   * A tick comes after all that is ready by then (see `after`). So a client
   * that has sent in time is never closed only because the loop is late. The
   * first tick may follow a client's last progress at once, so it counts as 0.
   */
  function tick(): void {
    nextTick = undefined;
    const stopping = signal?.aborted ?? false;
    const patience = stopping ? grace : Math.max(grace, LINGER);
    for (const client of clients) {
      const { leaving, weEnded, replying } = client;
      const idle = TICK * client.ticks++;
      const since = weEnded || stopping ? TICK * client.ticksLeaving++ : 0;
      const limit = weEnded ? LINGER : leaving ? patience : Infinity;
      const level = replying ? "error" : "info"; // we owe it a reply
      if (since >= patience) {
        disconnect(client, "the grace time is over", level);
      } else if (idle >= Math.min(limit, idleTimeout)) {
        disconnect(client, `no progress for ${idle / 1000} s`, level);
      } else if (leaving || idleTimeout < Infinity) {
        startTick();
      }
    }
  }

  function stop(): void {
    log("info", `stopping: ${clients.size} clients are connected`);
    clearTimeout(shortage);
    // What is closed makes its accept fail.
    for (const listener of listening) listener[Symbol.dispose]();
    for (const client of clients) client.close();
  }

  async function log(level: Level, line: string): Promise<void> {
    try {
      // An error may quote what a client has sent: it must not make a new line.
      await logger[level]?.(line.replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, " "));
    } catch { /* a log that fails costs no client its connection */ }
  }
}

// An accept fails so if the client has left before it was accepted.
const { NotConnected, ConnectionAborted, ConnectionReset } = Deno.errors;
const GAVE_UP = [NotConnected, ConnectionAborted, ConnectionReset];

function check(name: string, value: number, valid: boolean, expected: string) {
  if (!valid) throw new RangeError(`${name} is ${value}, expected ${expected}`);
}

function formatAddress(addr: Deno.Addr): string {
  if (!("hostname" in addr)) return Deno.inspect(addr);
  const bare = addr.hostname.replace(/^\[|\]$/g, ""); // of an IPv6 address
  return `${bare.includes(":") ? `[${bare}]` : bare}:${addr.port}`;
}

/** Says in words what has failed, or was thrown or sent. It may be anything. */
function describe(error: unknown, withStack = false): string {
  try {
    return withStack ? Deno.inspect(error) : String(error);
  } catch {
    return "something that cannot be shown";
  }
}

function bytesOfReply(reply: Reply): Uint8Array | null {
  return reply === null ? null : bytesOf(reply ?? EMPTY);
}

function bytesOf(data: unknown): Uint8Array {
  if (typeof data === "string") return encoder.encode(data);
  if (data instanceof Uint8Array) return data;
  throw new TypeError(`${describe(data, true)} is neither bytes nor a string`);
}

// ---- The selector

// Three numbers that follow from the runtime. To tokio, which does Deno's I/O,
// this program is one task. In one turn tokio completes at most 128 operations
// of a task, and puts off the rest (`tokio::task::coop`). It comes back to them
// within 61 turns (`event_interval`). Where a runtime does otherwise, these
// numbers cost speed or fairness, not correctness.

// How many operations of a round start in one turn. Each read leads to a write,
// often in the next turn. So a turn has 60 reads and the 60 writes of the batch
// before, and they fit into the 128.
const BATCH = 60;

// With so many completions at once, some operations may have been put off. A
// busy server has 120 in nearly every turn: those 60 reads and 60 writes. This
// is intended: it makes the next round wait for those put off, so no client
// starves.
const CROWD = 120;

// How many turns the next round waits then, and after a timer: more than 61.
const CATCH_UP = 64;

const LONGEST = 2 ** 31 - 1; // ms, as a timer holds 31 bits
const turn = () => new Promise<void>((resolve) => void setImmediate(resolve));

/**
 * The select of promises. `select(2)` tells which sockets are *ready* for an
 * operation. This one tells which operations are *complete*: start one, and in
 * its `then` push a record of it, a `T` of your choice. So each promise gets
 * one `then`, while `Promise.race` gives one more to all of them at each call.
 *
 * @typeParam T A record of what has completed.
 * @example
 * ```ts
 * import { Selector } from "./select_server.ts";
 * const selector = new Selector<string>();
 * Promise.resolve(1).then((value) => selector.push(`got ${value}`));
 * console.log(await selector.select()); // [ "got 1" ]
 * selector.nextRound(() => selector.push("started"));
 * console.log(await selector.select()); // [ "started" ]
 * ```
 */
export class Selector<T> {
  #completed: T[] = [];
  #round: (() => void)[] = []; // what is still to start in this round
  #nextRound: (() => void)[] = [];
  #turnsLeft = 0; // before the next round
  #wakeUp: PromiseWithResolvers<void> | undefined; // while it sleeps

  /** Adds a record of what has completed: the next `select` hands it out. */
  push(completion: T): void {
    this.#completed.push(completion);
    this.#wakeUp?.resolve();
  }

  /**
   * Starts an operation in the next round: when all that has completed by then
   * has been handed out. So no client is read from twice before each client
   * that is ready has been read from once. It is `select` that starts it.
   */
  nextRound(start: () => void): void {
    this.#nextRound.push(start);
    this.#wakeUp?.resolve();
  }

  /**
   * Starts an operation after `ms` milliseconds, and after all that is ready by
   * then. Returns the timer, for `clearTimeout`.
   *
   * @throws {RangeError} If `ms` is more than a timer holds, 2,147,483,647.
   */
  after(ms: number, start: () => void): ReturnType<typeof setTimeout> {
    check("ms", ms, ms <= LONGEST, `at most ${LONGEST}`);
    return setTimeout(() => {
      this.#turnsLeft = CATCH_UP; // what is ready by now comes first
      this.nextRound(start);
    }, ms);
  }

  /**
   * Resolves to all that has completed since the last call, in order, when
   * there is something. If `timeout` milliseconds pass before, it resolves to
   * an empty list. With 0 it polls: it hands out what is ready by now, or an
   * empty list.
   *
   * @throws {RangeError} If `timeout` is finite, and more than a timer holds.
   */
  async select(timeout = Infinity): Promise<T[]> {
    let timeIsUp = false;
    const timer = timeout < Infinity
      ? this.after(timeout, () => timeIsUp = true)
      : undefined;
    while (this.#completed.length === 0 && !timeIsUp) {
      if (this.#round.length > 0) {
        // A round is going on: start some more of its operations.
        for (const start of this.#round.splice(0, BATCH)) start();
        await turn();
      } else if (this.#turnsLeft > 0) {
        // It is over. Before the next, let those come in that were put off.
        this.#turnsLeft--;
        await turn();
      } else if (this.#nextRound.length > 0) {
        // All that was ready has been handed out: begin the next round.
        this.#round = this.#nextRound.splice(0);
      } else {
        // There is nothing to start: sleep until push or nextRound is called.
        const wakeUp = this.#wakeUp ??= Promise.withResolvers<void>();
        await wakeUp.promise;
        // Another caller of select may have woken, and gone to sleep again.
        if (wakeUp === this.#wakeUp) this.#wakeUp = undefined;
      }
    }
    clearTimeout(timer);
    if (this.#completed.length >= CROWD) this.#turnsLeft = CATCH_UP;
    return this.#completed.splice(0);
  }
}

// ---- Ports and replies

/** Where to {@linkcode listen}. */
export interface ListenOptions {
  /** An address or a name. By default 127.0.0.1, for this machine only. */
  hostname?: string;
  /** The first port, by default 50007. With 0 the system chooses each port. */
  port?: number;
  /** How many ports, one after the other. By default 1. */
  ports?: number;
}

/**
 * Opens consecutive ports: all of them or, if one cannot be opened, none.
 *
 * @throws {RangeError} If `ports` is not a whole number from 1 up.
 * @throws {Error} If a port cannot be opened. The message names it, and the
 * cause says why.
 * @example
 * ```ts
 * import { listen } from "./select_server.ts";
 * const listeners = listen({ port: 0, ports: 2 });
 * for (using listener of listeners) console.log(listener.addr.port);
 * ```
 */
export function listen(options: ListenOptions = {}): Deno.TcpListener[] {
  const { hostname = "127.0.0.1", port: first = 50007, ports = 1 } = options;
  const isCount = Number.isInteger(ports) && ports > 0;
  check("ports", ports, isCount, "a whole number from 1 up");
  using opened = new DisposableStack(); // closes them if one cannot be opened
  const listeners = Array.from({ length: ports }, (_, i) => {
    const port = first === 0 ? 0 : first + i;
    try {
      // With the default backlog of 511, a crowd that connects at once would
      // have to try again, for seconds.
      return opened.use(Deno.listen({ hostname, port, tcpBacklog: 4096 }));
    } catch (cause) {
      const address = formatAddress({ transport: "tcp", hostname, port });
      const message = `cannot listen on ${address}: ${describe(cause)}`;
      throw new Error(message, { cause });
    }
  });
  opened.move(); // all are open: do not close them
  return listeners;
}

/**
 * Replies with exactly the bytes that came (RFC 862).
 * @example
 * ```ts
 * import { echo } from "./select_server.ts";
 * console.log(echo(new Uint8Array([1, 2]))); // Uint8Array(2) [ 1, 2 ]
 * ```
 */
export const echo = (bytes: Uint8Array): Uint8Array => bytes;

/**
 * Replies as the book's server does: `Echo=>TEXT at TIME`. The bytes need not
 * be text.
 * @example
 * ```ts
 * import { stamp } from "./select_server.ts";
 * const reply = stamp(new TextEncoder().encode("spam"));
 * console.log(new TextDecoder().decode(reply)); // Echo=>spam at 20...
 * ```
 */
export function stamp(bytes: Uint8Array): Uint8Array {
  const time = encoder.encode(` at ${new Date().toISOString()}`);
  return new Uint8Array([...encoder.encode("Echo=>"), ...bytes, ...time]);
}

// ---- The command line: a program that copies the server needs nothing below

const HELP = `\
Select server: echoes what its clients send, on several ports, in one loop.

  deno run --allow-net select_server.ts [OPTIONS]

  -H, --host HOST        address to listen on (127.0.0.1: this machine only)
  -p, --port PORT        first port (50007); 0 lets the system choose each port
      --ports N          how many consecutive ports (2)
      --stamp            reply as the book does: Echo=>TEXT at TIME
      --delay MS         make every reply take MS milliseconds
      --idle-timeout S   close a client after S seconds without progress (never)
  -v, --verbose          log every message, too
  -q, --quiet            log errors only
  -h, --help             show this help

Ctrl-C stops it when the replies that it owes are out, or after 5 s. A second
one stops it at once.`;

async function main(): Promise<void> {
  const refuse = (arg: unknown) => {
    throw new RangeError(`${arg}: expected one of the options in --help`);
  };
  // Without arguments there is nothing to parse, and nothing is downloaded. The
  // parser's full address lets a copy of this file run without a deno.json.
  const args = Deno.args.length === 0
    ? undefined
    : (await import("jsr:@std/cli@^1/parse-args")).parseArgs(Deno.args, {
      string: ["host", "port", "ports", "delay", "idle-timeout"],
      boolean: ["stamp", "verbose", "quiet", "help"],
      alias: { host: "H", port: "p", verbose: "v", quiet: "q", help: "h" },
      unknown: refuse,
    });
  args?._.forEach(refuse); // what comes after --
  if (args?.help) return console.log(HELP);
  const hostname = args?.host ?? "127.0.0.1";
  if (hostname === "") throw new RangeError("--host: expected an address");
  const number = (
    option: string,
    text: string,
    least: number,
    most: number,
  ) => {
    const value = /^\d+$/.test(text) ? Number(text) : NaN;
    if (value >= least && value <= most) return value;
    const expected = `a whole number from ${least} to ${most}`;
    throw new RangeError(`--${option} ${text}: expected ${expected}`);
  };
  const port = number("port", args?.port ?? "50007", 0, 65535);
  const ports = number("ports", args?.ports ?? "2", 1, 65536 - port);
  const ms = number("delay", args?.delay ?? "0", 0, LONGEST);
  const idle = args?.["idle-timeout"]; // in seconds
  const idleTimeout = idle === undefined
    ? Infinity
    : 1000 * number("idle-timeout", idle, 1, 1e6);
  const listeners = listen({ hostname, port, ports });

  const stopper = new AbortController();
  const { signal } = stopper;
  let stoppedAt = Infinity;
  const onSignal = () => {
    // A terminal, `deno task` or a service manager may send a signal twice.
    // No person presses Ctrl-C a second time within 300 ms.
    if (performance.now() > stoppedAt + 300) Deno.exit(1);
    stoppedAt = Math.min(stoppedAt, performance.now());
    stopper.abort();
  };
  const signals = Deno.build.os === "windows"
    ? ["SIGINT", "SIGBREAK"] as const
    : ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const name of signals) Deno.addSignalListener(name, onSignal);

  const out = new Printer(Deno.stdout.writable.getWriter());
  const err = new Printer(Deno.stderr.writable.getWriter());
  const logger: ServeOptions["logger"] = { error: err.print };
  if (!args?.quiet) logger.info = out.print;
  if (args?.verbose && !args.quiet) logger.debug = out.print;
  const reply = args?.stamp ? stamp : echo;
  const delayed = async (bytes: Uint8Array) => {
    await delay(ms, undefined, { signal }).catch(() => {}); // a stop ends it
    return reply(bytes);
  };
  const protocol = () => ms > 0 ? delayed : reply;
  await serve(listeners, { protocol, idleTimeout, signal, logger });
  // The last lines may take 500 ms to be read.
  await Promise.race([Promise.all([out.written, err.written]), delay(500)]);
}

/**
 * Writes lines while the loop goes on. `console` waits for whoever reads it,
 * and every client would wait with it: for a terminal that is paused with
 * Ctrl-S, or for a program that does not read its pipe.
 */
class Printer {
  written = Promise.resolve();
  #lines: string[] = [];
  #dropped = 0;

  constructor(readonly to: WritableStreamDefaultWriter<Uint8Array>) {}

  print = (line: string): void => {
    if (this.#lines.length === MAX_LINES) this.#dropped++;
    else if (this.#lines.push(line) === 1) {
      const written = this.written.then(() => this.#write());
      this.written = written.catch(() => {}); // nobody reads it any more
    }
  };

  #write(): Promise<void> {
    if (this.#dropped > 0) this.#lines.push(`${this.#dropped} lines dropped`);
    this.#dropped = 0;
    const text = `${this.#lines.splice(0).join("\n")}\n`;
    return this.to.write(encoder.encode(text));
  }
}

const MAX_LINES = 10_000; // that wait to be read

if (import.meta.main) {
  await main().catch((error) => {
    console.error(
      `select_server: ${error instanceof Error ? error.message : error}`,
    );
    Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
  });
  // A log that nobody reads, or in Deno 2.8 what was pending when a connection
  // was closed, would keep the process alive.
  Deno.exit();
}
