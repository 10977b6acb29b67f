/**
 * The part of the address after `#` is the whole state of the page, so a copied address shows the same thing:
 *
 *     #/<bundle>?sort=max&desc=1&life=all&filter=max>=3&q=import&at=17     list
 *     #/<bundle>/<latent>?...the list it was opened from...&view=full&range=2~2.5   feature
 *     #/<bundle>/<latent>/with/<bundle>/<latent>                                    two features side by side
 *     #/<bundle>/map?at=17, #/<bundle>/try?at=17                                    map of decoder directions, search by example, for one feature
 *     #/models                                                                      the models that this server has for notebooks
 *     #/sweep/<pipeline>                                                            its SAEs beside each other (`sweep.ts`)
 *
 * A feature that is steered has `&steer=<latent>:<strength>,...&prompt=...` besides: see `steer.ts`.
 */
import { parseSteering, writeSteering, type Steering } from './steer';

/** A search is sorted so unless somebody chooses otherwise: the best match first. */
export const RELEVANCE = 'relevance';

export interface ListState {
  sort: string;
  isDescending: boolean;
  life: 'all' | 'live' | 'dead';
  filters: string[];
  text: string;
  /** Name of a person's own list; empty for all features. */
  list: string;
}

export interface Route {
  bundle: string | null;
  latent: number | null;
  /** The feature beside it. */
  other: { bundle: string; latent: number } | null;
  view: 'map' | 'try' | null;
  /** The models for notebooks, instead of a bundle. */
  isModels: boolean;
  list: ListState;
  /** Feature to bring into view: in the list, on the map, over a text. */
  at: number | null;
  /** Whole windows with their line breaks, instead of one line each. */
  isFull: boolean;
  /** Only examples with an activation in [low, high): a bar of the histogram. */
  range: [number, number] | null;
  /** What the panel "Steer" shows; null where it is closed. */
  steering: Steering | null;
}

export const DEFAULT_LIST: ListState = { sort: 'latent', isDescending: false, life: 'live', filters: [], text: '', list: '' };

export function parseRoute(hash: string): Route {
  const [path = '', query = ''] = hash.replace(/^#\/?/, '').split('?', 2);
  const [bundle = '', place = '', mark = '', otherBundle = '', otherLatent = ''] = path.split('/').map(decodePart);
  const view = place === 'map' || place === 'try' ? place : null;
  const latent = view ? '' : place;
  const given = new URLSearchParams(query);
  const life = given.get('life');
  return {
    bundle: bundle && path !== 'models' && bundle !== 'sweep' ? bundle : null,
    isModels: path === 'models',
    latent: latent === '' ? null : /^\d+$/.test(latent) ? Number(latent) : Number.NaN,
    other: mark === 'with' && otherBundle && /^\d+$/.test(otherLatent) ? { bundle: otherBundle, latent: Number(otherLatent) } : null,
    view,
    list: {
      sort: given.get('sort') ?? defaultSort(given.get('q') ?? ''),
      isDescending: given.get('desc') === '1',
      life: life === 'all' || life === 'dead' ? life : DEFAULT_LIST.life,
      filters: given.getAll('filter'),
      text: given.get('q') ?? '',
      list: given.get('list') ?? '',
    },
    at: /^\d+$/.test(given.get('at') ?? '') ? Number(given.get('at')) : null,
    isFull: given.get('view') === 'full',
    range: parseRange(given.get('range')),
    steering: parseSteering(given),
  };
}

export function formatRoute(route: { bundle: string; latent?: number | null; list?: ListState; at?: number | null; isFull?: boolean; range?: [number, number] | null; other?: { bundle: string; latent: number } | null; view?: 'map' | 'try' | null; steering?: Steering | null }): string {
  const list = route.list ?? DEFAULT_LIST;
  const query = new URLSearchParams();
  if (list.sort !== defaultSort(list.text)) query.set('sort', list.sort);
  if (list.isDescending) query.set('desc', '1');
  if (list.life !== DEFAULT_LIST.life) query.set('life', list.life);
  for (const filter of list.filters) query.append('filter', filter);
  if (list.text) query.set('q', list.text);
  if (list.list) query.set('list', list.list);
  if (route.at != null) query.set('at', String(route.at));
  if (route.isFull) query.set('view', 'full');
  if (route.range) query.set('range', route.range.join('~'));
  if (route.steering) writeSteering(query, route.steering);
  const beside = route.other ? `/with/${encodeURIComponent(route.other.bundle)}/${route.other.latent}` : '';
  const place = route.view ?? (route.latent == null ? null : `${route.latent}${beside}`);
  const path = `#/${encodeURIComponent(route.bundle)}${place === null ? '' : `/${place}`}`;
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/** What a list is sorted by when nobody has chosen. */
export const defaultSort = (text: string): string => (text.trim() ? RELEVANCE : DEFAULT_LIST.sort);

/** The same list with another query; an order that nobody has chosen follows it. */
export function withText(list: ListState, text: string): ListState {
  const isChosen = list.sort !== defaultSort(list.text) || list.isDescending;
  return isChosen && list.sort !== RELEVANCE ? { ...list, text } : { ...list, text, sort: defaultSort(text), isDescending: false };
}

/** The same list, as the server's query. */
export function listParameters(list: ListState): URLSearchParams {
  const query = new URLSearchParams({ sort: list.sort, life: list.life });
  if (list.isDescending) query.set('descending', 'true');
  for (const filter of list.filters) query.append('filter', filter);
  if (list.text.trim()) query.set('q', list.text.trim());
  if (list.list) query.set('list', list.list);
  return query;
}

/** Replace the bounds of one column among the filters; null means no bound. */
export function withBounds(filters: string[], column: string, low: number | null, high: number | null): string[] {
  const kept = filters.filter((filter) => !new RegExp(`^${column}\\s*[<>]`).test(filter));
  if (low !== null) kept.push(`${column}>=${low}`);
  if (high !== null) kept.push(`${column}<=${high}`);
  return kept;
}

/** Read a bound as people write it: 0.005, 5e-3, 1,000 and, of a share, 0.5 %. Null where it is none. */
export function parseBound(text: string, isShare: boolean): number | null {
  const found = /^([-+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?|[-+]?\d[\d,]*\.)\s*(%?)$/i.exec(text.trim().replaceAll('−', '-'));
  if (!found || (found[2] && !isShare)) return null;
  const value = Number(found[1]!.replaceAll(',', ''));
  return Number.isFinite(value) ? (found[2] ? Number((value / 100).toPrecision(12)) : value) : null;
}

/** Read the bounds of one column from the filters. */
export function boundsOf(filters: string[], column: string): { low: number | null; high: number | null } {
  const bound = (relation: string): number | null => {
    const found = filters.map((filter) => new RegExp(`^${column}\\s*${relation}(.*)$`).exec(filter)).find((match) => match);
    return found ? parseBound(found[1]!, true) : null;
  };
  return { low: bound('>='), high: bound('<=') };
}

function parseRange(text: string | null): [number, number] | null {
  const [low = Number.NaN, high = Number.NaN] = (text ?? '').split('~').map((part) => Number.parseFloat(part));
  return Number.isFinite(low) && Number.isFinite(high) && low < high ? [low, high] : null;
}

function decodePart(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
