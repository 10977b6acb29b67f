import { describe, expect, test } from 'vitest';
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
  test('a member is unpacked', async () => {
    await expect(decodeRecord(await pack({ version: 1, latent: 7 }), 7, 'records/00000')).resolves.toMatchObject({ latent: 7 });
  });

  test('a truncated member is an error that names the file', async () => {
    const member = await pack({ version: 1, latent: 7, text: 'x'.repeat(1000) });
    await expect(decodeRecord(member.slice(0, -9), 7, 'records/00003')).rejects.toThrow('records/00003.bin is damaged or truncated');
  });

  test("another latent's record is an error, not a page of the wrong feature", async () => {
    await expect(decodeRecord(await pack({ version: 1, latent: 8 }), 7, 'records/00000')).rejects.toThrow('Index and records disagree');
  });

  test('a newer record is refused', async () => {
    await expect(decodeRecord(await pack({ version: 2, latent: 7 }), 7, 'records/00000')).rejects.toThrow('version 2');
  });

  test('JSON that is no record is refused', async () => {
    await expect(decodeRecord(await pack(['what']), 7, 'records/00000')).rejects.toThrow('no feature record');
  });
});
