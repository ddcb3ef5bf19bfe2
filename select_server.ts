/**
 * An echo server with one process, one thread, two listening ports, and one
 * loop that serves every client. It is the select server of *Programming
 * Python* (4th edition, Example 12-9), for Deno 2.6 or later.
 *
 * The server starts each operation (an accept, a read, a reply, a write) and
 * goes on without waiting for it. The loop asks `select` which operations are
 * complete, and decides what comes next. It waits nowhere else, so a client
 * that does not read, or a reply that is slow to come, delays nobody else. But
 * while a handler computes, every client waits, as there is one thread.
 *
 * JavaScript's event loop does the same if each client has an async function of
 * its own. Here the loop is written out, and what to do next is decided in one
 * place. This loop is fairer, too: reads start in *rounds*, so nobody starves.
 *
 * For the idea, read the selector, the loop in `serve`, and `advance`. Then
 * read "Fair rounds", and the rest when you need it. A program that copies this
 * file needs nothing of "The command line", except perhaps `printTo`.
 * @module
 */
// `await nextTurn()` waits for the next turn of the event loop.
import { setImmediate as nextTurn } from "node:timers/promises";

// ---- The selector
/**
 * A selector does for promises what the system call `select` does for sockets.
 * The call tells which sockets are *ready* to be read from or written to. A
 * selector tells which operations are *complete*. An operation returns a
 * promise of its result, and `promise.then(f, g)` returns at once. Later, but
 * never in the middle of other code, `f` is called with the result, or `g` with
 * the error. Here `f` pushes a record, and `select` returns the records to the
 * loop, its only caller. The server below handles no errors or partial writes.
 * ```js ignore
 * const listener = Deno.listen({ port: 50007 });
 * const selector = new Selector();
 * function accept() {
 *   listener.accept().then((conn) =>
 *     selector.push({ type: "accepted", conn })
 *   );
 * }
 * function read(conn) {
 *   const buffer = new Uint8Array(1024);
 *   conn.read(buffer).then((count) =>
 *     selector.push({ type: "received", conn, buffer, count })
 *   );
 * }
 * accept();
 * while (true) {
 *   for (const { type, conn, buffer, count } of await selector.select()) {
 *     if (type === "accepted") {
 *       accept(); // the next client
 *       read(conn);
 *     } else if (count !== null) {
 *       conn.write(buffer.subarray(0, count));
 *       read(conn);
 *     } else conn.close(); // the client has ended its stream
 *   }
 * }
 * ```
 *
 * `Promise.race` also waits for the first of many promises. But each call adds
 * a callback to all of them, so callbacks pile up on the promise of a silent
 * client. Here each promise has one callback.
 */
export class Selector<T> {
  #completed: T[] = [];
  #wake = () => {};

  /** Adds a record of an operation that is complete. */
  push(completion: T): void {
    this.#completed.push(completion);
    this.#wake(); // ends the wait of `select`, if there is one
  }

  /** Waits until something is complete, and returns all that is, in order. */
  async select(): Promise<T[]> {
    if (this.#completed.length === 0) {
      await new Promise<void>((resolve) => this.#wake = resolve);
    }
    return this.#completed.splice(0); // takes all, and leaves the list empty
  }
}

// ---- The interface for programs
/**
 * What a handler replies: bytes, or a string, which is sent as UTF-8. Nothing,
 * or an empty reply, sends nothing. Null closes, as `Peer.close` does.
 */
export type Reply = Uint8Array | string | null | void;

/**
 * Receives the bytes of one read, and returns the reply or a promise of it. TCP
 * has no messages, so these bytes may be a part of a line, or many lines. The
 * reply is not copied: leave it unchanged until it has been written. Then the
 * next read overwrites the bytes: copy what you keep, and do not transfer them
 * (as `postMessage` can). A client that disconnects while its reply is being
 * made is noticed only afterwards, or at the `idleTimeout`.
 */
export type Handler = (bytes: Uint8Array) => Reply | PromiseLike<Reply>;

/** A client, as its protocol sees it. */
export interface Peer {
  /** The address of the client. */
  readonly remoteAddr: Deno.Addr;
  /** The address to which it has connected. */
  readonly localAddr: Deno.Addr;
  /** How many bytes are queued for it, and not yet taken by the system. */
  readonly bufferedAmount: number;
  /** Resolves when the client is gone, for whatever reason. Never rejects. */
  readonly closed: Promise<void>;
  /**
   * Sends bytes, which are copied, or a string as UTF-8, after what is queued
   * already. Until all has been sent, no new read from the client is started.
   * After `close`, `send` does nothing.
   * @throws {TypeError} If `data` is neither bytes nor a string.
   */
  send(data: Uint8Array | string): void;
  /** Sends what is queued, and a reply in progress, then closes the client. */
  close(): void;
}

/** How to {@linkcode serve}. Times are in milliseconds. */
export interface ServeOptions {
  /**
   * Called once for each client, when it connects. Returns its handler, so the
   * variables of this call belong to that client. By default an echo.
   */
  protocol?: (peer: Peer) => Handler;
  /**
   * Disconnects a client after this time without a read, a write, or a reply
   * from its handler. By default there is no limit: a silent client stays.
   */
  idleTimeout?: number;
  /**
   * `send` disconnects a client if more bytes than this are queued for it
   * already. By default 1 MiB. Replies count until they are written, so set it
   * above your largest reply. Check `bufferedAmount` before you send much.
   */
  sendLimit?: number;
  /**
   * Disconnects a closing client after this time without progress, and every
   * client when this time has passed since a stop. By default 5,000. (A client
   * has at most 1,000 to end its stream after the server has ended its own.)
   */
  grace?: number;
  /** Stops the server when it aborts. */
  signal?: AbortSignal;
  /**
   * Where to log: what is lost and handlers that fail are errors, clients that
   * come and go are info, reads are debug. By default errors go to the console,
   * which blocks the server while nobody reads it. (`printTo` does not.)
   */
  logger?: Partial<Pick<Console, "error" | "info" | "debug">>;
}

/** Counts of clients, of reads that a handler was given, and of their bytes. */
export type Totals = { clients: number; reads: number; bytes: number };

// ---- The server
// This is the small server again, with queues, partial writes, errors, limits
// and a stop. For example, a read: `plan` plans it, a round starts it, its
// callback pushes "received", `received` handles it, `advance` plans the next.
type Completion =
  | { type: "accepted"; listener: Deno.Listener; client: Client }
  | { type: "accept failed"; listener: Deno.Listener; error: unknown }
  | { type: "received"; client: Client; count: number | null }
  | { type: "replied"; client: Client; data: Reply }
  | { type: "written"; client: Client; count: number }
  | { type: "failed"; client: Client; error: unknown }
  | { type: "tick"; time: number }
  | { type: "abort" };

/**
 * Serves the clients of all listeners, however many, in one loop. Resolves when
 * all listeners are closed and all clients are gone. When the signal aborts, it
 * closes the listeners, and each client as `Peer.close` does. An error ends
 * only its own client. A connection is two streams, one in each direction: a
 * client that ends its own is closed when all that is queued for it is sent.
 * @throws {RangeError} If an option is a number that is not 0 or more.
 * @example A chat: each client hears what the others say.
 * ```ts
 * import { type Peer, serve } from "./select_server.ts";
 * const peers = new Set<Peer>();
 * await serve([Deno.listen({ hostname: "127.0.0.1", port: 0 })], {
 *   protocol(peer) {
 *     peers.add(peer);
 *     peer.closed.then(() => peers.delete(peer));
 *     peer.send(`Welcome, number ${peers.size}.\n`);
 *     return (bytes) => {
 *       for (const other of peers) if (other !== peer) other.send(bytes);
 *     };
 *   },
 *   signal: AbortSignal.timeout(100), // so that this example ends
 * });
 * ```
 */
export async function serve(
  listeners: Deno.Listener[],
  options: ServeOptions = {},
): Promise<Totals> {
  const { protocol = () => echo, signal } = options;
  const { idleTimeout = Infinity, sendLimit = 2 ** 20, grace = 5000 } = options;
  const logger: Logger = options.logger ?? { error: console.error };
  const limits = { idleTimeout, sendLimit, grace };
  for (const [name, value] of Object.entries(limits)) {
    if (value >= 0) continue;
    throw new RangeError(`${name} is ${value}: expected 0 or more`);
  }
  // For now, read this as a `Selector`. Its other two methods, `nextRound(f)`
  // and `catchUp(f)`, call `f` a moment later.
  const selector = new FairSelector<Completion>();
  const push = (completion: Completion) => selector.push(completion);
  const listening = new Set(listeners);
  const clients = new Set<Client>();
  const totals: Totals = { clients: 0, reads: 0, bytes: 0 };
  let stoppedAt = Infinity; // ms
  let nextWarning = 0; // ms
  let tickTimer: ReturnType<typeof setTimeout> | undefined;
  const onAbort = () => push({ type: "abort" });
  signal?.addEventListener("abort", onAbort);
  if (signal?.aborted) onAbort();
  for (const listener of listening) {
    log("info", `listening on ${formatAddress(listener.addr)}`);
    accept(listener);
  }

  while (listening.size > 0 || clients.size > 0) {
    for (const completion of await selector.select()) {
      const client = "client" in completion ? completion.client : undefined;
      if (client?.state === "closed") continue; // it is gone
      try {
        switch (completion.type) {
          case "accepted": // a new client: wait for the next one, too
            accept(completion.listener);
            welcome(completion.client);
            break;
          case "received": // null says that the client has ended its stream
            received(completion.client, completion.count);
            break;
          case "replied": // the handler's promise has brought its reply
            replied(completion.client, completion.data);
            break;
          case "written": // perhaps only a part: the rest is written next
            written(completion.client, completion.count);
            break;
          case "failed": // a reset, a reply that rejects, too much queued
            disconnect(completion.client, completion.error);
            break;
          case "accept failed": // client gone, port closed, or no descriptors
            acceptFailed(completion.listener, completion.error);
            break;
          case "tick": // some time has passed: who has taken too long?
            tick(completion.time);
            break;
          case "abort": // close the listeners and every client
            stop();
            break;
          default: // the compiler checks that no case is missing
            completion satisfies never;
        }
      } catch (error) { // a handler that throws ends only its own client
        if (!client) throw error; // it belongs to no client
        client.state = "failed";
        disconnect(client, error);
      }
    }
  }
  clearTimeout(tickTimer);
  signal?.removeEventListener("abort", onAbort);
  const { clients: served, reads, bytes } = totals;
  log("info", `served ${served} clients, ${reads} reads, ${bytes} bytes`);
  return totals;

  // The steps. (Function declarations are hoisted: the loop can call them.)
  // Each step in this table ends with `advance`. It is safe to call that twice.
  //
  //     complete          step      what comes next
  //     accepted          welcome   plan a read
  //     received 4 bytes  received  call the handler. If it has returned a
  //                                 promise, wait for "replied"
  //     replied           replied   write the reply at once
  //     written 2 of 4    written   a partial write: plan to write the rest
  //     written the rest  written   the queue is empty: plan a read
  //     received null     received  the client's end: disconnect
  function accept(listener: Deno.Listener): void {
    listener.accept().then((conn) => {
      push({ type: "accepted", listener, client: new Client(conn, push) });
    }, (error) => push({ type: "accept failed", listener, error }));
  }

  function welcome(client: Client): void {
    const { remoteAddr, localAddr } = client.conn;
    clients.add(client);
    client.name = `client ${++totals.clients} (${formatAddress(remoteAddr)})`;
    log("info", `${client.name} connected`);
    try {
      // Send small replies at once, without Nagle's delay (RFC 896), and notice
      // a client whose machine has vanished (RFC 1122, 4.2.3.6).
      if ("setNoDelay" in client.conn) client.conn.setNoDelay();
      if ("setKeepAlive" in client.conn) client.conn.setKeepAlive();
    } catch { /* the client has reset already: its first read says so */ }
    setLimit(client, idleTimeout);
    client.handle = protocol({
      remoteAddr,
      localAddr,
      closed: client.closed.promise,
      get bufferedAmount() {
        return client.outbox.length;
      },
      send: (data) => send(client, data),
      close: () => close(client),
    });
    if (stoppedAt < Infinity) close(client); // accepted just before the stop
    advance(client);
  }

  /** Decides what comes next for a client. Reads are planned only here. */
  function advance(client: Client): void {
    client.startClock(); // see "Time"
    // No read is planned while bytes are queued, so a client that does not read
    // cannot make the server keep more and more of them (back-pressure).
    if (client.outbox.length > 0) plan(client, "writing");
    else if (client.peerEnded) disconnect(client, "end of stream");
    else if (!client.replying) {
      if (client.state === "closing") endStream(client);
      plan(client, "reading"); // after `endStream`, too, until null comes
    }
  }

  /** Starts a read or a write in the next round, unless one is on its way. */
  function plan(client: Client, what: "reading" | "writing"): void {
    if (client[what]) return;
    client[what] = true;
    selector.nextRound(what === "reading" ? client.read : client.write);
  }

  function received(client: Client, count: number | null): void {
    const { handle, buffer } = client;
    client.reading = false;
    // A read that has filled its buffer makes it larger, with the same bytes.
    // (A buffer that a handler has transferred throws, here or below.)
    if (count === buffer.length && count < LARGEST_BUFFER) {
      client.buffer = new Uint8Array(buffer.buffer.transfer(2 * count));
    }
    const bytes = client.buffer.subarray(0, count ?? 0);
    if (count === null) client.peerEnded = true;
    if (count === null || client.state !== "open") return advance(client);
    client.replying = true;
    totals.reads++;
    totals.bytes += count;
    if (logger.debug) log("debug", `${client.name} sent ${count} bytes`);
    const result = handle(bytes);
    if (typeof result === "object" && result !== null && "then" in result) {
      Promise.resolve(result).then(client.onReplied, client.onFailed);
      advance(client); // it only starts the clock again
    } else replied(client, result);
  }

  function replied(client: Client, data: Reply): void {
    const { outbox } = client;
    const bytes = bytesOf(data ?? "");
    if (outbox.length === 0 && bytes.length > 0) {
      // The usual case, one reply for each read, needs no copy and no round.
      outbox.hold(bytes);
      client.writing = true;
      client.write();
    } else outbox.add(bytes);
    client.replying = false;
    if (data === null) close(client);
    advance(client);
  }

  function written(client: Client, count: number): void {
    client.writing = false;
    client.outbox.remove(count);
    advance(client);
  }

  function close(client: Client): void {
    if (client.state !== "open") return;
    client.state = "closing";
    setLimit(client, grace);
    advance(client);
  }

  /**
   * Ends the server's stream. The client's is read, unanswered, until it ends,
   * or for a second at most. A close with bytes unread would reset the
   * connection, and lose a reply that is still on its way (RFC 1122, 4.2.2.13).
   */
  function endStream(client: Client): void {
    setLimit(client, 1000);
    client.state = "lingering"; // from now on its clock does not start again
    client.conn.closeWrite().catch(client.onFailed);
  }

  function disconnect(client: Client, why: unknown): void {
    clients.delete(client);
    const isLoss = client.outbox.length > 0 || client.replying;
    const level = isLoss || client.state === "failed" ? "error" : "info";
    client.state = "closed";
    client.outbox = new Outbox(); // free the queue, even if the peer is kept
    client.closed.resolve();
    // Without this, Deno 2.8 does not close a connection with a pending read.
    client.conn.closeWrite().catch(() => {}); // it may be reset already
    client.conn[Symbol.dispose](); // unlike close, it never throws
    log(level, `${client.name} disconnected:`, why);
  }

  // ---- Sending at any time
  function send(client: Client, data: Uint8Array | string): void {
    const { state, outbox } = client;
    if (state !== "open") return;
    const bytes = bytesOf(data);
    if (outbox.length > sendLimit) {
      client.state = "failed"; // the loop disconnects it
      return client.onFailed("too much is queued");
    }
    outbox.add(bytes);
    if (outbox.length > 0) plan(client, "writing");
  }

  // ---- Time
  // A client's clock starts again when one of its operations starts or ends.
  function setLimit(client: Client, ms: number): void {
    client.limit = ms;
    client.startClock();
    if (ms < Infinity) startTick();
  }

  /** Schedules a tick in 100 ms, unless one is scheduled already. */
  function startTick(): void {
    tickTimer ??= setTimeout(() => {
      // A client whose bytes have arrived by now is not late. To see them, the
      // server first handles all that is ready, which starts clocks again.
      const time = performance.now();
      selector.catchUp(() => push({ type: "tick", time }));
    }, 100);
  }

  function tick(time: number): void {
    tickTimer = undefined;
    for (const client of clients) {
      const waited = Math.floor(time - client.waitingSince);
      if (waited >= client.limit) {
        disconnect(client, `timed out after ${waited} ms`);
      } else if (time >= stoppedAt + grace) {
        disconnect(client, "the grace time is over");
      } else if (client.limit < Infinity) startTick(); // look at it again
    }
  }

  // ---- Trouble, and the stop
  function acceptFailed(listener: Deno.Listener, error: unknown): void {
    if (error instanceof Deno.errors.BadResource || stoppedAt < Infinity) {
      listening.delete(listener); // closed, by the stop or by the program
    } else if (CLIENT_GONE.some((kind) => error instanceof kind)) {
      selector.nextRound(() => accept(listener)); // after the other clients
    } else { // most likely there are no file descriptors left
      if (performance.now() >= nextWarning) { // once a second at most
        nextWarning = performance.now() + 1000;
        log("error", "accepting pauses for a second:", error);
      }
      setTimeout(() => accept(listener), 1000); // a stop waits for this, too
    }
  }

  function stop(): void {
    log("info", `stopping: ${clients.size} clients are connected`);
    stoppedAt = performance.now();
    for (const listener of listening) listener[Symbol.dispose]();
    for (const client of clients) close(client);
  }

  async function log(level: keyof Logger, text: string, why: unknown = "") {
    try {
      const hasStack = level === "error" && typeof why !== "string";
      const shown = hasStack ? Deno.inspect(why) : String(why);
      // An error may quote what a client has sent: keep it on one line.
      const line = `${text} ${shown}`.replace(/[\p{Cc}\p{Zl}\p{Zp}]+/gu, " ");
      await logger[level]?.(line.trim());
    } catch { /* a logger that throws or rejects costs nobody a connection */ }
  }
}

// ---- A client
class Client {
  name = "";
  handle: Handler = echo; // `welcome` asks its protocol for another one
  buffer = new Uint8Array(4 * 1024); // for its next read
  outbox = new Outbox(); // the bytes that are queued for it
  closed = Promise.withResolvers<void>(); // resolves when it is gone
  reading = false; // a read is planned, or under way
  replying = false; // its handler has not replied yet
  writing = false; // a write is planned, or under way
  peerEnded = false; // the client has ended its own stream

  // open       what it sends is answered
  // closing    its queue is still sent, but nothing more is answered
  // lingering  the server's stream has ended: the client's is read to its end
  // failed     it is disconnected next, and logged as an error
  // closed     it is gone
  state: "open" | "closing" | "lingering" | "failed" | "closed" = "open";
  // When its clock has started, and its limit, in ms (see "Time").
  waitingSince = 0;
  limit = Infinity;

  constructor(
    readonly conn: Deno.Conn | Deno.TcpConn, // setNoDelay is TCP's
    readonly push: (completion: Completion) => void,
  ) {}

  // Arrow functions keep `this`. Making new ones each time would cost time.
  read = () => {
    this.startClock();
    this.conn.read(this.buffer).then(this.onReceived, this.onFailed);
  };
  write = () => {
    this.startClock();
    this.conn.write(this.outbox.next()).then(this.onWritten, this.onFailed);
  };
  startClock(): void {
    // It costs time to look at the clock, so do it only if there is a limit.
    // While the client lingers, nothing that it does gives it more time.
    if (this.limit === Infinity || this.state === "lingering") return;
    this.waitingSince = performance.now();
  }
  onReceived = (count: number | null) =>
    this.push({ type: "received", client: this, count });
  onReplied = (data: Reply) =>
    this.push({ type: "replied", client: this, data });
  onWritten = (count: number) =>
    this.push({ type: "written", client: this, count });
  onFailed = (error: unknown) =>
    this.push({ type: "failed", client: this, error });
}

/** A queue of bytes: some are being written, and others wait behind them. */
class Outbox {
  length = 0; // bytes in all
  #writing: Uint8Array = EMPTY;
  #waiting: Uint8Array = EMPTY; // a block, with room for more at its end

  /** Takes bytes into the empty queue as they are, without a copy. */
  hold(bytes: Uint8Array): void {
    this.#writing = bytes;
    this.length = bytes.length;
  }

  /** Copies bytes to the end. */
  add(bytes: Uint8Array): void {
    const used = this.length - this.#writing.length;
    const needed = used + bytes.length;
    if (needed > this.#waiting.length) {
      const larger = new Uint8Array(2 * needed);
      larger.set(this.#waiting.subarray(0, used));
      this.#waiting = larger;
    }
    this.#waiting.set(bytes, used);
    this.length += bytes.length;
  }

  /** What to write now: the rest of the last write, or else all that waits. */
  next(): Uint8Array {
    if (this.#writing === EMPTY) {
      this.#writing = this.#waiting.subarray(0, this.length);
      this.#waiting = EMPTY;
    }
    return this.#writing;
  }

  /** Removes what has been written. Throws if these bytes were transferred. */
  remove(count: number): void {
    const rest = this.#writing.subarray(count);
    this.#writing = rest.length > 0 ? rest : EMPTY;
    this.length -= count;
  }
}

// A pending read needs a buffer, even if the client is silent, so buffers are
// small at first. A read that fills its buffer doubles it for good, up to this.
const LARGEST_BUFFER = 64 * 1024;
// An accept fails with one of these if the client has disconnected already.
const { NotConnected, ConnectionAborted, ConnectionReset } = Deno.errors;
const CLIENT_GONE = [NotConnected, ConnectionAborted, ConnectionReset];

// ---- Fair rounds
/**
 * A selector with which no client starves. In one turn of the event loop, the
 * runtime (tokio) completes at most 128 operations. It postpones the rest, and
 * begins the next turn with newer ones, of clients that were answered just now.
 * So with the plain selector, many of a thousand busy clients wait for seconds.
 * Here reads (and writes that wait) are planned, and started in *rounds*. A
 * round begins when `select` has returned all that was ready. The aim is that
 * every client that is ready is read from once before any is read from twice.
 * For example, 180 clients, each with a pending read, ask at the same time:
 *
 *     turns  what happens
 *       1    128 reads complete: their replies are written
 *       1    these 128 writes complete: the next reads are planned
 *      64    128 are more than MANY, so wait: the other 52 are served
 *       3    a round begins: 60, 60 and 60 reads start
 *
 * @example
 * ```ts
 * import { FairSelector } from "./select_server.ts";
 * const selector = new FairSelector<string>();
 * selector.nextRound(() => selector.push("started"));
 * console.log(await selector.select()); // [ "started" ]
 * ```
 */
export class FairSelector<T> extends Selector<T> {
  #planned: (() => void)[] = []; // for the next round
  #isRunning = false; // rounds are being started
  #mustCatchUp = false;
  #completions = 0; // since the last wait began

  /** Adds a record, as every selector does, and counts it. */
  override push(completion: T): void {
    this.#completions++;
    super.push(completion);
  }

  /** Starts an operation in the next round. `start` must not throw. */
  nextRound(start: () => void): void {
    this.#planned.push(start);
    if (!this.#isRunning) this.#startRounds();
  }

  /** Like `nextRound`, but first `select` returns all that is ready by now. */
  catchUp(start: () => void): void {
    this.#mustCatchUp = true;
    this.nextRound(start);
  }

  async #startRounds(): Promise<void> {
    this.#isRunning = true;
    while (this.#planned.length > 0) {
      await nextTurn(); // before it, the loop has handled what is complete
      await this.#waitForPostponed();
      for (const [n, start] of this.#planned.splice(0).entries()) {
        if (n > 0 && n % BATCH === 0) await nextTurn();
        start();
      }
    }
    this.#isRunning = false;
  }

  /** If many are planned, others may have been postponed: waits for these. */
  async #waitForPostponed(): Promise<void> {
    let isMany = this.#planned.length > MANY;
    for (let n = 0; n < MOST_WAITS && (isMany || this.#mustCatchUp); n++) {
      this.#mustCatchUp = false;
      this.#completions = 0;
      for (let turn = 0; turn < CATCH_UP; turn++) await nextTurn();
      isMany = this.#completions > MANY; // then wait again, but not for ever
    }
  }
}

// These follow from tokio's rules. (If it changes, fairness may suffer, but no
// bytes are lost.) In a turn, 60 reads start, and 60 writes answer those of the
// turn before: 120 operations of 128. With more, some may have been postponed.
const BATCH = 60;
const MANY = 2 * BATCH;
// Once in 61 turns (its `event_interval`), tokio takes up 128 of the operations
// that it has postponed. So a wait serves 128 clients, and 32 serve 4,096.
const CATCH_UP = 64; // turns: less than 1 ms, if nothing else happens
const MOST_WAITS = 32;

// ---- Helpers
function bytesOf(data: Uint8Array | string): Uint8Array {
  if (data instanceof Uint8Array) return data;
  if (typeof data === "string") return encoder.encode(data);
  throw new TypeError(`neither bytes nor a string: ${Deno.inspect(data)}`);
}

function formatAddress(addr: Deno.Addr): string {
  if (!("hostname" in addr)) return Deno.inspect(addr);
  const { hostname, port } = addr;
  return `${hostname.includes(":") ? `[${hostname}]` : hostname}:${port}`;
}

const EMPTY = new Uint8Array(0);
const encoder = new TextEncoder();
const echo = (bytes: Uint8Array): Uint8Array => bytes; // RFC 862

type Logger = NonNullable<ServeOptions["logger"]>;

// ---- The command line
const HELP = `\
Select server: echoes what its clients send, on two ports, in one loop.

  deno run --allow-net select_server.ts [OPTIONS]

  -H, --host HOST   address to listen on (127.0.0.1: this machine only)
  -p, --port PORT   the first port (50007); the second is the next; 0: any two
  -v, --verbose     log every read, too
  -q, --quiet       log errors only
  -h, --help        show this help

Ctrl-C sends what is queued, then stops the server, within about 5 s.`;

async function main(): Promise<void> {
  const args = Deno.args.length > 0 ? await parse() : undefined;
  if (args?.help) return console.log(HELP);
  const { host: hostname = "127.0.0.1", port: text = "50007" } = args ?? {};
  if (hostname === "") refuse("--host", "an address");
  const first = /^\d+$/.test(text) ? Number(text) : NaN;
  if (!(first < 65535)) refuse(`--port ${text}`, "a whole number below 65535");
  const listeners = [first, first === 0 ? 0 : first + 1].map((port) => {
    try {
      // With the default backlog, 511, some of a thousand clients must retry.
      return Deno.listen({ hostname, port, tcpBacklog: 4096 });
    } catch (error) {
      const address = formatAddress({ transport: "tcp", hostname, port });
      throw new Error(`cannot listen on ${address}: ${error}`);
    }
  });
  const stopper = new AbortController();
  const signals: Deno.Signal[] = Deno.build.os === "windows"
    ? ["SIGINT", "SIGBREAK"]
    : ["SIGINT", "SIGTERM", "SIGHUP"];
  const onSignal = () => stopper.abort(); // a second signal changes nothing
  for (const name of signals) Deno.addSignalListener(name, onSignal);
  const out = Deno.stdout.writable.getWriter();
  const err = Deno.stderr.writable.getWriter();
  const logger: Logger = { error: printTo(err) };
  if (!args?.quiet) logger.info = printTo(out);
  if (args?.verbose && !args.quiet) logger.debug = printTo(out);
  await serve(listeners, { signal: stopper.signal, logger });
  // `ready` resolves when the last lines are written. Wait at most 500 ms.
  const late = new Promise((resolve) => setTimeout(resolve, 500));
  await Promise.race([Promise.allSettled([out.ready, err.ready]), late]);
}

// The parser's package is loaded only if there are arguments.
async function parse() {
  // deno-lint-ignore no-import-prefix -- a copy of this file has no deno.json
  const { parseArgs } = await import("jsr:@std/cli@^1/parse-args");
  const args = parseArgs(Deno.args, {
    string: ["host", "port"],
    boolean: ["verbose", "quiet", "help"],
    alias: { host: "H", port: "p", verbose: "v", quiet: "q", help: "h" },
    unknown: (arg: string) => refuse(arg),
  });
  args._.forEach((arg: unknown) => refuse(arg)); // what comes after --
  return args;
}

function refuse(what: unknown, expected = "an option of --help"): never {
  throw new RangeError(`${what}: expected ${expected}`);
}

// Writes a line without waiting, or drops it if 10,000 lines wait. The console
// would block the server while a terminal is paused, or nobody reads its pipe.
const printTo =
  (writer: WritableStreamDefaultWriter<Uint8Array>) => (line: string): void => {
    if ((writer.desiredSize ?? 0) < -10_000) return;
    writer.write(encoder.encode(`${line}\n`)).catch(() => {}); // nobody reads
  };

if (import.meta.main) {
  await main().catch((error: unknown) => {
    const text = error instanceof Error ? error.message : error;
    console.error(`select_server: ${text}`);
    Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
  });
  Deno.exit(); // a log that nobody reads would keep the process alive
}
