/**
 * What the selector, the server and the client promise, with doubles for what real sockets rarely
 * do and with sockets for the rest. What a permission is missing for is reported as ignored.
 */
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "@std/assert";
import { connect as connectNode } from "node:net";
import readme from "./README.md" with { type: "text" };
import { type Report, runClients, testMessages } from "./echo_client.ts";
import {
  type Connection,
  listen,
  type Listener,
  type Operation,
  Selector,
  serve,
  type ServeOptions,
  stamp,
} from "./select_server.ts";

const granted = async (name: "net" | "run") =>
  (await Deno.permissions.query({ name })).state === "granted";
const withNet = { ignore: !await granted("net") };
const withRun = { ignore: withNet.ignore || !await granted("run") };

const encode = (text: string) => new TextEncoder().encode(text);
const decode = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
const blockFor = (ms: number) => {
  for (const end = performance.now() + ms; performance.now() < end;);
};
const tick = () => new Promise<void>((resolve) => void setImmediate(resolve));

/** Numbers that look random, the same for the same seed (Park and Miller's generator). */
function randomNumbers(seed: number): (below: number) => number {
  let state = seed;
  return (below) => (state = state * 48271 % 2147483647) % below;
}

// ---- The selector

/** Watches a promise, and calls what it comes to by its name. */
function watchNamed(selector: Selector<string>, name: string, promise: Promise<unknown>) {
  selector.watch(
    promise,
    (value) => `${name}: ${value}`,
    (reason) => `${name} rejected: ${reason}`,
  );
}

Deno.test("select hands out what has completed, in order of completion", async () => {
  const selector = new Selector<string>();
  const slow = Promise.withResolvers<number>();
  const quick = Promise.withResolvers<number>();
  watchNamed(selector, "slow", slow.promise);
  watchNamed(selector, "quick", quick.promise);
  quick.resolve(1);
  assertEquals(await selector.select(), ["quick: 1"]);
  slow.resolve(2);
  assertEquals(await selector.select(), ["slow: 2"]);
});

Deno.test("select hands out everything that completes in one turn", async () => {
  const selector = new Selector<number>();
  for (let i = 0; i < 5000; i++) {
    selector.watch(Promise.resolve(i), (value) => value, () => -1);
  }
  assertEquals(await selector.select(), Array.from({ length: 5000 }, (_, i) => i));
});

Deno.test("a rejection comes out of select under its operation's name, and is never unhandled", async () => {
  const selector = new Selector<string>();
  watchNamed(selector, "read", Promise.reject(new Error("reset")));
  await tick(); // a rejection that nobody handles ends the test here
  assertEquals(await selector.select(), ["read rejected: Error: reset"]);
});

Deno.test("select resolves to an empty list when the time is up, and loses nothing", async () => {
  const selector = new Selector<string>();
  const late = Promise.withResolvers<string>();
  watchNamed(selector, "late", late.promise);
  const start = performance.now();
  assertEquals(await selector.select(20), []);
  assert(performance.now() - start >= 19, "it waited");
  late.resolve("here");
  assertEquals(await selector.select(), ["late: here"]);
});

Deno.test("select takes a wait that is longer than a timer can count", async () => {
  const selector = new Selector<string>();
  const soon = Promise.withResolvers<string>();
  watchNamed(selector, "soon", soon.promise);
  setTimeout(soon.resolve, 5, "here");
  assertEquals(await selector.select(1e12), ["soon: here"]);
});

Deno.test("select polls with a timeout of 0, or one that is past", async () => {
  const selector = new Selector<string>();
  watchNamed(selector, "never", Promise.withResolvers<void>().promise);
  assertEquals(await selector.select(0), []);
  assertEquals(await selector.select(-5), []);
  watchNamed(selector, "done", Promise.resolve(1));
  assertEquals(await selector.select(0), ["done: 1"]);
});

Deno.test("select polls for what the runtime has ready to deliver", withNet, async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using client = await Deno.connect({ port: listener.addr.port });
  using conn = await listener.accept();
  const selector = new Selector<number | null>();
  selector.watch(conn.read(new Uint8Array(8)), (count) => count, () => -1);
  await client.write(encode("hello"));
  assertEquals(await selector.select(0), [5]);
});

Deno.test("select refuses a timeout that is not a number", async () => {
  const selector = new Selector<string>();
  await assertRejects(() => selector.select(NaN), RangeError, "NaN");
  assertEquals(await selector.select(0), []);
});

Deno.test("a second caller of select gets an error, and the first gets its completions", async () => {
  const selector = new Selector<string>();
  const one = Promise.withResolvers<number>();
  watchNamed(selector, "one", one.promise);
  const first = selector.select();
  await assertRejects(() => selector.select(), Deno.errors.Busy);
  one.resolve(1);
  assertEquals(await first, ["one: 1"]);
  assertEquals(await selector.select(0), []);
});

Deno.test("each promise is subscribed to once, however often select is called", async () => {
  const selector = new Selector<string>();
  const silent = new Promise<string>(() => {});
  let subscriptions = 0;
  const then = silent.then.bind(silent);
  Object.defineProperty(silent, "then", {
    value: (...args: Parameters<typeof then>) => {
      subscriptions++;
      return then(...args);
    },
  });
  watchNamed(selector, "silent", silent);
  for (let i = 0; i < 1000; i++) {
    watchNamed(selector, "busy", Promise.resolve(i));
    assertEquals(await selector.select(), [`busy: ${i}`]);
  }
  assertEquals(subscriptions, 1);
});

Deno.test("a registered operation starts, once a call, when all that is ready has been handed out", async () => {
  const selector = new Selector<string>();
  let started = 0;
  const operation = selector.register(
    () => Promise.resolve(++started),
    (value) => `start ${value}`,
    String,
  );
  for (const round of [1, 2]) {
    operation.startNextRound();
    watchNamed(selector, "ready", Promise.resolve(round));
    await tick();
    assertEquals(await selector.select(), [`ready: ${round}`]);
    assertEquals(started, round - 1);
    assertEquals(await selector.select(), [`start ${round}`]);
  }
  assertEquals(await selector.select(0), []);
  assertEquals(started, 2);
});

Deno.test("an operation that cannot be started counts as rejected", async () => {
  const selector = new Selector<string>();
  const operation = selector.register(
    () => {
      throw new Error("no");
    },
    () => "",
    (reason) => `rejected: ${reason}`,
  );
  operation.start();
  assertEquals(await selector.select(), ["rejected: Error: no"]);
  operation.startNextRound();
  assertEquals(await selector.select(), ["rejected: Error: no"]);
});

/**
 * A runtime that completes 128 operations a turn, the newest first, as Deno's does when more are
 * ready at once; every operation is ready as soon as it has been started.
 */
class BusyRuntime {
  #pending: (() => void)[] = [];
  #running = true;
  readonly ended = this.#run();

  start(): Promise<void> {
    return new Promise((resolve) => void this.#pending.push(resolve));
  }

  async #run(): Promise<void> {
    while (this.#running) {
      await tick();
      for (const resolve of this.#pending.splice(-128)) resolve();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#running = false;
    await this.ended;
  }
}

/** How often each of 1,000 clients is served while there are 100 times as many completions. */
async function serveCrowd(start: keyof Operation): Promise<number[]> {
  await using runtime = new BusyRuntime();
  const selector = new Selector<number>();
  const served = new Array<number>(1000).fill(0);
  const clients = served.map((_, id) =>
    selector.register(() => runtime.start(), () => id, () => -1)
  );
  for (const client of clients) client[start]();
  for (let total = 0; total < 100 * served.length;) {
    const ids = await selector.select();
    total += ids.length;
    for (const id of ids) {
      served[id]++;
      clients[id][start]();
    }
  }
  return served;
}

Deno.test("a crowd that is always ready again does not delay anybody beyond one round", async () => {
  const served = await serveCrowd("startNextRound");
  assert(
    Math.max(...served) - Math.min(...served) <= 1,
    `${Math.min(...served)} to ${Math.max(...served)}`,
  );
});

Deno.test("(the same crowd starves somebody when it is not served in rounds)", async () => {
  assertEquals(Math.min(...await serveCrowd("start")), 0);
});

Deno.test("who became ready while the caller took long comes before the next round", async () => {
  const selector = new Selector<string>();
  const tireless = selector.register(() => Promise.resolve(), () => "tireless", String);
  tireless.startNextRound();
  assertEquals(await selector.select(), ["tireless"]);
  blockFor(10);
  const putOff = async () => {
    for (let turn = 0; turn < 60; turn++) await tick();
  };
  selector.watch(putOff(), () => "put off", String);
  tireless.startNextRound();
  assertEquals(await selector.select(), ["put off"]);
  assertEquals(await selector.select(), ["tireless"]);
});

Deno.test("timers go on while completions never cease", async () => {
  const selector = new Selector<number>();
  let fired = false;
  const timer = setTimeout(() => fired = true, 1);
  const one = selector.register(() => Promise.resolve(1), (value) => value, () => -1);
  for (let i = 0; i < 10; i++) one.startNextRound();
  while (!fired) for (const _ of await selector.select()) one.startNextRound();
  clearTimeout(timer);
});

Deno.test("whatever happens in whatever order, every completion comes out once, in order", async () => {
  for (const seed of [1, 2, 3, Math.floor(Math.random() * 1e9) + 1]) {
    const random = randomNumbers(seed);
    const selector = new Selector<number>();
    const pending: { id: number; settle: () => void }[] = [];
    const expected: number[] = []; // the model: what has been settled, in that order
    const actual: number[] = [];
    let ids = 0;
    const start = (id: number) => {
      const { promise, resolve, reject } = Promise.withResolvers<void>();
      pending.push({ id, settle: () => random(2) ? resolve() : reject(new Error("rejected")) });
      return promise;
    };
    const settle = (most: number) => {
      for (; most > 0 && pending.length > 0; most--) {
        const [{ id, settle }] = pending.splice(random(pending.length), 1);
        settle();
        expected.push(id);
      }
    };
    for (let step = 0; step < 500; step++) {
      const action = random(4);
      if (action === 0) {
        const id = ids++;
        selector.watch(start(id), () => id, () => id);
      } else if (action === 1) {
        const id = ids++;
        const operation = selector.register(() => start(id), () => id, () => id);
        random(2) ? operation.start() : operation.startNextRound();
      } else if (action === 2) settle(random(9));
      else actual.push(...await selector.select(random(2)));
    }
    while (actual.length < ids) {
      actual.push(...await selector.select(0)); // starts what is still to be started
      settle(Infinity);
    }
    assertEquals(await selector.select(0), [], `seed ${seed}`);
    assertEquals(actual, expected, `seed ${seed}`);
    assertEquals(new Set(actual).size, ids, `seed ${seed}`);
  }
});

// ---- The loop, with doubles

/** What has been put into it, in that order, for whoever asks; an Error rejects. */
class Queue<T> {
  #items: (T | Error)[] = [];
  #takers: PromiseWithResolvers<T>[] = [];

  put(item: T | Error): void {
    const taker = this.#takers.shift();
    if (taker === undefined) this.#items.push(item);
    else if (item instanceof Error) taker.reject(item);
    else taker.resolve(item);
  }

  take(): Promise<T> {
    const taker = Promise.withResolvers<T>();
    this.#takers.push(taker);
    const item = this.#items.shift();
    if (item !== undefined) {
      this.#takers.pop();
      if (item instanceof Error) taker.reject(item);
      else taker.resolve(item);
    }
    return taker.promise;
  }

  /** Rejects whoever is asking. */
  close(error: Error): void {
    for (const taker of this.#takers.splice(0)) taker.reject(error);
  }
}

/** A connection whose client is this test. */
class TestConnection implements Connection {
  readonly remoteAddr: Deno.NetAddr = { transport: "tcp", hostname: "192.0.2.1", port: 4711 };
  readonly incoming = new Queue<Uint8Array>();
  readonly written = new Queue<string>();
  closes = 0;
  #unread: Uint8Array = new Uint8Array(0);

  /** @param taken How many bytes a write takes at most; at 0 it never completes. */
  constructor(readonly taken = Infinity) {}

  send(text: string): void {
    this.incoming.put(encode(text));
  }

  async read(buffer: Uint8Array): Promise<number | null> {
    if (this.#unread.length === 0) this.#unread = await this.incoming.take();
    const bytes = this.#unread.subarray(0, buffer.length);
    buffer.set(bytes);
    this.#unread = this.#unread.subarray(bytes.length);
    return bytes.length || null; // no bytes stand for the end of the stream
  }

  write(bytes: Uint8Array): Promise<number> {
    if (this.taken === 0) return new Promise(() => {});
    const taken = bytes.subarray(0, this.taken);
    this.written.put(decode(taken));
    return Promise.resolve(taken.length);
  }

  close(): void {
    this.closes++;
    this.incoming.close(new Deno.errors.Interrupted("operation canceled"));
  }
}

/** A connection whose writes complete when the test resolves `written`. */
function withHeldWrites() {
  const conn = new TestConnection();
  const written = Promise.withResolvers<number>();
  conn.write = (bytes) => {
    conn.written.put(decode(bytes));
    return written.promise;
  };
  return { conn, written };
}

/** A listening socket that accepts what the test puts into it. */
class TestListener implements Listener {
  readonly addr: Deno.NetAddr = { transport: "tcp", hostname: "::1", port: 7 };
  readonly backlog = new Queue<Connection>();
  accepts = 0;
  closes = 0;

  accept(): Promise<Connection> {
    this.accepts++;
    return this.backlog.take();
  }

  connect(conn = new TestConnection()): TestConnection {
    this.backlog.put(conn);
    return conn;
  }

  close(): void {
    this.closes++;
    this.backlog.close(new Deno.errors.BadResource("Listener has been closed"));
  }
}

/** A log that can be waited for. */
class Log {
  readonly lines: string[] = [];
  #waiting: { pattern: RegExp; resolve: (line: string) => void }[] = [];

  #add(line: string): void {
    this.lines.push(line);
    for (const { pattern, resolve } of this.#waiting) if (pattern.test(line)) resolve(line);
  }
  error = (line: string) => this.#add(`error ${line}`);
  info = (line: string) => this.#add(`info ${line}`);
  debug = (line: string) => this.#add(`debug ${line}`);

  /** Resolves to the first line that matches, once it is there. */
  line(pattern: RegExp): Promise<string> {
    const { promise, resolve } = Promise.withResolvers<string>();
    this.#waiting.push({ pattern, resolve });
    const line = this.lines.find((line) => pattern.test(line));
    if (line !== undefined) resolve(line);
    return promise;
  }

  count(pattern: RegExp): number {
    return this.lines.filter((line) => pattern.test(line)).length;
  }
}

/** A server that runs until the test's block ends. */
function start<L extends Listener>(listeners: L[], options: Omit<ServeOptions, "signal"> = {}) {
  const log = new Log();
  const stop = new AbortController();
  const ended = serve(listeners, { logger: log, ...options, signal: stop.signal });
  return {
    log,
    ended,
    listeners,
    listener: listeners[0],
    stop: () => {
      stop.abort();
      return ended;
    },
    async [Symbol.asyncDispose]() {
      stop.abort();
      await ended;
    },
  };
}

/** Sends a text and takes the reply: this client is being served. */
async function assertServed(conn: TestConnection, text = "are you there?"): Promise<void> {
  conn.send(text);
  assertEquals(await conn.written.take(), text);
}

Deno.test("every client of every listener gets its echo from one loop", async () => {
  await using server = start([new TestListener(), new TestListener()]);
  const conns = server.listeners.map((listener) => listener.connect());
  for (const conn of [...conns, ...conns]) await assertServed(conn);
  for (const conn of conns) conn.incoming.put(new Uint8Array(0));
  await server.log.line(/client 1 .* disconnected: end of stream/);
  await server.log.line(/client 2 .* disconnected: end of stream/);
  assertEquals(await server.stop(), { clients: 2, messages: 4, bytes: 56 });
  assertEquals(conns.map((conn) => conn.closes), [1, 1]);
  assertEquals(server.listeners.map((listener) => listener.closes), [1, 1]);
  assertEquals(server.log.count(/listening on \[::1\]:7$/), 2);
});

Deno.test("a reply is written to its end, though every write takes one byte", async () => {
  await using server = start([new TestListener()]);
  const conn = server.listener.connect(new TestConnection(1));
  conn.send("in parts");
  for (const letter of "in parts") assertEquals(await conn.written.take(), letter);
});

Deno.test("clients that reset before they are accepted are forgotten, however many in a row", async () => {
  await using server = start([new TestListener()]);
  for (let i = 0; i < 300; i++) {
    server.listener.backlog.put(
      new Deno.errors.NotConnected("Transport endpoint is not connected"),
    );
    server.listener.backlog.put(new Deno.errors.ConnectionAborted("gone"));
  }
  await assertServed(server.listener.connect());
  assertEquals(server.log.count(/^error/), 0);
});

Deno.test("out of descriptors, accepting pauses until a client leaves, with one line at each end", async () => {
  await using server = start([new TestListener()]);
  const { listener, log } = server;
  const inside = listener.connect();
  await assertServed(inside);
  for (let i = 0; i < 2; i++) listener.backlog.put(new Error("Too many open files (os error 24)"));
  await log.line(/error accepting pauses: Error: Too many open files/);
  const { accepts } = listener;
  await assertServed(inside);
  assertEquals(listener.accepts, accepts, "it does not spin");
  const outside = listener.connect();
  inside.incoming.put(new Uint8Array(0)); // leaves, and there is still a descriptor missing
  await log.line(/client 1 .* disconnected/);
  await log.line(/accepting again/); // after a moment
  await assertServed(outside);
  assertEquals(listener.accepts, accepts + 3);
  assertEquals(log.count(/^error/), 2);
});

Deno.test("a listener that somebody else closes ends, and the server with the last of them", async () => {
  const server = start([new TestListener()]);
  const conn = server.listener.connect();
  await assertServed(conn);
  server.listener.close();
  await server.log.line(/error \[::1\]:7 is closed/);
  await assertServed(conn);
  conn.incoming.put(new Uint8Array(0));
  assertEquals((await server.ended).clients, 1);
});

Deno.test("a read that rejects ends that client alone, with one line", async () => {
  await using server = start([new TestListener()]);
  const [rude, other] = [server.listener.connect(), server.listener.connect()];
  await assertServed(rude);
  rude.incoming.put(new Deno.errors.ConnectionReset("Connection reset by peer"));
  await server.log.line(/info client 1 .* disconnected: ConnectionReset: Connection reset by peer/);
  await assertServed(other);
  assertEquals([rude.closes, other.closes], [1, 0]);
  assertEquals(server.log.count(/client 1 .* disconnected/), 1);
});

Deno.test("a write that never completes holds its client back, and nobody else up", async () => {
  await using server = start([new TestListener()], { grace: 10 });
  const stuck = server.listener.connect(new TestConnection(0));
  for (let i = 0; i < 10; i++) stuck.send("never read");
  const other = server.listener.connect();
  for (let i = 0; i < 10; i++) await assertServed(other);
  assertEquals(server.log.count(/client 1 .* sent/), 1);
});

Deno.test("a client that has reset before its options are set is still only one client", async () => {
  await using server = start([new TestListener()]);
  const rude = new TestConnection();
  Object.assign(rude, {
    setNoDelay() {
      throw new Error("Invalid argument (os error 22)");
    },
  });
  server.listener.connect(rude);
  await assertServed(server.listener.connect());
});

const failingReplies: [string, () => Uint8Array | Promise<Uint8Array>, RegExp][] = [
  ["throws", () => {
    throw new Error("out of order");
  }, /error client 1 \(192\.0\.2\.1:4711\) disconnected: reply failed: Error: out of order/],
  ["rejects", () => Promise.reject("reasons"), /error client 1 .*: reply failed: "reasons"/],
  // What a caller without types may do:
  ["throws what cannot be shown", () => {
    throw Object.defineProperty(new Error(), "message", {
      get() {
        throw new Error("no message");
      },
    });
  }, /error client 1 .*: reply failed: an error that cannot be shown/],
  ["throws two lines", () => {
    throw new Error("one\nclient 9 (forged)");
  }, /error client 1 .*: reply failed: Error: one client 9 \(forged\)$/],
  ["is no bytes", JSON.parse.bind(null, '"text"'), /reply failed: TypeError: the reply is "text"/],
  ["never settles", () => new Promise(() => {}), /info client 1 .*: without its reply for 0.02 s/],
];
for (const [name, failing, line] of failingReplies) {
  Deno.test(`a reply that ${name} costs that client its connection, and nobody else`, async () => {
    await using server = start([new TestListener()], {
      reply: (bytes, client) => client.id === 1 ? failing() : bytes,
      idleTimeout: name === "never settles" ? 20 : undefined,
    });
    const first = server.listener.connect();
    first.send("question");
    await server.log.line(line);
    assertEquals(first.closes, 1);
    await assertServed(server.listener.connect());
  });
}

Deno.test("an empty reply sends nothing, and the client is read from again", async () => {
  await using server = start([new TestListener()], {
    reply: (bytes) => decode(bytes) === "quiet" ? new Uint8Array(0) : bytes,
  });
  const conn = server.listener.connect();
  conn.send("quiet");
  await assertServed(conn, "loud");
});

Deno.test("a log that throws does not stop the loop", async () => {
  const fail = () => {
    throw new Error("disk full");
  };
  await using server = start([new TestListener()], {
    logger: { error: fail, info: fail, debug: fail },
  });
  await assertServed(server.listener.connect());
});

Deno.test("a log that rejects does not stop the loop", async () => {
  const reject = () => Promise.reject(new Error("disk full"));
  await using server = start([new TestListener()], {
    logger: { error: reject, info: reject, debug: reject },
  });
  await assertServed(server.listener.connect());
});

Deno.test("what has come in time counts, though the loop was late to look", async () => {
  const first = new TestConnection();
  await using server = start([new TestListener()], {
    idleTimeout: 30,
    reply: (bytes, client) => {
      if (client.id === 1) return bytes;
      blockFor(60); // beyond the first client's time
      first.send("in time");
      return bytes;
    },
  });
  server.listener.connect(first);
  server.listener.connect().send("block");
  assertEquals(await first.written.take(), "in time");
});

Deno.test("what has come in time counts, though the loop is late every time", async () => {
  const conns = Array.from({ length: 5 }, () => new TestConnection());
  await using server = start([new TestListener()], {
    idleTimeout: 30,
    reply: (bytes, client) => {
      blockFor(40); // meanwhile somebody is always overdue
      conns[client.id % conns.length].send("next");
      return bytes;
    },
  });
  for (const conn of conns) server.listener.connect(conn);
  conns[0].send("next");
  for (const end = performance.now() + 1500; performance.now() < end;) {
    for (const conn of conns) assertEquals(await conn.written.take(), "next");
  }
});

Deno.test("transactions overlap: the quick one is not kept waiting by the slow one", async () => {
  const slow = Promise.withResolvers<Uint8Array>();
  await using server = start([new TestListener()], {
    reply: (bytes, client) => client.id === 1 ? slow.promise : bytes,
  });
  const [first, second] = [server.listener.connect(), server.listener.connect()];
  first.send("slow");
  await server.log.line(/client 1 .* sent/);
  await assertServed(second);
  slow.resolve(encode("at last"));
  assertEquals(await first.written.take(), "at last");
});

Deno.test("a silent client is closed after the idle timeout, counted from its last byte", async () => {
  await using server = start([new TestListener()], { idleTimeout: 50 });
  const [silent, chatty] = [server.listener.connect(), server.listener.connect()];
  for (let i = 0; silent.closes === 0; i++) {
    await assertServed(chatty);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  assertEquals(chatty.closes, 0);
  assertEquals(server.log.count(/client 1 .* disconnected: silent for 0.05 s/), 1);
});

Deno.test("a silent client is closed though there is always something else to do", async () => {
  await using server = start([new TestListener()], { idleTimeout: 5 });
  const tireless = new TestConnection();
  tireless.read = () => Promise.resolve(1);
  server.listener.connect(tireless);
  server.listener.connect();
  await server.log.line(/client 2 .* disconnected: silent/);
  assertEquals(tireless.closes, 0);
  tireless.read = () => Promise.resolve(null);
});

Deno.test("a client that does not take its reply is closed after the idle timeout", async () => {
  await using server = start([new TestListener()], { idleTimeout: 20 });
  server.listener.connect(new TestConnection(0)).send("never read");
  await server.log.line(/client 1 .* disconnected: not reading its reply for 0.02 s/);
});

Deno.test("a signal that has aborted already closes the listeners before anybody is accepted", async () => {
  const listener = new TestListener();
  const totals = await serve([listener], { signal: AbortSignal.abort() });
  assertEquals(totals, { clients: 0, messages: 0, bytes: 0 });
  assertEquals([listener.accepts, listener.closes], [0, 1]);
});

Deno.test("an abort closes clients that are owed nothing, and who connects afterwards is not served", async () => {
  await using server = start([new TestListener()]);
  const idle = server.listener.connect();
  await assertServed(idle);
  await server.stop();
  assertEquals([idle.closes, server.listener.closes], [1, 1]);
  const { accepts } = server.listener;
  server.listener.connect();
  await tick();
  assertEquals([server.listener.accepts, server.log.count(/client \d+ .* connected$/)], [
    accepts,
    1,
  ]);
});

Deno.test("an abort waits for what was sent before it, and for the reply to it", async () => {
  const slow = Promise.withResolvers<Uint8Array>();
  await using server = start([new TestListener()], { reply: () => slow.promise });
  const conn = server.listener.connect();
  await server.log.line(/client 1 .* connected/);
  conn.send("just in time");
  const totals = server.stop();
  await server.log.line(/client 1 .* sent 12 bytes/);
  slow.resolve(encode("in order"));
  assertEquals(await conn.written.take(), "in order");
  assertEquals((await totals).messages, 1);
  assertEquals(conn.closes, 1);
});

Deno.test("an abort waits for what was sent ahead of it, though the loop is late", async () => {
  const { conn: ahead, written } = withHeldWrites();
  await using server = start([new TestListener()], {
    reply: (bytes, client) => {
      if (client.id === 1) return bytes;
      blockFor(1200); // beyond the time for the last reads, and for polls
      ahead.send("second");
      written.resolve("first".length);
      return bytes;
    },
  });
  server.listener.connect(ahead);
  const late = server.listener.connect();
  await assertServed(ahead, "first");
  const ended = server.stop();
  await server.log.line(/stopping/);
  late.send("block");
  assertEquals(await ahead.written.take(), "second");
  await ended;
});

Deno.test("an abort does not take the failure of one client for the silence of others", async () => {
  const { conn: ahead, written } = withHeldWrites();
  await using server = start([new TestListener()], {
    reply: (bytes, client) => {
      if (client.id === 1) return bytes;
      blockFor(150); // beyond the time for the last reads
      return Promise.reject(new Error("no"));
    },
  });
  server.listener.connect(ahead);
  const failing = server.listener.connect();
  ahead.send("one");
  ahead.send("two");
  assertEquals(await ahead.written.take(), "one");
  const ended = server.stop();
  await server.log.line(/stopping/);
  written.resolve("one".length);
  failing.send("bad");
  assertEquals(await ahead.written.take(), "two");
  await ended;
});

Deno.test("an abort closes who is accepted in the same moment", async () => {
  const late = new TestConnection();
  const listener = new TestListener();
  listener.close = () => void listener.connect(late);
  await using server = start([listener]);
  await server.stop();
  assertEquals(late.closes, 1);
});

Deno.test("an abort gives up on what takes longer than the grace time", async () => {
  await using server = start([new TestListener()], { grace: 20 });
  const stuck = server.listener.connect(new TestConnection(0));
  stuck.send("never read");
  await server.log.line(/sent/);
  await server.stop();
  assertEquals(stuck.closes, 1);
  await server.log.line(/disconnected: the server stops, write pending/);
});

Deno.test("neither a half-close nor an accept that throws ends the server", async () => {
  const fail = () => {
    throw new Error("not here");
  };
  const slow = Promise.withResolvers<Uint8Array>();
  const [listener, broken] = [new TestListener(), new TestListener()];
  broken.accept = fail;
  await using server = start([listener, broken], { reply: () => slow.promise });
  await server.log.line(/error accepting pauses: Error: not here/);
  const conns = [0, 1].map(() =>
    listener.connect(Object.assign(new TestConnection(), { closeWrite: fail }))
  );
  const silent = listener.connect();
  for (const conn of conns) conn.send("hello");
  await server.log.line(/client 2 .* sent/);
  const totals = server.stop();
  await server.log.line(/client 3 .* disconnected: the server stops/); // nothing more is read now
  slow.resolve(encode("owed"));
  for (const conn of conns) assertEquals(await conn.written.take(), "owed");
  assertEquals((await totals).messages, 2);
  assertEquals([...conns, silent].map((conn) => conn.closes), [1, 1, 1]);
});

Deno.test("every address is logged in one line", async () => {
  const listener = new TestListener();
  Object.assign(listener, {
    addr: { transport: "unix", path: `/run/${"long/".repeat(20)}socket` },
  });
  await using server = start([listener]);
  const line = await server.log.line(/listening on/);
  assertMatch(line, /^[^\n]+socket[^\n]+$/);
});

Deno.test("serve refuses times that are not milliseconds", async () => {
  for (const options of [{ idleTimeout: NaN }, { idleTimeout: -1 }, { grace: NaN }]) {
    await assertRejects(() => serve([], options), RangeError, "expected milliseconds");
  }
});

Deno.test("stamp replies as the book does", () => {
  assertMatch(decode(stamp(encode("spam"))), /^Echo=>spam at \d{4}-\d\d-\d\dT[\d:.]+Z$/);
});

// ---- The loop, with sockets

function startOnSockets(options: Omit<ServeOptions, "signal"> = {}) {
  const server = start(listen({ port: 0 }), options);
  const ports = server.listeners.map((listener) => listener.addr.port);
  return { ...server, ports, port: ports[0] };
}

/** What {@linkcode runClients} needs, unless a test says otherwise. */
const fewClients = {
  host: "127.0.0.1",
  clients: 1,
  message: testMessages(1, 64),
  timeout: 10_000,
  verify: true,
};

async function readAll(conn: Deno.Conn): Promise<Uint8Array> {
  return new Uint8Array(await new Response(conn.readable).arrayBuffer());
}

async function assertEchoed(port: number, text = "are you there?"): Promise<void> {
  const conn = await Deno.connect({ port });
  await conn.write(encode(text));
  await conn.closeWrite();
  assertEquals(decode(await readAll(conn)), text);
}

Deno.test(
  "one loop serves hundreds of clients on both ports, every byte right",
  withNet,
  async () => {
    await using server = startOnSockets();
    const { ports } = server;
    const report = await runClients({
      ...fewClients,
      ports,
      clients: 400,
      message: testMessages(5, 100),
    });
    assertEquals([report.succeeded, report.reasons], [400, {}]);
    assertEquals(await server.stop(), { clients: 400, messages: 2000, bytes: 200_000 });
  },
);

Deno.test(
  "messages of megabytes come back whole, from several clients at a time",
  withNet,
  async () => {
    await using server = startOnSockets();
    const message = testMessages(2, 3_000_001);
    const report = await runClients({ ...fewClients, ports: server.ports, clients: 4, message });
    assertEquals([report.succeeded, report.bytes], [4, 24_000_008]);
  },
);

Deno.test(
  "50 MB through one connection come back the same, to a slow reader",
  withNet,
  async () => {
    await using server = startOnSockets();
    using conn = await Deno.connect({ port: server.port });
    const block = testMessages(1, 1_000_000)(1, 0) ?? new Uint8Array(0);
    const send = async () => {
      for (let i = 0; i < 50; i++) {
        for (let sent = 0; sent < block.length;) sent += await conn.write(block.subarray(sent));
      }
      await conn.closeWrite();
    };
    const sent = send();
    const received = new Uint8Array(50 * block.length);
    let count = 0;
    for (let n: number | null = 0; n !== null; n = await conn.read(received.subarray(count))) {
      count += n;
      if (count % 7 === 0) await tick(); // now and then it is busy with something else
      if (count === received.length) break;
    }
    await sent;
    assertEquals(await conn.read(new Uint8Array(1)), null);
    const hash = async (bytes: Uint8Array<ArrayBuffer>) =>
      new Uint8Array(await crypto.subtle.digest("SHA-256", bytes)).toHex();
    const all = new Uint8Array(50 * block.length);
    for (let i = 0; i < 50; i++) all.set(block, i * block.length);
    assertEquals(await hash(received), await hash(all));
  },
);

Deno.test(
  "a client that half-closes gets all it sent, and then the end of the stream",
  withNet,
  async () => {
    await using server = startOnSockets();
    await assertEchoed(server.port, "x".repeat(100_000));
    await server.log.line(/disconnected: end of stream/);
  },
);

Deno.test("clients that never read are held back, and others go on", withNet, async () => {
  await using server = startOnSockets({ grace: 0 });
  const rude: Deno.Conn[] = [];
  for (let i = 0; i < 20; i++) {
    const conn = await Deno.connect({ port: server.port });
    rude.push(conn);
    (async () => {
      const block = new Uint8Array(1 << 20);
      while (true) await conn.write(block); // until it is closed
    })().catch(() => {});
  }
  const report = await runClients({
    ...fewClients,
    ports: server.ports,
    clients: 20,
    message: testMessages(20, 1000),
  });
  assertEquals(report.succeeded, 20);
  for (const conn of rude) conn.close();
});

/** Connects, and resets (SO_LINGER 0) when `until` has resolved, or at once. */
async function connectAndReset(port: number, message = "", until?: () => Promise<unknown>) {
  const { promise, resolve } = Promise.withResolvers<void>();
  const socket = connectNode(port, "127.0.0.1", resolve);
  await promise;
  if (message !== "") socket.write(message);
  await until?.();
  const closed = Promise.withResolvers<void>();
  socket.once("close", () => closed.resolve());
  socket.resetAndDestroy();
  await closed.promise;
}

Deno.test("a client that resets while idle is forgotten, with one line", withNet, async () => {
  await using server = startOnSockets();
  await connectAndReset(server.port, "", () => server.log.line(/client 1 .* connected/));
  await server.log.line(/info client 1 .* disconnected: ConnectionReset/);
  await assertEchoed(server.port);
});

Deno.test(
  "a client that resets while its reply is being written is forgotten",
  withNet,
  async () => {
    await using server = startOnSockets({ reply: () => new Uint8Array(50_000_000) });
    await connectAndReset(server.port, "much", () => server.log.line(/client 1 .* sent 4 bytes/));
    await server.log.line(/info client 1 .* disconnected: (ConnectionReset|BrokenPipe)/);
  },
);

Deno.test(
  "hundreds that reset before they are accepted leave the server serving",
  withNet,
  async () => {
    await using server = startOnSockets();
    const report = runClients({
      ...fewClients,
      ports: server.ports,
      message: testMessages(500, 10),
    });
    for (let i = 0; i < 10; i++) {
      await Promise.all(Array.from({ length: 30 }, () => connectAndReset(server.port)));
    }
    assertEquals((await report).succeeded, 1);
    assertEquals(server.log.count(/^error/), 0);
  },
);

Deno.test(
  "transactions overlap: all of them are under way before the first is done",
  withNet,
  async () => {
    const everybody = Promise.withResolvers<void>();
    let waiting = 0;
    await using server = startOnSockets({
      reply: async (bytes) => {
        if (++waiting === 50) everybody.resolve();
        await everybody.promise;
        return bytes;
      },
    });
    const report = await runClients({ ...fewClients, ports: server.ports, clients: 50 });
    assertEquals(report.succeeded, 50);
  },
);

Deno.test("a very large reply arrives whole", withNet, async () => {
  await using server = startOnSockets({ reply: () => new Uint8Array(20_000_000).fill(7) });
  const conn = await Deno.connect({ port: server.port });
  await conn.write(encode("all"));
  await conn.closeWrite();
  const reply = await readAll(conn);
  assertEquals([reply.length, reply.every((byte) => byte === 7)], [20_000_000, true]);
});

Deno.test(
  "an abort loses no owed reply of a client that has sent ahead of it",
  withNet,
  async () => {
    const owed = Promise.withResolvers<Uint8Array>();
    await using server = startOnSockets({ reply: () => owed.promise });
    using conn = await Deno.connect({ port: server.port });
    using idle = await Deno.connect({ port: server.port });
    await conn.write(encode("first"));
    await server.log.line(/sent 5 bytes/);
    await conn.write(encode("second"));
    const totals = server.stop();
    assertEquals(await idle.read(new Uint8Array(1)), null); // nothing more is read now
    owed.resolve(new Uint8Array(2_000_000));
    const buffer = new Uint8Array(65536);
    let received = 0;
    for (let n: number | null = 0; n !== null; n = await conn.read(buffer)) received += n;
    assertEquals(received, 2_000_000);
    await conn.closeWrite();
    assertEquals((await totals).messages, 1);
  },
);

Deno.test(
  "an abort during load loses no reply that is owed, and ends with every client closed",
  withNet,
  async () => {
    await using server = startOnSockets();
    let replies = 0;
    const report = runClients({
      ...fewClients,
      ports: server.ports,
      clients: 100,
      message: testMessages(1_000_000, 64),
      onReply: () => void (++replies === 1000 && server.stop()),
    });
    const totals = await server.ended;
    const { reasons, echoes } = await report;
    assertEquals(totals.messages, echoes);
    assertEquals(Object.keys(reasons).filter((reason) => /wrong|much|timed/.test(reason)), []);
  },
);

/** Takes a port that the system chooses, after one that is free. */
function takeSecondPort(): Deno.TcpListener {
  while (true) {
    const second = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    try {
      Deno.listen({ hostname: "127.0.0.1", port: second.addr.port - 1 }).close();
      return second;
    } catch {
      second.close(); // somebody has the port before it: take another
    }
  }
}

Deno.test(
  "listen opens all ports or none, and names the one that it cannot open",
  withNet,
  async () => {
    using taken = takeSecondPort();
    const { port } = taken.addr;
    const message = `cannot listen on 127.0.0.1:${port}: Address already in use`;
    assertThrows(() => listen({ port: port - 1, ports: 2 }), Error, message);
    await assertRejects(() => Deno.connect({ port: port - 1 }), Deno.errors.ConnectionRefused);
  },
);

Deno.test(
  "nobody who has sent in time is closed as idle, though the loop was late",
  withNet,
  async () => {
    const conns: Deno.TcpConn[] = [];
    const idleTimeout = 500;
    await using server = startOnSockets({
      idleTimeout,
      reply: (bytes) => {
        if (decode(bytes) !== "block") return bytes;
        blockFor(idleTimeout + 50); // beyond everybody's time
        for (const conn of conns) conn.write(encode("in time")); // at once: there is room for it
        return bytes;
      },
    });
    using blocker = await Deno.connect({ port: server.port });
    for (let i = 0; i < 50; i++) conns.push(await Deno.connect({ port: server.port }));
    await Promise.all(conns.map((conn) => say(conn, "hello")));
    await Promise.all(conns.map(hear));
    await say(blocker, "block");
    assertEquals(await Promise.all(conns.map(hear)), conns.map(() => "in time"));
    for (const conn of conns) conn.close();
  },
);

Deno.test("listen takes addresses and names of both families", withNet, async () => {
  for (const host of ["localhost", "127.0.0.1", "0.0.0.0", "::1"]) {
    const server = start(listen({ host, port: 0, ports: 1 }));
    const shown = host === "::1"
      ? /info listening on \[::1\]:\d+$/
      : /info listening on [\d.]+:\d+$/;
    await server.log.line(shown);
    await server.stop();
  }
  assertThrows(
    () => listen({ host: "nowhere.invalid" }),
    Error,
    "cannot listen on nowhere.invalid:50007: ",
  );
});

// ---- The client

const badServers: [string, (conn: Deno.TcpConn, bytes: Uint8Array) => unknown][] = [
  ["closed by the server", (conn) => conn.close()],
  ["sent too much", (conn, bytes) => conn.write(new Uint8Array([...bytes, 0]))],
  ["wrong bytes", (conn, bytes) => conn.write(bytes.map((byte) => byte ^ 1))],
  ["timed out", () => {}],
];
for (const [reason, behave] of badServers) {
  Deno.test(
    `the client counts a server's misbehaviour under its reason: ${reason}`,
    withNet,
    async () => {
      using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      const ports = [listener.addr.port];
      const timeout = reason === "timed out" ? 50 : 10_000;
      const report = runClients({ ...fewClients, ports, timeout });
      const conn = await listener.accept();
      const buffer = new Uint8Array(1000);
      await behave(conn, buffer.subarray(0, await conn.read(buffer) ?? 0));
      const { succeeded, failed, reasons } = await report;
      assertEquals([succeeded, failed, reasons], [0, 1, { [reason]: 1 }]);
      if (reason !== "closed by the server") conn.close();
    },
  );
}

Deno.test("the client counts a refused connection, and a reset one", withNet, async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const ports = [listener.addr.port];
  const reset = runClients({ ...fewClients, ports });
  (await listener.accept()).close(); // with bytes unread, which resets the connection
  const [reason] = Object.keys((await reset).reasons);
  assertMatch(reason, /ConnectionReset|closed by the server|BrokenPipe/);
  listener.close();
  assertEquals((await runClients({ ...fewClients, ports })).reasons, { ConnectionRefused: 1 });
});

Deno.test(
  "a reply that comes before its message is out does not run messages together",
  withNet,
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const messages = [1, 2].map((byte) => new Uint8Array(8_000_000).fill(byte)); // more than sockets hold
    const report = runClients({
      ...fewClients,
      ports: [listener.addr.port],
      message: (_, index) => messages[index],
      verify: false,
    });
    using conn = await listener.accept();
    await conn.write(encode("early"));
    const order: number[] = [];
    const buffer = new Uint8Array(64 * 1024);
    for (let left = 16_000_000, count; (count = await conn.read(buffer)) !== null;) {
      for (const byte of buffer.subarray(0, count)) if (order.at(-1) !== byte) order.push(byte);
      if ((left -= count) === 0) await conn.write(encode("done"));
      await tick(); // the client has a turn
    }
    await conn.closeWrite();
    const { succeeded, echoes } = await report;
    assertEquals([order, succeeded, echoes], [[1, 2], 1, 2]);
  },
);

Deno.test(
  "the client does not blame the server for its own lateness",
  withNet,
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const conns: Deno.TcpConn[] = [];
    const timeout = 500;
    const report = runClients({
      ...fewClients,
      ports: [listener.addr.port],
      clients: 50,
      message: (_, index) => index === 0 ? encode("echo") : undefined,
      timeout,
      onReply: () => {
        if (conns.length < 50) return; // only the first reply finds all of them connected
        blockFor(timeout + 50); // beyond everybody's time
        for (const conn of conns.splice(0).slice(1)) conn.write(encode("echo"));
      },
    });
    while (conns.length < 50) conns.push(await listener.accept());
    const served = [...conns];
    await served[0].write(encode("echo"));
    await Promise.all(served.map(readAll)); // to the end of the stream, which closes it
    const { succeeded, reasons } = await report;
    assertEquals([succeeded, reasons], [50, {}]);
  },
);

Deno.test(
  "an interrupted run leaves no connection open, not even one that was being made",
  withNet,
  async () => {
    await using server = startOnSockets();
    for (const after of [0, 1, 2, 4]) {
      const signal = AbortSignal.timeout(after);
      const message = testMessages(1e6, 8);
      await runClients({ ...fewClients, ports: server.ports, clients: 50, message, signal });
    }
    // A connection that is still open fails the test here (sanitizeResources).
  },
);

Deno.test(
  "a `message` that throws ends the run, and leaves no connection open",
  withNet,
  async () => {
    await using server = startOnSockets();
    const message = () => {
      throw new Error("no message");
    };
    const run = runClients({ ...fewClients, ports: server.ports, clients: 20, message });
    await assertRejects(() => run, Error, "no message");
  },
);

Deno.test("the client's report so far is there when it is interrupted", withNet, async () => {
  await using server = startOnSockets();
  const stop = new AbortController();
  const report: Report = await runClients({
    ...fewClients,
    ports: server.ports,
    message: testMessages(1_000_000, 8),
    signal: stop.signal,
    onReply: () => stop.abort(),
  });
  assertEquals([report.failed, report.reasons], [1, { interrupted: 1 }]);
  assert(report.echoes > 0 && report.latency.max >= report.latency.p50);
});

Deno.test("payloads differ by client and by message", () => {
  const message = testMessages(3, 16);
  const seen = new Set<string>();
  for (let client = 1; client <= 100; client++) {
    for (let index = 0; index < 3; index++) seen.add(message(client, index)?.join() ?? "");
  }
  assertEquals([seen.size, message(1, 3)], [300, undefined]);
});

// ---- The commands

// The scripts run with the packages that the tests run with, be it through an import map.
const parseArgs = "jsr:@std/cli@^1/parse-args";
const importMap = JSON.stringify({ imports: { [parseArgs]: import.meta.resolve(parseArgs) } });

function spawn(
  script: string,
  args: string[],
  permission = "--allow-net",
  stdin: "null" | "piped" = "null",
): Deno.ChildProcess {
  const map = `data:application/json,${encodeURIComponent(importMap)}`;
  const run = ["run", "--no-prompt", "--import-map", map, permission, import.meta.resolve(script)];
  return new Deno.Command(Deno.execPath(), {
    args: [...run, ...args],
    env: { NO_COLOR: "1" },
    stdin,
    stdout: "piped",
    stderr: "piped",
  }).spawn();
}

/** Runs a script, whose lines can be waited for. */
function command(...args: Parameters<typeof spawn>) {
  const child = spawn(...args);
  const log = new Log();
  const read = async (stream: typeof child.stdout, add: (line: string) => void) => {
    let rest = "";
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop() ?? "";
      lines.forEach(add);
    }
  };
  const output = Promise.all([read(child.stdout, log.info), read(child.stderr, log.error)]);
  return {
    log,
    child,
    /** Resolves to the exit code, when everything has been printed. */
    async ended(): Promise<number> {
      await output;
      return (await child.status).code;
    },
  };
}

const server = (...args: string[]) => command("./select_server.ts", args);
const client = (...args: string[]) => command("./echo_client.ts", args);

/** Starts the server on ports that the system chooses. */
async function serverOnPorts(...args: string[]) {
  const started = server("--port", "0", ...args);
  const [port] = /\d+$/.exec(await started.log.line(/listening on/)) ?? [];
  return { ...started, port: String(port) };
}

for (const [name, run] of [["server", server], ["client", client]] as const) {
  Deno.test(`the ${name}'s --help fits into 80 columns, and exits with 0`, withRun, async () => {
    for (const option of ["--help", "-h"]) {
      const { log, ended } = run(option);
      assertEquals(await ended(), 0);
      assert(log.count(/^info {3}-p, --port PORT {2,}\S/) === 1);
      assertEquals(log.lines.filter((line) => line.length > "info ".length + 80), []);
    }
  });
}

const badUse: [typeof server, string, RegExp][] = [
  [server, "--bogus", /--bogus: expected one of the options/],
  [server, "--no-stamp", /--no-stamp: expected one of the options/],
  [server, "--port", /--port without a value: expected a whole number from 0 to 65535/],
  [server, "--port=", /--port(=| without a value): expected/], // which of them is up to @std/cli
  [server, "--port 70000", /--port 70000: expected a whole number from 0 to 65535/],
  [server, "--port 5e2", /--port 5e2: expected a whole number/],
  [server, "--port -1", /-1: expected a number from 0 up/],
  [server, "--ports 0", /--ports 0: expected a whole number from 1/],
  [server, "--port 65535", /--port 65535 --ports 2: expected the last port to be 65535 at most/],
  [server, "--delay x", /--delay x: expected a whole number/],
  [server, "--idle-timeout 0", /--idle-timeout 0: expected a number from/],
  [server, "--host", /--host without a value: expected/],
  [server, "--quiet --verbose", /--quiet --verbose: expected one/],
  [server, "127.0.0.1", /127\.0\.0\.1: expected HOST PORT/],
  [server, "127.0.0.1 5e2", /5e2: expected a whole number/],
  [server, "127.0.0.1 7 8", /127\.0\.0\.1 7 8: expected HOST PORT/],
  [server, "127.0.0.1 7 --port 8", /127\.0\.0\.1 7: expected either HOST PORT or/],
  [client, "--bogus", /--bogus: expected one of the options/],
  [client, "--host", /--host without a value: expected/],
  [client, "--clients 0", /--clients 0: expected a whole number from 1/],
  [client, "--size 1.5", /--size 1\.5: expected a whole number/],
  [client, "--timeout -3", /-3: expected a number from 0 up/],
  [client, "--quiet --json", /--quiet --json: expected one of them/],
  [client, "--messages 2 hello", /hello: expected either MESSAGEs or --messages/],
];
Deno.test(
  "bad use is one line that names the value, a pointer to --help, and exit code 2",
  withRun,
  async () => {
    await Promise.all(badUse.map(async ([run, args, message]) => {
      const { log, ended } = run(...args.split(" "));
      assertEquals(await ended(), 2, args);
      assertEquals(log.lines.length, 2, log.lines.join("\n"));
      assertMatch(log.lines[0], message);
      assertMatch(log.lines[1], /^error .*--help/);
    }));
  },
);

Deno.test("a port that cannot be opened is one line and exit code 1", withRun, async () => {
  using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = taken.addr;
  const cases: [ReturnType<typeof command>, RegExp][] = [
    [
      server("--port", `${port}`),
      new RegExp(`cannot listen on 127.0.0.1:${port}: Address already in use`),
    ],
    [server("192.0.2.1", "7007"), /cannot listen on 192\.0\.2\.1:7007: /],
    [server("-H", "nowhere.invalid"), /cannot listen on nowhere\.invalid:50007: /],
    [
      command("./select_server.ts", [], "--deny-net"),
      /cannot listen on 127\.0\.0\.1:50007: Requires net access/,
    ],
  ];
  for (const [{ log, ended }, message] of cases) {
    assertEquals(await ended(), 1);
    assertEquals(log.lines.length, 1, log.lines.join("\n"));
    assertMatch(log.lines[0], message);
  }
});

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  const posix = { ignore: withRun.ignore || Deno.build.os === "windows" };
  Deno.test(
    `${signal} stops the server in order, with a line of totals and exit code 0`,
    posix,
    async () => {
      const { log, port, child, ended } = await serverOnPorts("--verbose", "--delay", "60000");
      const conn = await Deno.connect({ port: Number(port) });
      await conn.write(encode("owed"));
      await log.line(/client 1 .* sent 4 bytes/);
      child.kill(signal);
      assertEquals(decode(await readAll(conn)), "owed");
      assertEquals(await ended(), 0);
      assertEquals(log.lines.at(-1), "info served 1 clients, 1 messages, 4 bytes");
      assertEquals(log.count(/^error/), 0);
    },
  );

  Deno.test(`a second ${signal} stops the server at once, with exit code 1`, posix, async () => {
    const { log, port, child, ended } = await serverOnPorts("--verbose");
    using stuck = await Deno.connect({ port: Number(port) });
    const block = new Uint8Array(50_000_000);
    const blocked = stuck.write(block).then(async (n) => {
      while (true) n += await stuck.write(block.subarray(n % block.length));
    }).catch(() => {}); // never reads, so that the server owes it something
    await log.line(/client 1 .* sent/);
    child.kill(signal);
    await log.line(/stopping/);
    child.kill(signal);
    assertEquals(await ended(), 1);
    await blocked;
  });
}

Deno.test(
  "the client's every byte comes back, and it exits with 0 and a report",
  withRun,
  async () => {
    const { port, child, ended } = await serverOnPorts("--quiet=false");
    const ports = ["--port", port, "--ports", "1"];
    const plain = client(...ports, "--clients", "50", "--messages", "20");
    assertEquals(await plain.ended(), 0);
    await plain.log.line(/^info clients {3}50 succeeded, 0 failed$/);
    await plain.log.line(/^info echoes {4}1000, 64000 bytes in/);
    await plain.log.line(/^info fairness {2}[01]\.\d{3} /);

    const json = client(...ports, "-c", "3", "-n", "2", "-s", "5", "--json");
    assertEquals(await json.ended(), 0);
    const report = JSON.parse(json.log.lines[0].slice("info ".length));
    assertEquals([report.succeeded, report.failed, report.echoes, report.bytes], [3, 0, 6, 30]);
    assertEquals(report.finished.first <= report.finished.last, true);

    const both = client(...ports, "--json", "Hello network world");
    assertEquals(await both.ended(), 0);
    assertEquals(JSON.parse(both.log.lines.join("").slice("info ".length)).echoes, 1);

    const book = client(...ports, "Hello network world", "007");
    assertEquals(await book.ended(), 0);
    assertEquals(book.log.lines, [
      "info client 1 received: Hello network world",
      "info client 1 received: 007",
    ]);
    child.kill();
    assertEquals(await ended(), 0);
  },
);

Deno.test(
  "the client takes stamped replies with --no-verify, and refuses them without",
  withRun,
  async () => {
    const { port, child, ended } = await serverOnPorts("--stamp");
    const stamped = client("-p", port, "--ports", "1", "--no-verify", "spam");
    assertEquals(await stamped.ended(), 0);
    assertMatch(stamped.log.lines[0], /^info client 1 received: Echo=>spam at 20/);
    const verified = client("-p", port, "--ports", "1", "-c", "2");
    assertEquals(await verified.ended(), 1);
    await verified.log.line(/clients {3}0 succeeded, 2 failed, 2 sent too much/);
    child.kill();
    assertEquals(await ended(), 0);
  },
);

Deno.test("the client says when there is no server, and how to start it", withRun, async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  listener.close();
  const { log, ended } = client("--port", `${port}`, "--ports", "1");
  assertEquals(await ended(), 1);
  assertEquals(log.lines.length, 1);
  assertMatch(
    log.lines[0],
    /^error echo_client: nobody listens on .*deno run --allow-net select_server\.ts/,
  );
});

Deno.test("the client reports what it has done so far when it is interrupted", {
  ignore: withRun.ignore || Deno.build.os === "windows",
}, async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { log, child, ended } = client("-p", `${listener.addr.port}`, "--ports", "1", "-c", "1");
  using _conn = await listener.accept();
  child.kill("SIGINT");
  assertEquals(await ended(), 1);
  await log.line(/clients {3}0 succeeded, 1 failed, 1 interrupted/);
});

Deno.test("the server goes on when nobody reads its log any more", withRun, async () => {
  const child = spawn("./select_server.ts", ["--port", "0"]);
  const reader = child.stdout.getReader();
  let printed = "";
  while (!printed.includes("\n")) {
    printed += decode((await reader.read()).value ?? new Uint8Array(0));
  }
  await reader.cancel();
  const port = Number(/:(\d+)/.exec(printed)?.[1]);
  for (let i = 0; i < 3; i++) await assertEchoed(port); // each is a line that nobody can read
  child.kill();
  assertEquals((await child.status).code, 0);
  assertEquals(await new Response(child.stderr).text(), "");
});

// ---- The README

/** The programs that the README prints under a heading. */
function programs(heading: string): string[] {
  const [, section] = readme.split(`\n## ${heading}\n`);
  return [...section.split("\n## ")[0].matchAll(/^```ts\n(.*?)^```$/gms)].map(([, text]) => text);
}

/** Runs a program as it is printed, as if it stood in a file beside the scripts. */
function runPrinted(text: string, stdin?: "piped") {
  const beside = text.replaceAll(
    '"./select_server.ts"',
    `"${import.meta.resolve("./select_server.ts")}"`,
  );
  const program = `data:application/typescript,${encodeURIComponent(beside)}`;
  return command(program, ["0"], undefined, stdin); // on a port that the system chooses
}

async function portOf(log: Log): Promise<number> {
  return Number(/\d+$/.exec(await log.line(/listening on 127/)));
}

async function say(conn: Deno.Conn, text: string): Promise<void> {
  await conn.write(encode(text));
}

async function hear(conn: Deno.Conn): Promise<string> {
  const buffer = new Uint8Array(1000);
  return decode(buffer.subarray(0, await conn.read(buffer) ?? 0));
}

for (const [column, [name, run]] of ([["server", server], ["client", client]] as const).entries()) {
  Deno.test(`the README lists exactly the options of the ${name}'s help`, withRun, async () => {
    const { log, ended } = run("--help");
    assertEquals(await ended(), 0);
    const help = log.lines.flatMap((line) =>
      /^info {3,7}(?:-\w, )?(--[a-z-]+)/.exec(line)?.[1] ?? []
    );
    const [, section] = readme.split("\n## Options\n");
    const rows = section.split("\n").map((line) => line.split("|").map((cell) => cell.trim()));
    const listed = rows.flatMap(([, option = "", ...scripts]) =>
      scripts[column] ? /--[a-z][a-z-]*/.exec(option)?.[0] ?? [] : []
    );
    assertEquals(listed.toSorted(), help.toSorted());
  });
}

Deno.test("the README's upper-casing server does what it says", withRun, async () => {
  const [text] = programs("Make it yours");
  const { log, child } = runPrinted(text);
  using conn = await Deno.connect({ port: await portOf(log) });
  await say(conn, "spam");
  assertEquals(await hear(conn), "SPAM");
  child.kill();
  await child.status;
});

Deno.test("the README's party line broadcasts what is said", withRun, async () => {
  const [, text] = programs("Make it yours");
  const { log, child } = runPrinted(text);
  const port = await portOf(log);
  using ann = await Deno.connect({ port });
  using bob = await Deno.connect({ port });
  using eve = await Deno.connect({ port });
  await say(ann, "hello");
  await log.line(/client 1 .* sent 5 bytes/);
  await say(bob, "hi");
  assertEquals(await hear(ann), "hi");
  await say(eve, "quiet!");
  assertEquals(await hear(bob), "quiet!");
  child.kill();
  await child.status;
});

Deno.test("the README's server listens to its terminal in the same select", withRun, async () => {
  const [, , text] = programs("Make it yours");
  const { log, child, ended } = runPrinted(text, "piped");
  const keyboard = child.stdin.getWriter();
  await assertEchoed(await portOf(log));
  await keyboard.write(encode("still there?\n"));
  await log.line(/^info still there\?$/);
  await assertEchoed(await portOf(log), "quit\n"); // only the terminal may say so
  await keyboard.write(encode("quit\n"));
  assertEquals(await ended(), 0);
  await keyboard.close().catch(() => {}); // the other end is closed
});

const printedServers = [
  "Why not just Promise.race",
  "Why the obvious loop starves people, and dies",
];
for (const heading of printedServers) {
  Deno.test(`the README's server under "${heading}" echoes`, withRun, async () => {
    const [text] = programs(heading);
    const { log, child } = runPrinted(text);
    await assertEchoed(await portOf(log));
    child.kill();
    await child.status;
  });
}

// ---- How fast (deno bench)

for (const pending of [10, 100, 1000, 10_000]) {
  const group = `${pending} promises pending, one settles a turn`;
  const never = Array.from({ length: pending - 1 }, () => new Promise<number>(() => {}));
  const selector = new Selector<number>();
  for (const promise of never) selector.watch(promise, (value) => value, () => -1);
  const n = 200; // no more: each race leaves a subscription behind at every pending promise
  Deno.bench({ name: `Selector, ${pending}`, group, baseline: true, n }, async () => {
    selector.watch(Promise.resolve(1), (value) => value, () => -1);
    await selector.select();
  });
  Deno.bench({ name: `Promise.race, ${pending}`, group, n }, async () => {
    await Promise.race([...never, Promise.resolve(1)]);
  });
}
