/**
 * One process, no threads, two listening ports, and one loop that serves every
 * client: the select-based echo server of *Programming Python* (4th edition,
 * Example 12-9), for Deno 2.6 or later.
 *
 * The loop asks `select` which accepts, reads, replies and writes have
 * completed, and starts the next ones. It never awaits a single one of them.
 * So a client that does not read, or a reply that takes its time in a promise,
 * delays only itself. A reply that computes for a second delays every client
 * for a second, as in any single thread: keep it short, or use a Worker.
 *
 * Three words for time. A *turn* is one pass of the runtime's own event loop.
 * In a *round* each client that is ready is read from once. A *tick* comes
 * every 100 ms while there is something to time.
 *
 * @module
 */
import { setImmediate } from "node:timers";
import { setTimeout as delay } from "node:timers/promises";

// ---- What can complete, and what a client is

type Completion =
  | { type: "accepted"; listener: Deno.Listener; conn: Connection }
  | { type: "accept failed"; listener: Deno.Listener; error: unknown }
  | { type: "received"; client: Client; count: number | null }
  | { type: "replied"; client: Client; bytes: Uint8Array | null }
  | { type: "owed"; client: Client }
  | { type: "sent"; client: Client; count: number }
  | { type: "failed"; client: Client; why: string; level: Level }
  | { type: "tick" | "abort" };

type Push = (completion: Completion) => void;
type Level = "error" | "info" | "debug";
type Connection = Deno.Conn | Deno.TcpConn; // only one of TCP has options

/**
 * What a {@linkcode Handler} replies: bytes, or a string, which is sent as
 * UTF-8. An empty reply, or none, sends nothing. Null says goodbye: what the
 * client is owed goes out, then its stream ends.
 */
export type Reply = Uint8Array | string | null | void;

/**
 * Replies to what one read has brought, at once or in a promise. It is called
 * again for the same client only when that reply is out, so replies stay in
 * order. Until then both arrays are in use. So copy what you keep of `bytes`,
 * as its buffer takes the next message, and do not change bytes that you have
 * returned.
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
   * already. Bytes are copied. After a goodbye it does nothing.
   *
   * @throws {TypeError} If `data` is neither bytes nor a string.
   */
  send(data: Uint8Array | string): void;
  /** Says goodbye: what the client is owed goes out, then its stream ends. */
  close(): void;
}

// A pending read keeps its buffer, so a quiet client has a small one. A client
// whose last read has filled its buffer gets a large one.
const SMALL_BUFFER = 4 * 1024;
const LARGE_BUFFER = 32 * 1024;

const EMPTY = new Uint8Array(0);
const encoder = new TextEncoder();

class Client implements Peer {
  reading = false; // a read is pending, or waits for the next round
  replying = false; // its handler has been called, and its reply is not there
  writing = false; // a write is pending, or waits for the next round
  ending = false; // goodbye: no more messages of it, no more sends to it
  ended = false; // it has ended its stream: there is nothing more to read
  halfClosed = false; // we have ended ours
  ticks = 0; // since it last made progress
  ticksLeaving = 0; // since the stop, or since we ended our stream
  buffer = new Uint8Array(SMALL_BUFFER);
  bufferSize = SMALL_BUFFER; // from the next read on
  unsent: Uint8Array = EMPTY; // what it is owed
  replyLength = 0; // how much of that is its reply, until all is out
  handle: Handler = echo; // what its protocol has returned
  readonly left = Promise.withResolvers<void>();
  readonly closed = this.left.promise;
  #block = EMPTY; // `unsent` is a part of it if something was sent

  constructor(
    readonly name: string,
    readonly conn: Connection,
    readonly sendLimit: number,
    readonly push: Push,
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
    this.conn.write(this.unsent).then(this.onSent, this.onFailed);
  };
  onReceived = (count: number | null) =>
    this.push({ type: "received", client: this, count });
  onReplied = (reply: Reply) => {
    const bytes = reply === null ? null : bytesOf(reply ?? EMPTY);
    this.push({ type: "replied", client: this, bytes });
  };
  onReplyFailed = (error: unknown) => {
    const why = describe(error, true); // with its stack: it is our own mistake
    this.push({ type: "failed", client: this, why, level: "error" });
  };
  onSent = (count: number) => this.push({ type: "sent", client: this, count });
  onFailed = (error: unknown) => {
    const why = describe(error);
    this.push({ type: "failed", client: this, why, level: "info" });
  };

  // What its protocol may ask of it. The loop goes on from there.
  send(data: Uint8Array | string): void {
    const bytes = bytesOf(data);
    if (this.ending) return;
    // Otherwise the loop knows already that it is owed something.
    if (this.unsent.length === 0) this.push({ type: "owed", client: this });
    this.owe(bytes);
    const waiting = this.unsent.length - this.replyLength;
    if (waiting <= this.sendLimit) return;
    this.ending = true;
    this.onFailed(new Error(`${waiting} bytes wait that it does not read`));
  }
  close(): void {
    this.ending = true;
    this.push({ type: "owed", client: this });
  }
  get bufferedAmount(): number {
    return this.unsent.length;
  }
  get remoteAddr(): Deno.Addr {
    return this.conn.remoteAddr;
  }
  get localAddr(): Deno.Addr {
    return this.conn.localAddr;
  }
  /**
   * Copies bytes behind what it is owed, so that one write takes all of it. If
   * each line were a write of its own, a client that is sent many lines would
   * fall behind, however fast it reads.
   */
  owe(bytes: Uint8Array): void {
    const { unsent } = this;
    const length = unsent.length + bytes.length;
    let start = unsent.byteOffset;
    const isPart = unsent.buffer === this.#block.buffer;
    if (!isPart || start + length > this.#block.length) {
      this.#block = new Uint8Array(2 * length); // with room for more
      this.#block.set(unsent);
      start = 0;
    }
    this.#block.set(bytes, start + unsent.length);
    this.unsent = this.#block.subarray(start, start + length);
  }

  /** Some bytes are out, perhaps all that it is owed. */
  paid(count: number): void {
    if (count < this.unsent.length) {
      this.unsent = this.unsent.subarray(count);
    } else {
      this.unsent = this.#block = EMPTY; // an idle client keeps none
      this.replyLength = 0;
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
   * Closes a client that makes no progress for so long: nothing comes from it,
   * no reply is ready, and it does not read enough to make room in the system's
   * buffers. So a client whose reply takes longer is closed, too. By default
   * there is no such limit.
   */
  idleTimeout?: number;
  /**
   * Closes a client when more than so many bytes wait that were sent to it.
   * Replies do not count, as the client is not read from until they are out.
   * By default 1 MiB.
   */
  sendLimit?: number;
  /** Stops the server when it aborts. */
  signal?: AbortSignal;
  /**
   * How long a goodbye may take. When this time is over, a stop closes the
   * clients that are still owed something. A client whose stream we have ended,
   * and that goes on sending, is closed then, too. By default 5,000.
   */
  grace?: number;
  /**
   * Where to log. A level without a method is not logged. `debug` is a line for
   * each message. By default errors go to the console.
   */
  logger?: Partial<Pick<Console, "error" | "info" | "debug">>;
}

const TICK = 100; // ms
const LINGER = 500; // ms: so long may a client be silent after its goodbye

// ---- The server

/**
 * Serves every client of every listener in one loop. Resolves when all the
 * listeners are closed, as an abort of the signal does, and all the clients
 * have left. Trouble with one client closes that client and no other.
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
 * console.log(totals); // { clients: 0, messages: 0, bytes: 0 }
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
  const push: Push = (completion) => selector.push(completion);
  const listening = new Set(listeners);
  const clients = new Set<Client>();
  const totals: Totals = { clients: 0, messages: 0, bytes: 0 };
  let nextTick: ReturnType<typeof setTimeout> | undefined;
  // Defined while descriptors are short.
  let acceptingAgain: ReturnType<typeof setTimeout> | undefined;
  const onAbort = () => push({ type: "abort" });
  signal?.addEventListener("abort", onAbort);
  if (signal?.aborted) onAbort();
  for (const listener of listening) {
    log("info", `listening on ${formatAddress(listener.addr)}`);
    startAccept(listener);
  }

  while (listening.size > 0 || clients.size > 0) {
    for (const completion of await selector.select()) {
      // A client may have left since its operation completed.
      if ("client" in completion && !clients.has(completion.client)) continue;
      switch (completion.type) {
        case "accepted": // a client has connected: wait for the next one, too
          startAccept(completion.listener);
          welcome(completion.conn);
          break;
        case "received": // null is the end of its stream
          receive(completion.client, completion.count);
          break;
        case "replied": // its handler has replied, at once or after a while
          takeReply(completion.client, completion.bytes);
          break;
        case "owed": // something was sent to it, or goodbye was said to it
          goOn(completion.client);
          break;
        case "sent": // perhaps a part only: the rest goes out in the next round
          takeSent(completion.client, completion.count);
          break;
        case "failed": // reset, broken pipe, no reply: it ends this client alone
          disconnect(completion.client, completion.why, completion.level);
          break;
        case "accept failed": // that client gave up, or descriptors ran out
          acceptFailed(completion.listener, completion.error);
          break;
        case "tick": // some time has passed: which clients are overdue?
          tick();
          break;
        case "abort": // no more clients, no more messages: say goodbye to all
          stop();
          break;
        default:
          completion satisfies never;
      }
    }
  }
  clearTimeout(nextTick);
  clearTimeout(acceptingAgain);
  signal?.removeEventListener("abort", onAbort);
  const { clients: served, messages, bytes } = totals;
  log("info", `served ${served} clients, ${messages} messages, ${bytes} bytes`);
  return totals;

  // Only the steps of the loop follow. Functions that are declared can be
  // called from above, and so the loop could come first.

  function startAccept(listener: Deno.Listener): void {
    listener.accept().then(
      (conn) => push({ type: "accepted", listener, conn }),
      (error) => push({ type: "accept failed", listener, error }),
    );
  }

  function welcome(conn: Connection): void {
    const number = ++totals.clients;
    const name = `client ${number} (${formatAddress(conn.remoteAddr)})`;
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
    client.ending = signal?.aborted ?? false;
    try {
      client.handle = protocol(client);
      goOn(client);
    } catch (error) {
      client.onReplyFailed(error);
    }
  }

  /**
   * Starts what a client waits for next: it is asked after everything that
   * changes a client. A client that is owed something is not read from, so one
   * that does not read cannot make us keep more and more (back-pressure).
   */
  function goOn(client: Client): void {
    if (client.unsent.length > 0) {
      if (client.writing) return;
      client.writing = true;
      client.startWrite();
    } else if (client.ended) {
      disconnect(client, "end of stream", "info");
    } else if (!client.replying) {
      if (client.ending && !client.halfClosed) {
        // Ends our stream. Theirs is read to its end, unanswered: to close with
        // bytes unread would reset the connection, and a reply on its way would
        // be lost (RFC 1122, 4.2.2.13).
        client.halfClosed = true;
        client.ticks = 0;
        client.conn.closeWrite().catch(client.onFailed);
        startTick();
      }
      if (client.reading) return;
      client.reading = true;
      selector.nextRound(client.startRead);
    }
  }

  function receive(client: Client, count: number | null): void {
    client.reading = false;
    client.ticks = 0;
    if (count === null) client.ended = client.ending = true;
    else if (!client.ending) answer(client, count);
    goOn(client);
  }

  function answer(client: Client, count: number): void {
    if (count === client.buffer.length) client.bufferSize = LARGE_BUFFER;
    else if (count < SMALL_BUFFER) client.bufferSize = SMALL_BUFFER;
    totals.messages++;
    totals.bytes += count;
    if (logger.debug) log("debug", `${client.name} sent ${count} bytes`);
    client.replying = true;
    const { onReplied, onReplyFailed } = client;
    try {
      const reply = client.handle(client.buffer.subarray(0, count));
      const isThere = reply instanceof Uint8Array ||
        typeof reply !== "object" || reply === null;
      if (isThere) onReplied(reply);
      else Promise.resolve(reply).then(onReplied).catch(onReplyFailed);
    } catch (error) {
      onReplyFailed(error);
    }
  }

  function takeReply(client: Client, bytes: Uint8Array | null): void {
    client.replying = false;
    client.ticks = 0;
    if (bytes === null) client.ending = true;
    else if (client.unsent.length > 0) client.owe(bytes);
    else if (bytes.length > 0) client.unsent = bytes; // this is no copy
    client.replyLength = bytes?.length ?? 0;
    goOn(client);
  }

  function takeSent(client: Client, count: number): void {
    client.ticks = 0;
    client.paid(count);
    client.writing = client.unsent.length > 0;
    if (client.writing) selector.nextRound(client.startWrite);
    else goOn(client);
  }

  function disconnect(client: Client, why: string, level: Level) {
    const { name, conn, writing, replying } = client;
    const doing = writing ? "writing" : replying ? "replying" : "reading";
    log(level, `${name} disconnected while ${doing}: ${why}`);
    clients.delete(client);
    client.ending = true;
    client.paid(client.unsent.length); // it is owed nothing any more
    client.left.resolve();
    // Deno 2.8 leaves a connection open that is closed while it is read from,
    // so end its stream first. This fails if it has been reset: no matter.
    conn.closeWrite().catch(() => {});
    conn[Symbol.dispose](); // unlike close, it may come a second time
  }

  function acceptFailed(listener: Deno.Listener, error: unknown): void {
    if (GAVE_UP.some((kind) => error instanceof kind)) {
      startAccept(listener);
    } else if (error instanceof Deno.errors.BadResource) {
      listening.delete(listener); // a stop has closed it, or somebody else
      log("info", `${formatAddress(listener.addr)} is closed`);
    } else {
      if (acceptingAgain === undefined) {
        log("error", `accepting pauses: ${describe(error)}`);
      }
      clearTimeout(acceptingAgain);
      acceptingAgain = selector.after(2 * TICK, () => {
        acceptingAgain = undefined;
        log("error", "accepting again"); // it takes back a line at that level
      });
      selector.after(TICK, () => startAccept(listener));
    }
  }

  function startTick(): void {
    nextTick ??= selector.after(TICK, () => push({ type: "tick" }));
  }

  /**
   * A tick comes after all that is ready, as `after` does. So a client that has
   * sent in time is never closed because the loop is late. The first tick may
   * come at once, and so it does not count.
   */
  function tick(): void {
    nextTick = undefined;
    const stopping = signal?.aborted ?? false;
    for (const client of clients) {
      const leaving = client.halfClosed || stopping;
      const limit = client.halfClosed ? LINGER : Infinity;
      const idle = TICK * client.ticks++;
      const level = client.replying ? "error" : "info"; // we owe it a reply
      if (idle >= Math.min(limit, idleTimeout)) {
        disconnect(client, `no progress for ${idle / 1000} s`, level);
      } else if (leaving && TICK * client.ticksLeaving++ >= grace) {
        disconnect(client, "the grace time is over", level);
      } else if (leaving || idleTimeout < Infinity) startTick();
    }
  }

  function stop(): void {
    log("info", `stopping: ${clients.size} clients are connected`);
    clearTimeout(acceptingAgain);
    // What is closed makes its accept fail.
    for (const listener of listening) listener[Symbol.dispose]();
    for (const client of clients) {
      client.ending = true;
      goOn(client);
    }
    startTick();
  }

  function log(level: Level, line: string): void {
    try {
      // An error may quote what a client has sent: it must not make a new line.
      logger[level]?.(line.replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, " "));
    } catch {
      /* a log that cannot be written costs no client its connection */
    }
  }
}

// An accept fails so if the client has left before it was accepted.
const { NotConnected, ConnectionAborted, ConnectionReset } = Deno.errors;
const GAVE_UP = [NotConnected, ConnectionAborted, ConnectionReset];

function check(name: string, value: number, right: boolean, expected: string) {
  if (!right) throw new RangeError(`${name} is ${value}, expected ${expected}`);
}

function formatAddress(addr: Deno.Addr): string {
  if (!("hostname" in addr)) return Deno.inspect(addr);
  const bare = addr.hostname.replace(/^\[|\]$/g, ""); // of an IPv6 address
  return `${bare.includes(":") ? `[${bare}]` : bare}:${addr.port}`;
}

/** An error in words. It may be anything that a protocol throws. */
function describe(error: unknown, withStack = false): string {
  try {
    const inShort = error instanceof Error && !withStack;
    return inShort ? `${error.name}: ${error.message}` : Deno.inspect(error);
  } catch {
    return "an error that cannot be shown";
  }
}

function bytesOf(data: unknown): Uint8Array {
  if (typeof data === "string") return encoder.encode(data);
  if (data instanceof Uint8Array) return data;
  throw new TypeError(`${Deno.inspect(data)} is neither bytes nor a string`);
}

// ---- The selector

// These three numbers follow from the runtime. In one turn tokio completes at
// most 128 operations of a task, and puts off the rest (`tokio::task::coop`).
// It looks at those again within 61 turns (`event_interval`). Where another
// runtime does otherwise, they cost speed or fairness, not correctness.

// How many operations of a round start in one turn. Each read leads to a write
// soon after, and 60 reads with their 60 writes fit into the 128.
const BATCH = 60;

// If so many have completed, the 128 may be used up, and others put off. A busy
// server reaches 120 in every turn, with 60 reads and 60 writes. That is meant:
// then those put off come in before each new round, and no client starves.
const CROWD = 120;

// How many turns a new round then waits for those put off: more than 61.
const CATCH_UP = 64;

const LONGEST = 2 ** 31 - 1; // ms, as a timer holds 31 bits
const turn = () => new Promise<void>((resolve) => void setImmediate(resolve));

/**
 * The select of promises. `select(2)` tells which sockets are *ready* for an
 * operation. This one tells which operations are *complete*: start one, and in
 * its `then` push a record of it, a `T` of your choice. So each promise is
 * subscribed to once, while `Promise.race` subscribes to all of them each time.
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
  #sleep: PromiseWithResolvers<void> | undefined; // while there is nothing to do

  /** Adds a record of what has completed: the next `select` hands it out. */
  push(completion: T): void {
    this.#completed.push(completion);
    this.#sleep?.resolve();
  }

  /**
   * Starts an operation in the next round: when all that has completed by then
   * has been handed out. So no client has its second turn before each client
   * that is ready has had its first. It is `select` that starts it.
   */
  nextRound(start: () => void): void {
    this.#nextRound.push(start);
    this.#sleep?.resolve();
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
      this.#turnsLeft = CATCH_UP;
      this.nextRound(start);
    }, ms);
  }

  /**
   * Resolves to all that has completed since the last call, in order, when
   * there is something. If `timeout` milliseconds pass before, it resolves to
   * an empty list. With 0 it only polls: it takes what is ready.
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
        // A round is on: start the next operations of it.
        for (const start of this.#round.splice(0, BATCH)) start();
        await turn();
      } else if (this.#turnsLeft > 0) {
        // The round is over. First let those come in that were put off.
        this.#turnsLeft--;
        await turn();
      } else if (this.#nextRound.length > 0) {
        // Each client that was ready has had its turn: begin the next round.
        this.#round = this.#nextRound.splice(0);
      } else {
        // There is nothing to start: sleep until a push or a nextRound.
        const sleep = this.#sleep ??= Promise.withResolvers<void>();
        await sleep.promise;
        if (sleep === this.#sleep) this.#sleep = undefined;
      }
    }
    clearTimeout(timer);
    if (this.#completed.length >= CROWD) this.#turnsLeft = CATCH_UP;
    return this.#completed.splice(0);
  }
}

// ---- Ports and replies

/** Where to {@linkcode listen}. */
export type ListenOptions = {
  hostname?: string;
  port?: number;
  ports?: number;
};

/**
 * Opens `ports` consecutive ports: all of them or, if one cannot be opened,
 * none. By default it opens one port, the book's 50007, at 127.0.0.1, which
 * only this machine reaches. With port 0 the system chooses each port.
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

Ctrl-C stops it when the replies that it owes are out; a second one, at once.`;

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
  const idleTimeout = idle
    ? 1000 * number("idle-timeout", idle, 1, 1e6)
    : Infinity;
  const listeners = listen({ hostname, port, ports });

  const stop = new AbortController();
  const { signal } = stop;
  let stoppedAt = Infinity;
  const onSignal = () => {
    // A terminal, `deno task` or a service manager may send a signal twice.
    if (performance.now() > stoppedAt + REPEAT) Deno.exit(1);
    stoppedAt = Math.min(stoppedAt, performance.now());
    stop.abort();
  };
  const signals = Deno.build.os === "windows"
    ? ["SIGINT", "SIGBREAK"] as const
    : ["SIGINT", "SIGTERM", "SIGHUP"] as const;
  for (const name of signals) Deno.addSignalListener(name, onSignal);

  const [out, err] = [new Printer(Deno.stdout), new Printer(Deno.stderr)];
  const logger: ServeOptions["logger"] = { error: err.print };
  if (!args?.quiet) logger.info = out.print;
  if (args?.verbose) logger.debug = out.print;
  const reply = args?.stamp ? stamp : echo;
  const delayed = async (bytes: Uint8Array) => {
    await delay(ms, undefined, { signal }).catch(() => {}); // a stop ends it
    return reply(bytes);
  };
  const protocol = () => ms > 0 ? delayed : reply;
  await serve(listeners, { protocol, idleTimeout, signal, logger });
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

  constructor(readonly stream: Pick<typeof Deno.stdout, "write">) {}

  print = (line: string): void => {
    if (this.#lines.length === MOST_LINES) this.#dropped++;
    else if (this.#lines.push(line) === 1) {
      this.written = this.written.then(() => this.#write()).catch(() => {});
    }
  };

  async #write(): Promise<void> {
    if (this.#dropped > 0) this.#lines.push(`${this.#dropped} lines dropped`);
    this.#dropped = 0;
    let bytes = encoder.encode(`${this.#lines.splice(0).join("\n")}\n`);
    while (bytes.length > 0) {
      bytes = bytes.subarray(await this.stream.write(bytes));
    }
  }
}

const MOST_LINES = 10_000; // that wait to be read
const REPEAT = 300; // ms: nobody presses Ctrl-C a second time so soon

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
