import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { ROOT } from "./helpers.ts";

const json = (file: string) => JSON.parse(readFileSync(join(ROOT, file), "utf8"));
const { dependencies, devDependencies } = json("package.json") as Record<string, Record<string, string>>;
const lock = json("package-lock.json") as {
  packages: Record<
    string,
    { version: string; integrity?: string; resolved?: string; link?: true; dev?: true; optional?: true }
  >;
};
const packages = Object.entries(lock.packages).filter(([path]) => path);

describe("the npm packages", () => {
  test("have exact versions, in package.json and for Deno, which are those in the lock file", () => {
    const named = { ...dependencies, ...devDependencies };
    for (const [name, version] of Object.entries(named)) {
      assert.match(version, /^\d+\.\d+\.\d+$/, name);
      assert.equal(lock.packages[`node_modules/${name}`]?.version, version);
    }
    const { imports } = json("deno.json") as { imports: Record<string, string> };
    for (const [name, from] of Object.entries(imports)) assert.equal(from, `npm:${name}@${named[name]}`);
  });

  test("have a sha512 in the lock file, and come only from the registry", () => {
    for (const [path, { integrity, resolved, link }] of packages) {
      assert.match(integrity ?? "", /^sha512-[\w+/]{86}==$/, path);
      assert.ok(
        !link && (resolved ?? "https://registry.npmjs.org/").startsWith("https://registry.npmjs.org/"),
        path,
      );
    }
    const { npm } = json("deno.lock") as { npm: Record<string, { integrity?: string }> };
    for (const [name, { integrity }] of Object.entries(npm)) assert.match(integrity ?? "", /^sha512-/, name);
  });

  test("that are needed to run are only six, and their dependencies", () => {
    assert.deepEqual(Object.keys(dependencies as object), ["dotenv", "minimist", "ora", "tsx", "uqr", "zx"]);
    const run = packages.filter(([, { dev, optional }]) => !dev && !optional).map(([path]) => path);
    assert.ok(run.length <= 24, run.join());
  });
});

test("TLS is verified in every download, except when fetching the CA itself, whose hash is in the token", () => {
  const files = ["lib", "scripts"].flatMap((folder) =>
    (readdirSync(join(ROOT, folder), { recursive: true }) as string[])
      .filter((name) => name.endsWith(".ts"))
      .map((name) => join(folder, name)),
  );
  const lax = files.flatMap((file) =>
    readFileSync(join(ROOT, file), "utf8")
      .split("\n")
      .filter((line) =>
        /\b(curl|ask|wget)\b.*\s(-k|--insecure|--no-check-certificate)\b|rejectUnauthorized|NODE_TLS_REJECT/.test(
          line,
        ),
      )
      .map((line) => `${file}: ${line.trim().slice(0, 40)}`),
  );
  assert.deepEqual(lax, [
    // Whether a kubelet answers at all, and what its certificate says.
    `lib/k3s/watch.ts: [ ! -e "$lane" ] || curl -q -k -s -v --n`,
    'scripts/agent.ts: ask -k -D "$dir/head" -o "$dir/ca" "$url',
  ]);
});
