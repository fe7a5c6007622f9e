#!/usr/bin/env -S node --import tsx
/** Sets up what looks after the cluster each minute on the server, and tells a webhook what goes wrong. */
import { main } from "../../lib/k3s/script.ts";
import { watchStep } from "../../lib/k3s/watch.ts";

await main(import.meta, {
  about:
    "Sets up the watch on the first server: each minute it looks at nodes, tunnels, kubelets, certificates, disk, memory and backups, tells NOTIFY_URL what goes wrong, and writes metrics.",
  steps: [watchStep],
  host: "SERVER",
  flags: { remove: "take the watch away" },
});
