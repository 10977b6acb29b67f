/** Asks the server, and keeps what may be asked again: vocabularies, record indices and the latest records. */
import { Problem, asProblem } from './problem';
import { decodeRecord, locate, readSpan } from './record';
import { listParameters, type ListState } from './route';
import type { Bundle, BundleSummary, FeaturePage, FeatureRecord, FeatureRow, Place } from './types';
import { parseVocabulary, type Vocabulary } from './vocabulary';

const KEPT_RECORDS = 400;

/** Remember promises by key; a failed one is forgotten, so that the next try asks again. */
class Memory<T> {
  private readonly kept = new Map<string, Promise<T>>();
  constructor(private readonly limit: number) {}

  get(key: string, make: () => Promise<T>): Promise<T> {
    const found = this.kept.get(key);
    if (found) return found;
    const made = make();
    this.kept.set(key, made);
    made.catch(() => this.kept.delete(key));
    const oldest = this.kept.keys().next().value;
    if (this.kept.size > this.limit && oldest !== undefined) this.kept.delete(oldest);
    return made;
  }
}

const bundles = new Memory<Bundle>(16);
const vocabularies = new Memory<Vocabulary>(4);
const indices = new Memory<ArrayBuffer>(256);
const records = new Memory<FeatureRecord>(KEPT_RECORDS);

async function ask(path: string, init?: RequestInit): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error instanceof DOMException && error.name === 'AbortError') throw error;
    throw new Problem('The server does not answer.', 'Is `interp serve` still running? Start it again, then reload the page.');
  }
  if (response.ok) return response;
  let problem = new Problem(`The server answered ${response.status} for ${path}.`, 'Check the address, or look at the terminal of `interp serve`.', response.status);
  try {
    const { error } = (await response.json()) as { error: { what: string; do: string } };
    problem = new Problem(error.what, error.do, response.status);
  } catch {
    // Not our JSON: a proxy's page, say. The status is all there is to tell.
  }
  throw problem;
}

async function askJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await ask(path, signal ? { signal } : undefined);
  try {
    return (await response.json()) as T;
  } catch (error) {
    throw asProblem(error);
  }
}

const at = (name: string, rest: string): string => `api/bundles/${encodeURIComponent(name)}${rest}`;
const fileOf = (name: string, file: string): string => `bundles/${encodeURIComponent(name)}/${file}`;

export async function listBundles(): Promise<BundleSummary[]> {
  return (await askJson<{ bundles: BundleSummary[] }>('api/bundles')).bundles;
}

export function getBundle(name: string): Promise<Bundle> {
  return bundles.get(name, () => askJson<Bundle>(at(name, '')));
}

export function getFeatures(name: string, state: ListState, offset: number, limit: number, signal?: AbortSignal): Promise<FeaturePage> {
  const parameters = listParameters(state);
  parameters.set('offset', String(offset));
  parameters.set('limit', String(limit));
  return askJson<FeaturePage>(at(name, `/features?${parameters}`), signal);
}

export function getPlace(name: string, state: ListState, latent: number): Promise<Place> {
  const parameters = listParameters(state);
  parameters.set('latent', String(latent));
  return askJson<Place>(at(name, `/place?${parameters}`));
}

/** Rows of some latents, by latent: what the lists of neighbours show beside the numbers. */
export async function getRows(name: string, latents: number[]): Promise<Map<number, FeatureRow>> {
  if (!latents.length) return new Map();
  const parameters = new URLSearchParams(latents.map((latent) => ['latent', String(latent)]));
  const { rows } = await askJson<{ rows: FeatureRow[] }>(at(name, `/rows?${parameters}`));
  return new Map(rows.map((row) => [row.latent, row]));
}

export function getVocabulary(name: string): Promise<Vocabulary> {
  return vocabularies.get(name, async () => parseVocabulary(await askJson(fileOf(name, 'vocabulary.json'))));
}

/** Open one feature: its file's index (kept), then exactly one range request. */
export function getRecord(bundle: Bundle, latent: number): Promise<FeatureRecord> {
  if (Number.isNaN(latent)) {
    return Promise.reject(new Problem('The address names no feature: a number should stand there.', 'Go back to the list, or correct the address.'));
  }
  if (!Number.isInteger(latent) || latent < 0 || latent >= bundle.d_sae) {
    const what = `There is no feature ${latent}: this SAE has ${bundle.d_sae.toLocaleString('en')} latents, from 0.`;
    return Promise.reject(new Problem(what, 'Go back to the list, or correct the number in the address.'));
  }
  return records.get(`${bundle.name}/${latent}`, () => fetchRecord(bundle, latent));
}

async function fetchRecord(bundle: Bundle, latent: number): Promise<FeatureRecord> {
  const stored = bundle.records.repeat ? latent % bundle.records.repeat : latent; // invented bundles repeat their records
  const { file, place } = locate(stored, bundle.records.per_file);
  const path = fileOf(bundle.name, file);
  const index = await indices.get(path, async () => (await ask(`${path}.idx`)).arrayBuffer());
  const { start, stop } = readSpan(index, place, file);
  // Not through the browser's cache: it lets only one request at a time touch an address, and rows of a list ask for many ranges of one file.
  const response = await ask(`${path}.bin`, { headers: { Range: `bytes=${start}-${stop - 1}` }, cache: 'no-store' });
  const body = await response.arrayBuffer();
  const member = response.status === 206 ? body : body.slice(start, stop); // a host without ranges sends it all
  if (member.byteLength !== stop - start) {
    const what = `${file}.bin ends early: ${stop - start} bytes of feature ${latent} were asked for, ${member.byteLength} came.`;
    throw new Problem(what, 'Run `interp verify` on the bundle and materialize `feature_browser` again.');
  }
  return { ...(await decodeRecord(member, stored, file)), latent };
}
