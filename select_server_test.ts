/**
 * What the selector, the server and the client promise.
 *
 * Plain `deno test` needs no permission: the server runs on a network in memory
 * and in virtual time. What only sockets, processes or files can show is one
 * ignored line without them. Copy the first test under "The server".
 */
import { assert, assertEquals, assertMatch, assertRejects } from "@std/assert";
import { Buffer } from "node:buffer";
import { getEventListeners, once } from "node:events";
import { connect as connectNode, createServer, Socket } from "node:net";
import { clearImmediate, setImmediate } from "node:timers";
import {
  FairSelector,
  type Handler,
  type Peer,
  Selector,
  serve,
  type ServeOptions,
} from "./select_server.ts";

// ---- What a test may use
const isGranted = (permission: Deno.PermissionDescriptor) =>
  Deno.permissions.querySync(permission).state === "granted";
const hosts = ["127.0.0.1", "localhost", "[::1]"];
const hasHosts = hosts.every((host) => isGranted({ name: "net", host }));
const sockets = hasHosts ? "" : `--allow-net=${hosts}`;
const hasAll = (["net", "run", "read"] as const)
  .every((name) => isGranted({ name }));
const commands = hasAll ? "" : "--allow-net --allow-run --allow-read";
const canReset = "resetAndDestroy" in Socket.prototype;
/** What is missing here of what a test needs. */
const missing = {
  nothing: "",
  sockets,
  resets: sockets || (canReset ? "" : "Deno 2.7"),
  commands,
  signals: commands || (Deno.build.os === "windows" ? "POSIX signals" : ""),
};
const ignored = new Map<string, number>(); // how many tests, by what is missing

/** A test that ends, and leaves nothing open. */
function test(
  name: string,
  fn: () => Promise<void>,
  needs: keyof typeof missing = "nothing",
): void {
  const what = missing[needs];
  if (what !== "") return void ignored.set(what, 1 + (ignored.get(what) ?? 0));
  // Deno 2.8 looks for what is left open only if it is told to.
  const strict = { sanitizeOps: true, sanitizeResources: true };
  const limit = Deno.args.length > 0 ? 2 ** 31 - 1 : 30_000;
  const limited = () => within(turn().then(fn), "end of the test", limit);
  Deno.test({ ...strict, name, fn: limited });
}

async function within<T>(promise: Promise<T>, what: string, ms = 10_000) {
  const late = Promise.withResolvers<never>();
  const fail = () => late.reject(new Error(`no ${what} within ${ms} ms`));
  const timer = setTimeout(fail, ms);
  try {
    return await Promise.race([promise, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}
const sleep = (ms: number) =>
  new Promise<void>((resolve) => void setTimeout(resolve, ms));
const turn = () => new Promise<void>((resolve) => void setImmediate(resolve));
const never = () => new Promise<never>(() => {});
const throwing = (error: unknown) => (): never => {
  throw error;
};
const encode = (text: string) => new TextEncoder().encode(text);
const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
function only<T>([first, ...rest]: T[]): T {
  assert(first !== undefined && rest.length === 0, "one, and no other");
  return first;
}
let changes = 0; // of all that is watched
/** Something that changes, and can be waited for. */
class Watched {
  #waiting: (() => void)[] = [];
  changed(): void {
    changes++;
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

// ---- The network in memory
const { BadResource, BrokenPipe, Interrupted, NotConnected } = Deno.errors;
const { ConnectionAborted, ConnectionRefused, ConnectionReset } = Deno.errors;

/** One direction of a connection: bytes on their way, as many as fit. */
class Pipe extends Watched {
  length = 0;
  ended = false; // no more bytes come: the writer has said so
  broken = false; // the reader is gone, or the connection is reset
  // For the histories, with times in ms.
  taken = 0; // bytes that came in, all and last
  lastTaken = 0;
  unread = 0; // when the reader has closed it
  writtenAt: number[] = [];
  readAt: number[] = [];
  endedAt = Infinity;
  closedAt = Infinity;
  constructor(readonly bytes: Uint8Array) {
    super();
  }
  end(): void {
    this.ended = true;
    this.endedAt = Math.min(this.endedAt, performance.now());
    this.changed();
  }
}

/** What can be closed once: a connection or a listener. */
abstract class Resource extends Watched {
  closed = false;
  protected abstract end(): void;
  close(): void {
    this.refuseIfClosed();
    this.closed = true;
    this.end();
  }
  [Symbol.dispose](): void {
    if (!this.closed) this.close();
  }
  protected refuseIfClosed(): void {
    if (this.closed) throw new BadResource("Bad resource ID");
  }
  ref(): void {}
  unref(): void {}
}

/** One end of a connection of two pipes. It rejects what Deno's rejects. */
class MemoryConn extends Resource implements Deno.Conn<Deno.NetAddr> {
  readonly readable = new ReadableStream(); // nobody uses these
  readonly writable = new WritableStream();
  constructor(
    readonly localAddr: Deno.NetAddr,
    readonly remoteAddr: Deno.NetAddr,
    readonly incoming: Pipe,
    readonly outgoing: Pipe,
    readonly pieces: (most: number) => number, // how much one operation takes
  ) {
    super();
  }
  async read(buffer: Uint8Array): Promise<number | null> {
    const pipe = this.incoming;
    const isEmpty = buffer.length === 0; // perhaps it has been transferred
    await this.#until(pipe, () => isEmpty || pipe.length > 0);
    if (pipe.broken) throw new ConnectionReset("Connection reset by peer");
    if (pipe.length === 0 || isEmpty) return isEmpty ? 0 : null;
    const count = this.pieces(Math.min(buffer.length, pipe.length));
    buffer.set(pipe.bytes.subarray(0, count));
    pipe.bytes.copyWithin(0, count, pipe.length);
    pipe.length -= count;
    pipe.readAt.push(performance.now());
    pipe.changed(); // there is room again
    return count;
  }
  async write(data: Uint8Array): Promise<number> {
    const pipe = this.outgoing;
    const room = () => pipe.bytes.length - pipe.length;
    const isOver = () => pipe.broken || pipe.ended;
    const put = (bytes: Uint8Array) => {
      const count = this.pieces(Math.min(bytes.length, room()));
      pipe.bytes.set(bytes.subarray(0, count), pipe.length);
      pipe.length += count;
      pipe.taken += count;
      pipe.lastTaken = count;
      pipe.writtenAt.push(performance.now());
      pipe.changed();
      return count;
    };
    this.refuseIfClosed();
    if (data.length === 0) return 0;
    // What there is room for is out at once, and the writer hears of it later.
    const count = isOver() || room() === 0 ? 0 : put(data);
    const copy = data.slice(0, pipe.bytes.length); // it may be transferred
    await this.#until(pipe, () => count > 0 || room() > 0);
    if (count > 0) return count;
    if (isOver()) throw new BrokenPipe("Broken pipe");
    return put(data.length > 0 ? data : copy);
  }
  async closeWrite(): Promise<void> {
    this.refuseIfClosed();
    this.outgoing.end();
    await turn();
  }
  /** A close with bytes unread resets (RFC 1122, 4.2.2.13). */
  protected end(): void {
    this.incoming.unread = this.incoming.length;
    if (this.incoming.length > 0) return this.reset();
    this.outgoing.end();
    this.reset([this.incoming]); // what the other side writes reaches nobody
  }
  /** Both sides lose what is on its way. */
  reset(pipes = [this.incoming, this.outgoing]): void {
    this.closed = true;
    this.incoming.closedAt = performance.now();
    for (const pipe of pipes) {
      pipe.length = 0;
      pipe.broken = true;
      pipe.changed();
    }
  }
  async #until(pipe: Pipe, isReady: () => boolean): Promise<void> {
    this.refuseIfClosed();
    const isOver = () => this.closed || pipe.broken || pipe.ended;
    await pipe.until(() => isOver() || isReady());
    if (this.closed) throw new Interrupted("operation canceled");
  }
}

/** Takes connections from a queue, its backlog. */
class MemoryListener extends Resource
  implements Deno.Listener<MemoryConn, Deno.NetAddr> {
  readonly backlog: MemoryConn[] = [];
  readonly errors: Error[] = []; // what accept fails with first
  constructor(readonly addr: Deno.NetAddr) {
    super();
  }
  async accept(): Promise<MemoryConn> {
    const { backlog, errors } = this;
    await this.until(() => this.closed || backlog.length + errors.length > 0);
    this.refuseIfClosed();
    const error = errors.shift();
    const conn = error === undefined ? backlog.shift() : undefined;
    this.changed(); // there is room again
    if (error !== undefined) throw error;
    // The runtime asks for the address of the other side, which may be gone.
    if (conn !== undefined && !conn.incoming.broken) return conn;
    conn?.reset();
    throw new NotConnected("Transport endpoint is not connected");
  }
  /** Lets accept fail before it accepts again. */
  fail(error: Error): void {
    this.errors.push(error);
    this.changed();
  }
  protected end(): void {
    for (const conn of this.backlog) conn.reset();
    this.changed();
  }
  async *[Symbol.asyncIterator]() {
    while (!this.closed) yield await this.accept();
  }
}

/** What a test uses of a network, in memory or over sockets. */
interface Network {
  listen(ports: number): Deno.Listener<Deno.Conn, Deno.NetAddr>[];
  connect(port: number): Promise<Deno.Conn>;
  /** Connects, sends, and resets: at once or when `until` has resolved. */
  reset(port: number, text: string, until?: Promise<unknown>): Promise<void>;
  /** Keeps the event loop from running, as a handler that computes does. */
  block(ms: number): void;
}

/** Listeners by their ports, and every connection that there has been. */
class MemoryNetwork implements Network {
  readonly listeners: MemoryListener[] = [];
  readonly conns: MemoryConn[] = [];
  capacity = 64 * 1024; // bytes that a pipe holds
  pieces = (most: number) => most;
  backlog = 128;
  block = (_ms: number) => {}; // virtual time has its own
  timers = () => 0; // how many are pending
  listen(ports: number): MemoryListener[] {
    const { length } = this.listeners;
    for (let n = 1; n <= ports; n++) {
      this.listeners.push(new MemoryListener(at(length + n)));
    }
    return this.listeners.slice(length);
  }
  async connect(port: number, from = 50_000 + this.conns.length) {
    const listener = this.listeners.find(({ addr }) => addr.port === port);
    const isFull = () => listener && listener.backlog.length >= this.backlog;
    await listener?.until(() => listener.closed || !isFull());
    if (listener === undefined || listener.closed) {
      throw new ConnectionRefused("Connection refused");
    }
    const there = new Pipe(new Uint8Array(this.capacity));
    const back = new Pipe(new Uint8Array(this.capacity));
    const client = new MemoryConn(at(from), at(port), back, there, this.pieces);
    const server = new MemoryConn(at(port), at(from), there, back, this.pieces);
    this.conns.push(client, server);
    listener.backlog.push(server);
    listener.changed();
    return client;
  }
  async reset(port: number, text: string, until?: Promise<unknown>) {
    const conn = await this.connect(port);
    await write(conn, text);
    await until;
    conn.reset();
  }
}
const at = (port: number) =>
  ({ transport: "tcp", hostname: "127.0.0.1", port }) as const;

// Virtual time passes with the turns of the event loop, and leaps to the next
// timer when nothing happens: a minute takes a moment, and is always the same.
async function inVirtualTime(fn: Body<MemoryNetwork>, msPerTurn = 0.1) {
  const { setTimeout, clearTimeout } = globalThis;
  const timers = new Map<number, { due: number; call: () => void }>();
  let [now, nextDue, id, quiet, ended] = [0, Infinity, 0, 0, false];
  Object.assign(performance, { now: () => now });
  Object.assign(globalThis, {
    setTimeout(call: () => void, ms = 0) {
      timers.set(++id, { due: now + ms, call });
      nextDue = Math.min(nextDue, now + ms);
      return id;
    },
    clearTimeout: (id: number) => timers.delete(id),
  });
  try {
    const network = new MemoryNetwork();
    network.block = (ms) => now += ms;
    network.timers = () => timers.size;
    const running = fn(network).finally(() => ended = true);
    running.catch(() => {}); // it is awaited below
    for (let before = 0; !ended; now += msPerTurn) {
      await turn();
      quiet = before === changes ? quiet + 1 : 0;
      before = changes;
      if (quiet > 70) now = Math.max(now, Math.min(nextDue, now + 1000));
      if (now > 200_000) throw new Error("it hangs: 200 s are over");
      if (now < nextDue) continue;
      changes++;
      const inOrder = [...timers].sort(([, a], [, b]) => a.due - b.due);
      for (const [id, { due, call }] of inOrder) {
        if (due <= now && timers.delete(id)) call();
      }
      nextDue = Math.min(...[...timers.values()].map(({ due }) => due));
    }
    await running;
  } finally {
    Object.assign(globalThis, { setTimeout, clearTimeout });
    Reflect.deleteProperty(performance, "now"); // its prototype has another
  }
}

const overSockets: Network = {
  listen: (ports) => [...Array(ports)].map(() => Deno.listen(at(0))),
  connect: (port) => Deno.connect(at(port)),
  async reset(port, text, until) {
    const socket = connectNode(port, "127.0.0.1");
    await once(socket, "connect");
    if (text !== "") socket.write(text);
    await until;
    await once(socket.resetAndDestroy(), "close"); // SO_LINGER 0
  },
  block(ms) {
    for (const end = performance.now() + ms; performance.now() < end;);
  },
};
type Body<N> = (network: N) => Promise<void>;
const inMemory = (name: string, fn: Body<MemoryNetwork>) =>
  test(name, () => inVirtualTime(fn));
/** The same test in memory, in virtual time, and over sockets. */
function onBoth(
  name: string,
  fn: Body<Network>,
  needs: "sockets" | "resets" = "sockets",
): void {
  inMemory(name, fn);
  test(`${name} (sockets)`, () => fn(overSockets), needs);
}
const tooMuch = new Uint8Array(50_000_000); // for sockets to hold
/** What one read brings, as text; "" at the end of the stream. */
async function hear(conn: Deno.Conn): Promise<string> {
  const buffer = new Uint8Array(1000);
  const count = await within(conn.read(buffer), "bytes to read");
  return decode(buffer.subarray(0, count ?? 0));
}
/** What comes next is this text, however many reads bring it. */
async function hears(conn: Deno.Conn, text: string): Promise<void> {
  let heard = "";
  while (heard.length < text.length) {
    const more = await hear(conn);
    assert(more !== "", `the stream has ended after "${heard}"`);
    heard += more;
  }
  assertEquals(heard, text);
}
async function write(conn: Deno.Conn, data: Uint8Array | string) {
  const bytes = typeof data === "string" ? encode(data) : data;
  for (let n = 0; n < bytes.length;) n += await conn.write(bytes.subarray(n));
}
const ask = (conn: Deno.Conn, text: string) =>
  write(conn, text).then(() => hear(conn));
/** Reads to the end of the stream, and closes the connection. */
async function readAll(conn: Deno.Conn): Promise<string> {
  let [text, decoder] = ["", new TextDecoder()];
  const buffer = new Uint8Array(64 * 1024);
  const read = () => within(conn.read(buffer), "end of the stream");
  for (let count; (count = await read()) !== null;) {
    text += decoder.decode(buffer.subarray(0, count), { stream: true });
  }
  conn.close();
  return text;
}
const transfer = ({ buffer }: Uint8Array) =>
  void (buffer instanceof ArrayBuffer && buffer.transfer());

onBoth("a network: bytes arrive in order, then the end", async (network) => {
  using listener = only(network.listen(1));
  using client = await network.connect(listener.addr.port);
  using conn = await listener.accept();
  assertEquals(conn.remoteAddr, client.localAddr);
  const bytes = encode("ham");
  const writing = client.write(bytes);
  transfer(bytes); // while it is written
  assertEquals([await writing, await client.write(bytes)], [3, 0]);
  await write(client, "spam");
  await client.closeWrite();
  await hears(conn, "hamspam");
  assertEquals(await hear(conn), "");
  await write(conn, "eggs"); // the other direction is open still
  await hears(client, "eggs");
  await assertRejects(() => write(client, "x"), BrokenPipe);
});

onBoth("a network: what is closed rejects", async (network) => {
  const listener = only(network.listen(1));
  const { port } = listener.addr;
  using client = await network.connect(port);
  const conn = await listener.accept();
  const accepting = assertRejects(() => listener.accept(), BadResource);
  await sleep(10);
  for (const end of [conn, listener]) end.close();
  await accepting;
  await assertRejects(() => conn.read(new Uint8Array(1)), BadResource);
  await assertRejects(() => write(conn, "x"), BadResource);
  await assertRejects(() => listener.accept(), BadResource);
  await assertRejects(() => network.connect(port), ConnectionRefused);
  assertEquals(await hear(client), "");
});

onBoth("a network: the other side is told of a reset", async (network) => {
  using listener = only(network.listen(1));
  const { port } = listener.addr;
  using client = await network.connect(port);
  const unread = await listener.accept();
  await write(client, "unread");
  await sleep(10);
  unread.close(); // which resets
  await sleep(10);
  await assertRejects(() => write(client, "x"), BrokenPipe);
  const asked = Promise.withResolvers<void>();
  const resetting = network.reset(port, "text", asked.promise);
  using conn = await listener.accept();
  await hears(conn, "text");
  asked.resolve();
  await resetting;
  await assertRejects(() => conn.read(new Uint8Array(1)), ConnectionReset);
  await assertRejects(() => write(conn, "x"), BrokenPipe);
}, "resets");

// ---- The selector
test("select waits, and hands out what is complete, once", async () => {
  const selector = new Selector<number>();
  const selecting = selector.select();
  const early = await Promise.race([selecting, sleep(10)]);
  for (const n of [1, 2, 3]) selector.push(n);
  assertEquals([early, await selecting], [undefined, [1, 2, 3]]);
  selector.push(4);
  assertEquals(await selector.select(), [4]);
});

test("a round begins when all that is ready is handed out", async () => {
  const selector = new FairSelector<string>();
  selector.nextRound(() => selector.push("next"));
  selector.push("ready");
  assertEquals(await selector.select(), ["ready"]);
  selector.nextRound(() => selector.push("after next"));
  assertEquals(await selector.select(), ["next", "after next"]);
  setTimeout(() => selector.nextRound(() => selector.push("late")), 5);
  assertEquals(await selector.select(), ["late"]);
});

// As Deno's runtime, this completes 128 operations a turn, and looks every 61
// turns at those that it has put off. Here each is ready at once.
function startRuntime(ready: number[], push: (id: number) => void) {
  const putOff: number[] = [];
  const run = () => {
    if (++turns % 61 === 0) ready.push(...putOff.splice(0));
    for (const id of ready.splice(0, 128)) push(id);
    putOff.push(...ready.splice(0));
    timer = setImmediate(run);
  };
  let [turns, timer] = [0, setImmediate(run)];
  return { [Symbol.dispose]: () => clearImmediate(timer) };
}

test("in rounds, a thousand busy clients are served alike", async () => {
  const selector = new FairSelector<number>();
  const served = new Array<number>(1000).fill(0);
  const ready = [...served.keys()];
  using _runtime = startRuntime(ready, (id) => selector.push(id));
  while (!served.includes(20)) {
    for (const id of await selector.select()) {
      served[id] = (served[id] ?? 0) + 1;
      selector.nextRound(() => ready.push(id));
    }
  }
  assert(Math.min(...served) >= 19, `${Math.min(...served)} times`);
});

test("catchUp begins after all that is ready", async () => {
  const selector = new FairSelector<number>();
  const push = (id: number) => selector.push(id);
  using _runtime = startRuntime([...Array(1000).keys()], push);
  selector.catchUp(() => selector.push(-1)); // nothing else is planned
  const ids: number[] = [];
  while (!ids.includes(-1)) ids.push(...await selector.select());
  assertEquals(ids.indexOf(-1), 1000);
});

// ---- The server
/** A server, until the test's block ends. It tells what its protocol sees. */
function start(
  network: Network,
  options: Omit<ServeOptions, "signal"> = {},
  listeners = network.listen(1),
) {
  const { protocol = () => echo } = options;
  const peers: Peer[] = [];
  const news = new Watched();
  let heard = 0; // bytes, from all clients
  const watched = (peer: Peer): Handler => {
    peers.push(peer);
    news.changed();
    const handler = protocol(peer);
    return function (this: unknown, bytes) {
      heard += bytes.length;
      news.changed();
      return handler.call(this, bytes);
    };
  };
  const stopper = new AbortController();
  const own = { protocol: watched, signal: stopper.signal };
  const logger = { error: () => throwing(server.errors++)() }; // it may fail
  const server = {
    peers,
    errors: 0, // logged
    port: (nth = 0) => listeners[nth]?.addr.port ?? 0,
    connect: (nth = 0) => network.connect(server.port(nth)),
    hears: (bytes: number) =>
      within(news.until(() => heard >= bytes), `${bytes} bytes`),
    /** Connects, sends a text, and waits until it has been heard. */
    async say(text: string): Promise<Deno.Conn> {
      const [conn, before] = [await server.connect(), heard];
      await write(conn, text);
      await server.hears(before + text.length);
      return conn;
    },
    async peer(nth = 0): Promise<Peer> {
      await within(news.until(() => nth < peers.length), `client ${nth}`);
      return peers[nth] ?? throwing(nth)();
    },
    /** Waits until the nth client is gone; how long that took (ms). */
    async goes(nth = 0): Promise<number> {
      const since = performance.now();
      await within((await server.peer(nth)).closed, `end of client ${nth}`);
      return performance.now() - since;
    },
    stop(): ReturnType<typeof serve> {
      stopper.abort();
      return within(serving, "end of serve");
    },
    [Symbol.asyncDispose]: () => server.stop().then(() => {}),
  };
  const serving = serve(listeners, { logger, ...options, ...own });
  return server;
}
const echo: Handler = (bytes) => bytes;

// To write a test, copy this one: start a server with a protocol, connect, and
// compare what comes back with what is promised. Where nothing comes back, wait
// with `server.hears` and compare `readAll`. Begin with `inMemory`, which needs
// no permission and no time; `onBoth` is for what only sockets can show.
inMemory("what the handler returns is the reply", async (network) => {
  await using server = start(network, {
    protocol: () => (bytes) => `${decode(bytes)} and spam`,
  });
  using conn = await server.connect();
  await write(conn, "eggs");
  await hears(conn, "eggs and spam");
});

async function assertEchoes(
  { connect }: { connect: () => Promise<Deno.Conn> },
  text = "are you there?",
): Promise<void> {
  const conn = await connect();
  const writing = write(conn, text).then(() => conn.closeWrite());
  await sleep(20); // it is slow to read
  assert(await readAll(conn) === text, "the echo is what was sent");
  await writing;
}

onBoth("one loop serves hundreds of clients on two ports", async (network) => {
  await using server = start(network, {}, network.listen(2));
  const clients = [...Array(300).keys()].map(async (i) => {
    using conn = await server.connect(i % 2);
    for (const text of [`${100 + i}`, `${200 + i}`]) {
      assertEquals(await ask(conn, text), text);
    }
  });
  await Promise.all(clients);
  assertEquals(await server.stop(), { clients: 300, reads: 600, bytes: 1800 });
});

onBoth("megabytes come back to who is slow to read", async (network) => {
  let largest = 0; // bytes that a read has brought
  const protocol = () => (bytes: Uint8Array) => {
    largest = Math.max(largest, bytes.length);
    return bytes;
  };
  await using server = start(network, { protocol });
  await assertEchoes(server, [...Array(1e6).keys()].join());
  await server.goes();
  assert(largest > 16 * 1024, "buffers grow");
});

onBoth("who never reads is held back, and no other", async (network) => {
  await using server = start(network, { grace: 0 });
  const rude = await server.connect();
  let written = 0;
  const writing = (async () => {
    while (true) written += await rude.write(tooMuch.subarray(0, 1 << 20));
  })();
  for (let before = -1; before < written; await sleep(50)) {
    before = written;
    await assertEchoes(server);
  }
  assert(written < tooMuch.length, "back-pressure");
  await server.stop();
  await Promise.allSettled([readAll(rude), writing]); // it is reset
});

onBoth("a protocol speaks first, and has a last word", async (network) => {
  const protocol = ({ localAddr, remoteAddr, send }: Peer): Handler => {
    send(`${Deno.inspect([localAddr, remoteAddr])}\n`);
    return (bytes) => {
      send(bytes);
      bytes.fill(0); // it has been copied
      return null;
    };
  };
  await using server = start(network, { protocol }, network.listen(2));
  for (const nth of [0, 1]) {
    const conn = await server.connect(nth);
    const { localAddr, remoteAddr } = conn;
    await hears(conn, `${Deno.inspect([remoteAddr, localAddr])}\n`);
    await write(conn, "bye");
    assertEquals(await readAll(conn), "bye");
  }
});

/** A handler as a program without types may write it. */
function untyped(handler: (bytes: Uint8Array) => unknown): Handler {
  const value: unknown = handler;
  const isHandler = (value: unknown): value is Handler => value === handler;
  assert(isHandler(value));
  return value;
}
const thenable = { then: (resolve: (text: string) => void) => resolve("eggs") };
const replies: [string, (bytes: Uint8Array) => unknown, string][] = [
  ["bytes", (bytes) => bytes, "ham"],
  ["a string", () => "café", "café"],
  ["a promise", (bytes) => sleep(5).then(() => bytes), "ham"],
  ["another thenable", () => Object.create(thenable), "eggs"],
  ["nothing", () => {}, ""],
  ["an empty string", () => "", ""],
];
for (const [name, reply, text] of replies) {
  inMemory(`a handler may reply with ${name}`, async (network) => {
    await using server = start(network, { protocol: () => untyped(reply) });
    const conn = await server.say("ham");
    await hears(conn, text);
    await write(conn, "ham");
    await server.hears(6); // the next message is read
    await conn.closeWrite();
    assertEquals(await readAll(conn), text);
  });
}
const block = () => new Uint8Array(2 ** 20);
const failures: [string, (peer: Peer) => Handler][] = [
  ["whose protocol throws", throwing(new Error("full"))],
  ["whose handler throws", () => throwing(new TypeError("no"))],
  ["whose reply rejects", () => () => Promise.reject(Object.create(null))],
  ["whose reply is an object", () => untyped(() => ({ text: "ham" }))],
  ["whose thenable throws", () => untyped(() => ({ then: throwing(7) }))],
  ["whose buffer was transferred", () => transfer],
  ["closed without a buffer", () => untyped((b) => transfer(b) ?? null)],
  ["whose reply was transferred", ({ send }) => async () => {
    const reply = block();
    await turn();
    send("x");
    transfer(reply);
    return reply;
  }],
  ["to whom too much is sent by a handler that throws", ({ send }) => () => {
    for (const _ of [1, 2, 3]) send(block());
    throw new Error("and more");
  }],
];
for (const [name, protocol] of failures) {
  inMemory(`a client ${name} is closed, and no other`, async (network) => {
    const first = (peer: Peer) => server.peers[1] ? echo : protocol(peer);
    await using server = start(network, { protocol: first });
    const conn = await server.connect();
    await write(conn, "hello").catch(() => {}); // it may be closed
    const gone = server.goes();
    await Promise.allSettled([sleep(5).then(() => readAll(conn))]);
    assert(await gone < 20);
    await assertEchoes(server);
    assertEquals(server.errors, 1);
  });
}

inMemory("what is sent and replied keeps its order", async (network) => {
  const slow = Promise.withResolvers<string>();
  const seen: unknown[] = [];
  const protocol = ({ send }: Peer) =>
    function (this: unknown) {
      seen.push(this); // not the server's own record of the client
      send("before, ");
      queueMicrotask(() => send("after, "));
      return seen.length === 1 ? "reply, " : slow.promise;
    };
  await using server = start(network, { protocol });
  const conn = await server.say("x");
  await hears(conn, "before, reply, after, ");
  await write(conn, "x");
  await hears(conn, "before, after, ");
  const peer = await server.peer();
  await sleep(1).then(() => peer.send("meanwhile, ")); // all else is out
  assertEquals(peer.bufferedAmount, "meanwhile, ".length);
  peer.close(); // its reply is being made already, and goes out
  peer.send("dropped");
  slow.resolve("late");
  assertEquals(await readAll(conn), "meanwhile, late");
  assert(await server.goes() < 1);
  assertEquals([peer.bufferedAmount, ...seen], [0, undefined, undefined]);
});

inMemory("sendLimit counts what waits, which is no more", async (network) => {
  await using server = start(network, { sendLimit: 100_000 });
  using conn = await server.connect();
  const peer = await server.peer();
  const small = () => {
    for (let n = 0; n < 100_000; n++) for (const x of ["", "x"]) peer.send(x);
  };
  small(); // at the price of its bytes
  assertEquals(peer.bufferedAmount, 100_000);
  await hears(conn, "x".repeat(100_000));
  await sleep(1); // by then the server knows it, too
  small();
  peer.send(new Uint8Array(1e6)); // one may be larger
  assertEquals(peer.bufferedAmount, 1_100_000);
  peer.send("x"); // one too many
  assert(await server.goes() < 1);
  peer.send("too late");
  assertEquals(peer.bufferedAmount, 0);
});

onBoth("who resets, idle or sent to, goes alone", async (network) => {
  const protocol = () => (bytes: Uint8Array) =>
    decode(bytes) === "much" ? tooMuch : bytes;
  await using server = start(network, { protocol });
  const reset = network.reset.bind(network, server.port());
  await reset("", server.peer());
  await server.goes();
  await reset("much", server.hears(4));
  await server.goes(1);
  for (let i = 0; i < 10; i++) { // and who resets before it is accepted
    await Promise.all([...Array(30)].map(() => reset("")));
    await assertEchoes(server);
  }
}, "resets");

inMemory("out of descriptors, accepting pauses for 1 s", async (network) => {
  const listeners = network.listen(3);
  const fail = (error: Error, n = 0) => listeners[n]?.fail(error);
  await using server = start(network, {}, listeners);
  for (const kind of [NotConnected, ConnectionAborted, ConnectionReset]) {
    for (let n = 0; n < 200; n++) fail(new kind("it has disconnected"));
  }
  await assertEchoes(server); // so that is no reason
  for (const n of [0, 0, 2, 2]) fail(new Error("Too many open files"), n);
  await assertEchoes({ connect: () => server.connect(1) }); // others go on
  assert(performance.now() < 900);
  await assertEchoes(server);
  assert(performance.now() > 2000 && performance.now() < 2900);
  assertEquals(server.errors, 2); // one a second
});

inMemory("a connection's options are set, if they can be", async (network) => {
  const set: string[] = [];
  const setNoDelay = () => set.push("no delay"); // RFC 896
  const setKeepAlive = () => throwing(set.push("keep-alive"))();
  const remoteAddr = { transport: "unix", path: "" }; // nobody minds
  const listener = only(network.listen(1));
  const accept = listener.accept.bind(listener);
  listener.accept = async () =>
    Object.assign(await accept(), { setNoDelay, setKeepAlive, remoteAddr });
  await using server = start(network, {}, [listener]);
  await assertEchoes(server);
  assertEquals(set, ["no delay", "keep-alive"]);
});

inMemory("serve ends when others close its listeners", async (network) => {
  const listeners = network.listen(2);
  const serving = serve(listeners, { logger: {} });
  using conn = await network.connect(2);
  assertEquals(await ask(conn, "hello"), "hello"); // it echoes by default
  for (const listener of listeners) listener.close();
  const still = "still".repeat(100); // which one read brings
  assertEquals(await ask(conn, still), still);
  conn.close();
  assertEquals(await serving, { clients: 1, reads: 2, bytes: 505 });
});

// The only test of the log's words.
inMemory("each line of the log says what has happened", async (network) => {
  const log = new Set<string>();
  const add = (level: string) => (line: string) =>
    log.add(level + line.replace(/ +at .*/, "").replace(/\d[\d.:]*/g, "N"));
  const logger = { error: add("E "), info: add("I "), debug: add("D ") };
  const protocol = ({ send }: Peer) => (bytes: Uint8Array) => {
    const text = decode(bytes);
    if (text === "throw") throw new Error("a\nforged\u2028line");
    for (let n = 4; text === "send" && n > 0; n--) send(block());
    return text === "wait" ? never() : bytes;
  };
  const listener = only(network.listen(1));
  Object.assign(listener.addr, { hostname: "::1" });
  listener.fail(new Error("none left"));
  const options = { protocol, idleTimeout: 500, grace: 200, logger };
  const server = start(network, options, [listener]);
  for (const [n, text] of ["throw", "send", "wait"].entries()) {
    using _conn = await server.say(text);
    await server.goes(n);
  }
  await assertEchoes(server);
  using slow = await server.connect();
  (await server.peer(4)).send(block());
  const stopped = server.stop();
  await write(slow, "late"); // while its queue is still sent
  while (await hear(slow).catch(() => "") !== "") await sleep(50);
  assertEquals((await stopped).reads, 4); // what is late is not answered
  const client = "client N (N)";
  assertEquals([...log], [
    "I listening on [::N]:N",
    "E accepting pauses for a second: Error: none left",
    `I ${client} connected`,
    `D ${client} sent N bytes`,
    `E ${client} disconnected: Error: a forged line`,
    `E ${client} disconnected: too much is queued`,
    `E ${client} disconnected: timed out after N ms`,
    `I ${client} disconnected: end of stream`,
    "I stopping: N clients are connected",
    `E ${client} disconnected: the grace time is over`,
    "I served N clients, N reads, N bytes",
  ]);
});

// ---- Time and the stop
/** Asserts that something took so long (ms), and a tick and a round more. */
function assertTook(took: number, ms: number, round = 60): void {
  assert(took >= ms - 1 && took <= ms + 100 + round, `${took} ms, not ${ms}`);
}

onBoth("idleTimeout is right in time beside a busy crowd", async (network) => {
  const protocol = () => (bytes: Uint8Array) => {
    network.block(5);
    return bytes;
  };
  await using server = start(network, { idleTimeout: 150, protocol });
  using _silent = await server.connect();
  await server.peer();
  let isBusy = true;
  const clients = [...Array(80)].map(async () => {
    using conn = await server.connect();
    while (isBusy) assertEquals(await ask(conn, "busy"), "busy");
  });
  const took = await server.goes();
  isBusy = false;
  await Promise.all(clients); // nobody is closed who has sent
  assertTook(took, 150, 3 * clients.length * 5);
});

inMemory("who sends is not idle, even if it does not read", async (network) => {
  network.capacity = 100;
  await using server = start(network, { idleTimeout: 300 });
  using conn = await server.connect();
  (await server.peer()).send(new Uint8Array(150)); // more than it takes
  await sleep(200).then(() => write(conn, "x"));
  assertTook(await server.goes(), 300);
});

inMemory("nothing wakes up a server that times nothing", async (network) => {
  await using server = start(network);
  using _conn = await server.say("hello");
  await sleep(200);
  assertEquals(network.timers(), 0);
});

const stubborn: [string, (peer: Peer) => Handler, errors: number][] = [
  ["is silent", () => echo, 0],
  ["goes on sending", () => echo, 0],
  ["does not read", () => () => tooMuch, 1],
  ["waits for its reply", () => never, 1],
];
const limits: [string, Omit<ServeOptions, "signal">, ms: number][] = [
  ["idleTimeout", { idleTimeout: 600 }, 600],
  ["a close", { grace: 1000 }, 1000],
  ["a stop", { grace: 600 }, 600],
];
for (const [how, options, ms] of limits) {
  for (const [name, protocol, errors] of stubborn) {
    const goesOn = name === "goes on sending";
    if (goesOn && how === "idleTimeout") continue; // it is not idle
    inMemory(`${how} ends who ${name}, in time`, async (network) => {
      await using server = start(network, { ...options, protocol });
      using conn = await server.say("hello");
      const peer = await server.peer();
      const gone = server.goes();
      if (how !== "idleTimeout") await sleep(2000); // which do not count
      const since = performance.now();
      if (how === "a close") peer.close();
      if (how === "a stop") server.stop();
      if (how !== "idleTimeout") sleep(200).then(peer.close); // no more time
      const send = async () => {
        for (; goesOn; await sleep(50)) await write(conn, "x");
      };
      await Promise.allSettled([gone, send()]);
      assertTook(performance.now() - since, ms);
      assertEquals(server.errors, errors); // of what is lost
    });
  }
}

inMemory("a client that is closed has 1 s to end too", async (network) => {
  const protocol = (peer: Peer) => {
    peer.close();
    return echo;
  };
  await using server = start(network, { protocol, grace: Infinity });
  using _conn = await sleep(2000).then(() => server.connect());
  assertTook(await server.goes(), 1000);
});

test("serve refuses a limit that is below 0, or no number", async () => {
  for (const name of ["idleTimeout", "grace", "sendLimit"]) {
    for (const value of [-1, NaN]) {
      const { message } = await assertRejects(
        () => serve([], { [name]: value }),
        RangeError,
      );
      assertMatch(message, new RegExp(`${value}.* expected .*0`));
    }
  }
  const least = { idleTimeout: 0, grace: 0, sendLimit: 0, logger: {} };
  assertEquals((await serve([], least)).clients, 0);
});

inMemory("a signal that has aborted closes the listeners", async (network) => {
  const [listener, signal] = [only(network.listen(1)), AbortSignal.abort()];
  const totals = await serve([listener], { signal, logger: {} });
  assertEquals([totals.clients, listener.closed], [0, true]);
  assertEquals(getEventListeners(signal, "abort"), []);
});

onBoth("a stop waits for replies, and answers no more", async (network) => {
  const slow = Promise.withResolvers<Uint8Array>();
  await using server = start(network, { protocol: () => () => slow.promise });
  const conn = await server.say("first");
  // Left unread, this would reset the connection when it is closed.
  await write(conn, "second");
  const stopped = server.stop();
  await sleep(50);
  await assertRejects(() => server.connect(), ConnectionRefused);
  slow.resolve(new Uint8Array(2_000_000));
  assertEquals((await readAll(conn)).length, 2_000_000);
  assertEquals(await stopped, { clients: 1, reads: 1, bytes: 5 });
});

inMemory("a stop ends who is accepted at that moment", async (network) => {
  await using server = start(network);
  const conn = await server.connect();
  const stopped = server.stop();
  assertEquals(await readAll(conn), "");
  assertEquals((await stopped).clients, 1);
});

inMemory("a stop ends a listener, whatever it fails with", async (network) => {
  const [pausing, failing] = network.listen(2);
  assert(pausing !== undefined && failing !== undefined);
  pausing.fail(new Error("no descriptors"));
  const accept = failing.accept.bind(failing);
  failing.accept = () => accept().catch(throwing(new Error("mine")));
  await using server = start(network, {}, [pausing, failing]);
  await sleep(10);
  await server.stop();
  assert(performance.now() < 1100);
});

// ---- Histories: a seed decides everything that happens
/** Whole numbers below a limit, the same for the same seed (mulberry32). */
const randomOf = (seed: number) => (below: number) => {
  seed = (seed + 0x6d2b79f5) | 0;
  let mix = Math.imul(seed ^ (seed >>> 15), seed | 1);
  mix ^= mix + Math.imul(mix ^ (mix >>> 7), mix | 61);
  return ((mix ^ (mix >>> 14)) >>> 0) % below;
};
let random = randomOf(0); // of the history that is played
const some = <T>(list: readonly T[]): T =>
  list[random(list.length)] ?? throwing("an empty list")();
const polite = "ends its stream, and reads to the end of the server's";
const transferred = "has a reply transferred"; // and is polite
const early = ["leaves", "resets", "falls silent"]; // before it has said all
const closing = ["is closed", "gets an error", "gets no answer"];
const behaviours = [polite, transferred, ...early, ...closing, "does not read"];

/** What the seed decides for one client, and what is seen of it. */
class Actor {
  readonly behaviour = some(random(4) === 0 ? [polite] : behaviours);
  readonly message = new Uint8Array(1 + random(200)).map(() => random(64));
  readonly turnsAt = random(this.message.length); // its behaviour shows then
  readonly comesAt = random(400); // ms
  readonly key = random(64); // its reply is its message, xor this
  readonly copies = 1 + random(2) * random(4); // of it; 1: made in place
  readonly pauses = random(2) * random(8); // before it reads on
  peer?: Peer; // once it has connected
  conn?: MemoryConn; // its own end
  readonly heard: number[] = []; // what the server has heard from it
  readonly received: number[] = []; // what has reached it
  // Replies that are made at once have bytes below 64, in a promise below 128.
  readonly replies: number[] = [];
  readonly notLate: number[] = []; // replies that are made at once, and sends
  sends = 0; // bytes
  isMaking = false; // its reply, in a promise
  isGone = false; // as its peer says
  wrong = ""; // with bufferedAmount
  // When what has happened (ms): the last time, or the first.
  connectedAt = 0;
  repliedAt = 0;
  sentAt = 0;
  speaksAt = 0; // it goes on speaking then, if it does
  closeAt = Infinity; // it is to be closed when all is out
  failsAt = Infinity; // it is to be closed at once
  lostAt = Infinity; // too much, or what was transferred: it may be closed
  leavesAt = Infinity; // it ends its stream, or resets
  constructor(readonly port: number) {}
  now(what: "closeAt" | "failsAt" | "lostAt" | "leavesAt"): null {
    this[what] = Math.min(this[what], performance.now());
    return null;
  }
  /** How many bytes are for it that its connection has not taken. */
  get waiting(): number {
    const taken = this.conn?.incoming.taken ?? 0;
    return this.replies.length + this.sends - taken;
  }
  /** Sends it some bytes, which count if the server takes them. */
  send(sendLimit: number): void {
    const { peer, conn, waiting } = this;
    if (peer === undefined || conn?.outgoing.broken) return; // it is gone
    const bytes = new Uint8Array(random(50)).map(() => 128 + random(128));
    const before = peer.bufferedAmount;
    const own = bytes.slice();
    peer.send(own);
    own.fill(0); // it is the sender's own again
    const after = peer.bufferedAmount;
    // The server may not know yet that the last write is complete.
    const known = [waiting, waiting + (conn?.incoming.lastTaken ?? 0)];
    const isKnown = !this.isMaking && this.lostAt === Infinity;
    const sent = before > sendLimit ? 0 : before + bytes.length;
    if (isKnown && !known.includes(before) || ![before, sent].includes(after)) {
      this.wrong += `${before}, then ${after} bytes, not ${known}. `;
    }
    if (before > sendLimit) return void this.now("lostAt");
    if (after === before) return; // it is closing
    this.notLate.push(...bytes);
    this.sends += bytes.length;
    this.sentAt = performance.now();
  }
}

/** Plays what a seed decides, and returns what has been seen. */
async function play(seed: number, network: MemoryNetwork) {
  random = randomOf(seed);
  network.capacity = 1 + random(random(2) === 0 ? 20 : 2000);
  const piece = 1 + random(random(2) === 0 ? 8 : 500);
  network.pieces = (most) => 1 + random(Math.min(most, piece));
  network.backlog = 1 + random(16);
  const listeners = network.listen(1 + random(3));
  const isCrowd = random(20) === 0; // more than a round starts at once
  const size = isCrowd ? 61 + random(20) : 1 + random(9);
  const actors = [...Array(size).keys()].map((port) => new Actor(port));
  const isTimed = isCrowd || random(2) === 0;
  const idleTimeout = isTimed ? 50 + random(isCrowd ? 100 : 600) : Infinity;
  const grace = some([0, 300, 5000]);
  const sendLimit = random(4) === 0 ? 100 : 2 ** 20;
  const stopsAt = random(2) === 0 ? random(1500) : Infinity;
  const computes = isCrowd || random(3) === 0 ? 2 : 50; // one of so many
  const blocks: { at: number; ms: number }[] = []; // when, and how long
  let reads = 0;
  function protocol(peer: Peer): Handler {
    const { remoteAddr } = peer;
    const actor = actors["port" in remoteAddr ? remoteAddr.port : -1];
    assert(actor !== undefined);
    actor.peer = peer;
    actor.connectedAt = performance.now();
    peer.closed.then(() => {
      actor.isGone = true;
      some(actors).send(sendLimit);
    });
    if (random(2) === 0) actor.send(sendLimit); // speaks first
    return (bytes) => {
      reads++;
      actor.heard.push(...bytes);
      if (random(2) === 0) some(actors).send(sendLimit);
      if (random(computes) === 0) {
        const ms = random(60);
        network.block(ms);
        blocks.push({ at: performance.now(), ms });
      }
      return replyTo(actor, bytes, peer);
    };
  }
  function replyTo(actor: Actor, bytes: Uint8Array, peer: Peer) {
    const { behaviour, key, replies, notLate } = actor;
    const copies = random(10) > 0 ? actor.copies : 0;
    const isLate = random(10) === 0;
    const make = <T>(reply: () => T): T | Promise<T> => {
      if (!isLate) return reply();
      return sleep(random(100)).then(() => {
        actor.repliedAt = performance.now();
        return reply();
      });
    };
    const turns = actor.heard.length > actor.turnsAt ? behaviour : "not yet";
    const fail = () => throwing(actor.now("failsAt"))();
    if (turns === "gets an error") return make(fail);
    actor.isMaking = isLate || turns === "gets no answer";
    if (turns === "gets no answer") return never();
    if (turns === "is closed") {
      actor.send(sendLimit); // a last word
      if (random(2) === 0) return make(() => actor.now("closeAt"));
      const until = random(2) === 0 ? turn() : sleep(random(300));
      until.then(() => actor.now("closeAt") ?? peer.close());
    }
    const reply = new Uint8Array(copies * bytes.length).map((_, i) =>
      ((bytes[i % bytes.length] ?? 0) ^ key) + (isLate ? 64 : 0)
    );
    return make(() => {
      replies.push(...reply);
      if (!isLate) notLate.push(...reply);
      if (turns === transferred) {
        sleep(random(40)).then(() => actor.now("lostAt"))
          .then(() => transfer(reply));
      }
      if (turns === transferred || copies !== 1) return reply;
      bytes.set(reply); // in the server's own buffer
      return bytes;
    });
  }
  async function live(actor: Actor): Promise<void> {
    const { behaviour, message, received, turnsAt, pauses, port } = actor;
    await sleep(actor.comesAt);
    const conn = await network.connect(1 + port % listeners.length, port)
      .catch(() => null);
    if (conn === null) return; // it has come after the stop
    actor.conn = conn;
    const length = early.includes(behaviour) ? turnsAt : message.length;
    const isReader = behaviour !== "does not read";
    const longest = Math.min(idleTimeout, 300); // silence
    const speak = async () => {
      for (let n = 0; n < length || !isReader;) {
        const ms = random(4) > 0 ? 0 : random(random(2) === 0 ? 50 : longest);
        actor.speaksAt = performance.now() + ms;
        if (ms > 0) await sleep(ms);
        const from = n % length; // who does not read goes on for ever
        const to = Math.min(length, from + 1 + random(200));
        n += await conn.write(message.subarray(from, to));
      }
      if (behaviour !== polite && behaviour !== transferred) return;
      await sleep(random(longest));
      actor.now("leavesAt");
      await conn.closeWrite();
    };
    const hear = async () => {
      const buffer = new Uint8Array(1 + random(300));
      const pause = Math.min(200 + random(90), idleTimeout / 2);
      for (let n = 0; isReader || received.length < turnsAt; n++) {
        if (n < pauses) await sleep(pause);
        const count = await conn.read(buffer);
        if (count === null) return;
        received.push(...buffer.subarray(0, count));
      }
    };
    const hearing = Promise.allSettled([hear()]);
    await Promise.allSettled([speak()]);
    if (behaviour === "leaves" || behaviour === "resets") {
      await sleep(random(100));
      actor.now("leavesAt");
      if (behaviour === "resets") conn.reset();
    } else await hearing;
    const { outgoing } = conn;
    if (behaviour === "falls silent") {
      await outgoing.until(() => outgoing.broken);
    }
    actor.now("leavesAt");
    conn[Symbol.dispose]();
    await hearing;
  }
  let isClean = true; // no rejection is unhandled, and nothing is left open
  globalThis.onunhandledrejection = (event) => {
    event.preventDefault();
    isClean = false;
  };
  const stop = new AbortController();
  const options = { protocol, idleTimeout, sendLimit, grace, logger: {} };
  const serving = serve(listeners, { ...options, signal: stop.signal });
  const lives = actors.map(live);
  const disturbed = [...Array(random(4))].map(async () => {
    await sleep(random(600)); // accept fails now and then
    const kind = some([NotConnected, ConnectionAborted, Error]);
    some(listeners).fail(new kind("gone"));
  });
  const stubborn = ["falls silent", "does not read", "gets no answer"];
  const ends = (_: unknown, i: number) =>
    isTimed || !stubborn.includes(actors[i]?.behaviour ?? "");
  await (stopsAt < Infinity ? sleep(stopsAt) : Promise.all(lives.filter(ends)));
  const stoppedAt = performance.now();
  stop.abort();
  const totals = await serving;
  const returnedAt = performance.now();
  await Promise.all([...lives, ...disturbed]);
  await turn();
  globalThis.onunhandledrejection = null;
  isClean &&= [...listeners, ...network.conns].every(({ closed }) => closed);
  const times = { idleTimeout, grace, stoppedAt, returnedAt, blocks };
  return { ...times, actors, totals, reads, isClean };
}

/** What the server promises, one promise after the other. */
function check(story: Awaited<ReturnType<typeof play>>): void {
  const { idleTimeout, grace, stoppedAt, blocks, actors } = story;
  /** Not later than a tick, a round, and what handlers have computed since. */
  const isSoon = (time: number, due: number, since = due) => {
    const late = blocks.filter(({ at }) => at > Math.min(due, since));
    return time <= due + 200 + late.reduce((sum, { ms }) => sum + ms, 0);
  };
  const came = actors.filter(({ peer }) => peer !== undefined);
  const bytes = actors.reduce((sum, { heard }) => sum + heard.length, 0);
  const seen = { clients: came.length, reads: story.reads, bytes };
  assertEquals(story.totals, seen, "the totals are what was seen");
  assert(story.isClean, "nothing is left open, and no rejection unhandled");
  const stopEnds = stoppedAt + Math.max(grace, 1000); // accepting may pause
  assert(isSoon(story.returnedAt, stopEnds), "a stop ends in time");
  for (const actor of came) {
    const shown = () => Deno.inspect(actor, { iterableLimit: 9 });
    const promises = (isKept: boolean, promise: string) =>
      assert(isKept, isKept ? "" : `${promise}: ${shown()}`);
    const { behaviour, conn, message, heard, received, connectedAt } = actor;
    const { replies, notLate, waiting, isMaking, wrong, isGone } = actor;
    const { repliedAt, sentAt, closeAt, leavesAt, failsAt } = actor;
    assert(conn !== undefined);
    const { incoming, outgoing } = conn; // as the client sees them
    const { closedAt } = outgoing;
    const sent = heard.map((_, i) => message[i % message.length] ?? 0);
    promises(begins(sent, heard), "what is heard is what was sent");
    const own = received.filter((byte) => byte < 128);
    promises(begins(replies, own), "a client gets its own replies, in order");
    const rest = received.filter((byte) => byte < 64 || byte >= 128);
    promises(begins(notLate, rest), "sends and replies keep their order");
    promises(wrong === "", "bufferedAmount is what waits");
    const isEmpty = actor.peer?.bufferedAmount === 0;
    promises(isGone && isEmpty, "a peer is told of its end, and nothing waits");
    // It is closed when the server has waited for it for too long: at least
    // since it has sent or taken a byte, at most since it was sent one.
    const moved = [connectedAt, ...outgoing.readAt, ...incoming.writtenAt];
    const isKnown = (time: number) => time <= closedAt - 3; // to the server
    const least = Math.max(...moved.filter(isKnown));
    const late = [sentAt, repliedAt].filter((time) => time <= closedAt);
    const most = Math.max(...moved, ...late);
    const closing = Math.min(closeAt, stoppedAt);
    const isOpen = closedAt < closing;
    const ended = incoming.endedAt < closedAt ? incoming.endedAt : Infinity;
    const atMost = Math.min(ended + 1000, stoppedAt + grace);
    const ms = ended < Infinity ? 1000 : grace;
    const closes = (since: number) =>
      Math.min(atMost, Math.max(closing, since) + ms);
    const lostAt = Math.min(failsAt, actor.lostAt);
    const isAsked = closedAt >= Math.min(leavesAt, lostAt);
    const isOver = !isOpen && closedAt >= closes(least);
    const isIdle = closedAt >= least + idleTimeout;
    promises(isAsked || isOver || isIdle, "nobody is closed early");
    const wasMaking = isMaking || repliedAt > closedAt;
    const isBusy = waiting > 0 || wasMaking || !isKnown(actor.speaksAt);
    const isRead = isAsked || !isOpen || isBusy || outgoing.unread === 0;
    promises(isRead, "nobody who has sent is closed as idle");
    const isInTime =
      isSoon(Math.min(closedAt, closing), most + idleTimeout, most) &&
      isSoon(closedAt, closes(most), most);
    promises(isInTime, "who is idle, or closing, is closed in time");
    promises(isSoon(closedAt, failsAt), "who gets an error is closed at once");
    const isNoticed = isSoon(closedAt, Math.max(leavesAt, most)) ||
      behaviour === "gets no answer" ||
      waiting > 0 && incoming.closedAt >= closedAt;
    promises(isNoticed, "who disconnects is closed when all is out");
    const reads = [polite, transferred, "falls silent", "is closed"];
    const isCutOff = closedAt >= Math.min(lostAt, atMost, closing + grace) ||
      isOpen && isMaking || blocks.some(({ at }) => at > least);
    if (!reads.includes(behaviour) || isCutOff) continue;
    const isSent = waiting === 0 && received.length === incoming.taken;
    promises(isSent, "a client that reads gets everything");
    const isWhole = heard.length === message.length;
    promises(behaviour !== polite || !isOpen || isWhole, "and it is heard");
  }
}
const begins = (all: number[], part: number[]) =>
  part.length <= all.length && part.every((byte, i) => byte === all[i]);

test("the server keeps its promises in histories", async () => {
  const [word, count = 10_000, seed = 2 ** 32 * Math.random() >>> 0] =
    Deno.args;
  const isTask = word === "histories";
  const [length, first] = isTask ? [Number(count), Number(seed)] : [300, 450];
  if (isTask) console.log(`${length} histories from seed ${first} on`);
  for (let n = first; n < first + length; n++) {
    try {
      await inVirtualTime(async (network) => check(await play(n, network)), .4);
    } catch (cause) {
      throw new Error(`again: deno task histories 1 ${n}`, { cause });
    }
  }
});

// ---- The commands
const address = (program: string) =>
  `data:application/typescript,${encodeURIComponent(program)}`;
const preload = (program: string) => `--preload=${address(program)}`;
/** Where commands find the parser: where the tests do, or nowhere. */
function mapTo(find: (name: string) => string): string {
  const names = ["jsr:@std/cli@^1/parse-args", "@std/cli/parse-args"];
  const imports = Object.fromEntries(names.map((name) => [name, find(name)]));
  const map = encodeURIComponent(JSON.stringify({ imports }));
  return `--import-map=data:application/json,${map}`;
}
const importMap = mapTo((name) => import.meta.resolve(name));
/** Runs a program until it ends, or the test's block does. */
function command(program: string, args: string, flag = "", map = importMap) {
  const url = program.endsWith(".ts") ? import.meta.resolve(program) : program;
  const own = args === "" ? [] : args.split(" ");
  const child = new Deno.Command(Deno.execPath(), {
    args: ["run", "--allow-net", map, ...(flag ? [flag] : []), url, ...own],
    env: { NO_COLOR: "1" },
    stdin: "null",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const lines = (bytes: Uint8Array) => decode(bytes).match(/.+/g) ?? [];
  return {
    child,
    /** Its exit code, and its lines, if nobody has read them. */
    async ended() {
      const { code, stdout, stderr } = await within(child.output(), args, 2e4);
      return { code, out: lines(stdout), err: lines(stderr) };
    },
    async [Symbol.asyncDispose]() {
      const { stdout, stderr } = child;
      await Promise.allSettled([stdout.cancel(), stderr.cancel()]);
      await child[Symbol.asyncDispose](); // sends SIGTERM
    },
  };
}
const [server, client] = ["./select_server.ts", "./echo_client.ts"];

/** A free port before another, below those that systems lend to clients. */
function freePort(): number {
  for (let port = 20_000 + 2 * (Deno.pid % 5000); port < 32_000; port += 2) {
    try {
      using _first = Deno.listen(at(port));
      using _second = Deno.listen(at(port + 1));
      return port;
    } catch { /* one of them is taken */ }
  }
  throw new Error("no two consecutive ports are free");
}
async function connectSoon(port: number): Promise<Deno.Conn> {
  for (let tries = 500; tries > 0; tries--) {
    const conn = await overSockets.connect(port).catch(() => sleep(20));
    if (conn) return conn;
  }
  throw new Error(`nobody listens on port ${port}`);
}

const badUse: [script: string, uses: string[], code: number][] = [
  [server, ["--bogus", "--no-quiet", "127.0.0.1", "-- 7", "--port"], 2],
  [server, ["--port 65535", "--port 5e2", "--idle-timeout 5", "--host"], 2],
  [server, ["-H nowhere.invalid"], 1],
  [client, ["--bogus", "--clients 0", "-c 1000 -n 100001", "--size 1.5"], 2],
  [client, ["-p 65535", "-n 2 hello", "hello ", "--host", "--timeout 0"], 2],
];
for (const [script, uses, expected] of badUse) {
  test(`${script} refuses ${uses.join(", ")}`, async () => {
    await Promise.all(uses.map(async (args) => {
      await using refused = command(script, args);
      const { code, out, err } = await refused.ended();
      assertEquals([code, out], [expected, []], args);
      const name = /\w+/.exec(script);
      const form = expected === 2 ? ".+: expected .+" : "cannot .*invalid:";
      assertMatch(only(err), new RegExp(`^${name}: ${form}`));
      const wrong = args.replaceAll(/-- | hello|-c 1000 /g, "").split(" ");
      assert(wrong.some((word) => only(err).includes(word)), only(err));
    }));
  }, "commands");
}

test("--help fits 80 columns, and -h is the same", async () => {
  for (const script of [server, client]) {
    await using long = command(script, "--help");
    await using short = command(script, "-h");
    const { code, out, err } = await long.ended();
    assertEquals(await short.ended(), { code: 0, out, err: [] });
    assert(code + err.length === 0 && out.every((line) => line.length <= 80));
  }
}, "commands");
const signals = [["SIGINT", "-v"], ["SIGTERM", ""], ["SIGHUP", "-q"]] as const;
for (const [signal, option] of signals) {
  test(`the server ends on ${signal}, in order (${option})`, async () => {
    const port = freePort();
    await using stopping = command(server, `-p ${port} ${option}`.trim());
    const conn = await connectSoon(port + 1);
    const writing = write(conn, tooMuch); // more than comes back unread
    await assertEchoes({ connect: () => connectSoon(port + 1) });
    stopping.child.kill(signal);
    stopping.child.kill("SIGTERM"); // which makes no difference
    const { length } = await readAll(conn);
    await Promise.allSettled([writing]);
    const { code, out, err } = await stopping.ended();
    assertEquals([code, err, length > 0], [0, [], true]);
    const all = option === "-q" ? [] : [`${length + 14} bytes`];
    assertEquals(out.slice(-1).map((line) => line.split(", ")[2]), all);
    assertEquals(out.length > 8, option === "-v");
  }, "signals");
}

test("the server goes on when nobody reads its log", async () => {
  const port = freePort();
  await using unread = command(server, `-v -p ${port}`);
  const conn = await connectSoon(port);
  for (let n = 0; n < 12_010; n++) { // more lines than are kept
    if (n === 12_000) await unread.child.stdout.cancel();
    assertEquals(await ask(conn, "x"), "x");
  }
  unread.child.kill("SIGTERM");
  assertEquals(await readAll(conn), "");
  assertEquals((await within(unread.child.status, "end")).code, 0);
}, "signals");

// ---- The client
const clientOf = (
  { port }: { port: (nth?: number) => number },
  args: string,
  flag?: string,
) => command(client, `-p ${port()} --ports 1 ${args}`, flag);

/** The client's report as JSON. It must exit with this code. */
async function reportOf(client: ReturnType<typeof command>, expected = 0) {
  await using running = client;
  const { code, out, err } = await running.ended();
  assertEquals([code, err], [expected, []]);
  return JSON.parse(only(out));
}

test("the client reports in four lines, or as JSON", async () => {
  await using server = start(overSockets);
  await using fifty = clientOf(server, "-c 50 -n 20");
  const { out } = await fifty.ended();
  const lines = [/50.* 0/, /1000.*64000.*\d/, /p50.*p90.*p99.*ms$/, /\d+.* 20/];
  assertEquals(out.length, lines.length);
  lines.forEach((figures, n) => assertMatch(out[n] ?? "", figures));
  const { latency: { p50, p90, p99, max }, ...rest } = await reportOf(
    clientOf(server, "-c 2 -n 2 -s 6000000 --json"),
  );
  const { seconds, echoesPerSecond, fewest, most, ...counts } = rest;
  const [bytes, reasons] = [24_000_000, {}];
  assertEquals(counts, { succeeded: 2, failed: 0, reasons, echoes: 4, bytes });
  assert(0 < p50 && p50 <= p90 && p90 <= p99 && p99 <= max);
  assert(max < 1000 * seconds && fewest <= most && most <= 2);
  assert(Math.abs(echoesPerSecond - 4 / seconds) < 0.01);
  await using quiet = clientOf(server, "-c 1 -n 1 -q --json");
  assertEquals(await quiet.ended(), { code: 0, out: [], err: [] });
}, "commands");

test("the client sends MESSAGEs, and prints the replies", async () => {
  await using server = start(overSockets);
  await using echoed = clientOf(server, "ham 007 two\nlines -- -x");
  await using any = clientOf(server, "--no-verify -c 2 ham");
  const replies = (await echoed.ended()).out.map((line) => line.split(": ")[1]);
  assertEquals(replies, ["ham", "007", "two lines", "-x"]);
  assertEquals((await any.ended()).out.length, 2);
}, "commands");

test("the client counts who is not answered, and how long", async () => {
  const seen = new Set<string>();
  const protocol = () => {
    const isMute = server.peers.length === 1;
    return (bytes: Uint8Array) => {
      seen.add(String(bytes)); // no message is like another
      return isMute ? never() : bytes;
    };
  };
  await using server = start(overSockets, { protocol, grace: 0 });
  const many = clientOf(server, "-c 20 -n 50 --timeout 0.5 --json");
  const { latency, seconds, echoesPerSecond, fewest, most, ...counts } =
    await reportOf(many, 1);
  assertEquals([counts.reasons, counts.echoes], [{ "timed out": 1 }, 950]);
  assertEquals([fewest, most > 25, seen.size], [0, true, 951]);
  assert(latency.max >= 500 && latency.p99 < 500);
  assert(seconds < 0.5 && echoesPerSecond > 950 / 0.5, "up to the last echo");
}, "commands");

test("the client knows a bad server, and says what is bad", async () => {
  const other = (bytes: Buffer) => bytes.map((byte) => byte ^ 1);
  const behaviours: ((socket: Socket, bytes: Buffer) => unknown)[] = [
    (socket) => socket.end(),
    (socket, bytes) => socket.write(Buffer.concat([bytes, bytes])),
    (socket, bytes) => socket.write(other(bytes)),
    (socket, bytes) => socket.write(Buffer.concat([other(bytes), bytes])),
    (socket, bytes) => socket.write(bytes.subarray(0, 10)),
    (socket) => socket.resetAndDestroy(),
  ];
  await using bad = createServer((socket) => {
    const behave = behaviours.pop();
    socket.once("data", (bytes) => behave?.(socket, bytes));
    socket.on("error", () => {}); // the client closes
  });
  await once(bad.listen(0, "127.0.0.1"), "listening");
  const addr = bad.address();
  const port = () => typeof addr === "object" ? addr?.port ?? 0 : 0;
  const six = clientOf({ port }, "-c 6 -n 1 --timeout 0.5 --json");
  const { reasons } = await reportOf(six, 1);
  const some = { "closed early": 1, "sent too much": 1, "wrong bytes": 2 };
  assertEquals(reasons, { ...some, "timed out": 1, reset: 1 });
  await using none = clientOf({ port }, "-c 1 --timeout 0.1"); // not answered
  assertEquals((await none.ended()).out.length, 2);
}, commands === "" ? "resets" : "commands");

test("the client says where nobody listens, even itself", async () => {
  // TCP connects a client to itself now and then, for which no test can wait.
  // So a client of a server is told that its own address is the server's.
  const itself = preload(`const { connect } = Deno;
    Deno.connect = async (options) => {
      const conn = await connect(options);
      const localAddr = { value: { ...conn.remoteAddr } };
      return Object.defineProperty(conn, "localAddr", localAddr);
    };`);
  await using server = start(overSockets);
  const free = freePort();
  await using lost = clientOf({ port: () => free }, "-c 3 --json");
  await using alone = clientOf(server, "-c 3 --json", itself);
  for (const [each, port] of [[lost, free], [alone, server.port()]] as const) {
    const { code, out, err } = await each.ended();
    assertMatch(only(err), new RegExp(`127.0.0.1.*${port}`));
    const { reasons, latency } = JSON.parse(only(out));
    assertEquals([code, reasons, latency.max], [1, { refused: 3 }, null]);
  }
}, "commands");

const terminals: [string, change: string, shown: RegExp][] = [
  ["its progress", "", /^50%.*50%/],
  ["nothing if it is gone", "Deno.stderr.close();", /^$/],
  ["nothing while it is paused", "Deno.stderr.write = never;", /^$/],
];
for (const [what, change, shown] of terminals) {
  test(`the client shows on a terminal ${what}`, async () => {
    let left = 4;
    const protocol = () => (bytes: Uint8Array) => left-- > 0 ? bytes : never();
    await using server = start(overSockets, { protocol, grace: 0 });
    const flag = preload(`const never = () => new Promise(() => {});
      Deno.stderr.isTerminal = () => true;${change}`);
    await using two = clientOf(server, "-n 4 -c 2 --timeout 0.4 --json", flag);
    const { code, out, err } = await two.ended();
    assertEquals([code, JSON.parse(only(out)).echoes], [1, 4]);
    assertMatch(err.join("").replace(/^.*?50/, "50"), shown);
  }, "commands");
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  test(`the client reports what is done on ${signal}`, async () => {
    await using server = start(overSockets);
    const three = clientOf(server, "-c 3 -n 1000000 --json");
    await server.hears(100 * 64); // by then 97 echoes are back
    three.child.kill(signal);
    const { reasons, echoes } = await reportOf(three, 1);
    assertEquals([reasons, echoes >= 97], [{ interrupted: 3 }, true]);
  }, "signals");
}

test("without arguments, server and client need no parser", async () => {
  const port = freePort(); // another program may have the ports of the book
  const others = preload(`for (const name of ["listen", "connect"]) {
    const own = Deno[name];
    Deno[name] = (options) =>
      own({ ...options, port: options.port - 50007 + ${port} });
  }`);
  const none = mapTo(() => "data:text/javascript,throw new Error()");
  await using _running = command(server, "", others, none);
  for (const nth of [0, 1]) (await connectSoon(port + nth)).close();
  await using hundred = command(client, "", others, none);
  const { code, out } = await hundred.ended();
  assertMatch(`${code} ${out}`, /^0 .*100 .*1000.*64000/);
}, "commands");

// ---- The README
const readme = commands === ""
  ? await Deno.readTextFile(new URL(import.meta.resolve("./README.md")))
  : "";
// Its programs, by the names that their first lines give them.
const blocks = readme.matchAll(/^```ts\n(\/\/ (\w+)\.ts: .*?)^```$/gms);
const printed = new Map([...blocks].map(([, code = "", name]) => [name, code]));

/** A program as it is printed, but for the ports, and the files beside it. */
function program(name: string, port: number): string {
  const code = printed.get(name);
  if (code === undefined) return import.meta.resolve(`./${name}.ts`);
  return address(
    code.replaceAll(/50007|50009/g, `${port}`)
      .replaceAll("50008", `${port + 1}`)
      .replaceAll(/\.\/(\w+)\.ts/g, (_, file) => program(file, port)),
  );
}

/** What one sees of each of them, who connects to its nth port. */
const programs: Record<string, (connect: Connect) => Promise<void>> = {
  async hang(connect) {
    using first = await connect();
    assertEquals(await ask(first, "first"), "first");
    using second = await connect();
    const heard = ask(second, "second");
    assertEquals(await Promise.race([heard, sleep(200)]), undefined);
    first.close();
    assertEquals(await heard, "second"); // it has waited for the first
  },
  async listing(connect) {
    const conns = [await connect(0), await connect(1)];
    for (const conn of conns) assertEquals(await ask(conn, "ham"), "ham");
    for (const conn of conns) conn.close();
    await assertEchoes({ connect });
  },
  async shout(connect) {
    using conn = await connect();
    await write(conn, encode("café").subarray(0, -1));
    await hears(conn, "CAF");
    await write(conn, encode("é").subarray(-1)); // the rest of a character
    await hears(conn, "É");
  },
  async chat(connect) {
    using ann = await connect();
    const bob = await connect();
    const says = async (conn: Deno.Conn, text: string, heard: RegExp) => {
      await write(conn, text);
      for (const each of [ann, bob]) assertMatch(await hear(each), heard);
    };
    await says(ann, "", /name/);
    assertMatch(await ask(ann, "\r\n"), /name/); // that is no name
    assertMatch(await ask(ann, "Ann\r\n"), /Ann/);
    await says(bob, "Bob\n", /Bob/);
    await says(ann, "ham\r\nsp", /^Ann: ham\n$/);
    await says(ann, "am\n", /^Ann: spam\n$/);
    bob.close();
    assertMatch(await hear(ann), /Bob/);
  },
  async starve(connect) {
    const shares: number[] = [];
    for (const nth of [0, 1]) {
      using conn = await connect(nth);
      const port = () => "port" in conn.remoteAddr ? conn.remoteAddr.port : 0;
      shares.push((await reportOf(clientOf({ port }, "-c 600 --json"))).fewest);
    }
    const [plain = 0, fair = 0] = shares;
    assert(plain < 5 && fair > 5, `of 10 echoes the fewest had ${shares}`);
  },
};
type Connect = (nth?: number) => Promise<Deno.Conn>;
for (const [name, uses] of Object.entries(programs)) {
  test(`the README's ${name}.ts does as it says`, async () => {
    const port = freePort();
    await using _running = command(program(name, port), "");
    await uses((nth = 0) => connectSoon(port + nth));
  }, "commands");
}
test("the README's race.ts shows what races leave behind", async () => {
  await using races = command(program("race", 0), "");
  const { out: [first, , , last] } = await races.ended();
  const megabytes = (line = "") => Number(/(\d+) MB/.exec(line)?.[1]);
  assert(2 * megabytes(first) < megabytes(last));
}, "commands");

test("the README's changes put its listing in rounds", async () => {
  const changes = [...readme.matchAll(/^(?:-(.*)\n)?\+(.*)$/gm)];
  let code = printed.get("listing") ?? "";
  for (const [, from = "", to = ""] of changes) code = code.replace(from, to);
  assert(code.includes("new FairSelector") && code.includes("nextRound"));
  printed.set("", code);
  const port = freePort();
  await using _running = command(program("", port), "");
  (await connectSoon(port)).close();
  await reportOf(clientOf({ port: () => port }, "--json")); // all succeed
}, "commands");

// This one is a test itself.
if (commands === "") await import(program("check", 0));

// ---- How fast (deno bench)
for (const count of [1000, 10_000]) {
  const selector = new Selector<number>();
  const push = (value: number) => selector.push(value);
  const pending = [...Array(count)].map(never);
  for (const promise of pending) promise.then(push);
  const all = { group: `${count} promises pending, one more settles`, n: 200 };
  Deno.bench(`Selector, ${count}`, { ...all, baseline: true }, async () => {
    Promise.resolve(1).then(push);
    await selector.select();
  }); // no more than 200, as each race leaves a callback at every promise
  Deno.bench(`Promise.race, ${count}`, all, async () => {
    await Promise.race([...pending, Promise.resolve(1)]);
  });
}
for (const [what, count] of ignored) {
  Deno.test.ignore(`${count} tests, which need ${what}`, () => {});
}
