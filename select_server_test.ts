/**
 * What the selector, the server and the client promise; ignored where a permission for it is missing.
 */
import {
  assert,
  assertEquals,
  assertMatch,
  assertRejects,
  assertThrows,
} from "@std/assert";
import { clearImmediate, setImmediate } from "node:timers";
import { once } from "node:events";
import { connect as connectNode, createServer, Socket } from "node:net";
import {
  echo,
  listen,
  Selector,
  serve,
  type ServeOptions,
  stamp,
} from "./select_server.ts";

const granted = async (name: "net" | "run" | "read") =>
  (await Deno.permissions.query({ name })).state === "granted";
const net = await granted("net");
const run = net && await granted("run");
const readme = await granted("read")
  ? await Deno.readTextFile(new URL(import.meta.resolve("./README.md")))
  : "";
const withReadme = run && readme !== "";
const canReset = "resetAndDestroy" in Socket.prototype; // from Deno 2.7 on
const posix = Deno.build.os !== "windows";

/** A test that leaves nothing behind: the sanitizers are not on by default everywhere. */
function promise(
  needed: boolean,
  name: string,
  fn: () => void | Promise<void>,
): void {
  Deno.test({
    name,
    fn,
    ignore: !needed,
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
    return promise;
  }

  count(pattern: RegExp): number {
    return this.lines.filter((line) => pattern.test(line)).length;
  }
}

// ---- The selector

promise(
  true,
  "select hands out all that has completed, in that order, each once",
  async () => {
    const selector = new Selector<number>();
    setTimeout(() => [1, 2, 3].forEach((n) => selector.push(n)));
    assertEquals(await selector.select(), [1, 2, 3]);
    selector.push(4);
    assertEquals(await selector.select(), [4]);
  },
);

promise(
  true,
  "select resolves to an empty list when its time is up",
  async () => {
    const selector = new Selector<string>();
    for (const timeout of [0, 30]) {
      const start = performance.now();
      assertEquals(await selector.select(timeout), []);
      assert(
        performance.now() - start >= timeout - 1,
        "it waits for as long as it was told",
      );
    }
    selector.push("late");
    assertEquals(await selector.select(0), ["late"]);
    setTimeout(() => selector.push("in time"), 5);
    assertEquals(await selector.select(60_000), ["in time"]);
  },
);

promise(
  net,
  "select polls for what the runtime has ready to deliver",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    using client = await Deno.connect({ port: listener.addr.port });
    using conn = await listener.accept();
    const selector = new Selector<number | null>();
    selector.nextRound(() =>
      void conn.read(new Uint8Array(8)).then((n) => selector.push(n))
    );
    await client.write(encode("hello"));
    assertEquals(await selector.select(0), [5]);
  },
);

promise(
  true,
  "the next round starts when all that is ready has been handed out",
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
 * A runtime that completes 128 operations a turn and looks at those it has put off every 61 turns, as
 * Deno's does; every operation is ready as soon as it has been started.
 */
function busyRuntime() {
  const [ready, putOff]: (() => void)[][] = [[], []];
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

/** The fewest and the most times that one of 1,000 clients is served, all of whom are ready at first. */
async function serveCrowd(inRounds: boolean): Promise<[number, number]> {
  using runtime = busyRuntime();
  const selector = new Selector<number>();
  const served = new Array<number>(1000).fill(0);
  const start = (id: number) => runtime.start(() => selector.push(id));
  served.forEach((_, id) => start(id));
  for (let total = 0; total < 20 * served.length;) {
    for (const id of await selector.select()) {
      total++;
      served[id]++;
      if (inRounds) selector.nextRound(() => start(id));
      else start(id);
    }
  }
  return [Math.min(...served), Math.max(...served)];
}

promise(
  true,
  "a crowd that is always ready again delays nobody beyond one round",
  async () => {
    const [fewest, most] = await serveCrowd(true);
    assert(most - fewest <= 1, `${fewest} to ${most}`);
    assertEquals(
      (await serveCrowd(false))[0],
      0,
      "without rounds, somebody starves",
    );
  },
);

promise(
  true,
  "time goes on while completions never cease, and comes after them",
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
        blockFor(40); // beyond "late"; meanwhile somebody becomes ready, whom the runtime puts off
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
  options: Omit<ServeOptions, "signal"> = {},
  listeners = listen({ port: 0 }),
) {
  const log = new Log();
  const abort = new AbortController();
  const ended = serve(listeners, {
    logger: log,
    ...options,
    signal: abort.signal,
  });
  const stop = () => {
    abort.abort();
    return ended;
  };
  const ports = listeners.map((listener) => listener.addr.port);
  const dispose = async () => void await stop();
  return {
    log,
    ended,
    stop,
    ports,
    port: ports[0],
    [Symbol.asyncDispose]: dispose,
  };
}

const tooMuch = new Uint8Array(50_000_000); // for sockets to hold
const never = () => new Promise<never>(() => {});
const throwing = (error: Error) => (): never => {
  throw error;
};
const connect = (port: number) => Deno.connect({ hostname: "127.0.0.1", port });

async function hear(conn: Deno.Conn): Promise<string> {
  const buffer = new Uint8Array(1000);
  return decode(buffer.subarray(0, await conn.read(buffer) ?? 0));
}

async function ask(conn: Deno.Conn, text: string): Promise<string> {
  await conn.write(encode(text));
  return hear(conn);
}

/** Connects and sends a text, which the server has read then. */
async function say(
  server: ReturnType<typeof start>,
  text: string,
): Promise<Deno.TcpConn> {
  const conn = await connect(server.port);
  await conn.write(encode(text));
  await server.log.line(new RegExp(`sent ${text.length} bytes`));
  return conn;
}

/** Reads to the end of the stream, which also closes the connection. */
async function readAll(conn: Deno.Conn): Promise<Uint8Array> {
  return new Uint8Array(await new Response(conn.readable).arrayBuffer());
}

async function assertEchoed(
  port: number,
  text = "are you there?",
): Promise<void> {
  const conn = await connect(port);
  await conn.write(encode(text));
  await conn.closeWrite();
  assertEquals(decode(await readAll(conn)), text);
}

/** A server of one port that is given each accepted connection changed by `change`. */
function startChanged(change: (conn: Deno.TcpConn) => void) {
  const [listener] = listen({ port: 0, ports: 1 });
  const accept = listener.accept.bind(listener);
  listener.accept = async () => {
    const conn = await accept();
    change(conn);
    return conn;
  };
  return start({}, [listener]);
}

promise(
  net,
  "one loop serves hundreds of clients on both ports, and counts them",
  async () => {
    await using server = start();
    const clients = await Promise.all(
      Array.from({ length: 300 }, (_, i) => connect(server.ports[i % 2])),
    );
    for (const text of ["one", "two"]) {
      const echoes = await Promise.all(
        clients.map((conn, i) => ask(conn, `${text} ${i}`)),
      );
      assertEquals(echoes, clients.map((_, i) => `${text} ${i}`));
    }
    for (const conn of clients) conn.close();
    const bytes = 2 * "one ".length * 300 + 2 * (10 + 2 * 90 + 3 * 200);
    assertEquals(await server.stop(), { clients: 300, messages: 600, bytes });
  },
);

promise(
  net,
  "a client that half-closes gets all its echoes, then the end",
  async () => {
    await using server = start();
    await assertEchoed(server.port, "x".repeat(100_000));
    await server.log.line(
      /^info client 1 \(127\.0\.0\.1:\d+\) disconnected .*end of stream$/,
    );
  },
);

promise(
  net,
  "a reply is written to its end, though every write takes one byte",
  async () => {
    await using server = startChanged((conn) => {
      const write = conn.write.bind(conn);
      conn.write = (bytes) => write(bytes.subarray(0, 1));
    });
    await assertEchoed(server.port, "in parts");
  },
);

promise(
  net,
  "20 MB come back the same, to a reader that is slow to begin",
  async () => {
    await using server = start();
    const conn = await connect(server.port);
    const sent = new Uint8Array(20_000_000).map((_, i) =>
      i ^ (i >> 8) ^ (i >> 16)
    );
    const writing = (async () => {
      for (let n = 0; n < sent.length;) n += await conn.write(sent.subarray(n));
      await conn.closeWrite();
    })();
    await sleep(100);
    const received = await readAll(conn);
    await writing;
    assert(
      received.length === sent.length &&
        received.every((byte, i) => byte === sent[i]),
    );
  },
);

promise(
  net,
  "a client that never reads is held back, and nobody else is held up",
  async () => {
    await using server = start({ grace: 0 });
    const rude = await connect(server.port);
    const block = new Uint8Array(1 << 20);
    let written = 0;
    const writing = (async () => {
      while (true) written += await rude.write(block);
    })();
    for (let before = -1; before < written;) {
      before = written;
      await sleep(50);
      await assertEchoed(server.port);
    }
    assert(written < tooMuch.length, "back-pressure");
    await server.stop();
    await Promise.allSettled([readAll(rude), writing]); // until the reset of a close with bytes unread
  },
);

promise(
  net,
  "a protocol's memory is its client's own, and so is a slow reply",
  async () => {
    const slow = Promise.withResolvers<Uint8Array>();
    let protocols = 0;
    await using server = start({
      protocol: () => {
        protocols++;
        let messages = 0;
        return (bytes) => {
          if (decode(bytes) === "slow") return slow.promise;
          return decode(bytes) === "quiet"
            ? new Uint8Array(0)
            : encode(`${++messages}`);
        };
      },
    });
    using ann = await connect(server.port);
    using bob = await connect(server.port);
    assertEquals([
      await ask(ann, "x"),
      await ask(ann, "x"),
      await ask(bob, "x"),
    ], ["1", "2", "1"]);
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

promise(
  net,
  "a reply of null ends the client after what it is owed",
  async () => {
    const large = new Uint8Array(5_000_000).fill(7);
    await using server = start({
      protocol: () => (bytes) => decode(bytes) === "bye" ? null : large,
    });
    const conn = await say(server, "all");
    await conn.write(encode("bye"));
    assertEquals((await readAll(conn)).length, large.length);
    await server.log.line(/client 1 .* disconnected/);
    assertEquals(server.log.count(/^error/), 0);
  },
);

promise(
  net,
  "after a goodbye nobody is answered, and who is silent is closed",
  async () => {
    await using server = start({ protocol: () => () => null });
    using silent = await connect(server.port);
    using chatty = await connect(server.port);
    for (const conn of [silent, chatty]) {
      assertEquals(
        await ask(conn, "hello"),
        "",
      );
    }
    for (let i = 0; i < 8; i++) {
      await chatty.write(encode("still here"));
      await sleep(100);
    }
    await server.log.line(/client 1 .* disconnected .*no progress for 0\.5 s/);
    assertEquals([
      server.log.count(/client 2 .* disconnected/),
      server.log.count(/sent/),
    ], [0, 2]);
  },
);

const endings: [string, ServeOptions["protocol"], RegExp][] = [
  [
    "that is silent",
    () => echo,
    /^info client 1 .* while reading: no progress for 0\.3 s$/,
  ],
  [
    "that does not read",
    () => () => tooMuch,
    /^info client 1 .* while writing: no progress/,
  ],
  ["without its reply", () => never, /^error client 1 .*: no progress/],
  [
    "whose reply throws",
    () => throwing(new TypeError("no")),
    /^error client 1 .*: TypeError: no$/,
  ],
  [
    "whose reply rejects",
    () => () => Promise.reject("reasons"),
    /^error client 1 .*: "reasons"$/,
  ],
  [
    "with a forged line",
    () => throwing(new Error("a\nb")),
    /^error client 1 .*: Error: a b$/,
  ],
  [
    "whose protocol throws",
    throwing(new Error("full")),
    /^error client 1 .*: Error: full$/,
  ],
];
for (const [name, protocol = () => echo, line] of endings) {
  promise(
    net,
    `a client ${name} is closed in time, with one line, and nobody else`,
    async () => {
      let clients = 0;
      const first: ServeOptions["protocol"] = (addr) =>
        ++clients === 1 ? protocol(addr) : echo;
      await using server = start({ protocol: first, idleTimeout: 300 });
      using _conn = await say(server, "hello");
      const since = performance.now();
      await server.log.line(line);
      const took = performance.now() - since;
      assert(
        `${line}`.includes("progress")
          ? took >= 299 && took < 2000
          : took < 299,
        `${took}`,
      );
      await assertEchoed(server.port);
      assertEquals(server.log.count(/client 1 .* disconnected/), 1);
    },
  );
}

promise(net, "a log that throws costs nobody anything", async () => {
  const fail = throwing(new Error("disk full"));
  await using server = start({
    logger: { error: fail, info: fail, debug: fail },
  });
  await assertEchoed(server.port);
});

// ---- Resets, and trouble with accepting

/** Connects, and resets (SO_LINGER 0) when `until` has resolved, or at once. */
async function connectAndReset(
  port: number,
  text = "",
  until?: Promise<unknown>,
): Promise<void> {
  const socket = connectNode(port, "127.0.0.1");
  await once(socket, "connect");
  if (text !== "") socket.write(text);
  await until;
  await once(socket.resetAndDestroy(), "close");
}

promise(
  net && canReset,
  "a client that resets, idle or sent to, costs one line",
  async () => {
    await using server = start({ protocol: () => () => tooMuch });
    await connectAndReset(
      server.port,
      "",
      server.log.line(/client 1 .* connected/),
    );
    await server.log.line(
      /^info client 1 .* disconnected while reading: ConnectionReset/,
    );
    await connectAndReset(
      server.port,
      "much",
      server.log.line(/client 2 .* sent 4 bytes/),
    );
    await server.log.line(
      /^info client 2 .* while writing: (ConnectionReset|BrokenPipe)/,
    );
    assertEquals(server.log.count(/disconnected/), 2);
  },
);

promise(
  net && canReset,
  "hundreds that reset before they are accepted are forgotten",
  async () => {
    await using server = start();
    using conn = await connect(server.port);
    for (let i = 0; i < 10; i++) {
      await Promise.all(
        Array.from({ length: 30 }, () => connectAndReset(server.port)),
      );
      assertEquals(await ask(conn, `${i}`), `${i}`);
    }
    assertEquals(server.log.count(/^error/), 0);
  },
);

promise(
  net,
  "a client that has reset before its options are set is but one",
  async () => {
    await using server = startChanged((conn) => {
      conn.setNoDelay = throwing(new Error("Invalid argument (os error 22)"));
    });
    await assertEchoed(server.port);
  },
);

/** Makes a listener's accept fail with these errors first, in that order. */
function failing(
  listener: Deno.TcpListener,
  errors: Error[],
): Deno.TcpListener {
  const accept = listener.accept.bind(listener);
  listener.accept = () => {
    const error = errors.shift();
    return error === undefined ? accept() : Promise.reject(error);
  };
  return listener;
}

promise(
  net,
  "clients that give up before they are accepted are forgotten",
  async () => {
    const kinds = [Deno.errors.NotConnected, Deno.errors.ConnectionAborted];
    const errors = Array.from(
      { length: 600 },
      (_, i) => new kinds[i % 2]("gone"),
    );
    await using server = start({}, [
      failing(listen({ port: 0, ports: 1 })[0], errors),
    ]);
    await assertEchoed(server.port);
    assertEquals([errors.length, server.log.count(/^error/)], [0, 0]);
  },
);

promise(
  net,
  "out of descriptors, accepting pauses, with a line at each end",
  async () => {
    const errors = Array.from(
      { length: 5 },
      () => new Error("Too many open files (os error 24)"),
    );
    const listeners = listen({ port: 0 });
    await using server = start({}, [
      failing(listeners[0], errors),
      listeners[1],
    ]);
    await server.log.line(
      /^error accepting pauses: Error: Too many open files/,
    );
    await sleep(150);
    assert(errors.length > 0, "it does not spin");
    await assertEchoed(server.ports[1]);
    await server.log.line(/^error accepting again$/);
    await assertEchoed(server.ports[0]);
    assertEquals(server.log.count(/^error/), 2);
  },
);

promise(
  net,
  "the server ends with the last listener that somebody else closes",
  async () => {
    const listeners = listen({ port: 0 });
    await using server = start({}, listeners);
    const conn = await connect(server.port);
    assertEquals(await ask(conn, "hello"), "hello");
    for (const listener of listeners) listener.close();
    await server.log.line(/is closed/);
    assertEquals(await ask(conn, "still"), "still");
    conn.close();
    assertEquals(await server.ended, { clients: 1, messages: 2, bytes: 10 });
  },
);

// ---- Time

promise(
  net,
  "a client that makes progress is not idle, however slowly",
  async () => {
    await using server = start({ idleTimeout: 300 });
    using conn = await connect(server.port);
    for (let i = 0; i < 6; i++) {
      await sleep(150);
      assertEquals(await ask(conn, "tick"), "tick");
    }
  },
);

promise(
  net,
  "nobody who has sent is closed as idle because the loop is late",
  async () => {
    const protocol = () => (bytes: Uint8Array) => {
      blockFor(20);
      return bytes;
    };
    await using server = start({ idleTimeout: 300, protocol });
    // A round takes longer than the timeout; some think a while before they send.
    const clients = await Promise.all(
      Array.from({ length: 20 }, () => connect(server.port)),
    );
    await Promise.all(clients.map(async (conn, i) => {
      for (let n = 0; n < 4; n++) {
        assertEquals(await ask(conn, "busy"), "busy");
        if (i % 4 === 0) await sleep(100);
      }
      conn.close();
    }));
    assertEquals(server.log.count(/no progress/), 0);
  },
);

promise(true, "serve refuses times that are not milliseconds", async () => {
  for (
    const options of [{ idleTimeout: NaN }, { idleTimeout: -1 }, { grace: NaN }]
  ) {
    const [[name, value]] = Object.entries(options);
    const message = `${name} is ${value}, expected milliseconds from 0 up`;
    await assertRejects(() => serve([], options), RangeError, message);
  }
});

// ---- The stop

promise(
  net,
  "a signal that has aborted already closes the listeners",
  async () => {
    const listeners = listen({ port: 0 });
    const totals = await serve(listeners, {
      signal: AbortSignal.abort(),
      logger: {},
    });
    assertEquals(totals, { clients: 0, messages: 0, bytes: 0 });
    await assertRejects(() => listeners[0].accept(), Deno.errors.BadResource);
  },
);

promise(
  net,
  "an abort ends the stream of a client that is owed nothing",
  async () => {
    await using server = start();
    const idle = await connect(server.port);
    assertEquals(await ask(idle, "hello"), "hello");
    const stopped = server.stop();
    assertEquals((await readAll(idle)).length, 0);
    assertEquals((await stopped).messages, 1);
    await server.log.line(
      /client 1 .* disconnected while reading: end of stream/,
    );
    await assertRejects(
      () => connect(server.port),
      Deno.errors.ConnectionRefused,
    );
  },
);

promise(
  net,
  "an abort waits for what is owed, and answers nothing after it",
  async () => {
    const owed = Promise.withResolvers<Uint8Array>();
    await using server = start({ protocol: () => () => owed.promise });
    const conn = await say(server, "first");
    await conn.write(encode("second")); // unread, it would reset the connection when it is closed
    const stopped = server.stop();
    await sleep(150);
    owed.resolve(new Uint8Array(2_000_000));
    assertEquals((await readAll(conn)).length, 2_000_000);
    assertEquals((await stopped).messages, 1);
  },
);

promise(
  net,
  "an abort among busy clients loses no reply that is counted",
  async () => {
    await using server = start();
    const clients = await Promise.all(
      Array.from({ length: 100 }, () => connect(server.port)),
    );
    let echoes = 0;
    await Promise.all(clients.map(async (conn) => {
      for (let reply = "x"; reply !== "";) {
        reply = await ask(conn, "x").catch(() => "");
        if (reply !== "" && ++echoes === 2000) server.stop();
      }
      conn.close();
    }));
    assertEquals((await server.ended).messages, echoes);
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
for (const [name, protocol, line] of stubborn) {
  promise(net, `an abort is not held up by a client ${name}`, async () => {
    await using server = start({ protocol, grace: 700 });
    using _conn = await say(server, "hello");
    await sleep(300); // of no progress, which does not count against its goodbye
    const since = performance.now();
    await server.stop();
    const took = performance.now() - since;
    assert(took >= 499 && took < 2000, `${took}`);
    await server.log.line(line);
  });
}

promise(net, "an abort closes who is accepted in the same moment", async () => {
  const listeners = listen({ port: 0 });
  const { promise: late, resolve } = Promise.withResolvers<Deno.TcpConn>();
  const accept = listeners[0].accept.bind(listeners[0]);
  const accepted = accept();
  let accepts = 0;
  listeners[0].accept = () => accepts++ === 0 ? late : accept();
  await using server = start({}, listeners);
  const conn = await connect(server.port);
  const theirs = await accepted;
  listeners[1].close();
  await server.log.line(/is closed/);
  const stopped = server.stop();
  resolve(theirs);
  assertEquals((await readAll(conn)).length, 0);
  assertEquals((await stopped).clients, 1);
});

// ---- Ports and replies

/** Two consecutive ports that are free. */
async function consecutive(): Promise<Deno.TcpListener[]> {
  for (let port = 20_000 + 2 * (Deno.pid % 5000);; port += 2) {
    try {
      return listen({ port });
    } catch {
      await turn(); // somebody has one of them
    }
  }
}

promise(
  net,
  "listen opens all ports or none, and names the one that it cannot open",
  async () => {
    const [first, second] = await consecutive();
    first.close();
    const { port } = first.addr;
    const message = `cannot listen on 127.0.0.1:${port + 1}: AddrInUse`;
    assertThrows(() => listen({ port }), Error, message);
    await assertRejects(() => connect(port), Deno.errors.ConnectionRefused);
    second.close();
  },
);

promise(net, "listen takes addresses and names of both families", async () => {
  const shown: [string, RegExp][] = [
    ["localhost", /^info listening on (127\.0\.0\.1|\[::1\]):\d+$/],
    ["0.0.0.0", /^info listening on 0\.0\.0\.0:\d+$/],
    ["::1", /^info listening on \[::1\]:\d+$/],
  ];
  for (const [host, line] of shown) {
    await using server = start({}, listen({ host, port: 0, ports: 1 }));
    await server.log.line(line);
  }
  assertThrows(
    () => listen({ host: "nowhere.invalid" }),
    Error,
    "nowhere.invalid:50007: ",
  );
});

promise(
  true,
  "stamp replies as the book does, and keeps bytes that are no text",
  () => {
    assertMatch(
      decode(stamp(encode("spam"))),
      /^Echo=>spam at \d{4}-\d\d-\d\dT[\d:.]+Z$/,
    );
    assertEquals(
      stamp(new Uint8Array([255, 0])).slice(6, 8),
      new Uint8Array([255, 0]),
    );
  },
);

// ---- The commands

// The scripts run with the packages that the tests run with, be it through an import map.
const parseArgs = "jsr:@std/cli@^1/parse-args";
const importMap = JSON.stringify({
  imports: { [parseArgs]: import.meta.resolve(parseArgs) },
});

function spawn(
  script: string,
  args: string[],
  permission = "--allow-net",
): Deno.ChildProcess {
  const map = `data:application/json,${encodeURIComponent(importMap)}`;
  const run = [
    "run",
    "--no-prompt",
    "--import-map",
    map,
    permission,
    import.meta.resolve(script),
  ];
  return new Deno.Command(Deno.execPath(), {
    args: [...run, ...args],
    env: { NO_COLOR: "1" },
    stdin: "piped",
    stdout: "piped",
    stderr: "piped",
  }).spawn();
}

/** Runs a script whose lines can be waited for. */
function command(...args: Parameters<typeof spawn>) {
  const child = spawn(...args);
  const log = new Log();
  const read = async (
    stream: typeof child.stdout,
    add: (line: string) => void,
  ) => {
    let rest = "";
    for await (const text of stream.pipeThrough(new TextDecoderStream())) {
      const lines = (rest + text).split("\n");
      rest = lines.pop() ?? "";
      lines.forEach(add);
    }
  };
  const output = Promise.all([
    read(child.stdout, log.info),
    read(child.stderr, log.error),
  ]);
  const ended = output.then(() => child.status).then(async ({ code }) => {
    await child.stdin.close().catch(() => {}); // closed already
    return code;
  });
  const port = async () => Number(/\d+$/.exec(await log.line(/listening on/)));
  return { log, child, ended, port };
}

const server = (args: string) => command("./select_server.ts", args.split(" "));
const client = (args: string) => command("./echo_client.ts", args.split(" "));
const clientOf = (port: number, ...args: string[]) =>
  command("./echo_client.ts", ["-p", `${port}`, "--ports", "1", ...args]);

for (
  const [name, script] of [["server", server], ["client", client]] as const
) {
  promise(
    withReadme,
    `the ${name}'s --help fits 80 columns, and the README agrees`,
    async () => {
      const { log, ended } = script("--help");
      assertEquals(await ended, 0);
      assertEquals(
        log.lines.filter((line) => line.length > "info ".length + 80),
        [],
      );
      const options = log.lines.flatMap((line) =>
        /^info {3,7}(?:-\w, )?(--[a-z-]+)/.exec(line)?.[1] ?? []
      );
      assert(options.includes("--port") && await script("-h").ended === 0);
      const table = readme.split("\n## What it survives")[1].matchAll(
        /^\|(.*)\|$/gm,
      );
      const cells = [...table].map(([, row]) =>
        row.split("|")[name === "server" ? 1 : 2]
      );
      const named = [...cells.join().matchAll(/`(--[a-z-]+)/g)].map((
        [, option],
      ) => option);
      assertEquals(named.toSorted(), options.toSorted());
    },
  );
}

/** The command ends with this exit code and one line, which says whose it is. */
async function assertRefuses(
  refused: ReturnType<typeof command>,
  code: number,
  line: RegExp,
) {
  const { log, ended } = refused;
  assertEquals(await ended, code, log.lines.join("\n"));
  assertEquals(log.lines.length, 1, log.lines.join("\n"));
  assertMatch(log.lines[0], line);
  assertMatch(log.lines[0], /^error (select_server|echo_client): /);
}

const badUse: [typeof server, string, RegExp][] = [
  [server, "--bogus", /--bogus: expected one of the options/],
  [server, "--no-stamp", /--no-stamp: expected one of the options/],
  [server, "127.0.0.1", /127\.0\.0\.1: expected one of the options/],
  [server, "-- 7", /7: expected one of the options/],
  [server, "--port", /--port .*: expected a whole number from 0 to 65535/],
  [
    server,
    "--port 70000",
    /--port 70000: expected a whole number from 0 to 65535/,
  ],
  [server, "--port 5e2", /--port 5e2: expected a whole number/],
  [server, "--port -1", /-1: expected/],
  [server, "--ports 0", /--ports 0: expected a whole number from 1/],
  [
    server,
    "--port 65535 --ports 2",
    /--ports 2: expected a whole number from 1 to 1/,
  ],
  [server, "--delay x", /--delay x: expected a whole number/],
  [
    server,
    "--idle-timeout 0",
    /--idle-timeout 0: expected a whole number from 1/,
  ],
  [server, "--host", /--host: expected an address/],
  [client, "--bogus", /--bogus: expected one of the options/],
  [client, "--host", /--host: expected an address/],
  [client, "--clients 0", /--clients 0: expected a whole number from 1/],
  [client, "--size 1.5", /--size 1\.5: expected a whole number/],
  [
    client,
    "--messages 2 hello",
    /hello: expected either MESSAGEs or -n and -s/,
  ],
  [client, "--timeout 0", /--timeout 0: expected seconds above 0/],
];
promise(
  run,
  "bad use is one line that says what was expected, and exit code 2",
  async () => {
    await Promise.all(
      badUse.map(([script, args, line]) =>
        assertRefuses(script(args), 2, line)
      ),
    );
  },
);

promise(
  run,
  "a port that cannot be opened is one line, and exit code 1",
  async () => {
    using taken = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = taken.addr;
    const cases: [ReturnType<typeof command>, RegExp][] = [
      [
        server(`-p ${port}`),
        new RegExp(`cannot listen on 127.0.0.1:${port}: AddrInUse`),
      ],
      [
        server("-H nowhere.invalid"),
        /cannot listen on nowhere\.invalid:50007: /,
      ],
      [
        command("./select_server.ts", [], "--deny-net"),
        /on 127\.0\.0\.1:50007: NotCapable/,
      ],
    ];
    for (const [refused, line] of cases) await assertRefuses(refused, 1, line);
  },
);

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  promise(
    run && posix,
    `${signal} stops the server in order, a second one at once`,
    async () => {
      const { log, port, child, ended } = server(
        "-v -p 0 --stamp --delay 60000 --idle-timeout 60",
      );
      const conn = await connect(await port());
      await conn.write(encode("owed"));
      await log.line(/client 1 .* sent 4 bytes/);
      child.kill(signal);
      assertMatch(decode(await readAll(conn)), /^Echo=>owed at 20/);
      assertEquals(await ended, 0);
      assertEquals(
        log.lines.at(-1),
        "info served 1 clients, 1 messages, 4 bytes",
      );
      assertEquals(log.count(/^error/), 0);

      const again = server("-p 0");
      using idle = await connect(await again.port());
      assertEquals(await ask(idle, "hello"), "hello");
      assertEquals(again.log.count(/sent/), 0);
      again.child.kill(signal);
      await again.log.line(/stopping/);
      again.child.kill(signal);
      assertEquals(await again.ended, 1);
    },
  );
}

promise(
  run && posix,
  "the server goes on when nobody reads its log any more",
  async () => {
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
    await child.stdin.close().catch(() => {}); // closed already
    assertEquals(await new Response(child.stderr).text(), "");
  },
);

// ---- The client

promise(
  run,
  "every byte comes back to the client, which reports and exits with 0",
  async () => {
    await using server = start();
    const plain = clientOf(server.port, "--clients", "50", "--messages", "20");
    assertEquals(await plain.ended, 0);
    const patterns = [
      /^info clients {3}50 succeeded, 0 failed$/,
      /^info echoes {4}1000, 64000 bytes in \d+\.\d{3} s$/,
      /^info speed {5}\d+ echoes\/s$/,
      /^info latency {3}p50 [\d.]+ ms, p90 [\d.]+ ms, p99 [\d.]+ ms, max [\d.]+ ms$/,
      /^info {11}[\d.]+ ms (?=\S*█)[▁▂▃▄▅▆▇█]{50} [\d.]+ ms$/,
      /^info finished {2}first client after [\d.]+ ms, last after [\d.]+ ms$/,
      /^info fairness {2}[01]\.\d{3} /,
    ];
    assertEquals(plain.log.lines.length, patterns.length);
    patterns.forEach((pattern, i) => assertMatch(plain.log.lines[i], pattern));

    const json = clientOf(
      server.port,
      "-c",
      "3",
      "-n",
      "2",
      "-s",
      "3000000",
      "--json",
    );
    assertEquals(await json.ended, 0);
    const report = JSON.parse(json.log.lines[0].slice("info ".length));
    const {
      succeeded,
      failed,
      reasons,
      echoes,
      bytes,
      latency,
      finished,
      jain,
    } = report;
    assertEquals([succeeded, failed, reasons, echoes, bytes], [
      3,
      0,
      {},
      6,
      18_000_000,
    ]);
    assert(
      0 < latency.p50 && latency.p50 <= latency.p90 &&
        latency.p90 <= latency.p99,
    );
    assert(
      latency.p99 <= latency.max && latency.max <= finished.last &&
        jain > 1 / 3 && jain <= 1,
    );
    assert(
      finished.first <= finished.last && finished.last <= report.seconds * 1000,
    );
    assert(report.echoesPerSecond > 0);

    const texts = ["Hello network world", "007", "two\nlines"];
    const book = clientOf(server.port, ...texts);
    assertEquals(await book.ended, 0);
    const received = texts.map((text) =>
      `info client 1 received: ${text.replace("\n", " ")}`
    );
    assertEquals(book.log.lines, received);
    const quiet = clientOf(server.port, "-q", "--json");
    assertEquals([await quiet.ended, quiet.log.lines.length], [0, 0]);
  },
);

promise(
  run,
  "clients are dealt over the ports, and their messages differ",
  async () => {
    const seen: string[] = [];
    const protocol = () => (bytes: Uint8Array) => {
      seen.push(bytes.join());
      return bytes;
    };
    const listeners = await consecutive();
    await using server = start({ protocol }, listeners);
    listeners[1].close();
    await server.log.line(/is closed/);
    const { log, ended } = client(`-p ${server.port} -c 10 -n 5 -s 16`);
    assertEquals(await ended, 1);
    assertEquals(
      log.lines[0],
      "info clients   5 succeeded, 5 failed, 5 refused",
    );
    assertEquals([seen.length, new Set(seen).size], [25, 25]);
  },
);

promise(
  run,
  "who is no longer answered ends alone, and counts as served less",
  async () => {
    let clients = 0;
    const protocol = () => {
      const rest = [never, never, () => null][clients % 3];
      let left = clients++ % 3 === 0 ? 40 : 1;
      return (bytes: Uint8Array) =>
        left-- > 0 ? sleep(20).then(() => bytes) : rest();
    };
    await using server = start({ protocol, grace: 0 });
    const { log, ended } = clientOf(
      server.port,
      "-c",
      "9",
      "-n",
      "40",
      "--timeout",
      "0.5",
      "--json",
    );
    assertEquals(await ended, 1, log.lines.join("\n"));
    const { reasons, jain } = JSON.parse(log.lines[0].slice("info ".length));
    assertEquals([log.lines.length, reasons], [1, {
      "closed early": 3,
      "timed out": 3,
    }]);
    assert(
      jain > 1 / 3 && jain < 0.5,
      `${jain}: over the whole run, not only while they ran`,
    );
  },
);

const badServers: [
  string,
  string[],
  (conn: Deno.TcpConn, bytes: Uint8Array) => unknown,
][] = [
  ["closed early", [], (conn) => conn.closeWrite()],
  [
    "sent too much",
    [],
    (conn, bytes) => conn.write(new Uint8Array([...bytes, 0])),
  ],
  [
    "wrong bytes",
    [],
    (conn, bytes) => conn.write(bytes.map((byte) => byte ^ 1)),
  ],
  [
    "wrong bytes",
    [],
    (conn, bytes) => conn.write(new Uint8Array([bytes[0] ^ 1, ...bytes])),
  ],
  [
    "timed out",
    ["--timeout", "0.2"],
    (conn, bytes) => conn.write(bytes.subarray(0, 10)),
  ],
];
for (const [reason, args, behave] of badServers) {
  promise(
    run,
    `the client counts who misbehaves under the reason: ${reason}`,
    async () => {
      using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
      const { log, ended } = clientOf(listener.addr.port, "-c", "1", ...args);
      using conn = await listener.accept();
      const buffer = new Uint8Array(64);
      await conn.read(buffer);
      await behave(conn, buffer);
      assertEquals(await ended, 1);
      assertEquals(
        log.lines[0],
        `info clients   0 succeeded, 1 failed, 1 ${reason}`,
      );
      assertEquals(log.count(/^error/), 0);
    },
  );
}

promise(
  run && canReset,
  "the client counts a server that resets under that reason",
  async () => {
    const server = createServer((socket) =>
      socket.once("data", () => socket.resetAndDestroy())
    );
    await once(server.listen(0, "127.0.0.1"), "listening");
    const address = server.address();
    assert(address !== null && typeof address === "object");
    const { log, ended } = clientOf(address.port, "-c", "5");
    assertEquals(await ended, 1);
    assertEquals(log.lines[0], "info clients   0 succeeded, 5 failed, 5 reset");
    await once(server.close(), "close");
  },
);

promise(
  run,
  "the client gives up on who never accepts, and counts who is refused",
  async () => {
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const { port } = listener.addr;
    const never = clientOf(port, "--timeout", "0.2", "-c", "2");
    assertEquals(await never.ended, 1);
    await never.log.line(/0 succeeded, 2 failed, 2 timed out/);
    listener.close();
    const refused = clientOf(port);
    assertEquals(await refused.ended, 1);
    await refused.log.line(/0 succeeded, 100 failed, 100 refused/);
    await refused.log.line(/no echo has come back/);
  },
);

promise(
  run,
  "with --no-verify one read is a reply, whatever it brings",
  async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const size = 8_000_000; // more than sockets hold
    const options = ["-n", "2", "-s", `${size}`, "--no-verify", "-c", "1"];
    const { log, ended } = clientOf(listener.addr.port, ...options);
    const conn = await listener.accept();
    await conn.write(encode("early"));
    const buffer = new Uint8Array(64 * 1024);
    for (
      let left = 2 * size, count;
      (count = await conn.read(buffer)) !== null;
    ) {
      left -= count;
      if (left > 0) continue;
      await sleep(300); // less than the time-out
      await conn.write(encode("done"));
    }
    await conn.write(encode("!")).finally(() => conn.close()); // too late to be a reply
    assertEquals(await ended, 0);
    await log.line(/1 succeeded, 0 failed/);
    await log.line(/echoes {4}2, 10 bytes/);
  },
);

promise(
  run && posix,
  "the client that is interrupted reports what it has done",
  async () => {
    const busy = Promise.withResolvers<void>();
    let messages = 0;
    const protocol = () => (bytes: Uint8Array) => {
      if (++messages === 100) busy.resolve(); // at most one a client is on its way
      return bytes;
    };
    await using server = start({ protocol, logger: {} });
    const running = clientOf(server.port, "-c", "3", "-n", "1000000");
    await busy.promise;
    running.child.kill("SIGINT");
    assertEquals(await running.ended, 1);
    assertMatch(
      running.log.lines[0],
      /^info clients {3}0 succeeded, 3 failed, 3 interrupted$/,
    );
    assertMatch(running.log.lines[1], /^info echoes {4}[1-9]\d+, /);
  },
);

// ---- The README

/** Runs the README's nth program under a heading as it is printed, as if it stood beside the scripts. */
function printed(heading: string, n: number, ...args: string[]) {
  const section = readme.split(`\n## ${heading}\n`)[1].split("\n## ")[0];
  const text = [...section.matchAll(/^```ts\n(.*?)^```$/gms)][n][1];
  const server = import.meta.resolve("./select_server.ts");
  const beside = text.replaceAll('"./select_server.ts"', `"${server}"`);
  return command(
    `data:application/typescript,${encodeURIComponent(beside)}`,
    args,
  );
}

/** A port that is free, and so is the next one. */
async function freePort(): Promise<number> {
  const [first, second] = await consecutive();
  first.close();
  second.close();
  return first.addr.port;
}

async function connectSoon(port: number): Promise<Deno.Conn> {
  while (true) {
    try {
      return await connect(port);
    } catch {
      await sleep(20); // it does not listen yet
    }
  }
}

const echoing: [string, (port: number) => string[], number][] = [
  ["The book's listing, again", (port) => ["127.0.0.1", `${port}`], 2],
  ["Why not just `Promise.race`", (port) => [`${port}`], 1],
];
for (const [heading, args, ports] of echoing) {
  promise(
    withReadme,
    `the README's program under "${heading}" echoes`,
    async () => {
      const port = await freePort();
      const { child, ended } = printed(heading, 0, ...args(port));
      const conns = await Promise.all(
        [0, 1].map((i) => connectSoon(port + i % ports)),
      );
      for (const text of ["one", "two"]) {
        for (const conn of conns) assertEquals(await ask(conn, text), text);
      }
      for (const conn of conns) conn.close();
      await assertEchoed(port);
      child.kill();
      await ended;
    },
  );
}

promise(
  withReadme,
  "the README's server of lines joins what is split",
  async () => {
    const { log, child, ended, port } = printed("Make it yours", 0, "0");
    const [ann, bob] = [
      await connect(await port()),
      await connect(await port()),
    ];
    const é = encode("é");
    await ann.write(new Uint8Array([...encode("caf"), é[0]]));
    assertEquals(await ask(bob, "other\r\n"), "1 other\n");
    await ann.write(é.subarray(1));
    await log.line(/client 1 .* sent 1 bytes/);
    assertEquals(await ask(ann, "\nte"), "1 café\n");
    assertEquals(await ask(ann, "a\nmilk\n"), "2 tea\n3 milk\n");
    assertEquals(await ask(ann, "quit\n"), "");
    assertEquals(await ask(bob, "still\n"), "2 still\n");
    for (const conn of [ann, bob]) conn.close();
    child.kill();
    await ended;
  },
);

promise(
  withReadme,
  "the README's server of the time tells it to all its clients",
  async () => {
    const port = await freePort();
    const { child, ended } = printed("Make it yours", 1, `${port}`);
    const conns = [await connectSoon(port), await connectSoon(port)];
    for (const conn of conns) assert(Date.parse(await hear(conn)) > 0);
    for (const conn of conns) conn.close();
    child.kill();
    await ended;
  },
);

// ---- How fast (deno bench)

for (const pending of [10, 100, 1000, 10_000]) {
  const group = `${pending} promises pending, one settles a turn`;
  const never = Array.from(
    { length: pending - 1 },
    () => new Promise<number>(() => {}),
  );
  const selector = new Selector<number>();
  const push = (value: number) => selector.push(value);
  for (const promise of never) promise.then(push);
  const n = 200; // no more: each race leaves a subscription behind at every pending promise
  Deno.bench(
    { name: `Selector, ${pending}`, group, baseline: true, n },
    async () => {
      Promise.resolve(1).then(push);
      await selector.select();
    },
  );
  Deno.bench({ name: `Promise.race, ${pending}`, group, n }, async () => {
    await Promise.race([...never, Promise.resolve(1)]);
  });
}
