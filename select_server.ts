/**
 * One process, no threads, two listening ports, and one loop that serves every client: the
 * select-based echo server of *Programming Python* (4th edition, Example 12-9), for Deno. Pending
 * accepts, reads, replies and writes are raced in that one loop, so that neither a slow client nor
 * a long transaction keeps anybody else waiting.
 *
 * ```sh
 * deno run --allow-net select_server.ts
 * ```
 *
 * @example Serve something other than echoes
 * ```ts
 * import { listen, serve } from "./select_server.ts";
 *
 * const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
 * const reply = (bytes: Uint8Array) => new TextEncoder().encode(text(bytes).toUpperCase());
 * if (import.meta.main) await serve(listen(), { reply, logger: console });
 * ```
 *
 * @module
 */

// The package is named in full so that this file runs where it is copied to, without a deno.json.
import { parseArgs } from "jsr:@std/cli@^1/parse-args";

// ---- The selector

/**
 * How many operations may complete in one wake-up before others are put off. tokio lets a task
 * complete 128 I/O operations each time it runs (`tokio::task::coop`); staying a little below that
 * leaves room for operations that are not ours.
 */
const BUDGET = 120;

/**
 * How many turns of the event loop bring in those who were put off. They are looked at again after
 * tokio has next asked the system what is ready, which a busy program lets it do every 61 task runs
 * (its `event_interval`).
 */
const CATCH_UP_TURNS = 64;

/** A caller that took longer than this with what it got has kept others from being seen, in ms. */
const LONG_HANDLING = 5;

/** An operation that is {@linkcode Selector.register}ed, to be done again and again. */
export interface Operation {
  /**
   * Starts it. Its result comes out of {@linkcode Selector.select} once, as a completion. What is
   * always ready again goes before all that waits for the next round, if it starts in this way.
   */
  start(): void;
  /**
   * Starts it in a call of {@linkcode Selector.select} that has handed out everything that is ready
   * (and not in one that waits already).
   */
  startNextRound(): void;
}

/**
 * select() for promises: watch operations as they start, then ask again and again which of them have
 * completed.
 *
 * Where select(2) tells that a socket is *ready* for an operation, a selector tells that an operation
 * is *complete*, as a `T`, which is yours to choose; a discriminated union serves well. Each promise
 * is subscribed to once, so a call of {@linkcode Selector.select} costs what has completed, however
 * much else is pending. (`Promise.race` subscribes to all of it again, each time.)
 *
 * Nobody starves, as it goes in rounds: what is started by {@linkcode Operation.startNextRound}
 * starts when everything that was ready before has been handed out.
 *
 * @example Wait for whatever comes first
 * ```ts
 * import { Selector } from "./select_server.ts";
 *
 * const selector = new Selector<string>();
 * selector.watch(Promise.resolve(1), (value) => `got ${value}`, String);
 * selector.watch(Promise.reject("gone"), String, (reason) => `rejected: ${reason}`);
 * console.log(await selector.select()); // [ "got 1", "rejected: gone" ]
 * console.log(await selector.select(10)); // []: nothing has completed within 10 ms
 * ```
 */
export class Selector<T> {
  /** Completed, in that order, and not yet handed out. */
  #ready: T[] = [];
  /** What is still to start in this round, in reverse order. */
  #round: Operation[] = [];
  /** What starts in the next round. */
  readonly #nextRound: Operation[] = [];
  /** How much of the budget has been handed out since `#turns` last gave the event loop a turn. */
  #handedOut = 0;
  /** Turns to take before the next round: a wake-up used up the budget, or the caller took long. */
  #turnsOwed = 0;
  /** Since when the caller has had what `select` resolved to. */
  #handedOutAt = Infinity;
  /** Ends the wait of the pending `select`. */
  #wake?: () => void;
  #selecting = false;

  /**
   * Watches an operation that has started. `fulfilled` or `rejected` (the two functions that `then`
   * takes; they must not throw) turns its result into the completion that {@linkcode Selector.select}
   * hands out, once.
   *
   * @param promise The pending operation.
   * @param fulfilled Makes a completion of the value.
   * @param rejected Makes a completion of the reason, so that no rejection is lost or left unhandled.
   */
  watch<V>(
    promise: Promise<V>,
    fulfilled: (value: V) => T,
    rejected: (reason: unknown) => T,
  ): void {
    promise.then(
      (value) => this.#complete(fulfilled(value)),
      (reason) => this.#complete(rejected(reason)),
    );
  }

  /**
   * Registers an operation that is done again and again, as the reads of one client are. If they all
   * start in the next round, no client is read from a second time before everybody who is ready has
   * been read from once.
   *
   * @param start Starts the operation. What it throws counts as a rejection.
   * @param fulfilled Makes a completion of the value. Like `rejected`, it must not throw.
   * @param rejected Makes a completion of the reason.
   * @returns The operation, not started yet.
   */
  register<V>(
    start: () => Promise<V>,
    fulfilled: (value: V) => T,
    rejected: (reason: unknown) => T,
  ): Operation {
    return new RegisteredOperation(
      start,
      (value) => this.#complete(fulfilled(value)),
      (reason) => this.#complete(rejected(reason)),
      this.#nextRound,
    );
  }

  /**
   * Waits until something has completed, and resolves to all that has since the last call, in order
   * of completion.
   *
   * @param timeout The longest wait in milliseconds (`select`'s fourth argument, which is in seconds).
   * Without it, it waits for as long as it takes; 0 or less polls, and takes what the runtime has
   * ready to deliver. A wait beyond 2,147,483,647 ms, the most that the HTML standard's timers count,
   * may end then.
   * @returns The completions; an empty list means that the time is up.
   * @throws {RangeError} If `timeout` is not a number.
   * @throws {Deno.errors.Busy} If an earlier call is still waiting.
   */
  async select(timeout = Infinity): Promise<T[]> {
    if (Number.isNaN(timeout)) {
      throw new RangeError("select: timeout is NaN, expected milliseconds");
    }
    if (this.#selecting) throw new Deno.errors.Busy("select: an earlier call is still waiting");
    this.#selecting = true;
    if (performance.now() - this.#handedOutAt > LONG_HANDLING) this.#turnsOwed = CATCH_UP_TURNS;
    if (this.#handedOut >= BUDGET) await this.#turns(1);
    while (this.#ready.length === 0) {
      if (this.#round.length > 0) {
        // Half the budget in one turn: each may complete at once, and lead to one more operation.
        for (let i = 0; i < BUDGET / 2; i++) this.#round.pop()?.start();
        if (this.#round.length > 0) await this.#turns(1);
      } else if (this.#turnsOwed > 0) {
        this.#turnsOwed -= await this.#turns(this.#turnsOwed);
      } else if (this.#nextRound.length > 0) {
        this.#round = this.#nextRound.splice(0).reverse();
      } else if (!await this.#wait(timeout)) {
        break;
      }
    }
    const completions = this.#ready;
    this.#ready = [];
    // Accepts come one by one, and each takes longer than an echo: a flood of them must leave turns
    // to timers, to signals, and to those who are waiting.
    this.#handedOut += Math.max(completions.length, BUDGET / 8);
    if (completions.length >= BUDGET) this.#turnsOwed = CATCH_UP_TURNS;
    this.#handedOutAt = performance.now();
    this.#selecting = false;
    return completions;
  }

  #complete(completion: T): void {
    this.#ready.push(completion);
    this.#wake?.();
  }

  /** Gives the event loop turns until something completes; resolves to how many it took. */
  #turns(most: number): Promise<number> {
    this.#handedOut = 0;
    const { promise, resolve } = Promise.withResolvers<number>();
    let taken = 0;
    const turn = () => {
      if (++taken < most && this.#ready.length === 0) setImmediate(turn);
      else resolve(taken);
    };
    setImmediate(turn);
    return promise;
  }

  /** Resolves to false when the time was up first. */
  async #wait(timeout: number): Promise<boolean> {
    if (timeout > 0) {
      const { promise, resolve } = Promise.withResolvers<void>();
      this.#wake = resolve;
      const timer = timeout < Infinity
        ? setTimeout(resolve, Math.min(timeout, 2 ** 31 - 1))
        : undefined;
      await promise;
      clearTimeout(timer);
      this.#wake = undefined;
    } else {
      await this.#turns(CATCH_UP_TURNS);
    }
    return this.#ready.length > 0;
  }
}

/** Its functions are made once, as those made at every start would be most of the loop's garbage. */
class RegisteredOperation<V> implements Operation {
  readonly #start: () => Promise<V>;
  readonly #onFulfilled: (value: V) => void;
  readonly #onRejected: (reason: unknown) => void;
  readonly #nextRound: Operation[];

  constructor(
    start: () => Promise<V>,
    onFulfilled: (value: V) => void,
    onRejected: (reason: unknown) => void,
    nextRound: Operation[],
  ) {
    this.#start = start;
    this.#onFulfilled = onFulfilled;
    this.#onRejected = onRejected;
    this.#nextRound = nextRound;
  }

  start(): void {
    try {
      this.#start().then(this.#onFulfilled, this.#onRejected);
    } catch (reason) {
      this.#onRejected(reason);
    }
  }

  startNextRound(): void {
    this.#nextRound.push(this);
  }
}

// ---- The server

/** What the loop needs of a connection; a `Deno.Conn` has it. */
export interface Connection {
  /** The client's address. */
  readonly remoteAddr: Deno.Addr;
  /** Resolves to the number of bytes put into `buffer`, or to null at the end of the stream. */
  read(buffer: Uint8Array): Promise<number | null>;
  /** Resolves to the number of bytes taken from `bytes`, which may be only a part of them. */
  write(bytes: Uint8Array): Promise<number>;
  /** Sends the end of the stream, and leaves reading open, where the connection can do so. */
  closeWrite?(): Promise<void>;
  /** Closes both directions. */
  close(): void;
  /** Sends small writes at once (TCP_NODELAY), where the connection knows of that. */
  setNoDelay?(noDelay?: boolean): void;
}

/** What the loop needs of a listening socket; a `Deno.Listener` has it. */
export interface Listener {
  /** The address it listens on. */
  readonly addr: Deno.Addr;
  /** Resolves to the next client's connection. */
  accept(): Promise<Connection>;
  /** Stops listening. */
  close(): void;
}

/** Whom a reply is for. */
export interface Client {
  /** Counts the server's clients, from 1. */
  readonly id: number;
  /** The client's address. */
  readonly remoteAddr: Deno.Addr;
}

/**
 * Makes the reply to what one read brought, at once or in a promise; an empty one sends nothing.
 * `bytes` is overwritten when the reply is out: copy what you keep for longer. A reply function that
 * throws or rejects costs the client its connection.
 */
export type Reply = (bytes: Uint8Array, client: Client) => Uint8Array | Promise<Uint8Array>;

/** Takes the lines of the log; the levels it lacks are not logged. `console` is one. */
export interface Logger {
  /** What somebody should look into. */
  error?(line: string): void;
  /** Ports opened, clients that come and go. */
  info?(line: string): void;
  /** Every message. */
  debug?(line: string): void;
}

/** How to {@linkcode serve}. */
export interface ServeOptions {
  /** Makes the replies. By default {@linkcode echo}. */
  reply?: Reply;
  /** Closes a client with which nothing has happened for so many milliseconds. By default never. */
  idleTimeout?: number;
  /** Stops the server when it aborts. */
  signal?: AbortSignal;
  /** The time for replies still owed when the signal aborts, in milliseconds. By default 5,000. */
  grace?: number;
  /** Takes the log. By default errors go to the console. */
  logger?: Logger;
}

/** What {@linkcode serve} has done. */
export interface Totals {
  /** Clients accepted. */
  clients: number;
  /** Messages read, a message being what one read brought. */
  messages: number;
  /** Bytes read. */
  bytes: number;
}

/** What select tells the loop. */
type Completion =
  | { type: "accept"; listener: Listener; conn: Connection }
  | { type: "accept error"; listener: Listener; error: unknown }
  | { type: "read"; client: Session; count: number | null }
  | { type: "reply"; client: Session; bytes: Uint8Array }
  | { type: "write"; client: Session; count: number }
  | { type: "half-close"; client: Session }
  | { type: "client error"; client: Session; error: unknown }
  | { type: "abort" };

/** A pending read holds its buffer: a small one, and a large one after a read that has filled it. */
const SMALLEST_BUFFER = 4 * 1024;
const LARGEST_BUFFER = 32 * 1024;

/** What the log says of a client for which the idle timeout is up, by what is pending. */
const IDLE = { read: "silent", reply: "without its reply", write: "not reading its reply" };

/** How long polls for what may have come in time go on under a load that never ends, in milliseconds. */
const LONGEST_POLLING = 1000;

/** After an abort, how long to go on reading what clients had sent before it, in milliseconds. */
const LAST_READS = 100;

/** What accept rejects with when the client has reset or given up before it. */
const LOST_BEFORE_ACCEPT = [
  Deno.errors.NotConnected,
  Deno.errors.ConnectionReset,
  Deno.errors.ConnectionAborted,
];

/** Out of descriptors, how long to wait before accepting is tried again, in milliseconds. */
const ACCEPT_RETRY = 1000;

/** A client that is being served. Exactly one of its operations is pending at any time. */
class Session implements Client {
  readonly remoteAddr: Deno.Addr;
  /** For the log. */
  readonly name: string;
  readonly read: Operation;
  readonly write: Operation;
  open = true;
  halfClosed = false;
  /** What is pending, and since when. */
  pending: "read" | "reply" | "write" = "read";
  since = 0;
  /** What reads fill, and the size that the next one should have. */
  buffer = new Uint8Array(SMALLEST_BUFFER);
  nextSize = SMALLEST_BUFFER;
  /** The part of the reply that is still to be written. */
  unsent: Uint8Array = new Uint8Array(0);

  readonly onError = (error: unknown): Completion => ({
    type: "client error",
    client: this,
    error,
  });

  constructor(readonly id: number, readonly conn: Connection, selector: Selector<Completion>) {
    this.remoteAddr = conn.remoteAddr;
    this.name = `client ${id} (${formatAddress(this.remoteAddr)})`;
    this.read = selector.register(
      () => conn.read(this.buffer),
      (count) => ({ type: "read", client: this, count }),
      this.onError,
    );
    this.write = selector.register(
      () => conn.write(this.unsent),
      (count) => ({ type: "write", client: this, count }),
      this.onError,
    );
  }
}

/**
 * Serves every client of every listener, in one loop, until the signal aborts or all listeners have
 * been closed. After an abort it stops listening, sends the replies that it owes, and closes
 * everything.
 *
 * Trouble with one client closes that client and nothing else. One that resets before it has been
 * accepted is forgotten; when accepting fails for another reason, as when descriptors run out, it
 * pauses until a client leaves or a second has passed.
 *
 * @param listeners Where clients are accepted. The server closes them when it stops.
 * @param options The reply function, the idle timeout, the signal and the log.
 * @returns What has been done, once nobody is being listened to or served any more.
 * @throws {RangeError} If `idleTimeout` or `grace` is not a number of milliseconds from 0 up.
 *
 * @example Serve echoes for a tenth of a second
 * ```ts
 * import { listen, serve } from "./select_server.ts";
 *
 * const totals = await serve(listen({ port: 0 }), { signal: AbortSignal.timeout(100) });
 * console.log(totals); // { clients: 0, messages: 0, bytes: 0 }
 * ```
 */
export async function serve(
  listeners: Iterable<Listener>,
  options: ServeOptions = {},
): Promise<Totals> {
  const { reply = echo, idleTimeout = Infinity, grace = 5000, signal } = options;
  const logger: Logger = options.logger ?? { error: console.error };
  for (const [name, value] of Object.entries({ idleTimeout, grace })) {
    if (!(value >= 0)) throw new RangeError(`${name} is ${value}, expected milliseconds from 0 up`);
  }

  const selector = new Selector<Completion>();
  const listening = new Set(listeners);
  const paused = new Set<Listener>(); // not accepting for now: out of descriptors
  const clients = new Set<Session>(); // with an idle timeout, in the order of their `since`
  const deadlines = { acceptRetry: Infinity, lastReads: Infinity, grace: Infinity };
  let closing = false; // after the last reads: what is owed is written, nothing more is read
  let overdueSince = Infinity; // since when a deadline has passed, so that select only polls
  let found = false; // whether select has just found anything
  const totals: Totals = { clients: 0, messages: 0, bytes: 0 };

  const aborted = Promise.withResolvers<void>();
  const onAbort = () => aborted.resolve();
  signal?.addEventListener("abort", onAbort);
  selector.watch(aborted.promise, () => ({ type: "abort" }), () => ({ type: "abort" }));
  if (signal?.aborted) stop();
  for (const listener of listening) {
    log("info", `listening on ${formatAddress(listener.addr)}`);
    accept(listener);
  }

  // ---- The loop
  while (listening.size > 0 || clients.size > 0 || deadlines.lastReads < Infinity) {
    for (const completion of await selector.select(timeLeft())) {
      found = true;
      // A client may have been closed while its completion was on its way.
      if ("client" in completion && !completion.client.open) continue;
      switch (completion.type) {
        case "accept": // a client has connected: watch for the next one, and for what this one says
          accept(completion.listener);
          read(welcome(completion.conn));
          break;
        case "read": // null is the end of the stream, and all before it has been answered
          if (completion.count === null) leave(completion.client, "end of stream");
          else answer(completion.client, completion.count);
          break;
        case "reply": // a transaction is done, at once or after a while
          write(completion.client, completion.bytes);
          break;
        case "write": // the socket may have taken a part only; read again when it has taken all
          wrote(completion.client, completion.count);
          break;
        case "half-close": // the server stops: there is nothing left but this client's end of stream
          read(completion.client);
          break;
        case "client error": // reset, broken pipe, a failed reply: it ends this client alone
          fail(completion.client, completion.error);
          break;
        case "accept error": // that client gave up, descriptors ran out, or the port was closed
          acceptFailed(completion.listener, completion.error);
          break;
        case "abort":
          stop();
          break;
      }
    }
    meetDeadlines();
  }
  signal?.removeEventListener("abort", onAbort);
  return totals;

  function accept(listener: Listener): void {
    if (!listening.has(listener)) return;
    selector.watch(
      Promise.try(() => listener.accept()),
      (conn) => ({ type: "accept", listener, conn }),
      (error) => ({ type: "accept error", listener, error }),
    );
  }

  function welcome(conn: Connection): Session {
    const client = new Session(++totals.clients, conn, selector);
    clients.add(client);
    log("info", `${client.name} connected`);
    try {
      conn.setNoDelay?.(); // or a reply may wait for the acknowledgement of the one before (RFC 896)
    } catch {
      // A client that has reset already: its read says so.
    }
    return client;
  }

  function read(client: Session): void {
    if (closing && !client.halfClosed) return halfClose(client);
    setPending(client, "read");
    if (client.buffer.length !== client.nextSize) client.buffer = new Uint8Array(client.nextSize);
    // In the next round: nobody is read from again before everybody who is ready has been.
    client.read.startNextRound();
  }

  /**
   * Ends our side after the last reply. The client's is read to its end, unanswered: to close with
   * bytes unread resets the connection and loses the reply on its way (RFC 1122, 4.2.2.13).
   */
  function halfClose(client: Session): void {
    if (client.conn.closeWrite === undefined) return leave(client, "the server stops");
    client.halfClosed = true;
    setPending(client, "write");
    selector.watch(
      Promise.try(() => client.conn.closeWrite?.()),
      () => ({ type: "half-close", client }),
      client.onError,
    );
  }

  function answer(client: Session, count: number): void {
    if (client.halfClosed) return read(client);
    const { buffer } = client;
    if (count === buffer.length) client.nextSize = LARGEST_BUFFER;
    else if (count < SMALLEST_BUFFER) client.nextSize = SMALLEST_BUFFER;
    totals.messages++;
    totals.bytes += count;
    if (logger.debug) log("debug", `${client.name} sent ${count} bytes`);
    setPending(client, "reply");
    try {
      const bytes = reply(buffer.subarray(0, count), client);
      if (bytes instanceof Uint8Array) return write(client, bytes);
      selector.watch(
        Promise.resolve(bytes),
        (bytes) => ({ type: "reply", client, bytes }),
        client.onError,
      );
    } catch (error) {
      fail(client, error);
    }
  }

  function write(client: Session, bytes: Uint8Array): void {
    if (!(bytes instanceof Uint8Array)) { // JavaScript's callers may return anything
      return fail(client, new TypeError(`the reply is ${describe(bytes)}, expected a Uint8Array`));
    }
    client.unsent = bytes;
    if (bytes.length === 0) return read(client);
    setPending(client, "write");
    client.write.start();
  }

  function wrote(client: Session, count: number): void {
    if (count < client.unsent.length) write(client, client.unsent.subarray(count));
    else read(client);
  }

  function fail(client: Session, error: unknown): void {
    if (client.pending === "reply") leave(client, `reply failed: ${describe(error)}`, "error");
    else leave(client, describe(error));
  }

  function leave(client: Session, why: string, level: keyof Logger = "info"): void {
    clients.delete(client);
    client.open = false;
    try {
      client.conn.close();
    } catch {
      // Somebody else has closed it: it is as we want it.
    }
    log(level, `${client.name} disconnected: ${why}`);
    acceptAgain(); // there is a descriptor to spare now
  }

  function acceptFailed(listener: Listener, error: unknown): void {
    if (!listening.has(listener)) return; // we closed it
    if (LOST_BEFORE_ACCEPT.some((lost) => error instanceof lost)) return accept(listener);
    if (error instanceof Deno.errors.BadResource) {
      listening.delete(listener);
      return log("error", `${formatAddress(listener.addr)} is closed: ${describe(error)}`);
    }
    // Out of descriptors or memory. One line tells of it however often it happens before it is over.
    if (deadlines.acceptRetry === Infinity) log("error", `accepting pauses: ${describe(error)}`);
    deadlines.acceptRetry = performance.now() + ACCEPT_RETRY;
    paused.add(listener);
  }

  function acceptAgain(): void {
    for (const listener of paused) {
      paused.delete(listener);
      accept(listener);
    }
  }

  /** Notes which operation is pending, since now; the client comes after those with older ones. */
  function setPending(client: Session, pending: Session["pending"]): void {
    client.pending = pending;
    if (idleTimeout === Infinity) return;
    client.since = performance.now();
    clients.delete(client);
    clients.add(client);
  }

  function stop(): void {
    log("info", `stopping: ${clients.size} clients are connected`);
    for (const listener of listening) {
      try {
        listener.close();
      } catch {
        // Somebody else has closed it: it is as we want it.
      }
    }
    listening.clear();
    paused.clear();
    const now = performance.now();
    deadlines.acceptRetry = Infinity;
    deadlines.lastReads = now + Math.min(LAST_READS, grace);
    deadlines.grace = now + grace;
  }

  /** When there is something to do though nothing completes. */
  function nextDeadline(): number {
    const { acceptRetry, lastReads, grace } = deadlines;
    const next = Math.min(acceptRetry, lastReads, grace);
    if (idleTimeout === Infinity) return next;
    const [oldest] = clients;
    return oldest === undefined ? next : Math.min(next, oldest.since + idleTimeout);
  }

  /** How long select may wait, in milliseconds. */
  function timeLeft(): number {
    const next = nextDeadline();
    const now = next === Infinity ? 0 : performance.now();
    overdueSince = now < next ? Infinity : Math.min(overdueSince, now);
    found = false;
    return next - now;
  }

  function meetDeadlines(): void {
    if (overdueSince === Infinity) return;
    const now = performance.now();
    // The loop may be late, and what came before a deadline counts: first a poll must find nothing.
    const mayHaveSent = (deadline: number) =>
      found && now < Math.max(overdueSince, deadline) + LONGEST_POLLING;
    for (const client of clients) {
      if (now < client.since + idleTimeout) break; // and so it is for all who come after
      if (mayHaveSent(client.since + idleTimeout)) break;
      leave(client, `${IDLE[client.pending]} for ${idleTimeout / 1000} s`);
    }
    if (now >= deadlines.acceptRetry) {
      if (paused.size === 0) log("error", "accepting again");
      deadlines.acceptRetry = paused.size === 0 ? Infinity : now + ACCEPT_RETRY;
      acceptAgain();
    }
    if (now >= deadlines.lastReads) {
      closing = true; // who is answered from now on is half-closed, and who is silent is closed
      if (!mayHaveSent(deadlines.lastReads)) {
        deadlines.lastReads = Infinity;
        for (const client of clients) {
          if (client.pending === "read" && !client.halfClosed) leave(client, "the server stops");
        }
      }
    }
    if (now >= deadlines.grace) {
      for (const client of clients) leave(client, `the server stops, ${client.pending} pending`);
    }
  }

  function log(level: keyof Logger, line: string): void {
    try {
      const logged: unknown = logger[level]?.(line);
      if (logged instanceof Promise) logged.catch(() => {}); // as below
    } catch {
      // A log that cannot be written must not cost any client its connection.
    }
  }
}

function formatAddress(addr: Deno.Addr): string {
  if (!("hostname" in addr)) return Deno.inspect(addr, { breakLength: Infinity });
  return `${addr.hostname.includes(":") ? `[${addr.hostname}]` : addr.hostname}:${addr.port}`;
}

/** One line that tells what went wrong, whatever was thrown, and whatever it quotes. */
function describe(error: unknown): string {
  try {
    const text = error instanceof Error ? `${error.name}: ${error.message}` : Deno.inspect(error);
    return text.replace(/\p{Cc}+/gu, " ");
  } catch {
    return "an error that cannot be shown"; // its message, or what shows it, throws
  }
}

/** Where to {@linkcode listen}. */
export interface ListenOptions {
  /** The address or name to listen on. By default 127.0.0.1, which only this machine reaches. */
  host?: string;
  /** The first port. By default 50007, the book's; 0 lets the system choose each port. */
  port?: number;
  /** How many consecutive ports. By default 2. */
  ports?: number;
}

/**
 * Opens the ports: all of them or, when one cannot be opened, none.
 *
 * @param options The host, the first port, and how many.
 * @returns A listener for each port, to {@linkcode serve} or to close.
 * @throws {Error} If a port cannot be opened; the message names it, the cause says why.
 *
 * @example Two ports that the system chooses
 * ```ts
 * import { listen } from "./select_server.ts";
 *
 * const [first, second] = listen({ port: 0 });
 * console.log(first.addr, second.addr);
 * first.close();
 * second.close();
 * ```
 */
export function listen(options: ListenOptions = {}): Deno.TcpListener[] {
  const { host: hostname = "127.0.0.1", port: first = 50007, ports = 2 } = options;
  using opened = new DisposableStack();
  const listeners = Array.from({ length: ports }, (_, i) => {
    const port = first === 0 ? 0 : first + i;
    try {
      // The default of 511 clients waiting to be accepted makes a crowd retry for seconds.
      return opened.use(Deno.listen({ hostname, port, tcpBacklog: 4096 }));
    } catch (cause) {
      const address = formatAddress({ transport: "tcp", hostname, port });
      const why = cause instanceof Error ? cause.message : cause;
      throw new Error(`cannot listen on ${address}: ${why}`, { cause });
    }
  });
  opened.move(); // all are open: keep them so
  return listeners;
}

// ---- The replies

/**
 * Replies with exactly the bytes that came (RFC 862).
 *
 * @param bytes What came.
 * @returns The same.
 *
 * @example
 * ```ts
 * import { echo } from "./select_server.ts";
 *
 * console.log(echo(new Uint8Array([1, 2]))); // Uint8Array(2) [ 1, 2 ]
 * ```
 */
export function echo(bytes: Uint8Array): Uint8Array {
  return bytes;
}

/**
 * Replies as the book's server does: `Echo=>TEXT at TIME`.
 *
 * @param bytes What came.
 * @returns The same between `Echo=>` and the time.
 *
 * @example
 * ```ts
 * import { stamp } from "./select_server.ts";
 *
 * const reply = stamp(new TextEncoder().encode("spam"));
 * console.log(new TextDecoder().decode(reply)); // Echo=>spam at 2026-11-23T10:00:00.000Z
 * ```
 */
export function stamp(bytes: Uint8Array): Uint8Array {
  const before = new TextEncoder().encode("Echo=>");
  const after = new TextEncoder().encode(` at ${new Date().toISOString()}`);
  const reply = new Uint8Array(before.length + bytes.length + after.length);
  reply.set(before);
  reply.set(bytes, before.length);
  reply.set(after, before.length + bytes.length);
  return reply;
}

/** Makes every transaction take so many milliseconds, but not longer than the server runs. */
function delayed(reply: Reply, ms: number, signal: AbortSignal): Reply {
  return async (bytes, client) => {
    const { promise, resolve } = Promise.withResolvers<void>();
    const done = () => resolve();
    const timer = setTimeout(done, signal.aborted ? 0 : ms);
    signal.addEventListener("abort", done);
    await promise;
    clearTimeout(timer);
    signal.removeEventListener("abort", done);
    return reply(bytes, client);
  };
}

// ---- The command line

const HELP = `\
Select server: echoes what its clients send, on several ports, in one loop.

  deno run --allow-net select_server.ts [OPTIONS] [HOST PORT]

  -H, --host HOST        address to listen on (127.0.0.1: this machine only)
  -p, --port PORT        first port (50007); 0 lets the system choose each port
      --ports N          how many consecutive ports (2)
      --stamp            reply as the book does: Echo=>TEXT at TIME
      --delay MS         make every transaction take MS milliseconds
      --idle-timeout S   close a client after S seconds without progress (never)
  -v, --verbose          log every message too
  -q, --quiet            log errors only
  -h, --help             show this help

Ctrl-C stops it when the replies that it owes are out; a second one, at once.`;

/** Bad use of the command line; the message names the value and what was expected. */
export class UsageError extends Error {}

/**
 * Refuses an argument that is not one of a command's options.
 *
 * @param arg The argument as it was typed.
 * @throws {UsageError} Always.
 *
 * @example
 * ```ts
 * import { refuse, UsageError } from "./select_server.ts";
 * import { assertThrows } from "@std/assert";
 *
 * assertThrows(() => refuse("--prot"), UsageError, "--prot: expected one of the options");
 * ```
 */
export function refuse(arg: string): never {
  const negative = /^-\d/.test(arg); // the value of the option before it, taken for an option
  throw new UsageError(
    `${arg}: expected ${negative ? "a number from 0 up" : "one of the options that --help lists"}`,
  );
}

/**
 * Reads a number from the command line.
 *
 * @param option The option, for the message.
 * @param text Its value as it was typed: digits, and a fraction if one is allowed.
 * @param least The smallest number allowed.
 * @param most The largest.
 * @param kind Whether it must be whole.
 * @returns The number.
 * @throws {UsageError} If it is anything else.
 *
 * @example
 * ```ts
 * import { parseNumber } from "./select_server.ts";
 *
 * console.log(parseNumber("--port", "50007", 0, 65535)); // 50007
 * ```
 */
export function parseNumber(
  option: string,
  text: string,
  least: number,
  most: number,
  kind: "a whole number" | "a number" = "a whole number",
): number {
  const value = /^\d+(\.\d+)?$/.test(text) ? Number(text) : NaN;
  const whole = kind === "a number" || /^\d+$/.test(text);
  if (whole && value >= least && value <= most) return value;
  throw new UsageError(
    `${option} ${text || "without a value"}: expected ${kind} from ${least} to ${most}`,
  );
}

/**
 * Runs a command to its exit code. An error is one line on standard error, without a stack trace.
 *
 * @param name The command's name, for the message.
 * @param main The command, which takes the arguments and resolves to its exit code.
 * @returns The exit code: `main`'s, 2 for bad use, 1 for any other error.
 *
 * @example
 * ```ts
 * import { run } from "./select_server.ts";
 *
 * console.log(await run("nothing", () => Promise.resolve(0))); // 0
 * ```
 */
export async function run(
  name: string,
  main: (args: string[]) => Promise<number>,
): Promise<number> {
  try {
    return await main(Deno.args);
  } catch (error) {
    console.error(`${name}: ${error instanceof Error ? error.message : Deno.inspect(error)}`);
    if (!(error instanceof UsageError)) return 1;
    console.error("--help lists the options.");
    return 2;
  }
}

function parseCommandLine(args: string[]) {
  const positional: string[] = [];
  const parsed = parseArgs(args, {
    string: ["host", "port", "ports", "delay", "idle-timeout"],
    boolean: ["stamp", "verbose", "quiet", "help"],
    alias: { host: "H", port: "p", verbose: "v", quiet: "q", help: "h" },
    unknown: (arg, key) => {
      // Numbers among the positional arguments are converted, so their text is taken here.
      if (key === undefined) return positional.push(arg) < 0;
      refuse(arg);
    },
  });
  positional.push(...parsed._.map(String)); // what came after --
  const { stamp, verbose, quiet, help } = parsed;
  if (verbose && quiet) throw new UsageError("--quiet --verbose: expected one of them");
  if (positional.length !== 0 && positional.length !== 2) {
    throw new UsageError(`${positional.join(" ")}: expected HOST PORT, or neither`);
  }
  if (positional.length > 0 && (parsed.host ?? parsed.port) !== undefined) {
    throw new UsageError(`${positional.join(" ")}: expected either HOST PORT or --host and --port`);
  }
  const [host = parsed.host ?? "127.0.0.1", port = parsed.port ?? "50007"] = positional;
  if (host === "") throw new UsageError("--host without a value: expected an address or a name");
  const first = parseNumber("--port", port, 0, 65535);
  const ports = parseNumber("--ports", parsed.ports ?? "2", 1, 65535);
  if (first + ports - 1 > 65535) {
    throw new UsageError(
      `--port ${first} --ports ${ports}: expected the last port to be 65535 at most`,
    );
  }
  const delay = parseNumber("--delay", parsed.delay ?? "0", 0, 2 ** 31 - 1);
  const idle = parsed["idle-timeout"];
  return {
    help,
    stamp,
    verbose,
    quiet,
    delay,
    listen: { host, port: first, ports },
    idleTimeout: idle === undefined
      ? Infinity
      : 1000 * parseNumber("--idle-timeout", idle, 0.001, 1e6, "a number"),
  };
}

async function main(args: string[]): Promise<number> {
  const command = parseCommandLine(args);
  if (command.help) {
    console.log(HELP);
    return 0;
  }
  const { error, info } = console;
  const stop = new AbortController();
  const onSignal = () => stop.signal.aborted ? Deno.exit(1) : stop.abort();
  const signals: Deno.Signal[] = ["SIGINT", Deno.build.os === "windows" ? "SIGBREAK" : "SIGTERM"];
  const listeners = listen(command.listen);
  for (const signal of signals) Deno.addSignalListener(signal, onSignal);
  const reply = command.stamp ? stamp : echo;
  const { clients, messages, bytes } = await serve(listeners, {
    reply: command.delay > 0 ? delayed(reply, command.delay, stop.signal) : reply,
    idleTimeout: command.idleTimeout,
    signal: stop.signal,
    logger: command.verbose ? console : command.quiet ? { error } : { error, info },
  });
  for (const signal of signals) Deno.removeSignalListener(signal, onSignal);
  if (!command.quiet) {
    console.log(`served ${clients} clients, ${messages} messages, ${bytes} bytes`);
  }
  return 0;
}

if (import.meta.main) Deno.exitCode = await run("select_server", main);
