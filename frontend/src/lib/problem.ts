/** Something a person has to know: what is wrong, and what to do. Pages show it in place of what they cannot show. */
export class Problem extends Error {
  constructor(
    readonly what: string,
    readonly todo: string,
    readonly status = 0,
  ) {
    super(what);
  }
}

/** Turn anything that was thrown into a problem. */
export function asProblem(error: unknown): Problem {
  if (error instanceof Problem) return error;
  const text = error instanceof Error ? error.message : String(error);
  return new Problem(`The page met an error it did not expect: ${text}`, 'Reload the page; if it comes back, report it with the address.');
}
