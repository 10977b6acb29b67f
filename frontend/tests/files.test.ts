import { describe, expect, test } from 'vitest';
import { markLatents, parseQuery, readRow } from '../src/lib/files';
import { cosine } from '../src/lib/map';
import { cut, isIn, partsOf } from '../src/lib/matches';

test('a query is cut as the server cuts it', () => {
  expect(parseQuery('def raised:in " in" peaks:" x" a:b')).toEqual([['', 'def'], ['raised', 'in'], ['', ' in'], ['peaks', ' x'], ['', 'a:b']]);
  expect(parseQuery('   ""')).toEqual([]);
});

test('a row of 76 bytes is read as the format page has it', () => {
  const data = new DataView(new ArrayBuffer(80));
  data.setFloat64(4, 12, true);
  data.setFloat32(12, 0.001, true);
  data.setFloat32(20, 2.5, true);
  for (let i = 0; i < 12; i++) data.setUint32(32 + 4 * i, 0xffffffff, true);
  data.setUint32(32, 1, true);
  data.setUint32(64, 0, true);
  const row = readRow(data, 4, 9, [' a', 'b']);
  expect(row).toMatchObject({ latent: 9, is_dead: false, count: 12, frequency: 0.001, max: 2.5, top_token: 'b', top_tokens: ['b'], top_logits: [], bottom_logits: [' a'] });
});

test('a list is read by its steps, in each width', () => {
  const marked = (data: ArrayBufferView, width: number): number[] => {
    const found = new Uint8Array(200_000);
    markLatents(data.buffer as ArrayBuffer, width, found);
    return [...found.keys()].filter((i) => found[i]);
  };
  expect(marked(Uint8Array.of(0, 1, 255, 0, 255, 255, 7), 1)).toEqual([0, 1, 256, 773]);
  expect(marked(Uint16Array.of(3, 65535, 2), 2)).toEqual([3, 65540]);
  expect(marked(Uint32Array.of(70_000, 100_000), 4)).toEqual([70_000, 170_000]);
});

test('the best of several matches of one latent counts', () => {
  const found = new Uint8Array(4);
  for (const [latent, weight] of [[1, 5], [1, 3], [2, 9]] as const) markLatents(Uint8Array.of(latent).buffer as ArrayBuffer, 1, found, weight);
  expect([...found]).toEqual([0, 5, 9, 0]);
});

describe('what matched', () => {
  const marked = (query: string, text: string, where: 'peaks' | 'raised' | 'lowered' | 'label' = 'peaks'): string[] =>
    cut(text, where, partsOf(query)).filter((piece) => piece.isMarked).map((piece) => piece.text);

  test('the piece that was searched is marked, with its spaces as they are shown', () => {
    expect(marked('IMP', ' import')).toEqual(['imp']);
    expect(marked('" in"', ' int')).toEqual(['␣in']);
    expect(marked('im rt', 'import')).toEqual(['im', 'rt']);
    expect(cut(' import', 'peaks', partsOf('imp')).map((piece) => piece.text).join('')).toBe('␣import');
  });

  test('a part that names a column marks nothing elsewhere', () => {
    expect(marked('raised:def', 'def', 'peaks')).toEqual([]);
    expect(marked('raised:def', 'def', 'raised')).toEqual(['def']);
  });

  test('one character marks the token that is it, and a label where a word begins', () => {
    expect([marked('1', ' 1'), marked('1', '10')]).toEqual([['1'], []]);
    expect([marked('bra', 'opening brackets', 'label'), marked('rack', 'opening brackets', 'label')]).toEqual([['bra'], []]);
    expect(isIn(partsOf('label:open')[0]!, 'label', 'Opening brackets')).toBe(true);
  });
});

test('a cosine is that of the textbook', () => {
  expect(cosine(Int8Array.of(127, 0), Int8Array.of(127, 127))).toBeCloseTo(Math.SQRT1_2);
  expect(cosine(Int8Array.of(3, -4), Int8Array.of(-3, 4))).toBeCloseTo(-1);
  expect(cosine(Int8Array.of(0, 0), Int8Array.of(1, 1))).toBe(0);
});
