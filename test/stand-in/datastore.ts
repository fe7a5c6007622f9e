/** The datastore that several servers share, as far as the stand-in goes: etcd, by the JSON gateway of its API (v3). */
import { setTimeout as sleep } from "node:timers/promises";

export interface Store {
  /** Values by what follows the prefix in their keys. */
  list(prefix: string): Promise<Record<string, string>>;
  put(key: string, value: string): Promise<void>;
  /** Puts it where the present value is `was`: answers whether it is. */
  swap(key: string, was: string, value: string): Promise<boolean>;
  remove(key: string): Promise<void>;
}

const encode = (text: string): string => Buffer.from(text).toString("base64");
const decode = (text: string): string => Buffer.from(text, "base64").toString();
/** The end of the range of keys that begin with it. */
const after = (prefix: string): string =>
  prefix.slice(0, -1) + String.fromCharCode(prefix.charCodeAt(prefix.length - 1) + 1);

interface Answer {
  kvs?: { key: string; value?: string }[];
  succeeded?: boolean;
}

export function openStore(endpoint: string): Store {
  const { origin, username, password } = new URL(endpoint);
  const authorization = `Basic ${encode(`${username}:${password}`)}`;
  const ask = async (what: string, body: object): Promise<Answer> => {
    const answer = await fetch(`${origin}/v3/kv/${what}`, {
      method: "POST",
      headers: { authorization },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(5000),
    });
    if (!answer.ok) throw new Error(`datastore: ${answer.status} ${answer.statusText}`);
    return (await answer.json()) as object;
  };
  return {
    async list(prefix) {
      const { kvs = [] } = await ask("range", { key: encode(prefix), range_end: encode(after(prefix)) });
      return Object.fromEntries(
        kvs.map(({ key, value = "" }) => [decode(key).slice(prefix.length), decode(value)]),
      );
    },
    put: async (key, value) => void (await ask("put", { key: encode(key), value: encode(value) })),
    async swap(key, was, value) {
      const { succeeded } = await ask("txn", {
        compare: [{ key: encode(key), target: "VALUE", result: "EQUAL", value: encode(was) }],
        success: [{ requestPut: { key: encode(key), value: encode(value) } }],
      });
      return succeeded === true;
    },
    remove: async (key) => void (await ask("deleterange", { key: encode(key) })),
  };
}

type Json = Record<string, unknown>;
const isObject = (value: unknown): value is Json =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** `there` with what changes from `before` to `after`, as a patch would: the rest of it may be another server's. */
export function patched(there: unknown, before: unknown, after: unknown): unknown {
  if (!isObject(there) || !isObject(before) || !isObject(after)) return after;
  const result = { ...there };
  for (const key of new Set([...Object.keys(before), ...Object.keys(after)])) {
    if (JSON.stringify(before[key]) === JSON.stringify(after[key])) continue;
    if (after[key] === undefined) delete result[key];
    else result[key] = patched(there[key], before[key], after[key]);
  }
  return result;
}

/** Asked again until it answers, as k3s does when it starts. */
export async function patiently<T>(work: () => Promise<T>, failed: (error: Error) => void): Promise<T> {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      failed(error as Error);
      await sleep(2000);
    }
  }
}
