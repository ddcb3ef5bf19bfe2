/**
 * One process, no threads, two listening ports, and one loop that serves every client: the
 * select-based echo server of *Programming Python* (4th edition, Example 12-9), for Deno 2.6 or later.
 * The loop asks select which accepts, reads, replies and writes have completed, and starts the next
 * ones; it never waits for one of them alone, so nobody keeps anybody else waiting.
 *
 * @module
 */
import { parseArgs } from "jsr:@std/cli@^1/parse-args"; // in full: so this file runs where it is copied
import { setImmediate } from "node:timers";
import { setTimeout as delay } from "node:timers/promises";

// ---- What can complete, and what a client is
type Completion =
  | { type: "accepted"; listener: Deno.Listener; conn: Connection }
  | { type: "accept failed"; listener: Deno.Listener; error: unknown }
  | { type: "received"; client: Client; count: number | null }
  | { type: "replied"; client: Client; reply: Uint8Array | null }
  | { type: "sent"; client: Client; count: number }
  | { type: "failed"; client: Client; error: unknown }
  | { type: "tick" | "abort" };
type Push = (completion: Completion) => void;
type Level = "error" | "info" | "debug";
type Connection = Deno.Conn & Partial<Pick<Deno.TcpConn, "setNoDelay">>;

const SMALL_BUFFER = 4 * 1024; // a pending read holds its buffer: a small one while it is quiet,
const LARGE_BUFFER = 32 * 1024; // and a large one after a read that has filled it
const NOTHING = new Uint8Array(0);
/** One operation of a client is pending at a time; its completion is pushed to the selector. */
class Client {
  state: "reading" | "replying" | "writing" | "closed" = "reading";
  halfClosed = false; // we have sent the end of the stream
  ticks = 0; // since it last made progress
  buffer = new Uint8Array(SMALL_BUFFER);
  nextSize = SMALL_BUFFER; // of the buffer, from the next read on
  unsent: Uint8Array = NOTHING; // the part of the reply that is still to be written
  reply?: Reply; // made with its first message

  constructor(
    readonly name: string,
    readonly conn: Connection,
    readonly push: Push,
  ) {}

  // Made once a client: made at every call, these would be most of the loop's garbage.
  startRead = () => {
    if (this.buffer.length !== this.nextSize) {
      this.buffer = new Uint8Array(this.nextSize);
    }
    this.conn.read(this.buffer).then(this.onReceived, this.onFailed);
  };
  startWrite = () =>
    void this.conn.write(this.unsent).then(this.onSent, this.onFailed);
  onReceived = (count: number | null) =>
    this.push({ type: "received", client: this, count });
  onReplied = (reply: Uint8Array | null) =>
    this.push({ type: "replied", client: this, reply });
  onSent = (count: number) => this.push({ type: "sent", client: this, count });
  onFailed = (error: unknown) =>
    this.push({ type: "failed", client: this, error });
}

/**
 * Makes the reply to what one read has brought, at once or in a promise. An empty one sends nothing, null
 * says goodbye. `bytes` is overwritten when the reply is out: copy what you keep for longer.
 */
export type Reply = (
  bytes: Uint8Array,
) => Uint8Array | null | Promise<Uint8Array | null>;
/** What {@linkcode serve} has done; a message is what one read has brought. */
export type Totals = { clients: number; messages: number; bytes: number };

/** How to {@linkcode serve}; times are in milliseconds. */
export interface ServeOptions {
  /** Makes a client's reply function, with its first message. By default {@linkcode echo}. */
  protocol?: (remoteAddr: Deno.Addr) => Reply;
  /** Closes a client that has neither sent, read nor got its reply for so long. By default never. */
  idleTimeout?: number;
  /** Stops the server when it aborts. */
  signal?: AbortSignal;
  /** How long a stop waits for the replies that are owed. By default 5,000. */
  grace?: number;
  /** Takes the log; levels that it lacks are left out. By default errors go to the console. */
  logger?: Partial<Pick<Console, "error" | "info" | "debug">>;
}

const TICK = 100; // ms: time is counted in ticks
const LINGER = 500; // ms: a client that stays silent for so long after our goodbye is closed
const { NotConnected, ConnectionAborted, BadResource } = Deno.errors;

// ---- The server
/**
 * Serves every client of every listener in one loop, until the signal aborts or all listeners have been
 * closed, and all clients have left. Trouble with one client closes that client and nothing else.
 *
 * @throws {RangeError} If `idleTimeout` or `grace` is not a number of milliseconds from 0 up.
 * @example
 * ```ts
 * import { listen, serve } from "./select_server.ts";
 * console.log(await serve(listen({ port: 0 }), { signal: AbortSignal.timeout(100) }));
 * ```
 */
export async function serve(
  listeners: Deno.Listener[],
  options: ServeOptions = {},
): Promise<Totals> {
  const {
    protocol = () => echo,
    idleTimeout = Infinity,
    grace = 5000,
    signal,
  } = options;
  const { logger = { error: console.error } }: ServeOptions = options;
  for (const [name, value] of Object.entries({ idleTimeout, grace })) {
    if (!(value >= 0)) {
      throw new RangeError(
        `${name} is ${value}, expected milliseconds from 0 up`,
      );
    }
  }
  const selector = new Selector<Completion>();
  const push: Push = (completion) => selector.push(completion);
  const listening = new Set(listeners);
  const clients = new Set<Client>();
  const totals: Totals = { clients: 0, messages: 0, bytes: 0 };
  let paused: Set<Deno.Listener> | undefined; // out of descriptors: who accepts again at the next tick
  let graceLeft: number | undefined; // once the signal has aborted
  let timer: ReturnType<typeof setTimeout> | undefined;
  const onAbort = () => push({ type: "abort" });
  signal?.addEventListener("abort", onAbort);
  if (signal?.aborted) onAbort();
  for (const listener of listening) {
    log("info", `listening on ${formatAddress(listener.addr)}`);
    startAccept(listener);
  }

  while (listening.size > 0 || clients.size > 0) {
    for (const completion of await selector.select()) {
      if ("client" in completion && completion.client.state === "closed") {
        continue; // closed meanwhile
      }
      switch (completion.type) {
        case "accepted": // a client has connected: wait for the next one, and for what it says
          startAccept(completion.listener);
          welcome(completion.conn);
          break;
        case "received": // null is the end of the stream
          if (completion.count === null) {
            disconnect(completion.client, "end of stream");
          } else answer(completion.client, completion.count);
          break;
        case "replied": // a transaction is done, at once or after a while; null says goodbye
          if (completion.reply === null) halfClose(completion.client);
          send(completion.client, completion.reply ?? NOTHING);
          break;
        case "sent": // perhaps a part only: the rest is sent in the next round
          send(
            completion.client,
            completion.client.unsent.subarray(completion.count),
          );
          break;
        case "failed": // reset, broken pipe, a failed reply: it ends this client alone
          disconnect(completion.client, describe(completion.error));
          break;
        case "accept failed": // that client gave up, descriptors ran out, or the port was closed
          acceptFailed(completion.listener, completion.error);
          break;
        case "tick": // some time has passed: who has made no progress, and who accepts again?
          tick();
          break;
        case "abort": // no more clients, no more messages: what is owed goes out, then goodbye
          stop();
          break;
      }
    }
  }
  clearTimeout(timer);
  signal?.removeEventListener("abort", onAbort);
  log(
    "info",
    `served ${
      Object.entries(totals).map(([what, n]) => `${n} ${what}`).join(", ")
    }`,
  );
  return totals;

  function startAccept(listener: Deno.Listener): void {
    listener.accept().then(
      (conn) => push({ type: "accepted", listener, conn }),
      (error) => push({ type: "accept failed", listener, error }),
    );
  }

  function welcome(conn: Connection): void {
    const name = `client ${++totals.clients} (${
      formatAddress(conn.remoteAddr)
    })`;
    const client = new Client(name, conn, push);
    clients.add(client);
    log("info", `${name} connected`);
    startTicking();
    try {
      conn.setNoDelay?.(); // or a reply may wait for the acknowledgement of the one before (RFC 896)
    } catch { /* a client that has reset already: its read says so */ }
    readOn(client);
  }

  /** Reads from it when everybody who is ready has been read from; all that it is owed is out. */
  function readOn(client: Client): void {
    client.state = "reading";
    selector.nextRound(client.startRead);
    if (graceLeft !== undefined && !client.halfClosed) halfClose(client);
  }

  function answer(client: Client, count: number): void {
    client.ticks = 0;
    if (client.halfClosed) return readOn(client);
    if (count === client.buffer.length) client.nextSize = LARGE_BUFFER;
    else if (count < SMALL_BUFFER) client.nextSize = SMALL_BUFFER;
    totals.messages++;
    totals.bytes += count;
    if (logger.debug) log("debug", `${client.name} sent ${count} bytes`);
    client.state = "replying";
    try {
      client.reply ??= protocol(client.conn.remoteAddr);
      const reply = client.reply(client.buffer.subarray(0, count));
      if (reply instanceof Promise) {
        reply.then(client.onReplied, client.onFailed);
      } else client.onReplied(reply);
    } catch (error) {
      client.onFailed(error);
    }
  }

  function send(client: Client, bytes: Uint8Array): void {
    client.ticks = 0;
    client.unsent = bytes.length > 0 ? bytes : NOTHING; // an empty part would hold the whole
    if (bytes.length === 0) return readOn(client);
    if (client.state === "writing") {
      return selector.nextRound(client.startWrite); // the rest
    }
    client.state = "writing";
    client.startWrite();
  }

  /**
   * Says goodbye: ends our side, and leaves theirs to be read to its end, unanswered. To close with
   * bytes unread would reset the connection, and lose a reply on its way (RFC 1122, 4.2.2.13).
   */
  function halfClose(client: Client): void {
    client.halfClosed = true;
    client.ticks = 0;
    client.conn.closeWrite().catch(client.onFailed);
  }

  function disconnect(client: Client, why: string): void {
    const level = client.state === "replying" ? "error" : "info"; // a reply that fails is our trouble
    log(level, `${client.name} disconnected while ${client.state}: ${why}`);
    clients.delete(client);
    client.state = "closed";
    client.conn.closeWrite().catch(() => {}); // Deno 2.8 leaves a connection that is read from open
    client.conn[Symbol.dispose](); // a close that does not throw when somebody else has closed it
  }

  function acceptFailed(listener: Deno.Listener, error: unknown): void {
    const gaveUp = error instanceof NotConnected ||
      error instanceof ConnectionAborted;
    if (gaveUp) return startAccept(listener);
    if (error instanceof BadResource) { // closed by a stop or by somebody else
      listening.delete(listener);
      return log("info", `${formatAddress(listener.addr)} is closed`);
    }
    if (paused === undefined) {
      log("error", `accepting pauses: ${describe(error)}`);
    }
    paused = (paused ?? new Set()).add(listener);
    startTicking();
  }

  function startTicking(): void {
    timer ??= selector.after(TICK, () => push({ type: "tick" }));
  }

  /** A tick comes when everybody who is ready has been heard, so a loop that is late wrongs nobody. */
  function tick(): void {
    for (const client of clients) {
      const idle = TICK * client.ticks++; // the first tick may come at once: it does not count
      if (idle >= idleTimeout || (client.halfClosed && idle >= LINGER)) {
        disconnect(client, `no progress for ${idle / 1000} s`);
      }
    }
    if (graceLeft !== undefined && (graceLeft -= TICK) < 0) {
      for (const client of clients) {
        disconnect(client, "the grace time is over");
      }
    }
    if (paused?.size === 0) { // since the last tick nobody has failed
      log("error", "accepting again");
      paused = undefined;
    }
    paused?.forEach(startAccept);
    paused?.clear();
    timer = undefined;
    if (clients.size > 0 || paused !== undefined) startTicking(); // or there is nothing to time
  }

  function stop(): void {
    log("info", `stopping: ${clients.size} clients are connected`);
    graceLeft = grace;
    for (const listener of listening) listener[Symbol.dispose](); // and so its accept fails
    for (const client of clients) {
      if (client.state === "reading" && !client.halfClosed) halfClose(client); // is owed nothing
    }
  }

  function log(level: Level, line: string): void {
    try {
      logger[level]?.(line.replace(/\p{Cc}+/gu, " ")); // what an error quotes must not forge a line
    } catch {
      /* a log that cannot be written must not cost a client its connection */
    }
  }
}

function formatAddress(addr: Deno.Addr): string {
  if (!("hostname" in addr)) return Deno.inspect(addr);
  return `${
    addr.hostname.includes(":") ? `[${addr.hostname}]` : addr.hostname
  }:${addr.port}`;
}

function describe(error: unknown): string {
  return error instanceof Error
    ? `${error.name}: ${error.message}`
    : Deno.inspect(error);
}

// ---- The selector
// What follows is of today's runtime: wrong numbers cost speed or fairness, not correctness. tokio lets
// a task complete 128 I/O operations a turn (`tokio::task::coop`), and puts off the rest until it has
// looked for what is ready, which it does at least every 61 turns (`event_interval`).
const BATCH = 60; // reads to start in a turn: each leads to a write, and both must fit in
const CROWD = 120; // so many at once, and others may have been put off
const CATCH_UP = 64; // turns that bring them in
const turn = () => new Promise<void>((resolve) => void setImmediate(resolve));

/**
 * select() for promises. Where select(2) tells that a socket is *ready* for an operation, this tells
 * that an operation is *complete*: whoever starts one has its `then` push what has completed, a `T` of
 * your choice. So each promise is subscribed to once; `Promise.race` subscribes to all, each time.
 * @example
 * ```ts
 * import { Selector } from "./select_server.ts";
 * const selector = new Selector<string>();
 * await Promise.resolve(1).then((value) => selector.push(`got ${value}`));
 * selector.nextRound(() => selector.push("started"));
 * console.log(await selector.select(), await selector.select()); // [ "got 1" ] [ "started" ]
 * ```
 */
export class Selector<T> {
  #completed: T[] = [];
  #round: (() => void)[] = []; // what is still to start in this round
  #nextRound: (() => void)[] = [];
  #turnsLeft = 0; // before the next round
  #wake?: () => void;

  /** Adds a completion. */
  push(completion: T): void {
    this.#completed.push(completion);
    this.#wake?.();
  }

  /** Starts an operation when all that has completed has been handed out, so that nobody starves. */
  nextRound(start: () => void): void {
    this.#nextRound.push(start);
    this.#wake?.();
  }

  /** The same after so many ms, and after all that is ready by then. Returns what `clearTimeout` takes. */
  after(ms: number, start: () => void): ReturnType<typeof setTimeout> {
    return setTimeout(() => {
      this.#turnsLeft = CATCH_UP;
      this.nextRound(start);
    }, ms);
  }

  /**
   * Resolves to all that has completed since the last call, in order, once there is something; to nothing
   * when a timeout in milliseconds is up before (0 polls). It is for one caller at a time.
   */
  async select(timeout?: number): Promise<T[]> {
    let timeIsUp = false;
    const timer = timeout === undefined
      ? timeout
      : this.after(timeout, () => timeIsUp = true);
    while (this.#completed.length === 0 && !timeIsUp) {
      if (this.#round.length > 0) {
        for (const start of this.#round.splice(0, BATCH)) start();
        await turn();
      } else if (this.#turnsLeft > 0) {
        this.#turnsLeft--;
        await turn();
      } else if (this.#nextRound.length > 0) {
        this.#round = this.#nextRound.splice(0);
      } else {
        await new Promise<void>((resolve) => this.#wake = resolve);
        this.#wake = undefined;
      }
    }
    clearTimeout(timer);
    if (this.#completed.length >= CROWD) this.#turnsLeft = CATCH_UP;
    return this.#completed.splice(0);
  }
}

// ---- Ports and replies
/** Where to {@linkcode listen}: an address or name, the first port, and how many. */
export type ListenOptions = { host?: string; port?: number; ports?: number };

/**
 * Opens consecutive ports: all of them or, when one cannot be opened, none. By default the book's, 50007
 * and 50008, which only this machine reaches. From port 0 the system chooses each of them.
 *
 * @throws {Error} If a port cannot be opened; the message names it, the cause says why.
 * @example
 * ```ts
 * import { listen } from "./select_server.ts";
 * for (using listener of listen({ port: 0 })) console.log(listener.addr.port);
 * ```
 */
export function listen(options: ListenOptions = {}): Deno.TcpListener[] {
  const { host: hostname = "127.0.0.1", port: first = 50007, ports = 2 } =
    options;
  using opened = new DisposableStack();
  const listeners = Array.from({ length: ports }, (_, i) => {
    const port = first === 0 ? 0 : first + i;
    try {
      // The default backlog, 511 clients, makes a crowd that connects at once retry for seconds.
      return opened.use(Deno.listen({ hostname, port, tcpBacklog: 4096 }));
    } catch (cause) {
      const address = formatAddress({ transport: "tcp", hostname, port });
      throw new Error(`cannot listen on ${address}: ${describe(cause)}`, {
        cause,
      });
    }
  });
  opened.move(); // all are open: keep them so
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
 * Replies as the book's server does: `Echo=>TEXT at TIME`. The bytes need not be text.
 * @example
 * ```ts
 * import { stamp } from "./select_server.ts";
 * console.log(new TextDecoder().decode(stamp(new TextEncoder().encode("spam"))));
 * ```
 */
export function stamp(bytes: Uint8Array): Uint8Array {
  const encoder = new TextEncoder();
  const time = encoder.encode(` at ${new Date().toISOString()}`);
  return new Uint8Array([...encoder.encode("Echo=>"), ...bytes, ...time]);
}

// ---- The command line
const HELP = `\
Select server: echoes what its clients send, on several ports, in one loop.

  deno run --allow-net select_server.ts [OPTIONS]

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

function parseCommandLine() {
  const refuse = (arg: unknown) => {
    throw new RangeError(`${arg}: expected one of the options in --help`);
  };
  const args = parseArgs(Deno.args, {
    string: ["host", "port", "ports", "delay", "idle-timeout"],
    boolean: ["stamp", "verbose", "quiet", "help"],
    alias: { host: "H", port: "p", verbose: "v", quiet: "q", help: "h" },
    unknown: refuse,
  });
  args._.forEach(refuse); // what comes after --
  if (args.host === "") {
    throw new RangeError("--host: expected an address or a name");
  }
  const number = (
    option: string,
    text: string | undefined,
    least: number,
    most: number,
  ) => {
    if (text === undefined) return undefined;
    if (/^\d+$/.test(text) && Number(text) >= least && Number(text) <= most) {
      return Number(text);
    }
    throw new RangeError(
      `${option} ${text}: expected a whole number from ${least} to ${most}`,
    );
  };
  const port = number("--port", args.port, 0, 65535) ?? 50007;
  const ports = number("--ports", args.ports, 1, 65536 - port);
  const seconds = number("--idle-timeout", args["idle-timeout"], 1, 1e6) ??
    Infinity;
  const ms = number("--delay", args.delay, 0, 2 ** 31 - 1);
  return { ...args, port, ports, idleTimeout: 1000 * seconds, ms };
}

async function main(): Promise<void> {
  const { ms, idleTimeout, help, quiet, verbose, stamp: stamped, ...where } =
    parseCommandLine();
  if (help) return console.log(HELP);
  const listeners = listen(where);
  const stop = new AbortController();
  const { signal } = stop;
  for (
    const name of [
      "SIGINT",
      Deno.build.os === "windows" ? "SIGBREAK" : "SIGTERM",
    ] as const
  ) {
    Deno.addSignalListener(
      name,
      () => signal.aborted ? Deno.exit(1) : stop.abort(),
    );
  }
  const { error, info } = console;
  const logger = quiet ? { error } : verbose ? console : { error, info };
  const reply = stamped ? stamp : echo;
  const delayed = async (bytes: Uint8Array) => {
    await delay(ms, undefined, { signal }).catch(() => {}); // a stop ends it early
    return reply(bytes);
  };
  const protocol = () => ms ? delayed : reply;
  await serve(listeners, { protocol, idleTimeout, signal, logger });
}

if (import.meta.main) {
  await main().catch((error) => {
    console.error(
      `select_server: ${error instanceof Error ? error.message : error}`,
    );
    Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
  });
  Deno.exit(); // in Deno 2.8, what was pending when a connection was closed keeps the process
}
