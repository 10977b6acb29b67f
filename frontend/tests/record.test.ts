import { describe, expect, test } from 'vitest';
import golden from '../../tests/golden/packed_record.json';
import { decodeDecimals, decodeNumbers } from '../src/lib/digits';
import type { FeatureRecord } from '../src/lib/types';
import { decodeRecord, locate, readSpan } from '../src/lib/record';

const pack = (value: unknown): Promise<ArrayBuffer> =>
  new Response(new Blob([JSON.stringify(value)]).stream().pipeThrough(new CompressionStream('gzip'))).arrayBuffer();
const index = (...offsets: number[]): ArrayBuffer => new BigUint64Array(offsets.map(BigInt)).buffer as ArrayBuffer;

describe('where a record lies', () => {
  test('a file holds a fixed number of latents', () => {
    expect(locate(4095, 4096)).toEqual({ file: 'records/00000', place: 4095 });
    expect(locate(4096, 4096)).toEqual({ file: 'records/00001', place: 0 });
    expect(locate(9_999_999, 4096)).toEqual({ file: 'records/02441', place: 1663 });
  });

  test('the index gives the range', () => expect(readSpan(index(0, 10, 25), 1, 'records/00000')).toEqual({ start: 10, stop: 25 }));

  test('offsets beyond 32 bits are read whole', () => {
    expect(readSpan(index(2 ** 40, 2 ** 40 + 7), 0, 'records/00000')).toEqual({ start: 2 ** 40, stop: 2 ** 40 + 7 });
  });

  test('a short or falling index is named', () => {
    expect(() => readSpan(index(0, 10), 1, 'records/00007')).toThrow('records/00007.idx has 16 bytes');
    expect(() => readSpan(index(10, 10), 0, 'records/00007')).toThrow('ends before it starts');
  });
});

describe('what a record holds', () => {
  const { order, packed, record } = golden;
  const open = async (change: object, latent = 7): Promise<unknown> => decodeRecord(await pack({ ...packed, ...change }), latent, 'records/00000', order);

  test('a packed record becomes the record that Python packed', async () => {
    await expect(open({})).resolves.toEqual(record);
  });

  test('a truncated member is an error that names the file', async () => {
    const member = await pack({ ...packed, text: 'x'.repeat(1000) });
    await expect(decodeRecord(member.slice(0, -9), 7, 'records/00003', order)).rejects.toThrow('records/00003.bin is damaged or truncated');
  });

  test("another latent's record is an error, not a page of the wrong feature", async () => {
    await expect(open({}, 8)).rejects.toThrow('Index and records disagree');
  });

  test('a newer and an older record are refused, each with its own next step', async () => {
    await expect(open({ version: 4 })).rejects.toMatchObject({ what: expect.stringContaining('version 4'), todo: expect.stringContaining('Upgrade') });
    await expect(open({ version: 2 })).rejects.toMatchObject({ what: expect.stringContaining('version 2'), todo: expect.stringContaining('Materialize') });
  });

  test('columns that disagree are refused', async () => {
    const { windows, lists } = packed;
    for (const change of [
      { windows: { ...windows, tokens: '|'.repeat(windows.tokens.length) } },
      { windows: { ...windows, document: '$$%' } },
      { windows: { ...windows, masked: [[0]] } },
      { neighbours: [packed.neighbours[0], [0.5]] },
      { coactivations: [[33, 12], [0.5, 0.21], [3, 2, 1]] },
      { logits: { ...packed.logits, top: [[7], [3.21, 2.5]] } },
      { lists: { ...lists, top: 'z' } },
      { windows: undefined },
    ]) {
      await expect(open(change), JSON.stringify(change)).rejects.toThrow('cannot be read');
    }
  });

  const columns = Object.entries(packed.windows).filter((entry): entry is [string, string] => typeof entry[1] === 'string');
  test.each(columns)('column %s, too short or too long, is refused', async (name, column) => {
    expect(columns).toHaveLength(11);
    for (const other of [column.slice(0, -1), column + '#']) {
      await expect(open({ windows: { ...packed.windows, [name]: other } }), other).rejects.toThrow('cannot be read');
    }
  });

  test('roles come back as Python packed them, and damaged ones are refused', async () => {
    const { packed: roles, record: runs } = golden.roles;
    const found = (await open({ windows: { ...packed.windows, roles } })) as FeatureRecord;
    const windows = [...found.examples.top, ...found.examples.intervals.flatMap(({ examples }) => examples)];
    expect(new Map(windows.map(({ row, roles }) => [row.join(), roles]))).toEqual(new Map(runs.map(([row, spoken]) => [row!.join(), spoken])));
    for (const change of [{ runs: '%$' }, { gap: '#$##%' }, { name: '#$%$#' }, { name: '#$%$#&' }]) {
      await expect(open({ windows: { ...packed.windows, roles: { ...roles, ...change } } }), JSON.stringify(change)).rejects.toThrow('cannot be read');
    }
  });

  test('JSON that is no record is refused', async () => {
    await expect(decodeRecord(await pack(['what']), 7, 'records/00000', order)).rejects.toThrow('no feature record');
  });
});

describe('columns of numbers', () => {
  test('borders between one, two, three, four and eight characters', () => {
    expect(decodeNumbers('#RS#w~x##|~~}###}~~~~#######')).toEqual([0, 47, 48, 3323, 3324, 44728, 44729, 798299, 798300]);
  });

  test('a number that is cut off and a foreign character are errors', () => {
    for (const text of ['T', '{#', '}##', '~######', 'a\\', 'é', ' #', '\x7f']) expect(() => decodeNumbers(text), text).toThrow(RangeError);
  });

  test('decimals keep their digits', () => expect(decodeDecimals('#S#', 1, 3)).toEqual([99.9, 95.1]));
});
