import { describe, expect, test } from 'vitest';
import type { Window } from '../src/lib/types';
import { makeUnits, roleAt, parseVocabulary, tokenText, visible, visibleAlone, visibleInLine } from '../src/lib/vocabulary';

const vocabulary = parseVocabulary({
  format: 'interp-assets/vocabulary',
  version: 2,
  order: [0, 1, 2, 3, 4, 5, 6],
  tokens: ['<|bos|>', ' def', '\n', '\ufffd', '\ufffd', '\ufffd', '\ufffd'],
  bytes: { 3: 'e286', 4: '92', 5: 'ff', 6: 'f09f' },
  special: [0],
});

function window(tokens: number[], activations: [number, number][] = [], peak = 0, masked: number[] = [], position = 50): Window {
  return { row: [0, 0], document: 'a.py', tokens, peak, position, activation: 1, activations, masked };
}

describe('units', () => {
  test('tokens that share a character become one unit with the larger activation', () => {
    const units = makeUnits(window([1, 3, 4, 2], [[1, 0.5], [2, 2]], 2), vocabulary);
    expect(units.map((unit) => unit.text)).toEqual([' def', '→', '\n']);
    expect(units[1]).toMatchObject({ places: [1, 2], value: 2, isPeak: true });
  });

  test('bytes that never make a character are shown as bytes, each on its own', () => {
    expect(makeUnits(window([5, 3, 1]), vocabulary).map((unit) => unit.text)).toEqual(['\\xff', '\\xe2\\x86', ' def']);
  });

  test('a character that is cut by the end of the window does not run past it', () => {
    expect(makeUnits(window([1, 6]), vocabulary).at(-1)).toMatchObject({ text: '\\xf0\\x9f', places: [1] });
  });

  test('masked tokens are told apart and ids outside the vocabulary keep their number', () => {
    const units = makeUnits(window([0, 99], [], 1, [0]), vocabulary);
    expect(units.map((unit) => unit.isMasked)).toEqual([true, false]);
    expect(units[1]!.text).toBe('⟨99⟩');
  });
});

describe('whose words they are', () => {
  test('a name stands where somebody begins to speak, none where the chat template writes', () => {
    const spoken: Window = { ...window([0, 1, 3, 4, 2, 1], [], 5), roles: [[0, 'template'], [1, 'user'], [3, 'template'], [4, 'assistant']] };
    const units = makeUnits(spoken, vocabulary);
    expect(units.map((unit) => unit.role)).toEqual(['', 'user', '', 'assistant', '']);
    expect(units.map((unit) => unit.isTemplate)).toEqual([true, false, true, false, false]);
    expect([0, 2, 3, 5].map((place) => roleAt(spoken, place))).toEqual(['template', 'user', 'template', 'assistant']);
    expect(makeUnits(window([1, 2]), vocabulary).map((unit) => unit.role)).toEqual(['', '']);
  });
});

describe('where a text begins and ends', () => {
  const edges = (tokens: number[], peak: number, position?: number): string[] => makeUnits(window(tokens, [], peak, [], position), vocabulary).map((unit) => unit.edge);

  test('a special token there is a mark, which tells a context from a document', () => {
    expect(edges([0, 1, 2], 1, 1)).toEqual(['start of the context', '', '']);
    expect(edges([0, 1, 0], 1, 90)).toEqual(['start of the document', '', 'end of the document']);
  });

  test('one in the middle, one that is the example itself, and other tokens stay text', () => {
    expect(edges([1, 0, 2], 2)).toEqual(['', '', '']);
    expect(edges([0, 1], 0, 0)).toEqual(['', '']);
    expect(edges([1, 2], 1, 1)).toEqual(['', '']);
  });
});

describe('text', () => {
  test('new lines and tabs are seen, and spaces stay', () => {
    expect(visible('a\n\tb ')).toBe('a↵⇥b ');
    expect(visible('a\r\nb')).toBe('a↵b');
  });

  test('deep indentation takes two columns of a line', () => expect(visibleInLine('\n        x')).toBe('↵  x'));

  test('characters that would act on the page are written as numbers', () => {
    expect(visible('\u202eabc\u0000')).toBe('⟨202E⟩abc⟨0000⟩');
  });

  test('a token on its own shows its outer spaces', () => {
    expect(visibleAlone(' in')).toBe('␣in');
    expect(visibleAlone('\n        ')).toBe('↵␣×8');
    expect(visibleAlone('')).toBe('∅');
  });

  test('broken tokens are shown by their bytes', () => expect(tokenText(vocabulary, 4)).toBe('\\x92'));

  test('a newer vocabulary is refused with the next step', () => {
    expect(() => parseVocabulary({ format: 'interp-assets/vocabulary', version: 3, tokens: [] })).toThrow(/version 3/);
    expect(() => parseVocabulary('<html>')).toThrow(/no vocabulary/);
  });
});
