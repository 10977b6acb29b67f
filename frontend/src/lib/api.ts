/**
 * Asks the server, or the files of a static host, and keeps what may be asked again: vocabularies, record indices and the latest records.
 * `site.json` tells which of the two it is: `interp serve` answers it, `interp export site` writes it.
 */
import { parseDoses, type DoseCurve } from './doses';
import { Problem, asProblem } from './problem';
import { StaticList } from './files';
import { decodeRecord, locate, readSpan } from './record';
import { listParameters, type ListState } from './route';
import { readAnswer, readLine, splitLines, type Line, type Tensor } from './steer';
import { readClusters, type Cluster } from './labels';
import { bytesOf, cosine, readPoints, readTiles, type Points, type Tile } from './map';
import type { Bundle, BundleSummary, FeaturePage, FeatureRecord, FeatureRow, Label, Notes, Place, ServedModel, ServedPoint, Site, Tried } from './types';
import { parseVocabulary, type Vocabulary } from './vocabulary';

const KEPT_RECORDS = 400;
const BUNDLE_VERSION = 3;

/** Remember promises by key; a failed one is forgotten, so that the next try asks again. */
export class Memory<T> {
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

export async function ask(path: string, init?: RequestInit): Promise<Response> {
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

export async function askJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  const response = await ask(path, signal ? { signal } : undefined);
  try {
    return (await response.json()) as T;
  } catch (error) {
    throw asProblem(error);
  }
}

const at = (name: string, rest: string): string => `api/bundles/${encodeURIComponent(name)}${rest}`;
export const fileOf = (name: string, file: string): string => `bundles/${encodeURIComponent(name)}/${file}`;

const sites = new Memory<Site>(1);
const staticLists = new Map<string, StaticList>();

/** What this address serves, and how. */
export function getSite(): Promise<Site> {
  return sites.get('', () => askJson<Site>('site.json'));
}

/** The list of a bundle on a host with files only; null where a server answers. */
async function staticList(name: string): Promise<StaticList | null> {
  if ((await getSite()).mode === 'server') return null;
  const found = staticLists.get(name) ?? new StaticList(await getBundle(name), (file) => ask(fileOf(name, file)), (file, start, stop) => readRange(fileOf(name, file), start, stop));
  staticLists.set(name, found);
  return found;
}

export async function listBundles(): Promise<BundleSummary[]> {
  return (await getSite()).bundles;
}

export async function listModels(): Promise<ServedModel[]> {
  if (!(await getSite()).models) throw new Problem('No models are served here.', 'Start `interp serve` with --model and the name of one.');
  return (await askJson<{ models: ServedModel[] }>('api/models')).models;
}

export async function listPoints(model: string): Promise<ServedPoint[]> {
  return (await askJson<{ points: ServedPoint[] }>(`api/models/${encodeURIComponent(model)}/points`)).points;
}

export const ofModel = (model: string, rest: string): string => `api/models/${encodeURIComponent(model)}${rest}`;
export const posting = (content: unknown, signal?: AbortSignal): RequestInit => ({ method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(content), ...(signal && { signal }) });

/** The token ids of a prompt, with those that the model begins a text with. */
export async function tokenize(model: string, text: string, signal: AbortSignal): Promise<number[]> {
  const { ids } = (await (await ask(ofModel(model, '/tokenize'), posting({ texts: [text] }, signal))).json()) as { ids: number[][] };
  return ids[0]!;
}

/** What a strength is in the units of raw activations. */
export async function getStrength(model: string, written: string, sae: string, latent: number, signal: AbortSignal): Promise<number> {
  const query = new URLSearchParams({ written, sae, latent: String(latent) });
  return (await askJson<{ strength: number }>(ofModel(model, `/strength?${query}`), signal)).strength;
}

/** Write texts; tokens come as they are drawn. */
export async function* writeTexts(model: string, plan: Record<string, unknown>, signal: AbortSignal): AsyncGenerator<Line> {
  const { body } = await ask(ofModel(model, '/generate'), posting(plan, signal));
  for await (const line of splitLines(body!)) yield readLine(line);
}

/** Run a plan that reads. */
export async function runPlan(model: string, plan: Record<string, unknown>, signal: AbortSignal): Promise<Map<string, Tensor>> {
  return readAnswer(await (await ask(ofModel(model, '/run'), posting(plan, signal))).arrayBuffer());
}

export function getBundle(name: string): Promise<Bundle> {
  return bundles.get(name, async () => {
    const site = await getSite();
    if (site.mode === 'server') return askJson<Bundle>(at(name, ''));
    const known = site.bundles.map((item) => item.name);
    if (!known.includes(name)) throw new Problem(`No bundle is called '${name}'. This site has ${known.length}: ${known.slice(0, 10).join(', ')}.`, 'Go back to the list of bundles.');
    return { ...checkBundle(await askJson<Bundle & { format?: string; version?: number }>(fileOf(name, 'bundle.json'))), name };
  });
}

/** Refuse what `interp serve` would refuse. */
function checkBundle<T extends { format?: string; version?: number }>(found: T): T {
  if (found.format === 'interp-assets/feature-bundle' && found.version === BUNDLE_VERSION) return found;
  const step = (found.version ?? 0) > BUNDLE_VERSION ? 'Upgrade interp-assets, and export the site again.' : 'Materialize `feature_browser` and export the site again.';
  throw new Problem(`bundle.json is '${found.format}' version ${found.version}; these pages read version ${BUNDLE_VERSION}.`, step);
}

/** Read bytes [start, stop) of a file. A host without ranges sends the whole file, which is cut here. */
export async function readRange(path: string, start: number, stop: number): Promise<ArrayBuffer> {
  // Not through the browser's cache: it lets only one request at a time touch an address, and lists ask for many ranges of one file.
  const response = await ask(path, { headers: { Range: `bytes=${start}-${stop - 1}` }, cache: 'no-store' });
  const body = await response.arrayBuffer();
  const part = response.status === 206 ? body : body.slice(start, stop);
  if (part.byteLength !== stop - start) {
    const file = path.split('/').slice(2).join('/');
    throw new Problem(`${file} ends early: ${stop - start} bytes from ${start} were asked for, ${part.byteLength} came.`, 'Run `interp verify` on the bundle and materialize `feature_browser` again.');
  }
  return part;
}

export async function getFeatures(name: string, state: ListState, offset: number, limit: number, signal?: AbortSignal): Promise<FeaturePage> {
  const files = await staticList(name);
  if (files) return files.page(state, offset, limit);
  const parameters = listParameters(state);
  parameters.set('offset', String(offset));
  parameters.set('limit', String(limit));
  return askJson<FeaturePage>(at(name, `/features?${parameters}`), signal);
}

export async function getPlace(name: string, state: ListState, latent: number): Promise<Place> {
  const files = await staticList(name);
  if (files) return files.place(state, latent);
  const parameters = listParameters(state);
  parameters.set('latent', String(latent));
  return askJson<Place>(at(name, `/place?${parameters}`));
}

/** Rows of some latents, by latent: what the lists of neighbours show beside the numbers. */
export async function getRows(name: string, latents: number[]): Promise<Map<number, FeatureRow>> {
  if (!latents.length) return new Map();
  const files = await staticList(name);
  if (files) return new Map((await files.rows(latents)).map((row) => [row.latent, row]));
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

/** Ask for a record that will probably be wanted next; what is wrong with it is told when it is opened. */
export function prefetchRecord(bundle: Bundle, latent: number): void {
  getRecord(bundle, latent).catch(() => undefined);
}

async function fetchRecord(bundle: Bundle, latent: number): Promise<FeatureRecord> {
  const stored = bundle.records.repeat ? latent % bundle.records.repeat : latent; // invented bundles repeat their records
  const { file, place } = locate(stored, bundle.records.per_file);
  const path = fileOf(bundle.name, file);
  const index = await indices.get(path, async () => (await ask(`${path}.idx`)).arrayBuffer());
  const { start, stop } = readSpan(index, place, file);
  const [member, { order }] = await Promise.all([readRange(`${path}.bin`, start, stop), getVocabulary(bundle.name)]);
  return { ...(await decodeRecord(member, stored, file, order)), latent };
}

/** What was imported about a feature. A static host has none. */
export async function getLabels(name: string, latent: number): Promise<Label[]> {
  if ((await getSite()).mode === 'static' || !(await getBundle(name)).columns.labels) return [];
  return (await askJson<{ labels: Label[] }>(at(name, `/labels?latent=${latent}`))).labels;
}

export async function getNotes(name: string): Promise<Notes> {
  const site = await getSite();
  if (site.mode === 'static' || !site.notes) return { file: null, lists: {}, notes: {} };
  return askJson<Notes>(at(name, '/notes'));
}

export async function putNote(name: string, latent: number, note: string, lists: string[]): Promise<Notes> {
  const body = JSON.stringify({ note, lists });
  const response = await ask(at(name, `/notes/${latent}`), { method: 'PUT', headers: { 'Content-Type': 'application/json' }, body, keepalive: true });
  return (await response.json()) as Notes;
}

/** Run a text through model and SAE, on the server; of `latent` it is told how it fires, however weakly. */
export async function tryText(name: string, text: string, latent: number | null): Promise<Tried> {
  const site = await getSite();
  if (site.mode === 'static') throw new Problem('Search by example needs a server: this site is files only.', 'Open the bundle with `interp serve` beside its pipeline.');
  return askJson<Tried>(at(name, `/try?${new URLSearchParams(latent === null ? { text } : { text, latent: String(latent) })}`));
}

/** The decoder row of a feature, up to its length. */
async function getDirection(bundle: Bundle, latent: number): Promise<Int8Array> {
  const width = bundle.directions!.width;
  return new Int8Array(await readRange(fileOf(bundle.name, 'map/directions.bin'), latent * width, (latent + 1) * width));
}

/** The cosine of two decoder rows; null where a bundle holds none, or where they are directions of different spaces. */
export async function getCosine(a: Bundle, i: number, b: Bundle, j: number): Promise<number | null> {
  const isOneSpace = a.hook_point === b.hook_point && a.model.fingerprint === b.model.fingerprint && a.directions?.width === b.directions?.width;
  if (!a.directions || !b.directions || !isOneSpace) return null;
  return cosine(...(await Promise.all([getDirection(a, i), getDirection(b, j)])));
}

/** What steering by a feature did, as its pipeline swept it; none where it was not. */
export async function getDoses(bundle: Bundle, latent: number): Promise<DoseCurve[]> {
  if (!bundle.doses?.latents.includes(latent)) return [];
  return parseDoses(await askJson(fileOf(bundle.name, `doses/${latent}.json`)), latent);
}

const tileLists = new Memory<Tile[]>(4);
const tilePoints = new Memory<Points>(1024);
const clusterLists = new Memory<Cluster[]>(4);

export function getTiles(name: string): Promise<Tile[]> {
  return tileLists.get(name, async () => readTiles(await (await ask(fileOf(name, 'map/tiles.idx'))).arrayBuffer()));
}

/** Names of the map's clusters; none in a bundle of an earlier release. */
export function getClusters(bundle: Bundle): Promise<Cluster[]> {
  return clusterLists.get(bundle.name, async () => (bundle.map?.n_clusters ? readClusters(await askJson(fileOf(bundle.name, 'map/clusters.json'))) : []));
}

export function getPoints(name: string, tile: Tile): Promise<Points> {
  const { start, stop } = bytesOf(tile);
  return tilePoints.get(`${name}/${start}`, async () => readPoints(await readRange(fileOf(name, 'map/tiles.bin'), start, stop)));
}
