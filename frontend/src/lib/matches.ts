/** A query becomes what of a feature matched it: the same rule as the index's (`files.ts`, `interp_assets/web/search.py`), for marking. */
import { parseQuery } from './files';
import { visibleAlone } from './vocabulary';

export type Where = 'peaks' | 'raised' | 'lowered' | 'label';

export interface Part {
  /** Empty: anywhere. */
  column: string;
  /** Lower case. */
  text: string;
}

export const partsOf = (query: string): Part[] => parseQuery(query, true).map(([column, text]) => ({ column, text: text.toLowerCase() }));

/** Say whether a part is found in a token of one kind of evidence, or in a label: there at the beginning of a word. */
export function isIn(part: Part, where: Where, text: string): boolean {
  if (part.column !== '' && part.column !== where) return false;
  const folded = text.toLowerCase();
  if (where === 'label') return findInLabel(part, folded) >= 0;
  return /^[a-z0-9]$/.test(part.text) ? folded.trim() === part.text : folded.includes(part.text);
}

/** What is drawn of a token or a label, cut into pieces; those that matched are marked. */
export function cut(text: string, where: Where, parts: Part[]): { text: string; isMarked: boolean }[] {
  const shown = where === 'label' ? text : visibleAlone(text);
  const found = parts.filter((part) => isIn(part, where, text));
  if (!found.length) return [{ text: shown, isMarked: false }];
  const folded = shown.toLowerCase();
  const spans = found.map((part): [number, number] => {
    const start = where === 'label' ? findInLabel(part, folded) : folded.indexOf(visibleAlone(part.text));
    const inner = start < 0 ? folded.indexOf(part.text) : start;
    const length = start < 0 || where === 'label' ? part.text.length : visibleAlone(part.text).length;
    return inner < 0 || folded.length !== shown.length ? [0, shown.length] : [inner, inner + length];
  });
  const pieces: { text: string; isMarked: boolean }[] = [];
  for (let at = 0; at < shown.length; ) {
    const inside = (place: number): boolean => spans.some(([start, stop]) => place >= start && place < stop);
    let stop = at + 1;
    while (stop < shown.length && inside(stop) === inside(at)) stop++;
    pieces.push({ text: shown.slice(at, stop), isMarked: inside(at) });
    at = stop;
  }
  return pieces;
}

function findInLabel(part: Part, folded: string): number {
  const text = part.text.trim();
  for (let at = folded.indexOf(text); at >= 0 && text; at = folded.indexOf(text, at + 1)) {
    if (at === 0 || !/[\p{L}\p{N}]/u.test(folded[at - 1]!)) return at;
  }
  return -1;
}
