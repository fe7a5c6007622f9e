/** One https request, by a connection of its own, for agent and kubectl. */
import { request } from "node:https";

export type Call = {
  method?: string;
  ca?: string;
  cert?: string;
  key?: string;
  auth?: string;
  headers?: Record<string, string>;
  body?: unknown;
  insecure?: boolean;
  timeout?: number;
};
export type Answer = { status: number; statusText: string; body: string };
/** `localPort` is the near end's, which Go names in its errors. */
export type CallError = Error & { code?: string; localPort?: number };

export function call(url: string, c: Call = {}): Promise<Answer> {
  return new Promise((done, failed) => {
    let localPort: number | undefined;
    const req = request(
      url,
      {
        method: c.method ?? "GET",
        agent: false,
        ca: c.ca,
        cert: c.cert,
        key: c.key,
        auth: c.auth,
        rejectUnauthorized: !c.insecure,
        timeout: c.timeout ?? 30_000,
        headers: {
          ...c.headers,
          ...(c.body === undefined ? {} : { "Content-Type": "application/merge-patch+json" }),
        },
      },
      (res) => {
        let body = "";
        res.on("data", (d) => (body += d));
        res.on("error", failed);
        res.on("end", () => done({ status: res.statusCode!, statusText: res.statusMessage!, body }));
      },
    );
    req.on("socket", (socket) => socket.on("connect", () => (localPort = socket.localPort)));
    req.on("timeout", () => req.destroy(Object.assign(new Error("i/o timeout"), { code: "ETIMEDOUT" })));
    req.on("error", (error: CallError) => failed(Object.assign(error, { localPort })));
    req.end(c.body === undefined ? undefined : JSON.stringify(c.body));
  });
}
