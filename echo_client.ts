/**
 * Many concurrent echo clients in one loop: the other side of
 * `select_server.ts`. Each client sends its messages one after another, waits
 * for the whole echo of each, and compares every byte. The report at the end
 * says how fast and how fair the server was.
 *
 * It needs `select_server.ts` beside it, for the selector. A thousand clients
 * in a plain loop would starve each other, and the server would get the blame.
 */
import { Buffer } from "node:buffer"; // compares bytes
import { randomBytes } from "node:crypto"; // makes any number of them at once
import { FairSelector } from "./select_server.ts";

// ---- What can complete, and what a client is

type Completion =
  | { type: "connected"; client: Client }
  | { type: "sent"; client: Client; count: number }
  | { type: "received"; client: Client; count: number | null }
  | { type: "failed"; client: Client; error: unknown }
  | { type: "tick"; time: number }
  | { type: "interrupt" };
type Push = (completion: Completion) => void;

/** Its reads and writes overlap: the echo of a long message comes in parts. */
class Client {
  conn?: Deno.TcpConn;
  echoes = 0;
  message: Uint8Array | undefined; // none before the first and after the last
  since = performance.now(); // when it began to connect, to send, or to close
  unsent: Uint8Array = new Uint8Array(); // of the message, still to be written
  unread = this.unsent; // of its echo, still to be read
  buffer = this.unsent; // what reads fill: a large one once it is connected

  constructor(readonly id: number, readonly push: Push) {}

  // Arrow functions keep their `this`, so they can be used as callbacks.
  read = () => this.conn?.read(this.buffer).then(this.onRead, this.onError);
  write = () => this.conn?.write(this.unsent).then(this.onSent, this.onError);
  endStream = () => void this.conn?.closeWrite().catch(this.onError);
  onRead = (count: number | null) =>
    this.push({ type: "received", client: this, count });
  onSent = (count: number) => this.push({ type: "sent", client: this, count });
  onError = (error: unknown) =>
    this.push({ type: "failed", client: this, error });
}

// ---- The run

/** Runs the clients to their end, or until a signal, and prints the report. */
async function run(options: Options): Promise<void> {
  const { host, port, ports, messages, size, words, json, quiet } = options;
  const verify = !options["no-verify"];
  const selector = new FairSelector<Completion>();
  const push: Push = (completion) => selector.push(completion);
  const random = randomBytes(size + 65536);
  const outcomes: Record<string, number> = {}; // how many clients ended how
  const latencies: number[] = []; // how long each echo took
  const unanswered: number[] = []; // how long waits without an echo took
  let [bytes, lastEchoAt] = [0, NaN];
  let shares: Float64Array | undefined; // echoes when the first client was done
  let canShow = Deno.stderr.isTerminal() && !quiet && words.length === 0;
  // Listen before connecting: a signal needs a descriptor, and the clients may
  // use them all. SIGHUP comes from a closed terminal, SIGBREAK is Ctrl-Break.
  const stop = Deno.build.os === "windows" ? "SIGBREAK" : "SIGTERM";
  for (const signal of ["SIGINT", "SIGHUP", stop] as const) {
    Deno.addSignalListener(signal, () => push({ type: "interrupt" }));
  }
  const start = performance.now(); // times are in ms
  const clients = Array.from({ length: options.clients }, (_, i) => connect(i));
  const running = new Set(clients);
  const allEchoes = () => Float64Array.from(clients, (it) => it.echoes).sort();
  setInterval(() => {
    // As in the server, what has come by this time is read before the tick.
    const time = performance.now();
    selector.catchUp(() => push({ type: "tick", time }));
  }, 100);

  while (running.size > 0) {
    for (const completion of await selector.select()) {
      // A client may have ended in the meantime.
      if ("client" in completion && !running.has(completion.client)) continue;
      switch (completion.type) {
        case "connected": // send the first message, and read what comes back
          startMessage(completion.client);
          selector.nextRound(completion.client.read);
          break;
        case "sent": // perhaps only a part; its echo is being read meanwhile
          sendRest(completion.client, completion.count);
          break;
        case "received": // null is the end of the stream
          receive(completion.client, completion.count);
          break;
        case "failed": // refused, reset, broken pipe
          end(completion.client, reasonOf(completion.error));
          break;
        case "tick": // some time has passed: who has waited too long?
          endOverdue(completion.time);
          break;
        case "interrupt": // a signal: report what is done by now
          for (const client of running) end(client, "interrupted");
          break;
        default: // the compiler checks that no case is missing
          completion satisfies never;
      }
    }
  }
  await show(""); // the report stands in the place of the progress
  report();

  // The steps of the loop, in the order of a client's life.

  function connect(i: number): Client {
    const client = new Client(i + 1, push);
    Deno.connect({ hostname: host, port: port + i % ports }).then((conn) => {
      if (!running.has(client)) return conn.close(); // too late
      client.conn = conn;
      // Where nobody listens, the system may give a client that very port. TCP
      // connects it to itself then (RFC 9293, 3.5), and it hears its own bytes.
      const { localAddr: own, remoteAddr: server } = conn;
      if (own.port === server.port && own.hostname === server.hostname) {
        throw new Deno.errors.ConnectionRefused();
      }
      client.buffer = new Uint8Array(16 * 1024);
      conn.setNoDelay();
      push({ type: "connected", client });
    }).catch(client.onError);
    return client;
  }

  /** Starts the next message or, after the last, ends the stream. */
  function startMessage(client: Client): void {
    const { id, echoes } = client;
    client.since = performance.now();
    client.message = undefined;
    if (echoes === messages) return client.endStream();
    // Messages differ, so the echo of another one is noticed. The steps are
    // odd: a client has every offset once before it has one again.
    const offset = (id * 7919 + echoes * 104729) % 65536;
    const message = words[echoes] ?? random.subarray(offset, offset + size);
    client.message = client.unsent = client.unread = message;
    client.write();
  }

  function sendRest(client: Client, count: number): void {
    client.unsent = client.unsent.subarray(count);
    if (client.unsent.length > 0) client.write();
    else advance(client);
  }

  function receive(client: Client, count: number | null): void {
    const { id, message, unread, buffer } = client;
    const outcome = message ? "closed early" : "succeeded";
    if (count === null) return end(client, outcome);
    const came = buffer.subarray(0, count);
    const expected = verify ? unread.subarray(0, count) : came;
    const part = came.subarray(0, expected.length);
    if (Buffer.compare(part, expected) !== 0) return end(client, "wrong bytes");
    if (count > expected.length) return end(client, "sent too much");
    bytes += count;
    client.unread = unread.subarray(verify ? count : unread.length);
    if (words.length > 0 && !json && client.unread.length === 0) {
      const text = new TextDecoder().decode(verify ? message : came);
      console.log(`client ${id} received: ${text.replace(/\p{Cc}+/gu, " ")}`);
    }
    advance(client);
    selector.nextRound(client.read);
  }

  /** Goes on to the next message when this one is out and its echo is in. */
  function advance(client: Client): void {
    const { message, since, unsent, unread } = client;
    if (message === undefined || unsent.length > 0 || unread.length > 0) return;
    client.echoes++;
    lastEchoAt = performance.now();
    latencies.push(lastEchoAt - since);
    startMessage(client);
  }

  function end(client: Client, outcome: string): void {
    running.delete(client);
    client.conn?.close();
    outcomes[outcome] = (outcomes[outcome] ?? 0) + 1;
    if (outcome === "succeeded") shares ??= allEchoes();
    if (client.message) unanswered.push(performance.now() - client.since);
  }

  function endOverdue(time: number): void {
    for (const client of running) {
      if (time - client.since >= options.limit) end(client, "timed out");
    }
    const percent = 100 * latencies.length / (clients.length * messages);
    if (running.size > 0) show(`${Math.floor(percent)}%`);
  }

  /** Shows a line on the terminal, if there is one, in place of the last. */
  async function show(line: string): Promise<void> {
    if (!canShow) return;
    canShow = false; // until it is out: a terminal may be paused, or be gone
    await Deno.stderr.write(encoder.encode(`\r${line}\x1b[K`)).catch(() => {});
    canShow = true;
  }

  // ---- The report

  function report(): void {
    const { succeeded = 0, ...reasons } = outcomes;
    const failed = clients.length - succeeded;
    if (failed > 0) Deno.exitCode = 1;
    // What cannot be told, as there was no echo, is NaN. JSON makes it null.
    const echoes = latencies.length;
    const seconds = (lastEchoAt - start) / 1000;
    const rate = echoes / seconds;
    // Waits that ended without an echo count as the time that they lasted.
    const times = Float64Array.from(latencies.concat(unanswered)).sort();
    // The time that this share of the waits does not exceed.
    const at = (share: number) =>
      times[Math.ceil(share * times.length) - 1] ?? NaN;
    const latency = { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1) };
    // Leave out the first client that was done: it has most, so it sorts last.
    const had = shares?.subarray(0, -1) ?? allEchoes();
    const [fewest = NaN, most = NaN] = [had.at(0), had.at(-1)];
    const counts = { succeeded, failed, reasons, echoes, bytes };
    const figures = { seconds, echoesPerSecond: rate, latency, fewest, most };
    if (json && !quiet) console.log(JSON.stringify({ ...counts, ...figures }));
    const nobody =
      `nobody listens on ${host}, port ${port}: is select_server.ts running?`;
    if (reasons.refused === clients.length) throw new Error(nobody);
    if (json || quiet || (words.length > 0 && failed === 0)) return;
    const failures = Object.entries(reasons).map(([why, n]) => `${n} ${why}`);
    const all = failed > 0 ? `: ${failures.join(", ")}` : "";
    console.log(`clients   ${succeeded} succeeded, ${failed} failed${all}`);
    if (echoes === 0) return console.log("echoes    none has come back");
    const speed = `${seconds.toFixed(3)} s: ${Math.round(rate)} a second`;
    console.log(`echoes    ${echoes} (${bytes} bytes) in ${speed}`);
    const percentiles = Object.entries(latency)
      .map(([name, time]) => `${name} ${time.toFixed(2)} ms`).join(", ");
    const note = ` (${unanswered.length} ended without an echo)`;
    console.log(`latency   ${percentiles}${unanswered.length > 0 ? note : ""}`);
    const whose = shares
      ? "when the first client was done, each of the others"
      : "at the end, each client";
    const fairness = `${whose} had ${fewest} to ${most} of ${messages} echoes`;
    console.log(`fairness  ${had.length > 0 ? fairness : "only one client"}`);
  }
}

const encoder = new TextEncoder();
const { ConnectionReset, BrokenPipe, NotConnected } = Deno.errors;
const RESET = [ConnectionReset, BrokenPipe, NotConnected];

function reasonOf(error: unknown): string {
  if (error instanceof Deno.errors.ConnectionRefused) return "refused";
  return RESET.some((kind) => error instanceof kind) ? "reset" : `${error}`;
}

// ---- The command line

const HELP = `\
Echo client: many concurrent clients that compare every byte, and a report.

  deno run --allow-net echo_client.ts [OPTIONS] [MESSAGE...]

  -H, --host HOST       the server's address (127.0.0.1)
  -p, --port PORT       its first port (50007)
      --ports N         its number of ports; clients are dealt over them (2)
  -c, --clients N       concurrent clients (100, or 1 with MESSAGEs)
  -n, --messages N      messages each client sends (10)
  -s, --size BYTES      bytes per message (64)
      --timeout S       give up on connect, echo or close after S seconds (10)
      --no-verify       take what one read brings as the reply, whatever it is
      --json            print the report as JSON
  -q, --quiet           print no report
  -h, --help            show this help

With MESSAGEs each client sends these, and without --json replies are printed.
It exits with 0 if no client failed. Ctrl-C ends it with the report so far.`;

type Options = Awaited<ReturnType<typeof parseCommandLine>>;
const WHOLE = ["port", "ports", "clients", "messages", "size"] as const;
const SHORT = { H: "host", p: "port", c: "clients", n: "messages", s: "size" };

async function parseCommandLine() {
  const refuse = (what: string, expected: string): never => {
    throw new RangeError(`${what}: expected ${expected}`);
  };
  // Without arguments there is nothing to parse, and nothing is downloaded.
  const args = Deno.args.length === 0
    ? undefined
    : (await import("@std/cli/parse-args")).parseArgs(Deno.args, {
      string: ["_", "host", "timeout", ...WHOLE],
      boolean: ["no-verify", "json", "quiet", "help"],
      alias: { ...SHORT, q: "quiet", h: "help" },
      unknown: (arg, name) =>
        name && refuse(arg, "one of the options in --help"),
    });
  const whole = (name: typeof WHOLE[number], usual: number, most: number) => {
    const text = args?.[name] ?? `${usual}`;
    if (/^[1-9]\d*$/.test(text) && Number(text) <= most) return Number(text);
    return refuse(`--${name} ${text}`, `a whole number from 1 to ${most}`);
  };
  const texts = (args?._ ?? []).map(String);
  const words = texts.map((text) => encoder.encode(text));
  const given = args?.messages ?? args?.size;
  if (texts.includes("")) refuse('""', "a MESSAGE of at least one byte");
  if (texts[0] && given) refuse(texts[0], "either MESSAGEs or -n and -s");
  const host = args?.host ?? "127.0.0.1";
  if (host === "") refuse("--host", "an address or a name");
  const port = whole("port", 50007, 65535);
  const ports = whole("ports", 2, 65536 - port);
  const clients = whole("clients", words.length > 0 ? 1 : 100, 1e5);
  // The time of each echo is kept, so there are no more than 1e8 of them.
  const most = Math.floor(1e8 / clients);
  const messages = words.length || whole("messages", 10, most);
  const size = whole("size", 64, 2 ** 30);
  const limit = 1000 * Number(args?.timeout ?? 10); // ms
  if (!(limit > 0)) refuse(`--timeout ${args?.timeout}`, "seconds above 0");
  return { ...args, host, port, ports, clients, messages, size, words, limit };
}

if (import.meta.main) {
  await parseCommandLine()
    .then((options) => options.help ? console.log(HELP) : run(options))
    .catch((error: Error) => {
      console.error(`echo_client: ${error.message}`);
      Deno.exitCode = error instanceof RangeError ? 2 : 1; // 2: bad use
    });
  Deno.exit(); // ticks, or a late connect, would keep the process alive
}
