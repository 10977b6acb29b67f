/**
 * The part of the address after `#` is the whole state of the page, so a copied address shows the same thing:
 *
 *     #/<bundle>?sort=max&desc=1&life=all&filter=max>=3&q=import&at=17     list
 *     #/<bundle>/<latent>?...the list it was opened from...&view=full&range=2~2.5   feature
 *     #/<bundle>/<latent>/with/<bundle>/<latent>                                    two features side by side
 *     #/<bundle>/map, #/<bundle>/try                                                map of decoder directions, search by example
 */
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
  list: ListState;
  /** Feature to bring into view in the list. */
  at: number | null;
  /** Whole windows with their line breaks, instead of one line each. */
  isFull: boolean;
  /** Only examples with an activation in [low, high): a bar of the histogram. */
  range: [number, number] | null;
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
    bundle: bundle || null,
    latent: latent === '' ? null : /^\d+$/.test(latent) ? Number(latent) : Number.NaN,
    other: mark === 'with' && otherBundle && /^\d+$/.test(otherLatent) ? { bundle: otherBundle, latent: Number(otherLatent) } : null,
    view,
    list: {
      sort: given.get('sort') ?? DEFAULT_LIST.sort,
      isDescending: given.get('desc') === '1',
      life: life === 'all' || life === 'dead' ? life : DEFAULT_LIST.life,
      filters: given.getAll('filter'),
      text: given.get('q') ?? '',
      list: given.get('list') ?? '',
    },
    at: /^\d+$/.test(given.get('at') ?? '') ? Number(given.get('at')) : null,
    isFull: given.get('view') === 'full',
    range: parseRange(given.get('range')),
  };
}

export function formatRoute(route: { bundle: string; latent?: number | null; list?: ListState; at?: number | null; isFull?: boolean; range?: [number, number] | null; other?: { bundle: string; latent: number } | null; view?: 'map' | 'try' | null }): string {
  const list = route.list ?? DEFAULT_LIST;
  const query = new URLSearchParams();
  if (list.sort !== DEFAULT_LIST.sort) query.set('sort', list.sort);
  if (list.isDescending) query.set('desc', '1');
  if (list.life !== DEFAULT_LIST.life) query.set('life', list.life);
  for (const filter of list.filters) query.append('filter', filter);
  if (list.text) query.set('q', list.text);
  if (list.list) query.set('list', list.list);
  if (route.at != null) query.set('at', String(route.at));
  if (route.isFull) query.set('view', 'full');
  if (route.range) query.set('range', route.range.join('~'));
  const beside = route.other ? `/with/${encodeURIComponent(route.other.bundle)}/${route.other.latent}` : '';
  const place = route.view ?? (route.latent == null ? null : `${route.latent}${beside}`);
  const path = `#/${encodeURIComponent(route.bundle)}${place === null ? '' : `/${place}`}`;
  const text = query.toString();
  return text ? `${path}?${text}` : path;
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
  const kept = filters.filter((filter) => !new RegExp(`^${column}[<>]`).test(filter));
  if (low !== null) kept.push(`${column}>=${low}`);
  if (high !== null) kept.push(`${column}<=${high}`);
  return kept;
}

/** Read the bounds of one column from the filters. */
export function boundsOf(filters: string[], column: string): { low: number | null; high: number | null } {
  const bound = (relation: string): number | null => {
    const found = filters.find((filter) => filter.startsWith(`${column}${relation}`));
    const value = Number(found?.slice(column.length + relation.length));
    return found === undefined || !Number.isFinite(value) ? null : value;
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
