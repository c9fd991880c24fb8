// Answer questions about an image from a promprune package, with transformers.js and nothing of promprune.
//
//     (cd scripts/transformers_js && ONNXRUNTIME_NODE_INSTALL=skip npm ci)
//     node scripts/transformers_js/answer.mjs PACKAGE IMAGE QUESTION...
//
// Prints a JSON array with, for every question, the text, the new tokens and how many placeholders the prompt had.

import { resolve } from 'node:path';

import { AutoModelForImageTextToText, AutoProcessor, RawImage, env } from '@huggingface/transformers';

const MAX_NEW_TOKENS = 16;

const [folder, file, ...questions] = process.argv.slice(2);
if (!questions.length) {
    console.error('usage: node answer.mjs PACKAGE IMAGE QUESTION...');
    process.exit(2);
}
env.allowRemoteModels = false;
const name = resolve(folder);
const processor = await AutoProcessor.from_pretrained(name);
// 'fp32' stands for file names without a suffix; what lies in them may be fp16.
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: 'fp32', device: 'cpu' });
const imageToken = BigInt(model.config.image_token_index ?? model.config.image_token_id);
const image = await RawImage.read(file);

const answers = [];
for (const question of questions) {
    const content = [{ type: 'image' }, { type: 'text', text: question }];
    const prompt = processor.apply_chat_template([{ role: 'user', content }], { add_generation_prompt: true });
    const inputs = await processor(image, prompt);
    const generated = await model.generate({ ...inputs, max_new_tokens: MAX_NEW_TOKENS, do_sample: false });
    const tokens = generated.slice(null, [inputs.input_ids.dims[1], null]);
    answers.push({
        question,
        text: processor.batch_decode(tokens, { skip_special_tokens: true })[0],
        token_ids: Array.from(tokens.data, Number),
        placeholders: Array.from(inputs.input_ids.data).filter((id) => id === imageToken).length,
    });
}
console.log(JSON.stringify(answers));
