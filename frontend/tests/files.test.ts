import { expect, test } from 'vitest';
import { markLatents, parseQuery, readRow } from '../src/lib/files';

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
