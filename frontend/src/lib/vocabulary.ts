/**
 * Token ids become what is drawn. Three things make this more than a lookup: a character may be split over tokens (they are joined again),
 * white space must be seen, and control characters must not act.
 */
import { Problem } from './problem';
import type { Window } from './types';

const VOCABULARY_VERSION = 2;
const LONGEST_CHARACTER = 4;

export interface Vocabulary {
  tokens: string[];
  raw: Map<number, Uint8Array>;
  special: Set<number>;
  /** Token ids by falling frequency in the data set: records name tokens by their place here. */
  order: number[];
}

/** What is drawn as one piece: usually one token, several when they share a character. */
export interface Unit {
  text: string;
  /** Places in the window of the tokens that it stands for. */
  places: number[];
  /** Largest latent activation of its tokens. */
  value: number;
  isPeak: boolean;
  isMasked: boolean;
  /** Of a special token that begins or ends a text: it is drawn as a mark, and this says what it stands for. */
  edge: string;
  /** Whose words begin with it, in messages; empty where the same goes on, or where the chat template writes. */
  role: string;
  /** What the chat template writes. */
  isTemplate: boolean;
}

/** Role of what the chat template writes itself. */
export const TEMPLATE = 'template';

export function parseVocabulary(content: unknown): Vocabulary {
  const file = content as { format?: string; version?: number; tokens?: string[]; bytes?: Record<string, string>; special?: number[]; order?: number[] };
  if (file?.format !== 'interp-assets/vocabulary' || !Array.isArray(file.tokens)) {
    throw new Problem('vocabulary.json is no vocabulary.', 'Materialize `feature_browser` again.');
  }
  if (file.version !== VOCABULARY_VERSION || !Array.isArray(file.order)) {
    const step = (file.version ?? 0) > VOCABULARY_VERSION ? 'Upgrade interp-assets.' : 'Materialize `feature_browser` again.';
    throw new Problem(`vocabulary.json has version ${file.version}; these pages read version ${VOCABULARY_VERSION}.`, step);
  }
  const raw = new Map(Object.entries(file.bytes ?? {}).map(([id, hex]) => [Number(id), fromHex(hex)]));
  return { tokens: file.tokens, raw, special: new Set(file.special ?? []), order: file.order };
}

export function fromHex(hex: string): Uint8Array {
  return Uint8Array.from({ length: hex.length / 2 }, (_, i) => Number.parseInt(hex.slice(2 * i, 2 * i + 2), 16));
}

/** The text of a token on its own: its number when there is no such id, its bytes when it is no whole character. */
export function tokenText(vocabulary: Vocabulary, id: number): string {
  const raw = vocabulary.raw.get(id);
  if (raw) return Array.from(raw, (byte) => `\\x${byte.toString(16).padStart(2, '0')}`).join('');
  return vocabulary.tokens[id] ?? `⟨${id}⟩`;
}

/** Cut a window into units, joining tokens that only together are a character. */
export function makeUnits(window: Window, vocabulary: Vocabulary): Unit[] {
  const values = new Map(window.activations);
  const masked = new Set(window.masked);
  const units: Unit[] = [];
  const roles = window.roles ?? [];
  let [place, run] = [0, -1];
  while (place < window.tokens.length) {
    const { text, length } = joinAt(window.tokens, place, vocabulary);
    const places = Array.from({ length }, (_, i) => place + i);
    const before = run;
    while (roles[run + 1] && roles[run + 1]![0] < place + length) run++;
    const isTemplate = roles[run]?.[1] === TEMPLATE;
    units.push({
      text,
      places,
      value: Math.max(...places.map((i) => values.get(i) ?? 0)),
      isPeak: places.includes(window.peak),
      isMasked: places.every((i) => masked.has(i)),
      edge: '',
      role: run > before && !isTemplate ? roles[run]![1] : '',
      isTemplate,
    });
    place += length;
  }
  const isEdge = (unit: Unit | undefined): unit is Unit => unit !== undefined && !unit.isPeak && unit.value === 0 && vocabulary.special.has(window.tokens[unit.places[0]!]!);
  const [first, last] = [units[0], units.at(-1)];
  if (isEdge(first)) first.edge = `start of the ${window.position === window.peak ? 'context' : 'document'}`;
  if (last !== first && isEdge(last)) last.edge = 'end of the document';
  return units;
}

/** Whose words a place of a window is of, in messages. */
export function roleAt(window: Window, place: number): string {
  return window.roles?.findLast(([begin]) => begin <= place)?.[1] ?? '';
}

function joinAt(tokens: number[], place: number, vocabulary: Vocabulary): { text: string; length: number } {
  const bytes: number[] = [];
  for (let length = 1; length <= LONGEST_CHARACTER && place + length <= tokens.length; length++) {
    const raw = vocabulary.raw.get(tokens[place + length - 1]!);
    if (!raw) break;
    bytes.push(...raw);
    const text = decodeStrictly(Uint8Array.from(bytes));
    if (text !== null) return { text, length };
  }
  return { text: tokenText(vocabulary, tokens[place]!), length: 1 };
}

function decodeStrictly(bytes: Uint8Array<ArrayBuffer>): string | null {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return null;
  }
}

// Control, format and bidirectional-override characters, and lone surrogates: shown by number, so that they cannot act.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]/gu;
const byNumber = (char: string): string => `⟨${char.codePointAt(0)!.toString(16).toUpperCase().padStart(4, '0')}⟩`;

/** Make a token's text visible inside running text: new lines and tabs get a sign, spaces stay. */
export function visible(text: string): string {
  return text.replace(/\r\n|\r|\n/g, '↵').replaceAll('\t', '⇥').replace(INVISIBLE, byNumber);
}

/** Inside one line, indentation takes two columns, however deep it is; the whole window shows it as it is. */
export function visibleInLine(text: string): string {
  return visible(text).replace(/ {3,}/g, '  ');
}

/** Make a token's text visible on its own (chips, tooltips): leading and trailing spaces get a sign, too. */
export function visibleAlone(text: string): string {
  if (text === '') return '∅';
  return visible(text).replace(/^ +| +$|(?<=↵) +/g, (spaces) => (spaces.length > 3 ? `␣×${spaces.length}` : '␣'.repeat(spaces.length)));
}
