/**
 * Addresses of the pages of attention heads; as of features', the whole state:
 *
 *     #/<bundle>/heads?by=induction&and=previous&least=0.2                   all heads by a statistic, beside another, those of so much
 *     #/<bundle>/heads/5.3?range=0.2~0.4                                     one head, examples of a range of its score
 *     #/<bundle>/prompt/<id>?head=5.3&q=17&k=4&by=output&sink=hidden&side=key&scale=log&with=<id>
 *     #/<bundle>/live?text=...&logit=%20def&feature=l8:123&head=5.3&...        a text of one's own, and what adds to a token's logit or to a latent
 */
import type { Scale, Side, Sink } from './patterns';

export interface HeadRoute {
  bundle: string;
  page: 'map' | 'head' | 'prompt' | 'live';
  /** Of the page `head`, and of a focused prompt. */
  head: string;
  prompt: string;
  by: string;
  and: string;
  least: number | null;
  range: [number, number] | null;
  q: number | null;
  k: number | null;
  weight: string;
  sink: Sink;
  side: Side;
  scale: Scale;
  /** Whether every row is drawn up to its own largest. */
  perRow: boolean;
  beside: string;
  /** Of the page `live`: a text, a token whose logit is explained, and an SAE with its latent. */
  text: string;
  logit: string;
  feature: string;
}

const among = <T extends string>(text: string | null, known: readonly T[], otherwise: T): T => (known.includes(text as T) ? (text as T) : otherwise);
const whole = (text: string | null): number | null => (/^\d+$/.test(text ?? '') ? Number(text) : null);
const SINKS = ['shown', 'hidden', 'renormalised'] as const;
const SIDES = ['query', 'key'] as const;
const SCALES = ['sqrt', 'linear', 'log'] as const;

export function parseHeadRoute(hash: string): HeadRoute {
  const [path = '', query = ''] = hash.replace(/^#\/?/, '').split('?', 2);
  const [bundle = '', place = '', name = ''] = path.split('/').map(decodePart);
  const given = new URLSearchParams(query);
  const page = place === 'prompt' || place === 'live' ? place : name ? 'head' : 'map';
  const [low = Number.NaN, high = Number.NaN] = (given.get('range') ?? '').split('~').map(Number);
  const least = given.get('least');
  return {
    bundle,
    page,
    head: page === 'head' ? name : (given.get('head') ?? ''),
    prompt: page === 'prompt' ? name : '',
    by: given.get('by') ?? '',
    and: given.get('and') ?? '',
    least: least !== null && least !== '' && Number.isFinite(Number(least)) ? Number(least) : null,
    range: low < high ? [low, high] : null,
    q: whole(given.get('q')),
    k: whole(given.get('k')),
    weight: page === 'prompt' || page === 'live' ? given.get('by') || 'raw' : 'raw',
    sink: among(given.get('sink'), SINKS, 'shown'),
    side: among(given.get('side'), SIDES, 'query'),
    scale: among(given.get('scale'), SCALES, 'sqrt'),
    perRow: given.get('rows') === '1',
    beside: given.get('with') ?? '',
    text: given.get('text') ?? '',
    logit: given.get('logit') ?? '',
    feature: given.get('feature') ?? '',
  };
}

export function formatHeadRoute(route: Partial<HeadRoute> & { bundle: string; page: HeadRoute['page'] }): string {
  const query = new URLSearchParams();
  const put = (key: string, value: string | number | null | undefined, otherwise = ''): void => {
    if (value !== null && value !== undefined && String(value) !== otherwise) query.set(key, String(value));
  };
  if (route.page === 'map') {
    put('by', route.by);
    put('and', route.and);
    put('least', route.least);
  } else if (route.page === 'head') put('range', route.range?.join('~'));
  else {
    if (route.page === 'live') {
      put('text', route.text);
      put('logit', route.logit);
      put('feature', route.feature);
    }
    put('head', route.head);
    put('q', route.q);
    put('k', route.k);
    put('by', route.weight, 'raw');
    put('sink', route.sink, 'shown');
    put('side', route.side, 'query');
    put('scale', route.scale, 'sqrt');
    put('rows', route.perRow ? 1 : null);
    put('with', route.beside);
  }
  const place = { map: 'heads', head: `heads/${route.head}`, prompt: `prompt/${encodeURIComponent(route.prompt ?? '')}`, live: 'live' }[route.page];
  const text = query.toString();
  return `#/${encodeURIComponent(route.bundle)}/${place}${text ? `?${text}` : ''}`;
}

/** Go to another state of the page in the place of this one. What `location.replace` does with an address costs a millisecond or more each time. */
export function replaceHeadRoute(route: Parameters<typeof formatHeadRoute>[0]): void {
  history.replaceState(null, '', formatHeadRoute(route));
  dispatchEvent(new HashChangeEvent('hashchange'));
}

function decodePart(part: string): string {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
