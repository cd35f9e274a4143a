// llama.cpp, through node-llama-cpp: the logits at every token, as float32 in a file.
//
//     node llama.mjs MODULES BASE.gguf ADAPTER.gguf TOKENS OUT
//
// MODULES is the folder in which npm has installed node-llama-cpp, and TOKENS a list in JSON. OUT gets
// the logits of the base, of the adapter, and of the base again: (3, tokens, vocabulary).

import {writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const [modules, base, adapter, tokens, out] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(join(modules, "node-llama-cpp/dist/index.js")));

const llama = await getLlama({gpu: false, build: "never", progressLogs: false, maxThreads: 1});
const model = await llama.loadModel({modelPath: base, gpuLayers: 0});

async function logits(lora) {
    const context = await model.createContext({
        contextSize: 64,
        threads: 1,
        lora,
        flashAttention: false,
        experimentalKvCacheKeyType: "F32",
        experimentalKvCacheValueType: "F32"
    });
    const asked = JSON.parse(tokens).map((token) => [token, {generateNext: {logits: true}}]);
    const results = await context.getSequence().controlledEvaluate(asked);
    await context.dispose();
    return results.flatMap(({next}) => inOrder(next.logits));
}

function inOrder(byToken) {
    return Array.from({length: byToken.size}, (_, token) => byToken.get(token));
}

const rounds = [await logits(undefined), await logits(adapter), await logits(undefined)];
writeFileSync(out, Buffer.from(Float32Array.from(rounds.flat()).buffer));
