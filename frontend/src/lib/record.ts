/**
 * One latent becomes its record: an index gives the byte range, one range request brings a gzip member, the browser unpacks it.
 * Every way in which the files may disagree becomes a Problem that names the file.
 */
import { Problem } from './problem';
import { unpackRecord, type PackedRecord } from './packing';
import type { FeatureRecord } from './types';

const RECORD_VERSION = 3;
const REBUILD = 'Run `interp verify` on the bundle and materialize `feature_browser` again.';

export interface Span {
  start: number;
  stop: number;
}

/** Names the file that holds a latent, and its place in it. */
export function locate(latent: number, perFile: number): { file: string; place: number } {
  return { file: `records/${String(Math.floor(latent / perFile)).padStart(5, '0')}`, place: latent % perFile };
}

/** Read where record `place` lies from an index of little-endian u64 offsets. */
export function readSpan(index: ArrayBuffer, place: number, file: string): Span {
  const view = new DataView(index);
  if (index.byteLength % 8 !== 0 || (place + 2) * 8 > index.byteLength) {
    throw new Problem(`${file}.idx has ${index.byteLength} bytes, too few for record ${place}.`, REBUILD);
  }
  const start = Number(view.getBigUint64(place * 8, true));
  const stop = Number(view.getBigUint64(place * 8 + 8, true));
  if (stop <= start) throw new Problem(`${file}.idx says that record ${place} ends before it starts.`, REBUILD);
  return { start, stop };
}

/** Unpack and check one record; `order` are the token ids by rank. */
export async function decodeRecord(member: ArrayBuffer, latent: number, file: string, order: ArrayLike<number>): Promise<FeatureRecord> {
  let record: PackedRecord;
  try {
    const stream = new Blob([member]).stream().pipeThrough(new DecompressionStream('gzip'));
    record = JSON.parse(await new Response(stream).text()) as PackedRecord;
  } catch {
    throw new Problem(`The record of feature ${latent} in ${file}.bin is damaged or truncated.`, REBUILD);
  }
  if (typeof record !== 'object' || record === null || typeof record.version !== 'number') {
    throw new Problem(`What ${file}.bin holds for feature ${latent} is no feature record.`, REBUILD);
  }
  if (record.version !== RECORD_VERSION) {
    throw new Problem(
      `The record of feature ${latent} has version ${record.version}; these pages read version ${RECORD_VERSION}.`,
      record.version > RECORD_VERSION ? 'Upgrade interp-assets, then reload the page.' : 'Materialize `feature_records` and `feature_browser` again.',
    );
  }
  if (record.latent !== latent) {
    throw new Problem(`Index and records disagree: feature ${record.latent} lies where ${file}.idx says feature ${latent} is.`, REBUILD);
  }
  try {
    return unpackRecord(record, order);
  } catch (error) {
    throw new Problem(`The record of feature ${latent} in ${file}.bin cannot be read: ${(error as Error).message}.`, REBUILD);
  }
}
