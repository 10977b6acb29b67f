import { describe, expect, test } from 'vitest';
import { formatHeadRoute, parseHeadRoute } from '../src/lib/headroute';
import { Prompt, besideHead, listHeads, readHead, statisticsOf, type Heads } from '../src/lib/heads';
import { readFiles } from '../src/lib/live';
import { alignTokens, cutRuns, levelsOf, massOf, rankOf, readHalves, strength, strongest, tilePlace, tilesOf, unfoldTriangle, weigh } from '../src/lib/patterns';

const encode = (value: unknown): ArrayBuffer => new TextEncoder().encode(JSON.stringify(value)).buffer as ArrayBuffer;
const pack = (bytes: Uint8Array<ArrayBuffer>): Promise<ArrayBuffer> => new Response(new Blob([bytes]).stream().pipeThrough(new CompressionStream('gzip'))).arrayBuffer();

describe('bytes of a pattern', () => {
  // The example of docs/formats/attention_pattern.md, whose bytes a Python test holds to the codec.
  test('a triangle becomes a square', () => {
    expect([...unfoldTriangle(Uint8Array.of(255, 128, 221, 26, 146, 207), 3, false, 'x')]).toEqual([255, 0, 0, 128, 221, 0, 26, 146, 207]);
    expect(massOf(255)).toBe(1);
    expect(massOf(128)).toBeCloseTo(0.252, 3);
  });
  test('another number of edges is named', () => {
    expect(() => unfoldTriangle(new Uint8Array(5), 3, false, 'Head 1.2')).toThrow('Head 1.2 has 5 edges; 3 tokens have 6');
    expect(() => unfoldTriangle(new Uint8Array(6), 3, true, 'Head 1.2')).toThrow('3 tokens have 9');
  });
  test('half floats are read as they are', () => {
    const halves = Uint16Array.of(0x3c00, 0xc000, 0x0001, 0x3555, 0x7bff, 0x0000);
    const found = readHalves(halves);
    [1, -2, 2 ** -24, 0.333251953125, 65504, 0].forEach((value, i) => expect(found[i]).toBeCloseTo(value, 12));
  });
});

describe('tiles', () => {
  test.each([[1, 1], [256, 1], [257, 2], [1024, 3], [1025, 4], [8192, 6]])('%i tokens have %i levels', (n, levels) => expect(levelsOf(n)).toBe(levels));

  test.each([false, true])('places follow the order in which they are stored, the coarsest level first (both ways: %s)', (bothWays) => {
    const n = 1100;
    let place = 0;
    for (let level = levelsOf(n) - 1; level >= 0; level--) {
      const side = Math.ceil(n / (256 << level));
      for (let row = 0; row < side; row++) for (let column = 0; column < (bothWays ? side : row + 1); column++) expect(tilePlace(n, level, row, column, bothWays)).toBe(place++);
    }
    expect(tilesOf(n, bothWays)).toBe(place);
    expect(tilePlace(n, 0, 0, 1, bothWays)).toBe(bothWays ? place - 24 : -1);
  });
});

describe('lines', () => {
  const firsts = (query: number): number => [1, 0.6, 0.5][query]!;
  test('weights by key, from either side', () => {
    const column = Float32Array.of(2, 10, 1);
    const row = Float32Array.of(0.5, 0.25, 0.25);
    expect([...weigh(row, 2, { column, rows: null, sink: 'shown', side: 'query' }, firsts)]).toEqual([1, 2.5, 0.25]);
    expect([...weigh(row, 1, { column, rows: null, sink: 'shown', side: 'key' }, firsts)]).toEqual([5, 2.5, 2.5]);
  });
  test('what adds to a target is weighted by its query, too', () => {
    const [column, rows, line] = [Float32Array.of(2, -10, 1), Float32Array.of(1, 2, 4), Float32Array.of(0.5, 0.25, 0.25)];
    expect([...weigh(line, 2, { column, rows, sink: 'shown', side: 'query' }, firsts)]).toEqual([4, -10, 1]);
    expect([...weigh(line, 1, { column, rows, sink: 'shown', side: 'key' }, firsts)]).toEqual([-5, -5, -10]);
    expect(strongest([4, -10, 1], 2)).toEqual([{ place: 1, value: -10, covered: 10 / 15 }, { place: 0, value: 4, covered: 14 / 15 }]);
    expect(rankOf([4, -10, 1], 0)).toBe(2);
  });
  test('the first token is hidden, or what is left adds up to one', () => {
    const row = Float32Array.of(0.5, 0.25, 0.25);
    expect([...weigh(row, 2, { column: null, rows: null, sink: 'hidden', side: 'query' }, firsts)]).toEqual([0, 0.25, 0.25]);
    expect([...weigh(row, 2, { column: null, rows: null, sink: 'renormalised', side: 'query' }, firsts)]).toEqual([0, 0.5, 0.5]);
    expect([...weigh(Float32Array.of(0, 0.4, 0.25), 1, { column: null, rows: null, sink: 'renormalised', side: 'key' }, firsts)].map((value) => Number(value.toFixed(6)))).toEqual([0, 1, 0.5]);
    expect([...weigh(row, 0, { column: null, rows: null, sink: 'hidden', side: 'key' }, firsts)]).toEqual([0, 0, 0]);
  });
  test('the strongest, with what they cover', () => {
    expect(strongest([0.1, 0.4, 0, 0.4, 0.1], 3)).toEqual([{ place: 1, value: 0.4, covered: 0.4 }, { place: 3, value: 0.4, covered: 0.8 }, { place: 0, value: 0.1, covered: 0.9 }]);
    expect(rankOf([0.1, 0.4, 0, 0.4, 0.1], 0)).toBe(3);
    expect(strongest([0, 0])).toEqual([]);
  });
  test('scales rise from 0 to 1', () => {
    for (const scale of ['linear', 'sqrt', 'log'] as const) {
      const drawn = [0, 0.001, 0.1, 0.5, 1].map((value) => strength(value, 1, scale));
      expect(drawn).toEqual([...drawn].sort((a, b) => a - b));
      expect([drawn[0], drawn[4]]).toEqual([0, 1]);
    }
    expect(strength(1, 0, 'sqrt')).toBe(0);
  });
});

test('two texts are aligned by their tokens', () => {
  expect(alignTokens([1, 2, 3, 4], [1, 9, 3, 4])).toEqual([[0, 0], [2, 2], [3, 3]]);
  expect(alignTokens([1, 2, 3], [0, 1, 2, 3])).toEqual([[0, 1], [1, 2], [2, 3]]);
  expect(alignTokens([], [1])).toEqual([]);
  expect(alignTokens([1, 1], [1, 1, 1])).toEqual([[0, 0], [1, 1]]);
  const long = Array.from({ length: 20_000 }, (_, i) => i);
  const shifted = [...long.slice(0, 9000), -1, ...long.slice(9000)];
  expect(alignTokens(long, shifted)).toEqual(long.map((i) => [i, i < 9000 ? i : i + 1]));
});

test('runs of a context join where they nearly touch', () => {
  expect(cutRuns([10, 11, 16, 40], 42)).toEqual([[8, 19], [38, 42]]);
  expect(cutRuns([], 5)).toEqual([]);
});

const heads = {
  name: 'b',
  layers: [
    { layer: 1, n_heads: 2, n_key_heads: 1, window: null, softcap: null, has_sinks: false },
    { layer: 3, n_heads: 1, n_key_heads: 1, window: null, softcap: null, has_sinks: false },
  ],
  heads: { layer: [1, 1, 3], head: [0, 1, 0], rows: [5, 5, 5], induction: [0.5, null, 0.7], uniform_induction: [0.1, null, 0.1], first: [0.5, 0.9, 0.1], self: [0.1, 0.05, 0.1], learned_sink: [0, 0, 0], duplicate: [null, null, null] },
} as unknown as Heads;

describe('heads', () => {
  test('have chance and rank beside a statistic, and no rank without one', () => {
    expect(listHeads(heads, 'induction').map(({ name, value, chance, rank }) => [name, value, chance, rank])).toEqual([['1.0', 0.5, 0.1, 2], ['1.1', null, null, null], ['3.0', 0.7, 0.1, 1]]);
    expect(listHeads(heads, 'first').map((line) => line.isResting)).toEqual([false, true, false]);
    expect(statisticsOf(heads).map((item) => item.key)).toEqual(['induction', 'first', 'self']);
  });
  test('are walked by layer and in it', () => {
    expect([besideHead(heads, '1.1', 1, 0), besideHead(heads, '3.0', 1, 0), besideHead(heads, '1.1', 0, 1), besideHead(heads, '1.0', 0, -1)]).toEqual(['3.0', null, '3.0', null]);
  });
});

describe('a record', () => {
  const base64 = (bytes: Uint8Array): string => btoa(String.fromCharCode(...bytes));
  const example = { context: 0, query: 1, score: 0.5, first_query: 1, keys: base64(new Uint8Array(Uint32Array.of(1, 0, 0, 0, 0, 0, 0, 0).buffer)), masses: base64(Uint8Array.of(255, 51, 0, 0, 0, 0, 0, 0)) };
  const record = { version: 1, layer: 1, head: 0, contexts: [{ tokens: [4, 5] }], examples: [example] };
  test('has what each query looks at', () => expect(readHead(encode(record), '1.0').examples[0]!.rows).toEqual([[{ key: 1, mass: 1 }, { key: 0, mass: expect.closeTo(0.04, 6) }]]));
  test('of another version, of another head, and with keys beyond its text is refused', () => {
    expect(() => readHead(encode({ ...record, version: 2 }), '1.0')).toThrow('has version 2');
    expect(() => readHead(encode(record), '1.1')).toThrow('head 1.0 lies where head 1.1 should');
    expect(() => readHead(encode({ ...record, contexts: [{ tokens: [4] }] }), '1.0')).toThrow('8 keys and 8 masses for 1 tokens');
  });
});

test('a line of a long prompt is put together of its tiles', async () => {
  const n = 300;
  const at = (query: number, key: number): number => (key > query ? 0 : (query * 7 + key * 3) % 256);
  const members: ArrayBuffer[] = [];
  const tile = (of: (y: number, x: number) => number): Uint8Array<ArrayBuffer> => Uint8Array.from({ length: 65536 }, (_, i) => of(Math.floor(i / 256), i % 256));
  members.push(await pack(tile(() => 0)));
  for (const [row, column] of [[0, 0], [1, 0], [1, 1]] as const) members.push(await pack(tile((y, x) => (row * 256 + y < n && column * 256 + x < n ? at(row * 256 + y, column * 256 + x) : 0))));
  const ends = members.reduce<number[]>((sums, member) => [...sums, sums.at(-1)! + member.byteLength], [0]);
  const bytes = new Uint8Array(await new Blob(members).arrayBuffer());
  const facts = { name: 'long', n_tokens: n, both_ways: false, form: 'tiles' as const, columns: ['value'], thumb: 1 };
  const offsets = new BigUint64Array(ends.map(BigInt)).buffer as ArrayBuffer;
  const prompt = new Prompt(facts, Array.from({ length: n }, (_, i) => i), ['0.0'], offsets, new Uint16Array(n), new Uint8Array(1), (start, stop) => Promise.resolve(bytes.slice(start, stop).buffer));
  for (const place of [3, 280]) {
    const [row, column] = [await prompt.line('0.0', 'query', place), await prompt.line('0.0', 'key', place)];
    for (const i of [0, 2, 255, 256, 290, 299]) {
      expect(row[i]).toBeCloseTo(massOf(at(place, i)), 6);
      expect(column[i]).toBeCloseTo(massOf(at(i, place)), 6);
    }
  }
  const block = await prompt.block('0.0', 0, 250, 100, 60, 220);
  for (const [q, k] of [[0, 0], [5, 155], [6, 156], [30, 170], [49, 199], [55, 10], [0, 215]] as const) expect(block[q * 220 + k]).toBe(250 + q < n && 100 + k < n ? at(250 + q, 100 + k) : 0);
  expect(() => prompt.thumb('9.9')).toThrow('There is no head 9.9 in the prompt long');
});

test('an answer of a server becomes a prompt with what adds to targets', async () => {
  const numbers = (...values: number[]): ArrayBuffer => Float32Array.from(values).buffer as ArrayBuffer;
  const n = 2;
  const said = { tokens: [5, 6], heads: ['1.0', '3.0'], both_ways: false, form: 'triangle', columns: ['value', 'logit:6', 'feature:a:0'], thumb: 1, note: 'Cut.' };
  const targets = [{ column: 'logit:6', text: 'x', others: ['bias', 'rounding'], note: '' }, { column: 'feature:a:0', others: ['bias'], note: '' }];
  const members = [await pack(Uint8Array.of(255, 0, 255)), await pack(Uint8Array.of(255, 255, 0))];
  const files: [string, ArrayBuffer][] = [
    ['prompt.json', encode(said)],
    ['patterns.bin', await new Blob(members).arrayBuffer()],
    ['patterns.idx', new BigUint64Array([0n, BigInt(members[0]!.byteLength), BigInt(members[0]!.byteLength + members[1]!.byteLength)]).buffer as ArrayBuffer],
    ['columns.bin', Uint16Array.from({ length: 12 }, () => 0x3c00).buffer as ArrayBuffer],
    ['thumbs.bin', await pack(Uint8Array.of(1, 2))],
    ['targets.json', encode(targets)],
    ['scales.bin', numbers(1, 2, 3, 4, 5, 6, 7, 8)],
    ['terms.bin', numbers(0, 1, 0, 2, 0, 9, 0, 3, 0, 4, 0, 0, /* the second: */ 0, 10, 0, 20, 0, 35, 0, 0, 0, 5)],
  ];
  let offset = 0;
  const places = Object.fromEntries(files.map(([name, data]) => [name, [offset, (offset += data.byteLength)]]));
  const header = new Uint8Array(encode({ files: places }));
  const body = await new Blob([new BigUint64Array([BigInt(header.length)]), header, ...files.map(([, data]) => data)]).arrayBuffer();
  const prompt = await readFiles(body, 'mine');
  expect([prompt.n, prompt.facts.note, prompt.heads]).toEqual([n, 'Cut.', ['1.0', '3.0']]);
  expect([...(await prompt.line('3.0', 'query', 1))]).toEqual([1, 0]);
  expect([prompt.scale('1.0', 'value'), [...prompt.scale('3.0', 'logit:6')!], [...prompt.scale('1.0', 'feature:a:0')!]]).toEqual([null, [3, 4], [5, 6]]);
  expect(prompt.termsAt('logit:6', 1)).toEqual({ value: 9, heads: [['1.0', 1], ['3.0', 2]], others: [['heads of other layers', 3], ['bias', 4]] });
  expect(prompt.termsAt('feature:a:0', 1)).toEqual({ value: 35, heads: [['1.0', 10], ['3.0', 20]], others: [['bias', 5]] });
  expect(prompt.termsAt('raw', 1)).toBeNull();
  expect(() => readFiles(new ArrayBuffer(4), 'x')).toThrow('cannot be read');
});

test('addresses come back', () => {
  for (const hash of ['#/b/heads?by=first&and=self&least=0.25', '#/b/heads/5.3?range=0.25%7E0.5', '#/b/prompt/p?head=5.3&q=17&k=4&by=output&sink=hidden&side=key&scale=log&rows=1&with=other', '#/b/heads', '#/b/prompt/p', '#/b/live?text=a+b&logit=+os&feature=l8%3A5&head=5.3&by=logit%3A5']) {
    expect(formatHeadRoute(parseHeadRoute(hash))).toBe(hash);
  }
  expect(parseHeadRoute('#/b')).toMatchObject({ bundle: 'b', page: 'map' });
  expect(parseHeadRoute('#/b/prompt/p?sink=no&side=no&q=x&scale=no')).toMatchObject({ sink: 'shown', side: 'query', q: null, scale: 'sqrt' });
});
