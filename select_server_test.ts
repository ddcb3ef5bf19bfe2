/**
 * What the selector, the server and the client promise.
 *
 * Plain `deno test` needs no permission: it runs the server on a network in
 * memory, in a time of its own. Where sockets are allowed, the same tests run
 * over sockets, too. A test that is ignored says which permission it needs.
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { Buffer } from "node:buffer";
import { clearImmediate, setImmediate } from "node:timers";
import { once } from "node:events";
import { connect as connectNode, createServer, Socket } from "node:net";
import {
  echo,
  type Handler,
  listen,
  type Peer,
  Selector,
  serve,
  type ServeOptions,
  stamp,
} from "./select_server.ts";

// ---- What may be used, and tests that end

const granted = async (permission: Deno.PermissionDescriptor) =>
  (await Deno.permissions.query(permission)).state === "granted";
const hosts = ["127.0.0.1", "localhost", "[::1]"];
const hostsGranted = hosts.map((host) => granted({ name: "net", host }));
const net = (await Promise.all(hostsGranted)).every((yes) => yes);
const anyNet = await granted({ name: "net" });
const run = anyNet && await granted({ name: "run" });
const readme = await granted({ name: "read" })
  ? await Deno.readTextFile(new URL(import.meta.resolve("./README.md")))
  : "";
const withReadme = run && readme !== "";
const canReset = net && "resetAndDestroy" in Socket.prototype; // Deno 2.7 on
// Deno 2.8 leaves a connection open that is read from when it is closed.
const cancels = !Deno.version.deno.startsWith("2.8.");
const posix = Deno.build.os !== "windows";

/** What a test needs, as its name says it, and whether that is there. */
const needs = {
  nothing: ["", true],
  net: [" (needs --allow-net)", net],
  anyNet: [" (needs --allow-net for every host)", anyNet],
  reset: [" (needs --allow-net, Deno 2.7)", canReset],
  cancels: [" (needs --allow-net, any Deno but 2.8)", net && cancels],
  run: [" (needs --allow-net --allow-run)", run],
  signals: [" (needs --allow-net --allow-run, no Windows)", run && posix],
  readme: [" (needs --allow-net --allow-run --allow-read)", withReadme],
} as const;

/** A test that leaves nothing behind: Deno 2.8 does not check that itself. */
function test(
  needed: keyof typeof needs,
  name: string,
  fn: () => void | Promise<void>,
  limit = 60_000, // ms
): void {
  const [words, available] = needs[needed];
  Deno.test({
    name: name + words,
    fn: () => within(Promise.resolve().then(fn), "end of the test", "", limit),
    ignore: !available,
    sanitizeOps: true,
    sanitizeResources: true,
  });
}

const encode = (text: string) => new TextEncoder().encode(text);
const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
const sleep = (ms: number) =>
  new Promise<void>((resolve) => void setTimeout(resolve, ms));
const turn = () => new Promise<void>((resolve) => void setImmediate(resolve));
const blockFor = (ms: number) => {
  for (const end = performance.now() + ms; performance.now() < end;);
};

/** Waits for so long, then fails: what was waited for, and what was seen. */
async function within<T>(
  promise: Promise<T>,
  what: string,
  seen: unknown = "nothing", // shown as a string
  ms = 10_000,
): Promise<T> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => {
    late.reject(new Error(`${ms} ms are over: no ${what}; saw: ${seen}`));
  }, ms);
  try {
    return await Promise.race([promise, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}

/** Lines that can be waited for. */
class Log {
  readonly lines: string[] = [];
  #waiting: { pattern: RegExp; resolve: (line: string) => void }[] = [];

  add(line: string): void {
    this.lines.push(line);
    for (const { pattern, resolve } of this.#waiting) {
      if (pattern.test(line)) resolve(line);
    }
  }
  error = (line: string) => this.add(`error ${line}`);
  info = (line: string) => this.add(`info ${line}`);
  debug = (line: string) => this.add(`debug ${line}`);

  /** Resolves to the first line that matches, once it is there. */
  line(pattern: RegExp): Promise<string> {
    const { promise, resolve } = Promise.withResolvers<string>();
    this.#waiting.push({ pattern, resolve });
    const line = this.lines.find((line) => pattern.test(line));
    if (line !== undefined) resolve(line);
    return within(promise, `line like ${pattern}`, this);
  }

  count(pattern: RegExp): number {
    return this.lines.filter((line) => pattern.test(line)).length;
  }

  toString(): string {
    return this.lines.map((line) => `\n  ${line}`).join("");
  }
}

// ---- A network in memory

const { BadResource, BrokenPipe, ConnectionRefused, ConnectionReset } =
  Deno.errors;
const { ConnectionAborted, Interrupted, NotConnected } = Deno.errors;

/** Something that changes, and can be waited for. */
class Watched {
  #waiting: (() => void)[] = [];

  changed(): void {
    for (const lookAgain of this.#waiting.splice(0)) lookAgain();
  }

  /** Resolves when it is so. Like an operation of a socket, never at once. */
  async until(isSo: () => boolean): Promise<void> {
    await turn();
    while (!isSo()) {
      await new Promise<void>((resolve) => void this.#waiting.push(resolve));
    }
  }
}

/** One direction of a connection: bytes on their way, as many as fit. */
class Pipe extends Watched {
  length = 0;
  ended = false; // no more bytes come: the writer has said so
  broken = false; // the reader is gone, or the connection is reset

  constructor(readonly bytes: Uint8Array) {
    super();
  }
}

/** One end of a connection of two pipes. It rejects what Deno's rejects. */
class MemoryConn implements Deno.Conn<Deno.NetAddr> {
  closed = false;

  constructor(
    readonly localAddr: Deno.NetAddr,
    readonly remoteAddr: Deno.NetAddr,
    readonly incoming: Pipe,
    readonly outgoing: Pipe,
    readonly pieces: (most: number) => number, // how much one operation takes
  ) {}

  async read(buffer: Uint8Array): Promise<number | null> {
    this.#refuseIfClosed();
    const { bytes } = this.incoming;
    const pipe = this.incoming;
    await pipe.until(() => this.closed || pipe.broken || this.#canRead());
    if (this.closed) throw new Interrupted("operation canceled");
    if (pipe.broken) throw new ConnectionReset("Connection reset by peer");
    if (pipe.length === 0) return null;
    const count = this.pieces(Math.min(buffer.length, pipe.length));
    buffer.set(bytes.subarray(0, count));
    bytes.copyWithin(0, count, pipe.length);
    pipe.length -= count;
    pipe.changed(); // there is room again
    return count;
  }

  async write(data: Uint8Array): Promise<number> {
    this.#refuseIfClosed();
    const pipe = this.outgoing;
    await pipe.until(() => this.closed || pipe.broken || this.#canWrite());
    if (this.closed) throw new Interrupted("operation canceled");
    if (pipe.broken || pipe.ended) throw new BrokenPipe("Broken pipe");
    const room = pipe.bytes.length - pipe.length;
    const count = this.pieces(Math.min(data.length, room));
    pipe.bytes.set(data.subarray(0, count), pipe.length);
    pipe.length += count;
    pipe.changed();
    return count;
  }

  async closeWrite(): Promise<void> {
    this.#refuseIfClosed();
    this.outgoing.ended = true;
    this.outgoing.changed();
    await turn();
  }

  /** A close with bytes unread resets (RFC 1122, 4.2.2.13); else it ends. */
  close(): void {
    this.#refuseIfClosed();
    this.closed = true;
    if (this.incoming.length > 0) return this.reset();
    this.outgoing.ended = true;
    this.incoming.broken = true; // what the other side writes now reaches nobody
    this.outgoing.changed();
    this.incoming.changed();
  }

  /** Both sides lose what is on its way. */
  reset(): void {
    this.closed = true;
    for (const pipe of [this.incoming, this.outgoing]) {
      pipe.length = 0;
      pipe.broken = true;
      pipe.changed();
    }
  }

  [Symbol.dispose](): void {
    if (!this.closed) this.close();
  }

  get readable(): ReadableStream<Uint8Array<ArrayBuffer>> {
    return ReadableStream.from(chunksOf(this));
  }

  get writable(): WritableStream<Uint8Array<ArrayBufferLike>> {
    return new WritableStream({
      write: (bytes) => writeAll(this, bytes),
      close: () => this.close(),
    });
  }

  ref(): void {} // nothing here keeps a process alive
  unref(): void {}

  #canRead = () => this.incoming.length > 0 || this.incoming.ended;
  #canWrite = () => {
    const { ended, length, bytes } = this.outgoing;
    return ended || length < bytes.length;
  };

  #refuseIfClosed(): void {
    if (this.closed) throw new BadResource("Bad resource ID");
  }
}

async function* chunksOf(conn: Deno.Conn) {
  const buffer = new Uint8Array(64 * 1024);
  for (let n; (n = await conn.read(buffer)) !== null;) yield buffer.slice(0, n);
  conn.close();
}

async function writeAll(conn: Deno.Conn, bytes: Uint8Array): Promise<void> {
  for (let n = 0; n < bytes.length;) n += await conn.write(bytes.subarray(n));
}

/** Takes connections from a queue, its backlog. */
class MemoryListener extends Watched
  implements Deno.Listener<MemoryConn, Deno.NetAddr> {
  readonly backlog: MemoryConn[] = [];
  readonly errors: Error[] = []; // what accept fails with first
  closed = false;

  constructor(readonly addr: Deno.NetAddr) {
    super();
  }

  async accept(): Promise<MemoryConn> {
    const { backlog, errors } = this;
    await this.until(() => this.closed || backlog.length + errors.length > 0);
    if (this.closed) throw new BadResource("Listener has been closed");
    const error = errors.shift();
    if (error !== undefined) throw error;
    const conn = backlog.shift();
    this.changed(); // there is room again
    // The runtime asks for the address of the other side, which may be gone.
    if (conn === undefined || conn.incoming.broken) {
      conn?.reset();
      throw new NotConnected("Transport endpoint is not connected");
    }
    return conn;
  }

  close(): void {
    if (this.closed) throw new BadResource("Bad resource ID");
    this.closed = true;
    for (const conn of this.backlog) conn.reset();
    this.changed();
  }

  async *[Symbol.asyncIterator]() {
    while (!this.closed) yield await this.accept();
  }

  [Symbol.dispose](): void {
    if (!this.closed) this.close();
  }

  ref(): void {} // nothing here keeps a process alive
  unref(): void {}
}

/** Listeners by their ports, and every connection that there has been. */
class MemoryNetwork {
  readonly listeners: MemoryListener[] = [];
  readonly conns: MemoryConn[] = [];

  constructor(
    readonly capacity = 64 * 1024, // bytes that a pipe holds
    readonly pieces = (most: number) => most,
    readonly backlog = 128,
  ) {}

  listen(ports: number): MemoryListener[] {
    return Array.from({ length: ports }, () => {
      const listener = new MemoryListener(at(1 + this.listeners.length));
      this.listeners.push(listener);
      return listener;
    });
  }

  async connect(port: number, from = 50_000 + this.conns.length) {
    const listener = this.listeners.find(({ addr }) => addr.port === port);
    const queued = listener?.backlog ?? [];
    await listener?.until(() =>
      listener.closed || queued.length < this.backlog
    );
    if (listener === undefined || listener.closed) {
      throw new ConnectionRefused("Connection refused");
    }
    const [there, back] = [0, 1].map(() =>
      new Pipe(new Uint8Array(this.capacity))
    );
    assert(there !== undefined && back !== undefined);
    const client = new MemoryConn(at(from), at(port), back, there, this.pieces);
    const server = new MemoryConn(at(port), at(from), there, back, this.pieces);
    this.conns.push(client, server);
    listener.backlog.push(server);
    listener.changed();
    return client;
  }
}

const at = (port: number): Deno.NetAddr => ({
  transport: "tcp",
  hostname: "127.0.0.1",
  port,
});

/** The time in ms, and a way to keep the loop from running for a while. */
type Time = { now: () => number; block: (ms: number) => void };
type VirtualTime = Time & { timers: () => number }; // those that are pending

/**
 * Runs a function in virtual time, which passes with the turns of the event
 * loop. So a minute takes a moment, and is the same each time it is run.
 */
async function inVirtualTime(
  fn: (time: VirtualTime) => Promise<void>,
  msPerTurn = 0.1,
): Promise<void> {
  const limit = 120_000; // ms
  const { setTimeout, clearTimeout } = globalThis;
  const timers = new Map<number, { due: number; call: () => void }>();
  let [now, nextDue, id, ended] = [0, Infinity, 0, false];
  Object.assign(globalThis, {
    setTimeout(call: () => void, ms = 0) {
      timers.set(++id, { due: now + ms, call });
      nextDue = Math.min(nextDue, now + ms);
      return id;
    },
    clearTimeout: (id: number) => timers.delete(id),
  });
  try {
    const time: VirtualTime = {
      now: () => now,
      block: (ms) => void (now += ms),
      timers: () => timers.size,
    };
    const running = fn(time).finally(() => ended = true);
    running.catch(() => {}); // it is awaited below
    for (; !ended; now += msPerTurn) {
      if (now > limit) throw new Error(`it hangs: ${limit} ms are over`);
      await turn();
      while (nextDue <= now) {
        const inOrder = [...timers].sort(([, a], [, b]) => a.due - b.due);
        const [[first, timer] = []] = inOrder;
        nextDue = timer?.due ?? Infinity;
        if (first === undefined || nextDue > now) break;
        timers.delete(first);
        timer?.call();
      }
    }
    await running;
  } finally {
    Object.assign(globalThis, { setTimeout, clearTimeout });
  }
}

// ---- What a test says and hears

const tooMuch = new Uint8Array(50_000_000); // for sockets to hold
const never = () => new Promise<never>(() => {});
const throwing = (error: unknown) => (): never => {
  throw error;
};

/** A handler as a program without types may write it. */
function untyped(handler: (bytes: Uint8Array) => unknown): Handler {
  const untyped: unknown = handler;
  assert(isHandler(untyped));
  return untyped;
}
const isHandler = (value: unknown): value is Handler =>
  typeof value === "function";

/** The only element of a list of one. */
function only<T>([first, ...rest]: T[]): T {
  assert(first !== undefined && rest.length === 0);
  return first;
}

/** What one read brings, as text; "" at the end of the stream. */
async function hear(conn: Deno.Conn): Promise<string> {
  const buffer = new Uint8Array(1000);
  const count = await within(conn.read(buffer), "bytes to read");
  return decode(buffer.subarray(0, count ?? 0));
}

async function ask(conn: Deno.Conn, text: string): Promise<string> {
  await writeAll(conn, encode(text));
  return hear(conn);
}

/** Reads to the end of the stream, and closes the connection. */
async function readAll(conn: Deno.Conn): Promise<Uint8Array> {
  const all = new Response(conn.readable).arrayBuffer();
  return new Uint8Array(await within(all, "end of the stream"));
}

// ---- One body for both networks

/** What a test uses of a network, in memory or over sockets. */
interface Network extends Time {
  listen(ports: number): Deno.Listener<Deno.Conn, Deno.NetAddr>[];
  connect(port: number): Promise<Deno.Conn>;
  /** Connects, sends, and resets: at once or when `until` has resolved. */
  reset(port: number, text?: string, until?: Promise<unknown>): Promise<void>;
}

const sockets: Network = {
  now: () => performance.now(),
  block: blockFor,
  listen: (ports) => listen({ port: 0, ports }),
  connect: (port) => Deno.connect({ hostname: "127.0.0.1", port }),
  async reset(port, text = "", until) {
    const socket = connectNode(port, "127.0.0.1");
    await once(socket, "connect");
    if (text !== "") socket.write(text);
    await until;
    await once(socket.resetAndDestroy(), "close"); // SO_LINGER 0
  },
};

function inMemory(time: Time): Network {
  const network = new MemoryNetwork();
  return {
    ...time,
    listen: (ports) => network.listen(ports),
    connect: (port) => network.connect(port),
    async reset(port, text = "", until) {
      const conn = await network.connect(port);
      if (text !== "") await conn.write(encode(text));
      await until;
      conn.reset();
    },
  };
}

/** Those that wait, and so run side by side over sockets. */
const slow: [name: string, fn: (network: Network) => Promise<void>][] = [];

/** The same test in memory, which needs no permission, and over sockets. */
function testOnBoth(
  name: string,
  fn: (network: Network) => Promise<void>,
  needed: "net" | "reset" | "cancels" | "slow" = "net",
): void {
  test(
    "nothing",
    `${name}, in memory`,
    () => inVirtualTime((time) => fn(inMemory(time))),
  );
  if (needed === "slow") slow.push([name, fn]);
  else test(needed, `${name}, over sockets`, () => fn(sockets));
}

testOnBoth(
  "a network: bytes arrive in order, then the end",
  async (network) => {
    using listener = only(network.listen(1));
    using client = await network.connect(listener.addr.port);
    using conn = await listener.accept();
    assertEquals(conn.remoteAddr, client.localAddr);
    await writeAll(client, encode("ham"));
    await writeAll(client, encode("spam"));
    await client.closeWrite();
    let heard = "";
    for (let text; (text = await hear(conn)) !== "";) heard += text;
    assertEquals(heard, "hamspam");
    await conn.write(encode("eggs")); // the other direction is open still
    assertEquals(await hear(client), "eggs");
    await assertRejects(() => client.write(encode("x")), BrokenPipe);
  },
);

testOnBoth("a network: a write waits until there is room", async (network) => {
  using listener = only(network.listen(1));
  using client = await network.connect(listener.addr.port);
  const conn = await listener.accept();
  let written = 0;
  const writing = (async () => {
    while (written < tooMuch.length) {
      written += await client.write(tooMuch.subarray(written));
    }
    await client.closeWrite();
  })();
  for (let before = -1; before < written;) {
    before = written;
    await sleep(50);
  }
  assert(written < tooMuch.length);
  assertEquals((await readAll(conn)).length, tooMuch.length);
  await writing;
});

testOnBoth("a network: what is closed rejects", async (network) => {
  const listener = only(network.listen(1));
  const { port } = listener.addr;
  const client = await network.connect(port);
  const conn = await listener.accept();
  const accepting = assertRejects(() => listener.accept(), BadResource);
  await sleep(10);
  conn.close();
  listener.close();
  await accepting;
  await assertRejects(() => conn.read(new Uint8Array(1)), BadResource);
  await assertRejects(() => conn.write(new Uint8Array(1)), BadResource);
  await assertRejects(() => conn.closeWrite(), BadResource);
  await assertRejects(() => listener.accept(), BadResource);
  assertThrows(() => conn.close(), BadResource);
  assertThrows(() => listener.close(), BadResource);
  await assertRejects(() => network.connect(port), ConnectionRefused);
  assertEquals(await hear(client), "");
  await assertRejects(async () => {
    while (true) { // the first may go out before a socket is told
      await client.write(encode("x"));
      await sleep(10);
    }
  }, BrokenPipe);
  client.close();
});

testOnBoth(
  "a network: a close ends the read that is pending",
  async (network) => {
    using listener = only(network.listen(1));
    using _client = await network.connect(listener.addr.port);
    const conn = await listener.accept();
    const reading = conn.read(new Uint8Array(1));
    const rejected = assertRejects(() => reading, Interrupted);
    await sleep(10);
    conn.close();
    await rejected;
  },
  "cancels",
);

testOnBoth(
  "a network: a close with bytes unread resets, and so does a reset",
  async (network) => {
    using listener = only(network.listen(1));
    const { port } = listener.addr;
    using client = await network.connect(port);
    const conn = await listener.accept();
    await client.write(encode("unread"));
    await sleep(10);
    conn.close();
    await sleep(10);
    await assertRejects(() => client.write(encode("x")), BrokenPipe);

    const asked = Promise.withResolvers<void>();
    const resetting = network.reset(port, "text", asked.promise);
    using other = await listener.accept();
    assertEquals(await hear(other), "text");
    asked.resolve();
    await resetting;
    await assertRejects(() => other.read(new Uint8Array(1)), ConnectionReset);
    await assertRejects(() => other.write(encode("x")), BrokenPipe);
  },
  "reset",
);

// ---- The selector

test(
  "nothing",
  "Selector: select hands out all that has completed, in order, each once",
  async () => {
    const selector = new Selector<number>();
    setTimeout(() => [1, 2, 3].forEach((n) => selector.push(n)));
    assertEquals(await selector.select(), [1, 2, 3]);
    selector.push(4);
    assertEquals(await selector.select(), [4]);
  },
);

test(
  "nothing",
  "Selector: select resolves to an empty list when its time is up",
  async () => {
    const selector = new Selector<string>();
    for (const timeout of [0, 30]) {
      const start = performance.now();
      assertEquals(await selector.select(timeout), []);
      assert(performance.now() - start >= timeout - 1, "not before its time");
    }
    selector.push("late");
    assertEquals(await selector.select(0), ["late"]);
    setTimeout(() => selector.push("in time"), 5);
    assertEquals(await selector.select(60_000), ["in time"]);
  },
);

test("nothing", "Selector: without a limit of time, select waits", async () => {
  const selector = new Selector<string>();
  const waiting = selector.select(Infinity);
  await sleep(20);
  selector.push("at last");
  assertEquals(await waiting, ["at last"]);
});

test(
  "nothing",
  "Selector: it refuses more time than a timer holds",
  async () => {
    const selector = new Selector<string>();
    const message = "ms is 2147483648, expected at most 2147483647";
    assertThrows(() => selector.after(2 ** 31, () => {}), RangeError, message);
    await assertRejects(() => selector.select(2 ** 31), RangeError, message);
  },
);

test(
  "nothing",
  "Selector: of two callers of select, none waits for ever",
  async () => {
    const selector = new Selector<number>();
    const both = [selector.select(), selector.select()];
    for (let n = 0; n < 3; n++) {
      await sleep(1);
      selector.push(n);
    }
    assertEquals((await within(Promise.all(both), "answers")).flat(), [0, 1]);
    assertEquals(await selector.select(), [2]);
  },
);

testOnBoth(
  "Selector: select polls for what is ready to be delivered",
  async (network) => {
    using listener = only(network.listen(1));
    using client = await network.connect(listener.addr.port);
    using conn = await listener.accept();
    const selector = new Selector<number | null>();
    const buffer = new Uint8Array(8);
    selector.nextRound(() =>
      void conn.read(buffer).then((n) => selector.push(n))
    );
    await client.write(encode("hello"));
    assertEquals(await selector.select(0), [5]);
  },
);

test(
  "nothing",
  "Selector: the next round starts when all that is ready has been handed out",
  async () => {
    const selector = new Selector<string>();
    selector.nextRound(() => selector.push("next"));
    selector.push("ready");
    assertEquals(await selector.select(), ["ready"]);
    selector.nextRound(() => selector.push("after next"));
    assertEquals(await selector.select(), ["next", "after next"]);
    setTimeout(
      () => selector.nextRound(() => selector.push("while it waits")),
      5,
    );
    assertEquals(await selector.select(), ["while it waits"]);
  },
);

/**
 * A runtime that completes 128 operations a turn and looks at those it has put
 * off every 61 turns, as Deno's does. Every operation is ready at once.
 */
function busyRuntime() {
  const ready: (() => void)[] = [];
  const putOff: (() => void)[] = [];
  let turns = 0;
  const run = () => {
    if (++turns % 61 === 0) ready.push(...putOff.splice(0));
    for (const complete of ready.splice(0, 128)) complete();
    putOff.push(...ready.splice(0));
    timer = setImmediate(run);
  };
  let timer = setImmediate(run);
  const start = (complete: () => void) => void ready.push(complete);
  return { start, [Symbol.dispose]: () => clearImmediate(timer) };
}

/** Serves 1,000 clients that are always ready; the fewest and most times. */
async function serveCrowd(inRounds: boolean): Promise<[number, number]> {
  using runtime = busyRuntime();
  const selector = new Selector<number>();
  const served = new Array<number>(1000).fill(0);
  const start = (id: number) => runtime.start(() => selector.push(id));
  served.forEach((_, id) => start(id));
  for (let total = 0; total < 20 * served.length;) {
    for (const id of await selector.select()) {
      total++;
      served[id] = (served[id] ?? 0) + 1;
      if (inRounds) selector.nextRound(() => start(id));
      else start(id);
    }
  }
  return [Math.min(...served), Math.max(...served)];
}

test(
  "nothing",
  "Selector: in rounds, a crowd that is always ready is served alike",
  async () => {
    const [fewest, most] = await serveCrowd(true);
    assert(most - fewest <= 1, `${fewest} to ${most}`);
    assertEquals(
      (await serveCrowd(false))[0],
      0,
      "without rounds, one starves",
    );
  },
);

test(
  "nothing",
  "Selector: time goes on while completions never cease, and comes after them",
  async () => {
    const selector = new Selector<string>();
    const always = () => selector.nextRound(() => selector.push("again"));
    for (let i = 0; i < 10; i++) always();
    selector.after(1, () => selector.push("time"));
    selector.after(20, () => selector.push("late"));
    const heard: string[] = [];
    while (!heard.includes("late")) {
      for (const completion of await selector.select()) {
        if (completion === "again") always();
        else heard.push(completion);
        if (completion !== "time") continue;
        blockFor(40); // beyond "late"; and the runtime puts something off
        (async () => {
          for (let i = 0; i < 60; i++) await turn();
          selector.push("put off");
        })();
      }
    }
    assertEquals(heard, ["time", "put off", "late"]);
  },
);

// ---- The server

/** A server on ports that the system chooses, until the test's block ends. */
function start(
  network: Network,
  options: Omit<ServeOptions, "signal"> = {},
  listeners = network.listen(1),
) {
  const log = new Log();
  const abort = new AbortController();
  const { signal } = abort;
  const serving = serve(listeners, { logger: log, ...options, signal });
  const ended = () => within(serving, "end of serve", log);
  const stop = () => {
    abort.abort();
    return ended();
  };
  return {
    log,
    ended,
    stop,
    port: (nth = 0) => listeners[nth]?.addr.port ?? 0,
    connect: (nth = 0) => network.connect(listeners[nth]?.addr.port ?? 0),
    reset: (text?: string, until?: Promise<unknown>) =>
      network.reset(listeners[0]?.addr.port ?? 0, text, until),
    [Symbol.asyncDispose]: async () => void await stop(),
  };
}
type Server = ReturnType<typeof start>;

/** Connects and sends a text, which the server has read then. */
async function say(server: Server, text: string): Promise<Deno.Conn> {
  const conn = await server.connect();
  await conn.write(encode(text));
  await server.log.line(new RegExp(`sent ${text.length} bytes`));
  return conn;
}

async function assertEchoed(
  server: Pick<Server, "connect">,
  text = "are you there?",
): Promise<void> {
  const conn = await server.connect();
  await writeAll(conn, encode(text));
  await conn.closeWrite();
  assertEquals(decode(await readAll(conn)), text);
}

/** A listener whose accept does something else with what it accepts. */
function changed<T extends Deno.Conn>(
  listener: Deno.Listener<T, Deno.NetAddr>,
  change: (accept: () => Promise<T>) => Promise<T>,
): Deno.Listener<T, Deno.NetAddr> {
  const accept = listener.accept.bind(listener);
  listener.accept = () => change(accept);
  return listener;
}

/** A server of one port that is given each connection changed by `change`. */
function startChanged(network: Network, change: (conn: Deno.Conn) => void) {
  const listener = changed(only(network.listen(1)), async (accept) => {
    const conn = await accept();
    change(conn);
    return conn;
  });
  return start(network, {}, [listener]);
}

testOnBoth(
  "serve: one loop serves hundreds of clients on two ports, and counts them",
  async (network) => {
    await using server = start(network, {}, network.listen(2));
    const clients = await Promise.all(
      Array.from({ length: 300 }, (_, i) => server.connect(i % 2)),
    );
    for (const text of ["one", "two"]) {
      const asked = clients.map((conn, i) => ask(conn, `${text} ${i}`));
      assertEquals(
        await Promise.all(asked),
        clients.map((_, i) => `${text} ${i}`),
      );
    }
    for (const conn of clients) conn.close();
    const bytes = 2 * "one ".length * 300 + 2 * (10 + 2 * 90 + 3 * 200);
    assertEquals(await server.stop(), { clients: 300, messages: 600, bytes });
  },
);

testOnBoth(
  "serve: a client that half-closes gets all its echoes, then the end",
  async (network) => {
    await using server = start(network);
    await assertEchoed(server, "x".repeat(100_000));
    await server.log.line(
      /^info client 1 \(127\.0\.0\.1:\d+\) disconnected .*end of stream$/,
    );
  },
);

testOnBoth(
  "serve: a reply is written to its end, though every write takes one byte",
  async (network) => {
    await using server = startChanged(network, (conn) => {
      const write = conn.write.bind(conn);
      conn.write = (bytes) => write(bytes.subarray(0, 1));
    });
    await assertEchoed(server, "in parts");
  },
);

testOnBoth(
  "serve: 10 MB come back the same, to a reader that is slow to begin",
  async (network) => {
    await using server = start(network);
    const conn = await server.connect();
    const sent = new Uint8Array(10_000_000).map((_, i) =>
      i ^ (i >> 8) ^ (i >> 16)
    );
    const writing = writeAll(conn, sent).then(() => conn.closeWrite());
    await sleep(100);
    const received = await readAll(conn);
    await writing;
    assert(received.length === sent.length);
    assert(received.every((byte, i) => byte === sent[i]));
  },
);

testOnBoth(
  "serve: a client that never reads is held back, and no other is held up",
  async (network) => {
    await using server = start(network, { grace: 0 });
    const rude = await server.connect();
    const block = new Uint8Array(1 << 20);
    let written = 0;
    const writing = (async () => {
      while (true) written += await rude.write(block);
    })();
    for (let before = -1; before < written;) {
      before = written;
      await sleep(50);
      await assertEchoed(server);
    }
    assert(written < tooMuch.length, "back-pressure");
    await server.stop();
    // A close with bytes unread resets.
    await Promise.allSettled([readAll(rude), writing]);
  },
);

testOnBoth(
  "serve: a protocol's memory is its client's own, and so is a slow reply",
  async (network) => {
    const slow = Promise.withResolvers<Uint8Array>();
    let protocols = 0;
    await using server = start(network, {
      protocol: () => {
        protocols++;
        let messages = 0;
        return (bytes) => {
          if (decode(bytes) === "slow") return slow.promise;
          const quiet = decode(bytes) === "quiet";
          return quiet ? new Uint8Array(0) : encode(`${++messages}`);
        };
      },
    });
    using ann = await server.connect();
    using bob = await server.connect();
    assertEquals(
      [await ask(ann, "x"), await ask(ann, "x"), await ask(bob, "x")],
      ["1", "2", "1"],
    );
    await ann.write(encode("slow"));
    await server.log.line(/client 1 .* sent 4 bytes/);
    await bob.write(encode("quiet")); // an empty reply sends nothing
    await server.log.line(/client 2 .* sent 5 bytes/);
    assertEquals(await ask(bob, "x"), "2");
    slow.resolve(encode("at last"));
    assertEquals(await hear(ann), "at last");
    assertEquals(protocols, 2);
  },
);

const thenable = (bytes: Uint8Array) => ({
  then: (resolve: (bytes: Uint8Array) => void) => resolve(bytes),
});
const replies: [string, (bytes: Uint8Array) => unknown, string][] = [
  ["bytes", (bytes) => bytes, "ham"],
  ["a Buffer", (bytes) => Buffer.from(bytes), "ham"],
  ["a string", () => "café", "café"],
  ["a promise of bytes", (bytes) => Promise.resolve(bytes), "ham"],
  ["a promise of a string", () => sleep(5).then(() => "spam"), "spam"],
  ["another thenable", (bytes) => Object.create(thenable(bytes)), "ham"],
  ["nothing", () => {}, ""],
  ["a promise of nothing", () => Promise.resolve(), ""],
  ["an empty string", () => "", ""],
];
for (const [name, reply, text] of replies) {
  testOnBoth(`serve: a handler may reply with ${name}`, async (network) => {
    await using server = start(network, { protocol: () => untyped(reply) });
    const conn = await server.connect();
    await conn.write(encode("ham"));
    await conn.closeWrite();
    assertEquals(decode(await readAll(conn)), text);
    await server.log.line(/client 1 .* disconnected .*: end of stream$/);
  });
}

const noReplies: [string, unknown][] = [
  ["a number", 7],
  ["a plain object", { text: "ham" }],
  ["an ArrayBuffer", new ArrayBuffer(8)],
  ["a function", () => "ham"],
  ["a promise of a number", Promise.resolve(7)],
];
for (const [name, reply] of noReplies) {
  testOnBoth(
    `serve: ${name} is no reply, and fails loudly`,
    async (network) => {
      await using server = start(network, {
        protocol: () => untyped(() => reply),
      });
      const conn = await say(server, "hello");
      await server.log.line(/^error client 1 .* is neither bytes nor a string/);
      assertEquals((await readAll(conn)).length, 0);
    },
  );
}

testOnBoth(
  "serve: a protocol greets, says a last word, and knows both addresses",
  async (network) => {
    const listeners = network.listen(2);
    await using server = start(network, {
      protocol(peer) {
        assert("port" in peer.localAddr && "port" in peer.remoteAddr);
        peer.send(`to ${peer.localAddr.port} from ${peer.remoteAddr.port}\n`);
        return (bytes) => {
          peer.send("221 ");
          peer.send(bytes);
          bytes.fill(0); // it has been copied
          return null;
        };
      },
    }, listeners);
    for (const i of [0, 1]) {
      const conn = await server.connect(i);
      assert("port" in conn.localAddr);
      const greeting = `to ${server.port(i)} from ${conn.localAddr.port}\n`;
      assertEquals(await hear(conn), greeting);
      await conn.write(encode("bye\n"));
      assertEquals(decode(await readAll(conn)), "221 bye\n");
    }
    await server.log.line(
      /client 2 .* disconnected while reading: end of stream/,
    );
  },
);

testOnBoth(
  "serve: what is sent and what is replied arrive in the order in which they are owed",
  async (network) => {
    const slow = Promise.withResolvers<string>();
    let ann: Peer | undefined;
    await using server = start(network, {
      protocol(peer) {
        ann ??= peer;
        return () => {
          peer.send("before,");
          return slow.promise;
        };
      },
    });
    const conn = await say(server, "hello");
    assertEquals(await hear(conn), "before,");
    assert(ann !== undefined);
    ann.send("meanwhile,");
    assertEquals(ann.bufferedAmount, "meanwhile,".length);
    ann.close(); // its reply is owed already, and goes out
    ann.send("after the goodbye");
    assertEquals(await hear(conn), "meanwhile,");
    await sleep(50); // by then the server knows that it is out
    assertEquals(ann.bufferedAmount, 0);
    slow.resolve("late");
    assertEquals(decode(await readAll(conn)), "late");
    await within(ann.closed, "end of the client");
    ann.send("after its end");
    assertEquals(ann.bufferedAmount, 0);
  },
);

testOnBoth(
  "serve: a client that half-closes gets what others have sent to it before",
  async (network) => {
    const large = new Uint8Array(900_000).fill(1);
    const peers: Peer[] = [];
    await using server = start(network, {
      protocol(peer) {
        peers.push(peer);
        return () => peers[0]?.send(large);
      },
    });
    const quiet = await server.connect();
    await server.log.line(/client 1 .* connected/);
    using _other = await say(server, "x");
    await quiet.closeWrite();
    await sleep(100);
    assertEquals((await readAll(quiet)).length, large.length);
    await server.log.line(/client 1 .* disconnected .*: end of stream/);
  },
);

testOnBoth(
  "serve: of many lines a fast reader gets each, and one that never reads is closed",
  async (network) => {
    const peers = new Set<Peer>();
    const left = new Log();
    await using server = start(network, {
      protocol(peer) {
        peers.add(peer);
        peer.closed.then(() => {
          peers.delete(peer);
          left.add(`${peer.bufferedAmount} bytes`);
        });
        return (bytes) => {
          for (const line of decode(bytes).match(/.*\n?/g) ?? []) {
            for (const other of peers) if (other !== peer) other.send(line);
          }
        };
      },
    });
    using _deaf = await server.connect();
    const fast = await server.connect();
    await server.log.line(/client 2 .* connected/);
    const ann = await server.connect();
    const dots = ".".repeat(200); // so that it is more than sockets hold
    const lines = Array.from(
      { length: 40_000 },
      (_, i) => `line ${i} ${dots}\n`,
    );
    const saying = writeAll(ann, encode(lines.join("")));
    const waiting = server.log.line(/client 1 .*: RangeError: \d+ bytes wait/);
    let heard = "";
    const decoder = new TextDecoder();
    const buffer = new Uint8Array(64 * 1024);
    while (!heard.endsWith(lines.at(-1) ?? "")) {
      const count = await within(
        fast.read(buffer),
        "the next line",
        server.log,
      );
      heard += decoder.decode(buffer.subarray(0, count ?? 0), { stream: true });
    }
    assert(heard === lines.join(""), "each line, in order");
    await saying;
    const line = await waiting;
    assertMatch(line, /^info client 1 .* while writing: /);
    const bytes = Number(/(\d+) bytes wait/.exec(line)?.[1]);
    assert(bytes > 2 ** 20 && bytes < 2 ** 20 + 300, `${bytes}`);
    await left.line(/^0 bytes$/); // it is owed nothing any more
    fast.close();
    ann.close();
  },
);

testOnBoth(
  "serve: a reply may be larger than the limit of what is sent, which holds again after it",
  async (network) => {
    let ann: Peer | undefined;
    await using server = start(network, {
      protocol(peer) {
        ann = peer;
        return () => new Uint8Array(3_000_000);
      },
    });
    const conn = await say(server, "all");
    assert(ann !== undefined);
    ann.send("and this");
    const buffer = new Uint8Array(64 * 1024);
    for (let left = 3_000_008; left > 0;) {
      left -= await within(conn.read(buffer), "the reply", server.log) ?? left;
    }
    await sleep(50); // by then the server knows that all is out
    assertEquals(ann.bufferedAmount, 0);
    assertEquals(server.log.count(/disconnected/), 0);
    for (let i = 0; i < 200; i++) ann.send(buffer); // nobody reads this
    assert(ann.bufferedAmount <= 2 ** 20 + buffer.length, "no more is kept");
    await server.log.line(/client 1 .* bytes wait, too many to send/);
    conn.close();
  },
);

testOnBoth(
  "serve: a reply of null ends the client after what it is owed",
  async (network) => {
    const large = new Uint8Array(5_000_000).fill(7);
    await using server = start(network, {
      protocol: () => (bytes) => decode(bytes) === "bye" ? null : large,
    });
    const conn = await say(server, "all");
    await conn.write(encode("bye"));
    assertEquals((await readAll(conn)).length, large.length);
    await server.log.line(/client 1 .* disconnected/);
    assertEquals(server.log.count(/^error/), 0);
  },
);

testOnBoth(
  "serve: after a goodbye no client is answered, and a silent one is closed",
  async (network) => {
    await using server = start(network, { protocol: () => () => null });
    using silent = await server.connect();
    using chatty = await server.connect();
    for (const conn of [silent, chatty]) {
      assertEquals(await ask(conn, "hello"), "");
    }
    for (let i = 0; i < 8; i++) {
      await chatty.write(encode("still here"));
      await sleep(100);
    }
    await server.log.line(/client 1 .* disconnected .*no progress for 0\.5 s/);
    assertEquals(server.log.count(/client 2 .* disconnected/), 0);
    assertEquals(server.log.count(/sent/), 2);
  },
  "slow",
);

testOnBoth(
  "serve: a client that goes on sending after the goodbye is closed in the end",
  async (network) => {
    await using server = start(network, {
      protocol: () => () => null,
      grace: 700,
    });
    using chatty = await server.connect();
    assertEquals(await ask(chatty, "hello"), "");
    const since = network.now();
    const sending = (async () => {
      while (true) {
        await chatty.write(encode("still here"));
        await sleep(50);
      }
    })();
    const sent = Promise.allSettled([sending]);
    await server.log.line(/client 1 .* while reading: the grace time is over/);
    const took = network.now() - since;
    assert(took >= 690 && took < 3000, `${took}`);
    await within(sent, "broken pipe");
  },
  "slow",
);

testOnBoth(
  "serve: a client that does not read what it is owed is closed after the goodbye, too",
  async (network) => {
    await using server = start(network, {
      protocol: (peer) => () => {
        peer.close();
        return tooMuch;
      },
      grace: 600,
    });
    const since = network.now();
    using _deaf = await say(server, "hello");
    await server.log.line(
      /^info client 1 .* while writing: no progress for 0\.6 s/,
    );
    assert(network.now() - since >= 599, "not before its time");
  },
  "slow",
);

testOnBoth(
  "serve: a goodbye that is said again gives a client no more time",
  async (network) => {
    let ann: Peer | undefined;
    await using server = start(network, {
      protocol(peer) {
        ann = peer;
        return () => tooMuch;
      },
      grace: 600,
    });
    using _deaf = await say(server, "hello");
    await server.log.line(/client 1 .* sent/);
    const since = network.now();
    while (server.log.count(/disconnected/) === 0) {
      ann?.close();
      await sleep(50);
      assert(network.now() - since < 5000, "it is still there");
    }
    await server.log.line(/client 1 .* while writing: no progress for 0\.6 s/);
  },
  "slow",
);

testOnBoth(
  "serve: thousands of lines that are sent at once arrive, each in its place",
  async (network) => {
    const lines = Array.from({ length: 3_500 }, (_, i) => `line ${i}\n`);
    await using server = start(network, {
      protocol(peer) {
        for (const line of lines) peer.send(line);
        return () => null;
      },
    });
    const conn = await say(server, "bye");
    assertEquals(decode(await readAll(conn)), lines.join(""));
  },
);

testOnBoth(
  "serve: a reply comes before what is sent after it",
  async (network) => {
    await using server = start(network, {
      protocol: (peer) => (bytes) => {
        queueMicrotask(() => peer.send("and later"));
        return decode(bytes) === "bye" ? null : "at once, ";
      },
    });
    const conn = await server.connect();
    let heard = await ask(conn, "hello");
    while (!heard.endsWith("later")) heard += await hear(conn);
    assertEquals(heard, "at once, and later");
    assertEquals(await ask(conn, "bye"), "");
    conn.close();
  },
);

test(
  "nothing",
  "serve: while there is nothing to time, nothing wakes it up",
  () =>
    inVirtualTime(async (time) => {
      const network = inMemory(time);
      await using server = start(network);
      using conn = await server.connect();
      assertEquals(await ask(conn, "hello"), "hello");
      assertEquals(time.timers(), 0);
    }),
);

// Errors that refuse to be shown.
const noMessage = Object.defineProperty(new Error(), "message", {
  get: throwing(new Error("no message")),
});
const noName = Object.assign(new Error("no name"), { name: Symbol("no") });
const noInspect = { [Symbol.for("Deno.customInspect")]: throwing(new Error()) };
function revoked(): unknown {
  const { proxy, revoke } = Proxy.revocable({}, {});
  revoke();
  return proxy;
}
const shown = /^error client 1 .* disconnected while replying: ./;

const endings: [string, ServeOptions["protocol"], boolean, RegExp][] = [
  [
    "that is silent",
    () => echo,
    true,
    /^info client 1 .* while reading: no progress for 0\.3 s$/,
  ],
  [
    "that does not read",
    () => () => tooMuch,
    true,
    /^info client 1 .* while writing: no progress/,
  ],
  ["without its reply", () => never, true, /^error client 1 .*: no progress/],
  [
    "whose reply throws",
    () => throwing(new TypeError("no")),
    false,
    /^error client 1 .*: TypeError: no +at .*test\.ts/,
  ],
  [
    "whose reply rejects",
    () => () => Promise.reject("reasons"),
    false,
    /^error client 1 .*: "reasons"$/,
  ],
  [
    "with a forged line",
    () => throwing(new Error("a\nb")),
    false,
    /^error client 1 .*: Error: a b +at /,
  ],
  ["whose error has no message", () => throwing(noMessage), false, shown],
  ["whose error has no name", () => throwing(noName), false, shown],
  [
    "whose error is no object any more",
    () => throwing(revoked()),
    false,
    shown,
  ],
  ["whose error cannot be inspected", () => throwing(noInspect), false, shown],
  [
    "whose protocol throws",
    throwing(new Error("full")),
    false,
    /^error client 1 .*: Error: full /,
  ],
];
for (const [name, protocol = () => echo, timesOut, line] of endings) {
  testOnBoth(
    `serve: a client ${name} is closed in time, with one line, and no other`,
    async (network) => {
      let clients = 0;
      await using server = start(network, {
        protocol: (peer) => ++clients === 1 ? protocol(peer) : echo,
        idleTimeout: 300,
      });
      using conn = await server.connect();
      const since = network.now();
      await conn.write(encode("hello")).catch(() => {}); // it may be closed
      await server.log.line(line);
      const took = network.now() - since;
      assert(timesOut ? took >= 299 && took < 2000 : took < 299, `${took}`);
      await assertEchoed(server);
      assertEquals(server.log.count(/client 1 .* disconnected/), 1);
    },
    "slow",
  );
}

testOnBoth(
  "serve: a log that throws costs no client anything",
  async (network) => {
    const fail = throwing(new Error("disk full"));
    const reject = () => Promise.reject(new Error("disk full"));
    const logger = { error: fail, info: reject, debug: fail };
    await using server = start(network, { logger });
    await assertEchoed(server);
  },
);

// ---- Resets, and trouble with accepting

testOnBoth(
  "serve: a client that resets, idle or sent to, costs one line",
  async (network) => {
    await using server = start(network, { protocol: () => () => tooMuch });
    const { log } = server;
    await server.reset("", log.line(/client 1 .* connected/));
    await log.line(
      /^info client 1 .* disconnected while reading: ConnectionReset/,
    );
    await server.reset("much", log.line(/client 2 .* sent 4 bytes/));
    await log.line(
      /^info client 2 .* while writing: (ConnectionReset|BrokenPipe)/,
    );
    assertEquals(log.count(/disconnected/), 2);
  },
  "reset",
);

testOnBoth(
  "serve: hundreds that reset before they are accepted are forgotten",
  async (network) => {
    await using server = start(network);
    using conn = await server.connect();
    for (let i = 0; i < 10; i++) {
      await Promise.all(Array.from({ length: 30 }, () => server.reset()));
      assertEquals(await ask(conn, `${i}`), `${i}`);
    }
    assertEquals(server.log.count(/^error/), 0);
  },
  "reset",
);

testOnBoth(
  "serve: replies do not wait for one another, and a machine that vanished is noticed",
  async (network) => {
    const set: string[] = [];
    await using server = startChanged(network, (conn) => {
      const setNoDelay = () => set.push("no delay"); // RFC 896
      const setKeepAlive = () => set.push("keep-alive"); // RFC 1122, 4.2.3.6
      Object.assign(conn, { setNoDelay, setKeepAlive });
    });
    await assertEchoed(server);
    assertEquals(set, ["no delay", "keep-alive"]);
  },
);

testOnBoth(
  "serve: a client whose options cannot be set is served",
  async (network) => {
    await using server = startChanged(network, (conn) => {
      // A client that has reset already: Invalid argument (os error 22).
      Object.assign(conn, {
        setNoDelay: throwing(new Error("Invalid argument")),
      });
    });
    await assertEchoed(server);
  },
);

/** Makes a listener's accept fail with these errors first, in that order. */
const failing = (
  listener: Deno.Listener<Deno.Conn, Deno.NetAddr>,
  errors: Error[],
) =>
  changed(listener, (accept) => {
    const error = errors.shift();
    return error === undefined ? accept() : Promise.reject(error);
  });

testOnBoth(
  "serve: clients that give up before they are accepted are forgotten",
  async (network) => {
    const kinds = [NotConnected, ConnectionAborted, ConnectionReset];
    const errors = kinds.flatMap((kind) =>
      Array.from({ length: 200 }, () => new kind("gone"))
    );
    const listener = failing(only(network.listen(1)), errors);
    await using server = start(network, {}, [listener]);
    await assertEchoed(server);
    assertEquals([errors.length, server.log.count(/^error/)], [0, 0]);
  },
);

testOnBoth(
  "serve: out of descriptors, accepting pauses, with a line at each end",
  async (network) => {
    const shortage = () => new Error("Too many open files (os error 24)");
    const errors = Array.from({ length: 5 }, shortage);
    const [first, second] = network.listen(2);
    assert(first !== undefined && second !== undefined);
    await using server = start(network, {}, [failing(first, errors), second]);
    await server.log.line(
      /^error accepting pauses: Error: Too many open files/,
    );
    await sleep(150);
    assert(errors.length > 0, "it does not spin");
    await assertEchoed({ connect: () => server.connect(1) });
    await server.log.line(/^error accepting again$/);
    await assertEchoed(server);
    assertEquals(server.log.count(/^error/), 2);
  },
  "slow",
);

testOnBoth(
  "serve: it ends with the last listener that somebody else closes",
  async (network) => {
    const listeners = network.listen(2);
    await using server = start(network, {}, listeners);
    const conn = await server.connect();
    assertEquals(await ask(conn, "hello"), "hello");
    for (const listener of listeners) listener.close();
    await server.log.line(/is closed/);
    assertEquals(await ask(conn, "still"), "still");
    conn.close();
    assertEquals(await server.ended(), { clients: 1, messages: 2, bytes: 10 });
  },
);

// ---- Time

testOnBoth(
  "serve: a client that makes progress is not idle, however slowly",
  async (network) => {
    await using server = start(network, { idleTimeout: 300 });
    using conn = await server.connect();
    for (let i = 0; i < 4; i++) {
      await sleep(150);
      assertEquals(await ask(conn, "tick"), "tick");
    }
  },
  "slow",
);

testOnBoth(
  "serve: a late loop closes no client that has sent in time",
  async (network) => {
    const protocol = () => (bytes: Uint8Array) => {
      network.block(15);
      return bytes;
    };
    await using server = start(network, { idleTimeout: 200, protocol });
    // A round takes longer than the timeout; some think before they send.
    const clients = await Promise.all(
      Array.from({ length: 20 }, () => server.connect()),
    );
    await Promise.all(clients.map(async (conn, i) => {
      for (let n = 0; n < 3; n++) {
        assertEquals(await ask(conn, "busy"), "busy");
        if (i % 4 === 0) await sleep(100);
      }
      conn.close();
    }));
    assertEquals(server.log.count(/no progress/), 0);
  },
);

const noNumbers: [ServeOptions, string][] = [
  [{ idleTimeout: NaN }, "idleTimeout is NaN, expected milliseconds above 0"],
  [{ idleTimeout: 0 }, "idleTimeout is 0, expected milliseconds above 0"],
  [{ grace: NaN }, "grace is NaN, expected milliseconds from 0 up"],
  [{ grace: -1 }, "grace is -1, expected milliseconds from 0 up"],
  [{ sendLimit: -1 }, "sendLimit is -1, expected bytes from 0 up"],
];
for (const [options, message] of noNumbers) {
  test("nothing", `serve: it refuses that ${message}`, async () => {
    await assertRejects(() => serve([], options), RangeError, message);
  });
}

// ---- The stop

testOnBoth(
  "serve: a signal that has aborted already closes the listeners",
  async (network) => {
    const listener = only(network.listen(1));
    const signal = AbortSignal.abort();
    const totals = await serve([listener], { signal, logger: {} });
    assertEquals(totals, { clients: 0, messages: 0, bytes: 0 });
    await assertRejects(() => listener.accept(), BadResource);
  },
);

testOnBoth(
  "serve: a stop ends the stream of a client that is owed nothing",
  async (network) => {
    await using server = start(network);
    const idle = await server.connect();
    assertEquals(await ask(idle, "hello"), "hello");
    const stopped = server.stop();
    assertEquals((await readAll(idle)).length, 0);
    assertEquals((await stopped).messages, 1);
    await server.log.line(
      /client 1 .* disconnected while reading: end of stream/,
    );
    await assertRejects(() => server.connect(), ConnectionRefused);
  },
);

testOnBoth(
  "serve: a stop waits for what is owed, and answers nothing after it",
  async (network) => {
    const owed = Promise.withResolvers<Uint8Array>();
    await using server = start(network, { protocol: () => () => owed.promise });
    const conn = await say(server, "first");
    // Left unread, this would reset the connection when it is closed.
    await conn.write(encode("second"));
    const stopped = server.stop();
    await sleep(150);
    owed.resolve(new Uint8Array(2_000_000));
    assertEquals((await readAll(conn)).length, 2_000_000);
    assertEquals((await stopped).messages, 1);
  },
);

testOnBoth(
  "serve: a stop among busy clients loses no reply that is counted",
  async (network) => {
    await using server = start(network);
    const clients = await Promise.all(
      Array.from({ length: 100 }, () => server.connect()),
    );
    let echoes = 0;
    await Promise.all(clients.map(async (conn) => {
      for (let reply = "x"; reply !== "";) {
        reply = await ask(conn, "x").catch(() => "");
        if (reply !== "" && ++echoes === 2000) server.stop();
      }
      conn.close();
    }));
    assertEquals((await server.ended()).messages, echoes);
  },
);

const stubborn: [string, ServeOptions["protocol"], RegExp][] = [
  [
    "that neither sends nor leaves",
    () => echo,
    /while reading: no progress for 0\.5 s/,
  ],
  [
    "that does not read",
    () => () => tooMuch,
    /while writing: the grace time is over/,
  ],
  [
    "whose reply never comes",
    () => never,
    /while replying: the grace time is over/,
  ],
];
for (const [name, protocol = () => echo, line] of stubborn) {
  testOnBoth(
    `serve: a stop is not held up by a client ${name}`,
    async (network) => {
      await using server = start(network, { protocol, grace: 600 });
      using _conn = await say(server, "hello");
      await sleep(200); // of no progress, which does not count after the goodbye
      const since = network.now();
      await server.stop();
      const took = network.now() - since;
      assert(took >= 499 && took < 2000, `${took}`);
      await server.log.line(line);
    },
    "slow",
  );
}

testOnBoth(
  "serve: a client that is accepted at the moment of a stop is closed",
  async (network) => {
    const late = Promise.withResolvers<Deno.Conn>();
    let accepts = 0;
    const [first, second] = network.listen(2);
    assert(first !== undefined && second !== undefined);
    const accepted = first.accept();
    const listener = changed(
      first,
      (accept) => accepts++ === 0 ? late.promise : accept(),
    );
    await using server = start(network, {}, [listener, second]);
    const conn = await server.connect();
    const theirs = await accepted;
    second.close();
    await server.log.line(/is closed/);
    const stopped = server.stop();
    late.resolve(theirs);
    assertEquals((await readAll(conn)).length, 0);
    assertEquals((await stopped).clients, 1);
  },
);

test(
  "net",
  "serve: its promises about time hold over sockets, too, side by side",
  async () => {
    const running = slow.map(([, fn]) => fn(sockets));
    const results = await Promise.allSettled(running);
    const failed = results.flatMap((result, i) =>
      result.status === "rejected" ? `${slow[i]?.[0]}: ${result.reason}` : []
    );
    assertEquals(failed, []);
  },
);

// ---- Seeded histories: a seed decides everything that happens

/** Whole numbers below a limit, the same for the same seed. */
function randomOf(seed: number): (below: number) => number {
  let state = Math.imul(seed + 1, 0x9e3779b1) || 1;
  const next = () => {
    state ^= state << 13; // xorshift32: Marsaglia, "Xorshift RNGs", 2003
    state ^= state >>> 17;
    state ^= state << 5;
    return state >>> 0;
  };
  for (let i = 0; i < 8; i++) next(); // or seeds close together begin alike
  return (below) => next() % below;
}

/** What a client may do, and how the log then may say that it has left. */
const behaviours = [
  ["is polite", /^info .*: end of stream$/],
  ["leaves early", /^info .*: (end of stream|ConnectionReset|BrokenPipe)/],
  ["resets", /^info .*: (end of stream|ConnectionReset|BrokenPipe)/],
  ["falls silent", /^info .*: (end of stream|no progress)/],
  ["does not read", /^info .*: (no progress|ConnectionReset|BrokenPipe)/],
  ["is told goodbye", /^info .*: (end of stream|no progress|the grace)/],
  ["gets an error", /^error .*: Error: no reply /],
  ["gets no answer", /^error .*: no progress/],
] as const;

/** What the seed decides for one client, and what has been seen of it. */
class Actor {
  readonly message: Uint8Array;
  readonly behaviour: typeof behaviours[number][0];
  readonly ending: RegExp;
  readonly comesAt: number; // ms
  readonly turnsAt: number; // bytes: from here on it does what is its own
  readonly key: number; // its reply is its message, xor this
  readonly inPlace: boolean; // the reply is made in the server's own buffer
  readonly copies: number; // of the message, in the reply
  readonly pauses: number; // before it reads on
  readonly heard: number[] = []; // what the server has heard from it
  readonly replies: number[] = []; // all below 128
  readonly sends: number[] = []; // all from 128 on
  readonly received: number[] = []; // what has reached it
  peer?: Peer; // once it has connected
  hasLeft = false; // as its peer says
  heardAt = 0; // when the server has last heard from it, or answered it
  sentAt = -Infinity; // when the server has last taken a send to it
  goodbyeAt = Infinity;

  constructor(readonly port: number, random: (below: number) => number) {
    const length = 1 + random(400);
    this.message = Uint8Array.from({ length }, () => random(128));
    [this.behaviour, this.ending] = behaviours[random(behaviours.length)] ??
      behaviours[0];
    this.comesAt = random(400);
    this.turnsAt = random(length);
    this.key = random(128);
    this.inPlace = random(2) === 0;
    this.copies = this.inPlace ? 1 : 1 + random(4);
    this.pauses = random(2) === 0 ? random(8) : 0;
  }

  /** Sends it some bytes, which count if the server has taken them. */
  send(random: (below: number) => number, now: number): void {
    if (this.peer === undefined) return;
    const length = random(50);
    const bytes = Uint8Array.from({ length }, () => 128 + random(128));
    const before = this.peer.bufferedAmount;
    this.peer.send(bytes);
    if (this.peer.bufferedAmount > before) {
      this.sends.push(...bytes);
      this.sentAt = now;
    }
    bytes.fill(0); // it is the sender's own again
  }
}

/** Plays what a seed decides, and checks all that the server promises. */
async function history(seed: number, time: Time, log: Log): Promise<void> {
  const random = randomOf(seed);
  const capacity = 1 + random(random(2) === 0 ? 20 : 2000);
  const most = 1 + random(random(2) === 0 ? 8 : 500);
  const pieces = (n: number) => 1 + random(Math.min(n, most));
  const network = new MemoryNetwork(capacity, pieces, 1 + random(16));
  const listeners = network.listen(1 + random(3));
  const actors = Array.from(
    { length: 1 + random(9) },
    (_, i) => new Actor(50_000 + i, random),
  );
  const idleTimeout = random(2) === 0 ? 300 + random(500) : Infinity;
  const grace = [0, 300, 5000][random(3)] ?? 0;
  const sendLimit = random(4) === 0 ? 100 : 2 ** 20;
  const stopsAt = random(2) === 0 ? random(1500) : Infinity;
  const loggedAt = new Map<string, number>();
  const write = (line: string) => {
    log.add(line);
    loggedAt.set(line, time.now());
  };
  let messages = 0;

  const someActor = () => actors[random(actors.length)];
  const protocol = (peer: Peer) => {
    const { remoteAddr } = peer;
    assert("port" in remoteAddr);
    const actor = actors.find(({ port }) => port === remoteAddr.port);
    assert(actor !== undefined);
    actor.peer = peer;
    peer.closed.then(() => {
      actor.hasLeft = true;
      someActor()?.send(random, time.now());
    });
    if (random(2) === 0) actor.send(random, time.now()); // a greeting
    return (bytes: Uint8Array) => {
      messages++;
      actor.heard.push(...bytes);
      actor.heardAt = time.now();
      if (random(4) === 0) someActor()?.send(random, time.now());
      const reply = replyTo(actor, bytes);
      if (random(10) > 0) return reply();
      return sleep(random(100)).then(() => {
        actor.heardAt = time.now();
        return reply();
      });
    };
  };

  function replyTo(actor: Actor, bytes: Uint8Array) {
    const { behaviour, heard, turnsAt, key, replies, inPlace, copies } = actor;
    if (random(50) === 0) time.block(random(30)); // a reply that computes
    if (heard.length > turnsAt) {
      if (behaviour === "is told goodbye") {
        actor.goodbyeAt = time.now();
        actor.send(random, time.now()); // a last word
        return () => null;
      }
      if (behaviour === "gets an error") return throwing(new Error("no reply"));
      if (behaviour === "gets no answer") return never;
    }
    if (random(20) === 0) return () => new Uint8Array(0);
    const reply = new Uint8Array(copies * bytes.length)
      .map((_, i) => (bytes[i % bytes.length] ?? 0) ^ key);
    replies.push(...reply);
    return () => {
      if (!inPlace) return reply;
      bytes.set(reply);
      return bytes;
    };
  }

  async function live(actor: Actor): Promise<void> {
    const { behaviour, turnsAt, message } = actor;
    await sleep(actor.comesAt);
    const listener = listeners[actor.port % listeners.length];
    const conn = await network.connect(listener?.addr.port ?? 0, actor.port)
      .catch(() => undefined); // it comes after the stop
    if (conn === undefined) return;
    const speaking = Promise.allSettled([speak()]);
    const hearing = Promise.allSettled([hear()]);
    await speaking;
    if (behaviour === "leaves early" || behaviour === "resets") {
      await sleep(random(100));
      if (behaviour === "resets") conn.reset();
      else conn.close();
    }
    await hearing;
    if (behaviour === "falls silent") {
      await conn.outgoing.until(() => conn.outgoing.broken);
    }
    conn[Symbol.dispose]();

    async function speak(): Promise<void> {
      const early = ["leaves early", "resets", "falls silent"];
      const length = early.includes(behaviour) ? turnsAt : message.length;
      const times = behaviour === "does not read" ? Infinity : 1;
      for (let time = 0; time < times; time++) {
        for (let n = 0; n < length;) {
          const end = Math.min(length, n + 1 + random(200));
          n += await conn?.write(message.subarray(n, end)) ?? 0;
          if (random(4) === 0) await sleep(random(50));
        }
      }
      if (behaviour === "is polite") await conn?.closeWrite();
    }

    async function hear(): Promise<void> {
      const buffer = new Uint8Array(1 + random(300));
      for (
        let n = 0;
        behaviour !== "does not read" || actor.received.length < turnsAt;
        n++
      ) {
        if (n < actor.pauses) await sleep(200 + random(90));
        const count = await conn?.read(buffer) ?? null;
        if (count === null) return;
        actor.received.push(...buffer.subarray(0, count));
      }
    }
  }

  /** Lets accept fail now and then. */
  async function disturb(): Promise<void> {
    for (let i = random(4); i > 0; i--) {
      await sleep(random(300));
      const kinds = [new NotConnected("gone"), new ConnectionAborted("gone")];
      const error = kinds[random(3)] ?? new Error("Too many open files");
      const listener = listeners[random(listeners.length)];
      listener?.errors.push(error);
      listener?.changed();
    }
  }

  const rejections: string[] = [];
  const onRejection = (event: PromiseRejectionEvent) => {
    event.preventDefault();
    rejections.push(String(event.reason));
  };
  globalThis.addEventListener("unhandledrejection", onRejection);
  const stop = new AbortController();
  const { signal } = stop;
  const logger = {
    error: (line: string) => write(`error ${line}`),
    info: (line: string) => write(`info ${line}`),
  };
  const options = { protocol, idleTimeout, sendLimit, grace, signal, logger };
  const serving = serve(listeners, options);
  const lives = actors.map(live);
  const disturbed = disturb();
  const stubborn = ["falls silent", "does not read", "gets no answer"];
  const ending = lives.filter((_, i) =>
    idleTimeout < Infinity || !stubborn.includes(actors[i]?.behaviour ?? "")
  );
  await (stopsAt < Infinity ? sleep(stopsAt) : Promise.all(ending));
  const stoppedAt = time.now();
  stop.abort();
  const totals = await serving;
  await Promise.all([...lives, disturbed]);
  await turn();
  globalThis.removeEventListener("unhandledrejection", onRejection);

  const bytes = actors.reduce((sum, { heard }) => sum + heard.length, 0);
  const clients = log.count(/\) connected$/);
  assertEquals(totals, { clients, messages, bytes });
  assertEquals(rejections, []);
  assert(listeners.every(({ closed }) => closed), "every listener is closed");
  assert(network.conns.every(({ closed }) => closed), "every client is closed");
  for (const actor of actors) {
    const { port, behaviour, received, heard, message } = actor;
    const its = log.lines.filter((line) => line.includes(`:${port})`));
    const story = `a client that ${behaviour}:${
      its.map((line) => `\n  ${line}`)
    }`;
    const [connected, line = "", ...more] = its;
    if (connected === undefined) {
      assert(stoppedAt < time.now() || behaviour === "resets", story);
      continue;
    }
    const at = loggedAt.get(line) ?? 0;
    assert(line.includes(" disconnected while ") && more.length === 0, story);
    const sent = heard.map((_, i) => message[i % message.length]);
    assertEquals(heard, sent, `${story}: heard`);
    const replies = received.filter((byte) => byte < 128);
    const sends = received.filter((byte) => byte >= 128);
    const owed = [actor.replies, actor.sends];
    const parts = [replies, sends].map((part, i) =>
      owed[i]?.slice(0, part.length)
    );
    assertEquals([replies, sends], parts, `${story}: received`);
    assert(actor.hasLeft, `${story}: its peer knows that it has left`);
    const overdue = line.endsWith("the grace time is over");
    const goodbyeAt = Math.min(stoppedAt, actor.goodbyeAt);
    if (overdue) assert(at - goodbyeAt >= grace, `${story}: cut off early`);
    const silentFor = /no progress for ([\d.]+) s$/.exec(line)?.[1];
    if (silentFor !== undefined) {
      const since = Math.max(actor.heardAt, loggedAt.get(connected) ?? 0);
      assert(at - since >= 1000 * Number(silentFor), `${story}: closed early`);
    }
    const stopped = stoppedAt <= at;
    const mayFallBehind = sendLimit < 2 ** 20 || behaviour === "does not read";
    if (line.includes(" bytes wait,") && mayFallBehind) continue;
    if (!stopped) assertMatch(line, actor.ending, story);
    const reads = ["is polite", "is told goodbye", "falls silent"];
    if (!reads.includes(behaviour) || (overdue && grace < 5000)) continue;
    assert(!overdue, `${story}: not held up`);
    // What is sent to it when its time is nearly up may come too late.
    const isLate = silentFor !== undefined && at - actor.sentAt < 200;
    assertEquals(replies, actor.replies, `${story}: all that it is owed`);
    if (!isLate) assertEquals(sends, actor.sends, `${story}: all sent to it`);
    if (behaviour === "is polite" && !stopped) {
      assertEquals(heard.length, message.length, `${story}: all heard`);
    }
  }
}

// `deno test -- histories [COUNT] [FIRST SEED]` plays others.
const [word, count, first] = Deno.args;
const others = word === "histories";
const histories = others ? Number(count ?? 10_000) : 300;
const firstSeed = first !== undefined
  ? Number(first)
  : others
  ? crypto.getRandomValues(new Uint32Array(1))[0] ?? 0
  : 1;

test(
  "nothing",
  "serve: it keeps its promises in seeded histories",
  async () => {
    if (others) console.log(`${histories} histories from seed ${firstSeed} on`);
    for (let seed = firstSeed; seed < firstSeed + histories; seed++) {
      const log = new Log();
      try {
        await inVirtualTime((time) => history(seed, time, log), 1);
      } catch (cause) {
        const again = `again: deno task histories 1 ${seed}`;
        throw new Error(`history ${seed} fails; ${again}${log}`, { cause });
      }
    }
  },
  others ? 2 ** 31 - 1 : 60_000,
);

// ---- Ports and replies

/** Two consecutive ports that are free. */
function consecutive(): [Deno.TcpListener, Deno.TcpListener] {
  // Below those that systems lend to clients.
  for (let port = 20_000 + 2 * (Deno.pid % 5000); port < 32_000; port += 2) {
    try {
      const [first, second] = listen({ port, ports: 2 });
      assert(first !== undefined && second !== undefined);
      return [first, second];
    } catch (error) {
      assert(error instanceof Error);
      const { cause } = error;
      if (!(cause instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
  throw new Error("no two consecutive ports are free");
}

test(
  "net",
  "listen: it opens all ports or none, and names the one that it cannot open",
  async () => {
    const [first, second] = consecutive();
    first.close();
    const { port } = first.addr;
    const message = `cannot listen on 127.0.0.1:${port + 1}: AddrInUse`;
    assertThrows(() => listen({ port, ports: 2 }), Error, message);
    await assertRejects(() => sockets.connect(port), ConnectionRefused);
    second.close();
  },
);

const hostnames: ["net" | "anyNet", string, RegExp][] = [
  ["net", "localhost", /^info listening on (127\.0\.0\.1|\[::1\]):\d+$/],
  ["net", "::1", /^info listening on \[::1\]:\d+$/],
  ["net", "[::1]", /^info listening on \[::1\]:\d+$/],
  ["anyNet", "0.0.0.0", /^info listening on 0\.0\.0\.0:\d+$/],
];
for (const [needed, hostname, line] of hostnames) {
  test(
    needed,
    `listen: it opens a port of ${hostname}, and serve shows it`,
    async () => {
      const listeners = listen({ hostname, port: 0 });
      await using server = start(sockets, {}, listeners);
      await server.log.line(line);
    },
  );
}

test(
  "net",
  "listen: it opens one port, if not told how many, and brackets no address twice",
  () => {
    for (const hostname of ["::1", "[::1]"]) {
      using taken = only(listen({ hostname, port: 0 }));
      const { port } = taken.addr;
      const message = `cannot listen on [::1]:${port}: AddrInUse`;
      assertThrows(() => listen({ hostname, port }), Error, message);
    }
  },
);

for (const ports of [0, -1, 2.5, NaN]) {
  test("nothing", `listen: it refuses ${ports} ports`, () => {
    const message = `ports is ${ports}, expected a whole number from 1 up`;
    assertThrows(() => listen({ port: 0, ports }), RangeError, message);
  });
}

test("anyNet", "listen: it names an address that is none", () => {
  const message = "nowhere.invalid:50007: ";
  assertThrows(() => listen({ hostname: "nowhere.invalid" }), Error, message);
});

test(
  "nothing",
  "stamp: it replies as the book does, and keeps bytes that are no text",
  () => {
    const reply = decode(stamp(encode("spam")));
    assertMatch(reply, /^Echo=>spam at \d{4}-\d\d-\d\dT[\d:.]+Z$/);
    const bytes = new Uint8Array([255, 0]);
    assertEquals(stamp(bytes).slice(6, 8), bytes);
  },
);

// ---- The commands

// They run with the packages that the tests run with.
const parseArgs = "jsr:@std/cli@^1/parse-args";
const packages = { [parseArgs]: import.meta.resolve(parseArgs) };
const mapOf = (imports: Record<string, string>) =>
  `data:application/json,${encodeURIComponent(JSON.stringify({ imports }))}`;
const importMap = mapOf(packages);
const noParser = { [parseArgs]: "data:text/javascript,throw new Error()" };

/** Runs a script, until the test's block ends; its lines can be waited for. */
function command(
  script: string,
  args: string[],
  permission = "--allow-net",
  imports = packages,
  ...flags: string[]
) {
  const deno = [
    "run",
    "--no-prompt",
    "--import-map",
    mapOf(imports),
    permission,
    ...flags,
  ];
  const child = new Deno.Command(Deno.execPath(), {
    args: [...deno, import.meta.resolve(script), ...args],
    env: { NO_COLOR: "1" },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const log = new Log();
  async function read(
    stream: typeof child.stdout,
    add: (line: string) => void,
  ) {
    let rest = "";
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop() ?? "";
      lines.forEach(add);
    }
    if (rest !== "") add(rest); // no whole line
  }
  const output = [read(child.stdout, log.info), read(child.stderr, log.error)];
  const exit = Promise.all(output).then(() => child.status);
  return {
    script,
    log,
    kill: (signal: Deno.Signal = "SIGTERM") => child.kill(signal),
    /** Resolves to the exit code. */
    ended: async () => {
      return (await within(exit, `end of ${script}`, log, 20_000)).code;
    },
    port: async () => Number(/\d+$/.exec(await log.line(/listening on/))),
    [Symbol.asyncDispose]: async () => {
      try {
        child.kill("SIGKILL");
      } catch { /* it has ended */ }
      await exit;
    },
  };
}

const server = (args: string) => command("./select_server.ts", args.split(" "));
const client = (args: string) => command("./echo_client.ts", args.split(" "));
const clientOf = (port: number, ...args: string[]) =>
  command("./echo_client.ts", ["-p", `${port}`, "--ports", "1", ...args]);
const scripts = [["server", server], ["client", client]] as const;

for (const [name, script] of scripts) {
  test("run", `the ${name}: --help fits 80 columns`, async () => {
    await using help = script("--help");
    assertEquals(await help.ended(), 0);
    const { lines } = help.log;
    const columns = "info ".length + 80;
    assertEquals(lines.filter((line) => line.length > columns), []);
    await using short = script("-h");
    assertEquals(await short.ended(), 0);
    assertEquals(short.log.lines, lines);
  });
}

/** The command ends with this exit code and one line, which says whose it is. */
async function assertRefuses(
  refused: ReturnType<typeof command>,
  code: number,
  line: RegExp,
): Promise<void> {
  const { script, log, ended } = refused;
  assertEquals(await ended(), code, log.toString());
  assertMatch(only(log.lines), line);
  const name = script.slice("./".length, -".ts".length);
  assert(only(log.lines).startsWith(`error ${name}: `), log.toString());
}

/** One test per row: arguments, and what is said of them. */
function testBadUse(name: "server" | "client", rows: [string, RegExp][]): void {
  for (const [args, line] of rows) {
    test(
      "run",
      `the ${name}: "${args}" is refused in one line, exit code 2`,
      async () => {
        await using refused = (name === "server" ? server : client)(args);
        await assertRefuses(refused, 2, line);
      },
    );
  }
}

testBadUse("server", [
  ["--bogus", /--bogus: expected one of the options/],
  ["--no-stamp", /--no-stamp: expected one of the options/],
  ["127.0.0.1", /127\.0\.0\.1: expected one of the options/],
  ["-- 7", /7: expected one of the options/],
  ["--port", /--port .*: expected a whole number from 0 to 65535/],
  ["--port 70000", /--port 70000: expected a whole number from 0 to/],
  ["--port 5e2", /--port 5e2: expected a whole number/],
  ["--port -1", /-1: expected/],
  ["--ports 0", /--ports 0: expected a whole number from 1/],
  ["--port 65535 --ports 2", /--ports 2: expected .* from 1 to 1/],
  ["--delay x", /--delay x: expected a whole number/],
  ["--idle-timeout 0", /--idle-timeout 0: expected .* from 1/],
  ["--host", /--host: expected an address/],
  ["--idle-timeout=", /--idle-timeout : expected a whole number/],
]);

test(
  "run",
  "the server: a port that cannot be opened is one line, exit code 1",
  async () => {
    using taken = only(listen({ port: 0 }));
    const { port } = taken.addr;
    await using inUse = server(`-p ${port}`);
    const address = `127.0.0.1:${port}`;
    await assertRefuses(
      inUse,
      1,
      new RegExp(`cannot listen on ${address}: Addr`),
    );
    await using nowhere = server("-H nowhere.invalid");
    await assertRefuses(
      nowhere,
      1,
      /cannot listen on nowhere\.invalid:50007: /,
    );
    await using denied = command("./select_server.ts", [], "--deny-net");
    await assertRefuses(denied, 1, /on 127\.0\.0\.1:50007: NotCapable/);
  },
);

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  test(
    "signals",
    `the server: ${signal} stops it in order, also if it comes twice at once`,
    async () => {
      const options = "-v -p 0 --stamp --delay 60000 --idle-timeout 60";
      await using stopping = server(options);
      const { log } = stopping;
      const conn = await sockets.connect(await stopping.port());
      await conn.write(encode("owed"));
      await log.line(/client 1 .* sent 4 bytes/);
      stopping.kill(signal);
      await log.line(/stopping/);
      stopping.kill("SIGTERM"); // as a terminal and `deno task` do, or systemd
      assertMatch(decode(await readAll(conn)), /^Echo=>owed at 20/);
      assertEquals(await stopping.ended(), 0);
      const totals = "info served 1 clients, 1 messages, 4 bytes";
      assertEquals(log.lines.at(-1), totals);
      assertEquals(log.count(/^error/), 0);
    },
  );
}

test(
  "signals",
  "the server: a second Ctrl-C after a while stops it at once",
  async () => {
    await using stopping = server("-p 0");
    const { log } = stopping;
    using idle = await sockets.connect(await stopping.port());
    assertEquals(await ask(idle, "hello"), "hello");
    assertEquals(log.count(/sent/), 0);
    stopping.kill("SIGINT");
    await log.line(/stopping/);
    await sleep(350);
    stopping.kill("SIGINT");
    assertEquals(await stopping.ended(), 1);
  },
);

test(
  "signals",
  "the server: a log that is open but not read stops no client, and not the stop",
  async () => {
    await using child = startUnread();
    const [port, reader] = await firstPort(child);
    for (let i = 0; i < 40; i++) { // each client is two lines: more than a pipe holds
      const clients = Array.from({ length: 25 }, () => sockets.connect(port));
      for (const connecting of clients) {
        using conn = await within(connecting, "connection");
        assertEquals(await ask(conn, "hello"), "hello");
      }
    }
    child.kill();
    // The end is not held up by lines that wait; so read on only when it has come.
    const { code } = await within(child.status, "end of the server");
    assertEquals(code, 0);
    await reader.cancel();
    assertEquals(await new Response(child.stderr).text(), "");
  },
);

test(
  "signals",
  "the server: a log that is read late says how many lines are lost",
  async () => {
    await using child = startUnread("--verbose");
    const [port, reader] = await firstPort(child);
    const clients = Array.from({ length: 20 }, () => sockets.connect(port));
    await Promise.all(clients.map(async (connecting) => {
      using conn = await within(connecting, "connection");
      for (let i = 0; i < 800; i++) await ask(conn, "a line of the log");
    }));
    let printed = "";
    const decoder = new TextDecoder();
    while (!/^[1-9]\d* lines dropped$/m.test(printed)) {
      const end = printed.slice(-200);
      const { value } = await within(reader.read(), "dropped lines", end);
      printed += decoder.decode(value, { stream: true });
    }
    child.kill();
    for (let done = false; !done;) {
      const next = await within(reader.read(), "end of the log");
      printed += decode(next.value ?? new Uint8Array(0));
      done = next.done;
    }
    assertEquals((await within(child.status, "end of the server")).code, 0);
    assertMatch(printed, /\nserved 20 clients, 16000 messages, \d+ bytes\n$/);
    assertEquals(await new Response(child.stderr).text(), "");
  },
);

/** Starts the server; nobody reads what it writes. */
function startUnread(...args: string[]): Deno.ChildProcess {
  const script = import.meta.resolve("./select_server.ts");
  const run = ["run", "--allow-net", "--import-map", importMap, script];
  return new Deno.Command(Deno.execPath(), {
    args: [...run, "--port", "0", ...args],
    stdout: "piped",
    stderr: "piped",
  }).spawn();
}

/** Reads its output until it has named a port, and no further. */
async function firstPort({ stdout }: Deno.ChildProcess) {
  const reader = stdout.getReader();
  let printed = "";
  while (!printed.includes("\n")) {
    const { value } = await within(reader.read(), "port", printed);
    printed += decode(value ?? new Uint8Array(0));
  }
  return [Number(/:(\d+)/.exec(printed)?.[1]), reader] as const;
}

test(
  "signals",
  "the server: it goes on when nobody reads its log any more",
  async () => {
    await using child = startUnread();
    const [port, reader] = await firstPort(child);
    await reader.cancel();
    const connect = () => sockets.connect(port);
    for (let i = 0; i < 3; i++) await assertEchoed({ connect }); // each is a line
    child.kill();
    assertEquals((await within(child.status, "end of the server")).code, 0);
    assertEquals(await new Response(child.stderr).text(), "");
  },
);

test(
  "run",
  "the server: without arguments it needs no parser, and so no registry",
  async () => {
    await using plain = command(
      "./select_server.ts",
      [],
      "--allow-net",
      noParser,
    );
    // Another program may have its port: then it has come as far as that.
    const line = await plain.log.line(
      /(listen|listening) on 127\.0\.0\.1:5000[78]/,
    );
    assertMatch(line, /^info listening|AddrInUse/);
  },
);

// ---- The client

/** What a client prints. It must exit with this code, and report no error. */
async function output(
  { ended, log }: ReturnType<typeof command>,
  code: number,
): Promise<string[]> {
  assertEquals(await ended(), code, log.toString());
  assertEquals(log.count(/^error/), 0, log.toString());
  return log.lines.map((line) => line.slice("info ".length));
}

const preload = (code: string) =>
  `--preload=data:application/javascript,${encodeURIComponent(code)}`;

/** Like `clientOf`, in a Deno that some JavaScript has changed before. */
function clientAfter(code: string, port: number, ...args: string[]) {
  const all = ["-p", `${port}`, "--ports", "1", ...args];
  const flag = preload(code);
  return command("./echo_client.ts", all, "--allow-net", packages, flag);
}

test(
  "run",
  "the client: it reports when every byte has come back, and exits with 0",
  async () => {
    await using server = start(sockets);
    const options = ["--clients", "50", "--messages", "20"];
    await using fifty = clientOf(server.port(), ...options);
    const patterns = [
      /^clients {3}50 succeeded, 0 failed$/,
      /^echoes {4}1000, 64000 bytes in \d+\.\d{3} s$/,
      /^speed {5}\d+ echoes\/s$/,
      /^latency {3}p50 [\d.]+ ms, p90 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms$/,
      /^ {10}[\d.]+ ms (?=\S*█)[▁▂▃▄▅▆▇█]{50} [\d.]+ ms$/,
      /^finished {2}first client after [\d.]+ ms, last after [\d.]+ ms$/,
      /^ {10}when the first finished, the clients had \d+ [▁▂▃▄▅▆▇█]{9}█ 20 echoes$/,
      /^fairness {2}[01]\.\d{3} /,
    ];
    const lines = await output(fifty, 0);
    assertEquals(lines.length, patterns.length);
    patterns.forEach((pattern, i) => assertMatch(lines[i] ?? "", pattern));
  },
);

test(
  "run",
  "the client: it reports as JSON what it reports as text",
  async () => {
    await using server = start(sockets);
    const options = ["-c", "3", "-n", "2", "-s", "3000000", "--json"];
    await using three = clientOf(server.port(), ...options);
    const { seconds, echoesPerSecond, latency, finished, jain, ...counts } =
      JSON.parse(only(await output(three, 0)));
    const bytes = 18_000_000;
    const expected = { succeeded: 3, failed: 0, reasons: {}, echoes: 6, bytes };
    assertEquals(counts, expected);
    const { p50, p90, p99, max } = latency;
    assert(0 < p50 && p50 <= p90 && p90 <= p99);
    const { first, last } = finished;
    assert(p99 <= max && max <= last);
    assert(first <= last && last <= seconds * 1000);
    assert(Math.abs(echoesPerSecond - 6 / seconds) < 0.01);
    assert(jain > 1 / 3 && jain <= 1);
  },
);

test(
  "run",
  "the client: with -q it prints no report, not as JSON either",
  async () => {
    await using server = start(sockets);
    await using quiet = clientOf(server.port(), "-q", "--json");
    assertEquals(await output(quiet, 0), []);
  },
);

test(
  "run",
  "the client: it sends the MESSAGEs as they are, and prints the replies",
  async () => {
    await using server = start(sockets);
    const port = server.port();
    const texts = ["Hello network world", "007", "two\nlines", "--", "-x"];
    await using one = clientOf(port, ...texts);
    await using two = clientOf(port, "-c", "2", "--json", "one", "two");
    const replies = ["Hello network world", "007", "two lines", "-x"];
    const received = replies.map((text) => `client 1 received: ${text}`);
    assertEquals(await output(one, 0), received);
    assertEquals(JSON.parse(only(await output(two, 0))).bytes, 12);
  },
);

test(
  "run",
  "the client: clients are dealt over the ports, and their messages differ",
  async () => {
    const seen: string[] = [];
    const protocol = () => (bytes: Uint8Array) => {
      seen.push(bytes.join());
      return bytes;
    };
    const listeners = consecutive();
    await using server = start(sockets, { protocol }, listeners);
    listeners[1].close();
    await server.log.line(/is closed/);
    await using ten = client(`-p ${server.port()} -c 10 -n 5 -s 16`);
    const [outcome] = await output(ten, 1);
    assertEquals(outcome, "clients   5 succeeded, 5 failed, 5 refused");
    assertEquals([seen.length, new Set(seen).size], [25, 25]);
  },
);

test(
  "run",
  "the client: a message is random in each of its parts",
  async () => {
    const message: number[] = [];
    const protocol = () => (bytes: Uint8Array) => {
      message.push(...bytes);
      return bytes;
    };
    await using server = start(sockets, { protocol });
    const options = ["-c", "1", "-n", "1", "-s", "300000"];
    await using one = clientOf(server.port(), ...options);
    await output(one, 0);
    assertEquals(message.length, 300_000);
    for (let i = 0; i < message.length; i += 20_000) {
      const kinds = new Set(message.slice(i, i + 20_000)).size;
      assertEquals(kinds, 256, `kinds of bytes from byte ${i} on`);
    }
  },
);

test(
  "run",
  "the client: it tells how much less was served to clients that wait",
  async () => {
    const rest = Promise.withResolvers<void>();
    let clients = 0;
    const protocol = () => {
      const isFirst = clients++ === 0;
      let messages = 0;
      return async (bytes: Uint8Array) => {
        if (!isFirst && ++messages > 1) await rest.promise;
        return bytes;
      };
    };
    await using server = start(sockets, { protocol });
    const options = ["-c", "10", "-n", "5", "--json"];
    await using ten = clientOf(server.port(), ...options);
    await server.log.line(/disconnected while reading: end of stream/);
    await sleep(100); // by then the client knows it, too
    rest.resolve();
    const { finished, latency, jain } = JSON.parse(only(await output(ten, 0)));
    assertEquals(finished.shares, [1, 1, 1, 1, 1, 1, 1, 1, 1, 5]);
    assert(finished.last - finished.first >= 99);
    assert(latency.max >= 99 && jain < 1);
  },
);

test(
  "run",
  "the client: a client that is no longer answered counts as served less",
  async () => {
    let clients = 0;
    const protocol = () => {
      const rest = [never, never, () => null][clients % 3] ?? never;
      let left = clients++ % 3 === 0 ? 20 : 1;
      return (bytes: Uint8Array) =>
        left-- > 0 ? sleep(20).then(() => bytes) : rest();
    };
    await using server = start(sockets, { protocol, grace: 0 });
    const options = ["-c", "9", "-n", "20", "--timeout", "0.3", "--json"];
    await using nine = clientOf(server.port(), ...options);
    const { reasons, jain } = JSON.parse(only(await output(nine, 1)));
    assertEquals(reasons, { "closed early": 3, "timed out": 3 });
    const message = `${jain}: over the whole run, not only while they ran`;
    assert(jain > 1 / 3 && jain < 0.5, message);
  },
);

const badServers: [
  string,
  string,
  string[],
  (conn: Deno.TcpConn, bytes: Uint8Array) => unknown,
][] = [
  ["closed early", "ends its stream", [], (conn) => conn.closeWrite()],
  [
    "sent too much",
    "sends a byte more",
    [],
    (conn, bytes) => conn.write(new Uint8Array([...bytes, 0])),
  ],
  [
    "wrong bytes",
    "changes each byte",
    [],
    (conn, bytes) => conn.write(bytes.map((byte) => byte ^ 1)),
  ],
  [
    "wrong bytes",
    "changes the first byte and sends one more",
    [],
    (conn, bytes) =>
      conn.write(new Uint8Array([(bytes[0] ?? 0) ^ 1, ...bytes])),
  ],
  [
    "timed out",
    "sends a part only",
    ["--timeout", "0.1"],
    (conn, bytes) => conn.write(bytes.subarray(0, 10)),
  ],
];
for (const [reason, what, args, behave] of badServers) {
  test(
    "run",
    `the client: a server that ${what} is counted as: ${reason}`,
    async () => {
      using listener = only(listen({ port: 0 }));
      await using one = clientOf(listener.addr.port, "-c", "1", ...args);
      using conn = await within(listener.accept(), "client", one.log);
      const buffer = new Uint8Array(64);
      await within(conn.read(buffer), "message", one.log);
      await behave(conn, buffer);
      const [outcome] = await output(one, 1);
      assertEquals(outcome, `clients   0 succeeded, 1 failed, 1 ${reason}`);
    },
  );
}

test(
  canReset ? "run" : "reset",
  "the client: a server that resets is counted as: reset",
  async () => {
    await using server = createServer((socket) =>
      socket.once("data", () => socket.resetAndDestroy())
    );
    await once(server.listen(0, "127.0.0.1"), "listening");
    const address = server.address();
    assert(address !== null && typeof address === "object");
    await using five = clientOf(address.port, "-c", "5");
    const [outcome] = await output(five, 1);
    assertEquals(outcome, "clients   0 succeeded, 5 failed, 5 reset");
  },
);

test(
  "run",
  "the client: it gives up on a server that never accepts, and has no figures",
  async () => {
    using listener = only(listen({ port: 0 }));
    const since = performance.now();
    const options = ["--timeout", "0.2", "-c", "2"];
    await using two = clientOf(listener.addr.port, ...options);
    assertEquals(await output(two, 1), [
      "clients   0 succeeded, 2 failed, 2 timed out",
      "echoes    no echo has come back",
    ]);
    assert(performance.now() - since >= 199, "not before its time");
  },
);

const nobody = (ports: string) =>
  `error echo_client: nobody listens on 127.0.0.1, ${ports}: ` +
  "is select_server.ts running?";

test(
  "run",
  "the client: where nobody listens, it asks for the server on one line",
  async () => {
    const port = freePort();
    await using many = client(`-p ${port}`);
    await using one = client(`-p ${port} hello`);
    assertEquals([await many.ended(), await one.ended()], [1, 1]);
    const both = nobody(`ports ${port} to ${port + 1}`);
    assertEquals(many.log.lines, [both]);
    assertEquals(one.log.lines, [nobody(`port ${port}`)]);
  },
);

test(
  "run",
  "the client: where nobody listens, a report as JSON has no figures",
  async () => {
    const port = freePort();
    await using json = clientOf(port, "--json");
    assertEquals(await json.ended(), 1);
    const [error, info = "", ...rest] = json.log.lines.toSorted();
    assertEquals([error, rest], [nobody(`port ${port}`), []]);
    const { reasons, echoes, latency, finished, jain } = JSON.parse(
      info.slice("info ".length),
    );
    assertEquals([reasons, echoes, jain], [{ refused: 100 }, 0, null]);
    assertEquals(latency, { p50: null, p90: null, p99: null, max: null });
    assertEquals([finished.first, finished.last], [null, null]);
  },
);

// TCP connects a client to itself now and then, which no test can wait for. So
// here a client of a server is told that its own address is the server's.
test(
  "run",
  "the client: a client that is connected to itself is counted as refused",
  async () => {
    await using server = start(sockets);
    const itself = `const { connect } = Deno;
    Deno.connect = async (options) => {
      const conn = await connect(options);
      const localAddr = { value: { ...conn.remoteAddr } };
      return Object.defineProperty(conn, "localAddr", localAddr);
    };`;
    await using three = clientAfter(itself, server.port(), "-c", "3");
    await assertRefuses(three, 1, /nobody listens/);
    await server.log.line(/client 3 .* disconnected/);
    assertEquals(server.log.count(/ sent \d/), 0);
  },
);

const terminal = "Deno.stderr.isTerminal = () => true;";
const halfway = ["-c", "2", "-n", "4", "--timeout", "0.3", "--json"];

/** A server that answers the first two messages of a client, and no more. */
function startHalfway() {
  const protocol = () => {
    let left = 2;
    return (bytes: Uint8Array) => left-- > 0 ? bytes : never();
  };
  return start(sockets, { protocol, grace: 0 });
}

test(
  "run",
  "the client: it shows on a terminal how far it is, and clears the line",
  async () => {
    await using server = startHalfway();
    await using two = clientAfter(terminal, server.port(), ...halfway);
    assertEquals(await two.ended(), 1, two.log.toString());
    const [error = "", info = "", ...rest] = two.log.lines.toSorted();
    assertEquals(rest, []);
    assertEquals(JSON.parse(info.slice("info ".length)).echoes, 4);
    const shown = error.replaceAll("\x1b[K", "|"); // clears the rest
    assertMatch(shown, /^error (\r50%, \d{1,2} echoes\/s\|\r){3,}\r\|\r$/);
  },
);

for (const args of [["-q", "-n", "1"], ["hello"]]) {
  test(
    "run",
    `the client: it shows nothing on a terminal with ${args[0]}`,
    async () => {
      const protocol = () => (bytes: Uint8Array) =>
        sleep(150).then(() => bytes); // it would show something after 100 ms
      await using server = start(sockets, { protocol });
      const told = `Deno.stderr.write = () => console.error("shown");`;
      const code = terminal + told;
      const options = ["-c", "1", ...args];
      await using one = clientAfter(code, server.port(), ...options);
      await output(one, 0);
    },
  );
}

const lostTerminals: [string, string][] = [
  ["is gone", "Deno.stderr.close();"],
  ["is paused", "Deno.stderr.write = () => new Promise(() => {});"],
];
for (const [what, change] of lostTerminals) {
  test(
    "run",
    `the client: it goes on, and reports, when its terminal ${what}`,
    async () => {
      await using server = startHalfway();
      const code = terminal + change;
      await using two = clientAfter(code, server.port(), ...halfway);
      const { echoes, reasons } = JSON.parse(only(await output(two, 1)));
      assertEquals([echoes, reasons], [4, { "timed out": 2 }]);
    },
  );
}

test(
  "run",
  "the client: with --no-verify one read is a reply, whatever it brings",
  async () => {
    using listener = only(listen({ port: 0 }));
    const size = 8_000_000; // more than sockets hold
    const options = ["-n", "2", "-s", `${size}`, "--no-verify", "-c", "1"];
    await using one = clientOf(listener.addr.port, ...options);
    using conn = await within(listener.accept(), "client", one.log);
    await conn.write(encode("early"));
    const buffer = new Uint8Array(64 * 1024);
    const read = () => within(conn.read(buffer), "bytes to read", one.log);
    for (let left = 2 * size, count; (count = await read()) !== null;) {
      left -= count;
      if (left > 0) continue;
      await sleep(100); // less than the time-out
      await conn.write(encode("done"));
    }
    await conn.write(encode("!")); // too late to be a reply
    await conn.closeWrite();
    const [outcome, echoes = ""] = await output(one, 0);
    assertEquals(outcome, "clients   1 succeeded, 0 failed");
    assertMatch(echoes, /^echoes {4}2, 10 bytes/);
  },
);

test(
  "run",
  "the client: with --no-verify it prints a reply that is no echo",
  async () => {
    await using server = start(sockets, { protocol: () => stamp });
    await using one = clientOf(server.port(), "--no-verify", "hello");
    const line = only(await output(one, 0));
    assertMatch(line, /^client 1 received: Echo=>hello at 20/);
  },
);

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  test(
    "signals",
    `the client: it reports what it has done when a ${signal} ends it`,
    async () => {
      const busy = Promise.withResolvers<void>();
      let messages = 0;
      const protocol = () => (bytes: Uint8Array) => {
        // By then 97 echoes are back: each client has one on its way.
        if (++messages === 100) busy.resolve();
        return bytes;
      };
      await using server = start(sockets, { protocol, logger: {} });
      const options = ["-c", "3", "-n", "1000000"];
      await using three = clientOf(server.port(), ...options);
      await within(busy.promise, "100 messages", three.log);
      three.kill(signal);
      const lines = await output(three, 1);
      assertEquals(lines.length, 6);
      const [outcome, echoes = ""] = lines;
      assertEquals(outcome, "clients   0 succeeded, 3 failed, 3 interrupted");
      assertMatch(echoes, /^echoes {4}[1-9]\d+, /);
    },
  );
}

test(
  "run",
  "the client: without arguments it needs no parser, and has its defaults",
  async () => {
    const changed = (bytes: Uint8Array) => bytes.map((byte) => byte ^ 1);
    await using changing = start(sockets, { protocol: () => changed });
    await using echoing = start(sockets);
    // Another program may have the ports of the book. Whatever connects to
    // them gets these.
    const ports = { 50007: echoing.port(), 50008: changing.port() };
    const flag = preload(`const { connect } = Deno;
    const ports = ${JSON.stringify(ports)};
    Deno.connect = (options) =>
      connect({ ...options, port: ports[options.port] });`);
    const script = "./echo_client.ts";
    await using plain = command(script, [], "--allow-net", noParser, flag);
    const [outcome, echoes = ""] = await output(plain, 1);
    assertEquals(outcome, "clients   50 succeeded, 50 failed, 50 wrong bytes");
    assertMatch(echoes, /^echoes {4}500, 32000 bytes/);
  },
);

testBadUse("client", [
  ["--bogus", /--bogus: expected one of the options/],
  ["--host", /--host: expected an address/],
  ["--clients 0", /--clients 0: expected a whole number from 1 to 100000$/],
  ["--clients 100001", /--clients 100001: expected .* from 1 to 100000$/],
  ["-c 1000 -n 100001", /--messages 100001: expected .* from 1 to 100000$/],
  ["--size 1.5", /--size 1\.5: expected a whole number from 1 to 1073741824$/],
  ["--port 0", /--port 0: expected a whole number from 1 to 65535$/],
  ["--port 65535", /--ports 2: expected a whole number from 1 to 1$/],
  ["--messages 2 hello", /hello: expected either MESSAGEs or -n and -s/],
  ["hello -s 2", /hello: expected either MESSAGEs or -n and -s/],
  ["hello ", /"": expected a MESSAGE of at least one byte/],
  ["--timeout 0", /--timeout 0: expected seconds above 0/],
]);

// ---- The README

const address = (program: string) =>
  `data:application/typescript,${encodeURIComponent(program)}`;

/**
 * The README's nth program under a heading, as it is printed. Only the port and
 * the files beside it are others, as the port may be in use.
 */
function program(heading: string, n: number, port = 0): string {
  const [, section = ""] = readme.split(`\n## ${heading}\n`);
  const [own = ""] = section.split("\n## ");
  const text = [...own.matchAll(/^```ts\n(.*?)^```$/gms)][n]?.[1] ?? "";
  assert(text !== "", `no program ${n} under ${heading}`);
  const server = import.meta.resolve("./select_server.ts");
  return text
    .replaceAll('"./select_server.ts"', `"${server}"`)
    .replace(/\b5000[79]\b/g, `${port}`);
}

/** Runs such a program, as if it stood beside the scripts. */
const printed = (heading: string, n: number, port = freePort()) => ({
  ...command(address(program(heading, n, port)), []),
  at: port,
});

/** A port that is free, and so is the next one. */
function freePort(): number {
  const [first, second] = consecutive();
  first.close();
  second.close();
  return first.addr.port;
}

/** Connects to a command's port as soon as it listens. */
async function connectSoon(
  port: number,
  { log }: ReturnType<typeof command>,
): Promise<Deno.Conn> {
  for (let i = 0; i < 500; i++) {
    try {
      return await sockets.connect(port);
    } catch (error) {
      if (!(error instanceof ConnectionRefused)) throw error;
      await sleep(20);
    }
  }
  throw new Error(`nobody listens on port ${port}; saw ${log}`);
}

/** What comes next is this text, however many reads bring it. */
async function assertHears(conn: Deno.Conn, text: string): Promise<void> {
  let heard = "";
  while (heard.length < text.length) {
    const more = await hear(conn);
    assert(more !== "", `the stream has ended after ${heard}`);
    heard += more;
  }
  assertEquals(heard, text);
}

const tell = (conn: Deno.Conn, text: string) => writeAll(conn, encode(text));

const book = "The book's listing, again";
const starving = "When the plain loop starves clients";
const echoing: [string, string, number, number][] = [
  ["the book's listing", book, 0, 2],
  ["the loop with Promise.race", "Why not just `Promise.race`", 0, 1],
  ["the plain loop", starving, 0, 1],
  ["the plain loop and serve, with a reply that computes", starving, 1, 2],
];
for (const [name, heading, n, ports] of echoing) {
  test("readme", `the README: ${name} echoes, whoever resets`, async () => {
    const port = freePort();
    await using echoing = printed(heading, n, port);
    const connect = (i = 0) => connectSoon(port + i % ports, echoing);
    const conns = [await connect(0), await connect(1)];
    if (canReset) await sockets.reset(port, "reset", sleep(50));
    for (const text of ["one", "two"]) {
      for (const conn of conns) assertEquals(await ask(conn, text), text);
    }
    for (const conn of conns) conn.close();
    await assertEchoed({ connect });
  });
}

test(
  "readme",
  "the README: the listing in rounds, by a change of one line, echoes",
  async () => {
    const port = freePort();
    const change = (sign: string) =>
      new RegExp(`^\\${sign}( {8}.*)$`, "m").exec(readme)?.[1] ?? "none";
    const server = import.meta.resolve("./select_server.ts");
    const inRounds = program(book, 0, port)
      .replace(/^class .*?^}$/ms, `import { Selector } from "${server}";`)
      .replace(change("-"), change("+"));
    assert(inRounds.includes("nextRound"));
    await using running = command(address(inRounds), []);
    await assertEchoed({ connect: () => connectSoon(port, running) });
    await using clients = clientOf(port, "--clients", "50");
    assertEquals(await clients.ended(), 0);
  },
);

test("readme", "the README: the first program shouts", async () => {
  await using shouting = printed("Your own server", 0);
  using conn = await connectSoon(shouting.at, shouting);
  assertEquals(await ask(conn, "ham and eggs\n"), "HAM AND EGGS\n");
});

test(
  "readme",
  "the README: in the chat everybody hears everybody, and who leaves",
  async () => {
    await using chat = printed("Your own server", 1);
    const ann = await connectSoon(chat.at, chat);
    await assertHears(ann, "Hello! Already here: 0. What is your name?\n");
    await tell(ann, "Ann\n");
    await assertHears(ann, "Ann is here.\n");
    const bob = await connectSoon(chat.at, chat);
    await assertHears(bob, "Hello! Already here: 1. What is your name?\n");
    const nobody = await connectSoon(chat.at, chat);
    await assertHears(nobody, "Hello! Already here: 1. What is your name?\n");
    nobody.close(); // it has said no name, so it is not missed
    await tell(bob, "Bob\n");
    for (const conn of [ann, bob]) await assertHears(conn, "Bob is here.\n");

    const [start = 0, end = 0] = encode("é");
    await ann.write(new Uint8Array([...encode("ham\nspam\ncaf"), start]));
    const two = "Ann: ham\nAnn: spam\n";
    for (const conn of [ann, bob]) await assertHears(conn, two);
    await ann.write(new Uint8Array([end, ...encode("\n")]));
    for (const conn of [ann, bob]) await assertHears(conn, "Ann: café\n");

    bob.close();
    await assertHears(ann, "Bob has left.\n");
    ann.close();
  },
);

test(
  "readme",
  "the README: of 100,000 lines in the chat a reader that keeps up gets each, and one that never reads is closed",
  async () => {
    await using chat = printed("Your own server", 1);
    const lines = Array.from({ length: 100_000 }, (_, i) => `${i}`.padEnd(99));
    const [ann, bob, deaf] = [
      await connectSoon(chat.at, chat),
      await connectSoon(chat.at, chat),
      await connectSoon(chat.at, chat),
    ];
    const names = [["Bob", bob], ["Deaf", deaf], ["Ann", ann]] as const;
    const question = "What is your name?\n";
    const until = async (conn: Deno.Conn, end: string) => {
      let heard = "";
      while (!heard.endsWith(end)) {
        const more = await hear(conn);
        assert(more !== "", `the stream has ended after ${heard}`);
        heard += more;
      }
    };
    for (const [name, conn] of names) {
      await until(conn, question);
      await tell(conn, `${name}\n`);
      await until(conn, `${name} is here.\n`);
    }
    const hears = async (conn: Deno.Conn, last = "") => {
      const buffer = new Uint8Array(64 * 1024);
      const decoder = new TextDecoder();
      let heard = "";
      while (!heard.endsWith(`Ann: ${last}\n`)) {
        const count = await within(conn.read(buffer), "line");
        assert(count !== null, "the stream has ended");
        heard += decoder.decode(buffer.subarray(0, count), { stream: true });
      }
      return heard;
    };
    let [annHeard, bobHeard] = ["", ""];
    for (let n = 0; n < lines.length; n += 10_000) { // 1 MB: they keep up
      const some = lines.slice(n, n + 10_000);
      const heard = [hears(ann, some.at(-1)), hears(bob, some.at(-1))];
      await tell(ann, some.map((line) => `${line}\n`).join(""));
      const [annHears = "", bobHears = ""] = await Promise.all(heard);
      annHeard += annHears;
      bobHeard += bobHears;
    }
    const expected = lines.map((line) => `Ann: ${line}\n`).join("");
    for (const text of [annHeard, bobHeard]) {
      assertEquals(text.match(/^Deaf has left\.$/gm)?.length, 1);
      const said = text.replace(/^(\w+ is here|Deaf has left)\.\n/gm, "");
      assert(said === expected, "each line, in order");
    }
    for (const conn of [ann, bob, deaf]) conn.close();
  },
);

test(
  "readme",
  "the README: the server of lines joins what is split, and has a last word",
  async () => {
    await using lines = printed("Your own server", 2);
    const ann = await connectSoon(lines.at, lines);
    const bob = await connectSoon(lines.at, lines);
    const [start = 0, end = 0] = encode("é");
    await ann.write(new Uint8Array([...encode("caf"), start]));
    assertEquals(await ask(bob, "other\r\n"), "1 other\n");
    await ann.write(new Uint8Array([end]));
    await tell(ann, "\nte");
    await assertHears(ann, "1 café\n");
    await tell(ann, "a\nmilk\n");
    await assertHears(ann, "2 tea\n3 milk\n");
    await tell(ann, "ham\nquit\nspam\n");
    const all = decode(await readAll(ann));
    assertEquals(all, "4 ham\nYou said 4 lines. Goodbye!\n");
    assertEquals(await ask(bob, "still\n"), "2 still\n");
    bob.close();
  },
);

const own = "In your program";
for (const signal of ["SIGINT", "SIGTERM"] as const) {
  test(
    "signals",
    `the README: the program with a stop ends on ${signal}`,
    async () => {
      if (!withReadme) return;
      await using stopping = printed(own, 0);
      const conn = await sockets.connect(await stopping.port());
      assertEquals(await ask(conn, "ham"), "ham");
      stopping.kill(signal);
      assertEquals(await hear(conn), "");
      conn.close();
      assertEquals(await stopping.ended(), 0);
      await stopping.log.line(/clients: 1, messages: 1, bytes: 3/);
    },
  );
}

// It is a test itself. Its name is "the server echoes".
if (withReadme) await import(address(program(own, 1)));

test("readme", "the README: a Unix socket echoes", async () => {
  if (!posix) return;
  await using temporary = command(
    address("console.log(Deno.makeTempDirSync())"),
    [],
    "-A",
  );
  const folder = (await temporary.log.line(/^info /)).slice("info ".length);
  const path = `${folder}/echo.sock`;
  const server = program(own, 2).replace("echo.sock", path);
  const client = `
    for (let conn; !conn;) {
      conn = await Deno.connect({ transport: "unix", path: "${path}" })
        .catch(() => {});
      await conn?.write(new TextEncoder().encode("ham"));
      const buffer = new Uint8Array(3);
      if (conn) console.log(await conn.read(buffer), buffer.join());
    }
    await Deno.remove("${folder}", { recursive: true });`;
  await using _serving = command(address(server), [], "-A");
  await using asking = command(address(client), [], "-A");
  await asking.log.line(/^info 3 104,97,109$/);
  assertEquals(await asking.ended(), 0);
});

test(
  "readme",
  "the README: a reply that a Worker computes holds up no other client",
  async () => {
    const port = freePort();
    const worker = address(program(own, 3));
    const server = program(own, 4, port).replace("./worker.ts", worker);
    await using serving = command(address(server), []);
    using heavy = await connectSoon(port, serving);
    using light = await connectSoon(port, serving);
    assertEquals(await ask(heavy, "!one"), "!one"); // the Worker has started
    const order: string[] = [];
    const answer = ask(heavy, "!two").then((text) => order.push(text));
    order.push(await ask(light, "light"));
    await answer;
    assertEquals(order, ["light", "!two"]);
  },
);

test("readme", "the README: on Linux two processes share a port", async () => {
  if (Deno.build.os !== "linux") return;
  const port = freePort();
  const own = program("What it survives, and what it is not", 0, port);
  const server = address(`setTimeout(() => console.log("listening"));${own}`);
  const start = () =>
    command(server, [], "--allow-net", undefined, "--unstable-net");
  await using first = start();
  await using second = start();
  for (const { log } of [first, second]) await log.line(/listening/);
  const connect = () => sockets.connect(port);
  await assertEchoed({ connect });
  first.kill("SIGKILL");
  await first.ended();
  await assertEchoed({ connect });
});

test(
  "readme",
  "the README: the plain loop lets some wait 3 times as long as serve does",
  async () => {
    const port = freePort();
    await using both = printed(starving, 1, port);
    const worst = async (port: number) => {
      (await connectSoon(port, both)).close();
      const args = "--clients 1000 --messages 10 --timeout 60 --json";
      await using clients = clientOf(port, ...args.split(" "));
      assertEquals(await clients.ended(), 0, clients.log.toString());
      const report = only(clients.log.lines).slice("info ".length);
      return JSON.parse(report).latency.max;
    };
    // Something else may hold up the machine: one try of three is enough.
    const tries: string[] = [];
    while (tries.length < 3) {
      const [plain, fair] = [await worst(port), await worst(port + 1)];
      if (plain >= 3 * fair) return;
      tries.push(`plain loop ${plain} ms, serve ${fair} ms`);
    }
    throw new Error(tries.join("; "));
  },
);

// ---- How fast (deno bench)

for (const pending of [10, 100, 1000, 10_000]) {
  const group = `${pending} promises pending, one settles a turn`;
  const selector = new Selector<number>();
  const push = (value: number) => selector.push(value);
  const others: Promise<number>[] = []; // made by the first pass
  const makeOthers = () => {
    while (others.length < pending - 1) {
      const promise = never();
      promise.then(push);
      others.push(promise);
    }
  };
  const n = 200; // no more: each race leaves a subscription at every promise
  Deno.bench(
    { name: `Selector, ${pending}`, group, baseline: true, n },
    async () => {
      makeOthers();
      Promise.resolve(1).then(push);
      await selector.select();
    },
  );
  Deno.bench({ name: `Promise.race, ${pending}`, group, n }, async () => {
    makeOthers();
    await Promise.race([...others, Promise.resolve(1)]);
  });
}
