import { describe, expect, test } from 'vitest';
import { Problem } from '../src/lib/problem';
import { formatRoute, parseRoute } from '../src/lib/route';
import {
  activationsOf, asCurl, asPython, asYaml, findModel, makeReadPlan, makeTextPlan, newSteering, parseLatents, readAnswer, readLine, shareTokens, splitLines,
  type Steering,
} from '../src/lib/steer';
import type { Bundle, ServedModel, Site } from '../src/lib/types';

const STEERING: Steering = { dials: [{ latent: 12, times: 10 }, { latent: 7, times: -2.5 }], watched: [5], prompt: 'a&b ="\n', newTokens: 8, temperature: 0.8, seed: 3, where: 'generated' };
const MODEL = {
  name: 'tiny', model: 'tiny gpt2', can_measure: true, special_tokens: [0], stop_tokens: [1], queue: { stopped: '' },
  saes: { demo: { hook_point: 'resid_post.0', written_at: 'resid_post.1', d_sae: 40, artifact_id: 'abc' } },
} as unknown as ServedModel;
const BUNDLE = { name: 'demo-1', pipeline: 'p', model: { name: 'org/m' }, sae: { name: 'demo', artifact_id: 'abc' } } as unknown as Bundle;
const SERVER = { mode: 'server', models: true, bundles: [] } as Site;

describe('the address of a steered feature', () => {
  test('holds all that is set', () => {
    const address = formatRoute({ bundle: 'demo', latent: 12, steering: STEERING });
    expect(parseRoute(address).steering).toEqual(STEERING);
    expect(parseRoute(formatRoute({ bundle: 'demo', latent: 12, steering: newSteering(12) })).steering).toEqual(newSteering(12));
    expect(formatRoute({ bundle: 'demo', latent: 12, steering: newSteering(12) })).toBe('#/demo/12?steer=12%3A10');
  });

  test('without `steer` opens nothing', () => expect(parseRoute('#/demo/12?prompt=a').steering).toBeNull());

  test('leaves out what cannot be, and bounds what is left', () => {
    const found = parseRoute('#/demo/1?steer=1:2,x:3,4:,1:5,6:NaN&new=1e9&temp=-1&seed=0.5&where=moon&watch=3,-2,3').steering!;
    expect(found).toEqual({ ...newSteering(1), dials: [{ latent: 1, times: 5 }], watched: [3] });
    expect(parseRoute(`#/demo/1?steer=${Array.from({ length: 50 }, (_, i) => `${i}:1`).join()}`).steering!.dials).toHaveLength(8);
  });

  test('latents are read from what people type', () => expect(parseLatents(' 5, 9 12,,5 x -3 ')).toEqual([5, 9, 12]));
});

describe('where nothing can be steered', () => {
  const whatOf = (site: Site, models: ServedModel[]): string => {
    const found = findModel(site, models, BUNDLE);
    return found instanceof Problem ? `${found.what} ${found.todo}` : found.name;
  };

  test('the reason and the next step are told', () => {
    expect(whatOf({ ...SERVER, mode: 'static' }, [])).toMatch(/files only.*interp serve --config PIPELINE.yaml --model org\/m.*'p'/);
    expect(whatOf({ ...SERVER, models: false }, [])).toMatch(/serves no model.*--model org\/m/);
    expect(whatOf(SERVER, [{ ...MODEL, saes: { demo: { ...MODEL.saes.demo!, artifact_id: 'other' } } }])).toMatch(/'demo' of this bundle \(abc\).*: tiny\./);
    expect(whatOf(SERVER, [{ ...MODEL, can_measure: false }])).toMatch(/predicts no next token/);
    expect(whatOf(SERVER, [{ ...MODEL, queue: { ...MODEL.queue, stopped: 'A hook stayed.' } }])).toMatch(/A hook stayed. Start the server again/);
  });

  test('the model with the very SAE is found', () => expect(whatOf(SERVER, [{ ...MODEL, name: 'other', saes: {} }, MODEL])).toBe('tiny'));
});

describe('plans', () => {
  test('a text is written under one clamp a feature, in the order of the recipe', () => {
    const plan = makeTextPlan(MODEL, 'demo', STEERING, [0, 4, 5], [3, -1]) as { edits: unknown[] };
    expect(plan).toMatchObject({ whole: 'generate', rows: [[0, 4, 5]], new_tokens: 8, seed: 3, temperature: 0.8, stop: [1], special: [0], compare: true });
    expect(plan.edits).toEqual([12, 7].map((latent, i) => ({ write: { op: 'sae_clamp', point: 'resid_post.1', sae: 'demo', latents: [latent], values: [[3, -1][i]] }, where: 'generated' })));
  });

  test('activations are read after the edits, which are where they were: not at special tokens', () => {
    const texts = { prompt: [0, 4], plain: [5], steered: [6, 0, 7] };
    const read = (where: Steering['where']): { rows: number[][]; operations: { op: string; pos?: number[] }[] } => makeReadPlan(MODEL, 'demo', { ...STEERING, where }, texts, [3, -1]) as never;
    expect(read('all').rows).toEqual([[0, 4, 5], [0, 4, 6, 0, 7]]);
    expect((['all', 'prompt', 'generated'] as const).map((where) => read(where).operations[0]!.pos)).toEqual([[1, 2, 4], [1], [2, 4]]);
    expect(read('all').operations.at(-1)).toEqual({ op: 'sae_read', name: 'latents', point: 'resid_post.0', sae: 'demo', latents: [12, 7, 5], after: true });
    expect((makeReadPlan(MODEL, 'demo', STEERING, { ...texts, steered: [0] }, [3, -1]) as { operations: unknown[] }).operations).toHaveLength(1);
  });
});

describe('copies', () => {
  test('YAML is a recipe', () => {
    expect(asYaml('demo', STEERING)).toBe('edits:\n  - {sae: "demo", latent: 12, clamp: 10 max, where: generated}\n  - {sae: "demo", latent: 7, clamp: -2.5 max, where: generated}\n');
  });

  test('Python names the server, or the pipeline where there is none, and its texts are literals of Python', () => {
    const program = asPython('demo', { ...STEERING, prompt: 'é"\u202e😀\n' }, { address: 'http://h:1', model: 'tiny' });
    expect(program).toContain('llm = lab.connect("http://h:1", "tiny")');
    expect(program).toContain('llm.generate("é\\"\\u202e😀\\n", steer=recipe, new_tokens=8, temperature=0.8, seed=3, compare=True)');
    expect(asPython('demo', STEERING, null)).toContain('lab.open("PIPELINE.yaml").model()');
  });

  test('curl cannot be left by a quote', () => {
    const command = asCurl('http://h:1', 'tiny', { sae: "it's" });
    expect(command).toBe(`curl -N 'http://h:1/api/models/tiny/generate' -H 'content-type: application/json' -d '{"sae":"it\\u0027s"}'\n`);
  });
});

describe('answers', () => {
  test('tokens of one text that the other has in the same order are shared', () => {
    expect(shareTokens([1, 2, 3, 4], [1, 9, 3, 4, 4])).toEqual([[true, false, true, true], [true, false, true, true, false]]);
    expect(shareTokens([], [1])).toEqual([[], [false]]);
  });

  test('lines are tokens, the end, or an error', () => {
    expect(readLine('{"token":[0,false,3,17,-0.5,-2.25,0.125,[]]}')).toEqual({ isDefault: false, token: { token: 17, logprob: -0.5, base: -2.25, kl: 0.125 } });
    const end = { effects: [{ n_places: { values: [4] }, moved: { values: [0.5] }, before: { values: [null] }, after: { values: [1] } }], fvu: { demo: null } };
    expect(readLine(JSON.stringify({ generated: end }))).toEqual({ effects: [{ places: 4, moved: 0.5, before: null, after: 1 }], fvu: { demo: null } });
    expect(() => readLine('{"error":{"what":"The model stopped.","do":"Ask again."}}')).toThrow(expect.objectContaining({ what: 'The model stopped.', todo: 'Ask again.' }));
    expect(() => readLine('{}')).toThrow(/neither a token nor an end/);
  });

  test('lines are whole, however the stream is cut', async () => {
    const bytes = new TextEncoder().encode('{"a":"é"}\n\n{"b":2}\n{"c":3}');
    for (const size of [1, 4, 100]) {
      const pieces = Array.from({ length: Math.ceil(bytes.length / size) }, (_, i) => bytes.slice(i * size, (i + 1) * size));
      const found: string[] = [];
      for await (const line of splitLines(new ReadableStream({ start: (to) => (pieces.forEach((piece) => to.enqueue(piece)), to.close()) }))) found.push(line);
      expect(found).toEqual(['{"a":"é"}', '{"b":2}', '{"c":3}']);
    }
  });

  test('tensors of an answer are read by the names of operations', () => {
    const values = Float32Array.from({ length: 12 }, (_, i) => i / 2);
    const pack = (dtype: string): ArrayBuffer => {
      const text = JSON.stringify({ __metadata__: { answer: JSON.stringify({ tensors: { latents: '0' } }) }, 0: { dtype, shape: [2, 3, 2], data_offsets: [0, 48] } });
      const header = new TextEncoder().encode(text);
      const body = new Uint8Array(8 + header.length + 48); // not a multiple of 4: offsets need not be aligned
      new DataView(body.buffer).setBigUint64(0, BigInt(header.length), true);
      body.set(header, 8);
      body.set(new Uint8Array(values.buffer), 8 + header.length);
      return body.buffer;
    };
    const found = readAnswer(pack('F32')).get('latents')!;
    expect(found.shape).toEqual([2, 3, 2]);
    expect(activationsOf(found, 1, 1, 1, 3)).toEqual([4.5, 5.5]);
    expect(() => readAnswer(pack('F16'))).toThrow(/latents is F16/);
    expect(() => readAnswer(new ArrayBuffer(3))).toThrow(/cannot be read/);
  });
});
