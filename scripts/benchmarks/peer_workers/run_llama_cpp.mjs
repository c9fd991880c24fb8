// Worker of peers.py: llama.cpp through node-llama-cpp. See serve.py for what it reads and writes.
// Arguments: model, threads, folder with node_modules.

import { createInterface } from "node:readline";
import { pathToFileURL } from "node:url";
import { readFileSync } from "node:fs";
import path from "node:path";

const [modelPath, threads, modules] = process.argv.slice(2);
const folder = path.join(path.resolve(modules), "node_modules", "node-llama-cpp");
const { getLlama } = await import(pathToFileURL(path.join(folder, "dist", "index.js")).href);
const { version } = JSON.parse(readFileSync(path.join(folder, "package.json"), "utf8"));
const say = (content) => process.stdout.write(`@${JSON.stringify(content)}\n`);

const llama = await getLlama({ gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error" });
const model = await llama.loadModel({ modelPath, useMmap: true });
const context = await model.createContext({ contextSize: 1024, batchSize: 1024, threads: Number(threads) });
const sequence = context.getSequence();

say({ version, llama_cpp: llama.llamaCppRelease.release, threads: Number(threads), kv: "fp16", flash_attention: context.flashAttention });
for await (const line of createInterface({ input: process.stdin })) {
    const { prompt, new_tokens: count } = JSON.parse(line);
    await sequence.clearHistory();
    const tokens = [];
    const times = [];
    let begin = performance.now();
    for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
        const end = performance.now();
        times.push(end - begin);
        tokens.push(token);
        if (tokens.length === count) break;
        begin = performance.now();
    }
    say({ tokens, times_ms: times });
}
await llama.dispose();
