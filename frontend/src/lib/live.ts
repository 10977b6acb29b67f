/** Asks a model that is served about heads over a text of one's own. The answer holds the files of a prompt: docs/formats/attention_answer.md. */
import { Memory, ask, askJson, getSite, ofModel, posting } from './api';
import { Prompt, makePrompt, type Heads } from './heads';
import { Problem } from './problem';
import type { ServedModel } from './types';

export interface LiveTarget {
  token?: string;
  sae?: string;
  latent?: number;
}

export interface Change {
  kl: number;
  position: number;
  tokens: { id: number; text: string; before: number; after: number; p_before: number; p_after: number }[];
}

/** A term of a query or a key: a latent's number, `error`, `bias` or `other latents`. */
export type Term = number | string;

/** What an edge is made of: see docs/formats/attention_answer.md. */
export interface Pairs {
  sae: string;
  score: number;
  mean: number;
  slope: number;
  mass: number;
  pairs: [Term, Term, number][];
  others: { n: number; sum: number };
  queries: [Term, number][];
  keys: [Term, number][];
  written: Record<string, [Term, number][]>;
}

const last = (name: string): string => name.split(/[/\\:]/).at(-1) ?? name;

/** The model of these heads, or why there is none. */
export async function findModel(heads: Heads): Promise<ServedModel | string> {
  const start = `Start \`interp serve\` with --model ${heads.model.name}, by its name or its folder.`;
  const site = await getSite();
  if (site.mode === 'static') return `This site is files only: a text of one's own needs a server with the model. ${start}`;
  if (!site.models) return `This server has no model. ${start}`;
  const { models } = await askJson<{ models: ServedModel[] }>('api/models');
  return models.find((model) => last(model.model) === last(heads.model.name)) ?? `This server has ${models.map((model) => model.model).join(', ')}; these are heads of ${heads.model.name}. ${start}`;
}

const answers = new Memory<Prompt>(8);

/** Every head over a text, with what adds to targets. */
export function askPrompt(heads: Heads, model: string, text: string, targets: LiveTarget[]): Promise<Prompt> {
  const wanted = { text, layers: heads.layers.map((layer) => layer.layer), targets };
  return answers.get(JSON.stringify([model, wanted]), async () => readFiles(await (await ask(ofModel(model, '/attention'), posting(wanted))).arrayBuffer(), text));
}

export const cutHead = async (model: string, asked: { text: string; head: string; how: 'zero' | 'mean'; query?: number; key?: number; position: number; tokens: string[] }): Promise<Change> =>
  (await ask(ofModel(model, '/cut'), posting(asked))).json() as Promise<Change>;

export const cutEach = async (model: string, asked: { text: string; how: 'zero' | 'mean'; position: number }): Promise<{ position: number; kl: Record<string, number> }> =>
  (await ask(ofModel(model, '/cuts'), posting(asked))).json() as Promise<{ position: number; kl: Record<string, number> }>;

const asked = new Memory<Pairs>(50);

/** The pairs of latents that an edge is made of; kept once asked. */
export const askPairs = (model: string, wanted: { text: string; head: string; query: number; key: number; sae: string; targets: LiveTarget[] }): Promise<Pairs> =>
  asked.get(JSON.stringify([model, wanted]), async () => (await ask(ofModel(model, '/pairs'), posting(wanted))).json() as Promise<Pairs>);

/** Files that lie one after the other behind a header with their places. */
export function readFiles(body: ArrayBuffer, name: string): Promise<Prompt> {
  let files: (file: string) => ArrayBuffer;
  try {
    const length = Number(new DataView(body).getBigUint64(0, true));
    const { files: places } = JSON.parse(new TextDecoder().decode(new Uint8Array(body, 8, length))) as { files: Record<string, [number, number]> };
    files = (file) => {
      const [start, stop] = places[file] ?? [0, 0];
      return body.slice(8 + length + start, 8 + length + stop);
    };
  } catch (error) {
    throw new Problem(`The server's answer cannot be read: ${(error as Error).message}.`, 'Are the server and this page of one release? Reload the page.');
  }
  return makePrompt(name, files);
}
