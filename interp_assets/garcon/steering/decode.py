"""A plan that generates becomes texts: a loop of forwards with a key-value cache, in which edits act on the continuations that have them.

1. Prompts are rows of one batch, padded on the left, `n` of each. With `compare`, each has a default beside it, which is continued without the
   edits, and (with `score` too) a twin, which reads the very tokens of the edited row without them: what the unedited model says of every token (its
   log probability, and KL(unedited || edited) in nats) does not stop where the two texts part. Frozen points come from twins too.
2. A forward computes the columns that are new: the prompts, then one token each. Edits act on these alone (`edits.py`): what came before is
   in the cache as they left it. So the tokens are those that running everything again for each token would give.
3. A token is drawn by its logits plus noise (the Gumbel trick): the i-th continuation draws its noise from a stream of its own, whatever the
   prompt, the edits and whatever runs beside it. So a default and an edited text part where the edits make a difference, not by chance.
4. Rows that have ended leave the batch and the cache.
5. Latents of crosscoders are read by forwards of their own that go ahead (`ahead.py`).

The first token is drawn after the last position of the prompt: edits on `generated` positions alone move the second one first.
Models whose rotary frequencies follow the length (`rope.py`) may be continued as far as these stay the same.
"""

import inspect
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from interp_assets.compute.seeds import stream
from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.backend import Continuation, Generated, Token
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import Edit, GeneratePlan, Span
from interp_assets.garcon.rope import fixed_length, forget_lengths
from interp_assets.garcon.steering.ahead import Ahead
from interp_assets.garcon.steering.edits import Batch, Editor
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import tapped
from interp_assets.garcon.writes import Beside
from interp_assets.planning.progress import format_count

_EDITED, _DEFAULT, _TWIN = range(3)


def generate(
    subject: SubjectModel,
    plan: GeneratePlan,
    tensors: Mapping[str, Tensor],
    saes: Mapping[str, AttachedSae] | None = None,
    on_token: Callable[[Token], None] | None = None,
) -> Generated:
    """Run a plan that generates, and hand out its tokens as they come; `tensors` holds what it names, by digest.

    Raises `InputError` for what does not fit the model, and `NonFiniteError` where its logits are not finite.
    """
    tokens = stream_tokens(subject, plan, tensors, saes)
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            return end.value
        if on_token is not None:
            on_token(token)


def stream_tokens(
    subject: SubjectModel, plan: GeneratePlan, tensors: Mapping[str, Tensor], saes: Mapping[str, AttachedSae] | None = None
) -> Generator[Token, None, Generated]:
    """Yield tokens as they come, and return what `generate` does. Between two tokens the model is as it was: whoever stops asking cancels."""
    _check(subject, plan)
    editor = Editor(subject, plan, Beside(tensors, saes or {}))
    _check_reach(plan)
    return (yield from _Decoder(subject, plan, editor).run())


def _check(subject: SubjectModel, plan: GeneratePlan) -> None:
    config = subject.net.config
    parameters = inspect.signature(subject.net.forward).parameters
    if not subject.is_causal or subject.net.get_output_embeddings() is None:
        raise InputError(f"{subject.name} ({config.model_type}) predicts no next token: it is no causal language model, and cannot generate.")
    if "past_key_values" not in parameters:
        raise InputError(f"{subject.name}, a {config.model_type} model, has no key-value cache: it cannot generate here.")
    lengths = [len(row) for row in plan.rows]
    if len(set(lengths)) > 1 and "position_ids" not in parameters:
        raise InputError(f"A {config.model_type} model takes no positions, so its prompts must be of one length; found {sorted(set(lengths))}.")
    longest, limit = max(lengths) + plan.new_tokens, subject.max_context
    if longest > limit:
        told = f"Ask for at most {limit - max(lengths):,} new tokens" if limit > max(lengths) else "Shorten the prompt"
        raise InputError(
            f"A prompt of {max(lengths):,} tokens and {plan.new_tokens:,} new ones are more than the {limit:,} of {subject.name}. {told}."
        )
    if (fixed := fixed_length(config)) is not None and longest > fixed:
        raise InputError(
            f"The rotary frequencies of {subject.name} change beyond {fixed:,} tokens, and a cache keeps keys with the earlier ones; a prompt of "
            f"{max(lengths):,} tokens and {plan.new_tokens:,} new ones would go beyond."
        )
    subject.check_tokens(torch.tensor([token for row in plan.rows for token in row]))


def _check_reach(plan: GeneratePlan) -> None:
    """Raise `InputError` for an edit that reaches no position of a prompt it is on."""
    for edit in plan.edits:
        for prompt in range(len(plan.rows)) if edit.write.rows is None else edit.write.rows:
            row = plan.rows[prompt]
            n_positions, told = len(row) + plan.new_tokens - 1, format_count(len(row), "token")  # the last token is never read
            if isinstance(edit.where, tuple):
                outside = [place for place in edit.where if not -len(row) <= place < n_positions]
                if outside or not edit.where:
                    raise InputError(
                        f"Positions {list(edit.where)} of an edit at {edit.write.point!r}: prompt {prompt} has {told}, and "
                        f"{plan.new_tokens} new ones make positions 0 to {n_positions - 1}."
                    )
            if not any(_reaches(plan, edit, prompt, place) for place in range(n_positions)):
                raise InputError(
                    f"An edit at {edit.write.point!r} on {edit.where!r} reaches no position of prompt {prompt}, of {told} and "
                    f"{plan.new_tokens} new ones, special tokens left alone. Ask for more new tokens, choose other positions, or say special."
                )


def _reaches(plan: GeneratePlan, edit: Edit, prompt: int, place: int, token: int | None = None) -> bool:
    """Tell whether an edit is made at a position of a prompt or, if it lies after it, of its continuation, where `token` stands."""
    if edit.write.rows is not None and prompt not in edit.write.rows:
        return False
    row = plan.rows[prompt]
    is_generated = place >= len(row)
    if not edit.special and (token if is_generated else row[place]) in plan.special:
        return False
    if edit.where in ("all", "prompt", "generated"):
        return edit.where == "all" or is_generated == (edit.where == "generated")
    if edit.where == "assistant":
        return is_generated or place in plan.assistant[prompt]
    if isinstance(edit.where, Span):
        start, stop = (None if end is None else end + len(row) if end < 0 else end for end in (edit.where.start, edit.where.stop))
        first = max(0, start or 0)
        return first <= place and (stop is None or place < stop) and (place - first) % (edit.where.step or 1) == 0
    return place in edit.where or (not is_generated and place - len(row) in edit.where)


class _Decoder:
    """One generation: rows that are left, their tokens, and the cache."""

    def __init__(self, subject: SubjectModel, plan: GeneratePlan, editor: Editor) -> None:
        self._subject, self._plan, self._editor = subject, plan, editor
        self._ahead = Ahead(subject, editor.crosscoders) if editor.crosscoders else None
        n_texts = len(plan.rows) * plan.n
        asked = {_EDITED: True, _DEFAULT: plan.compare, _TWIN: plan.compare or plan.score or bool(plan.freeze)}
        kinds = [kind for kind, is_asked in asked.items() if is_asked and (kind == _EDITED or not editor.is_idle)]
        self._kind = [kind for kind in kinds for _ in range(n_texts)]
        self._own = [text for _ in kinds for text in range(n_texts)]
        self._noise = [torch.Generator().manual_seed(stream(plan.seed, "generate", i).torch_seed()) for i in range(plan.n)]
        self._written: dict[tuple[int, int], list[Token]] = {(kind, text): [] for kind, text in zip(self._kind, self._own, strict=True)}
        self._stopped: set[tuple[int, int]] = set()
        self._width = max(len(row) for row in plan.rows)
        parameters = inspect.signature(subject.net.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in parameters}
        self._is_special = torch.zeros((len(self._kind), 0), dtype=torch.bool)
        self._cache: Any = None

    def run(self) -> Generator[Token, None, Generated]:
        """Write all texts."""
        new = self._begin()
        for index in range(self._plan.new_tokens):
            logits = self._forward(new)
            written = self._choose(logits, index)
            yield from written.values()
            rows = self._remaining(written) if index + 1 < self._plan.new_tokens else []
            if not rows:
                break
            new = self._next(rows, written)
        texts = {key: Continuation(tokens, key in self._stopped) for key, tokens in self._written.items()}
        n_texts = len(self._plan.rows) * self._plan.n
        edited, defaults = ([texts[kind, text] for text in range(n_texts) if (kind, text) in texts] for kind in (_EDITED, _DEFAULT))
        return Generated(edited, defaults, self._editor.effects(), self._editor.fvu())

    def _begin(self) -> Tensor:
        """Return the prompts, padded on the left, and tell the editor which positions it reaches."""
        rows = [self._plan.rows[text // self._plan.n] for text in self._own]
        token_ids = torch.zeros((len(rows), self._width), dtype=torch.int64)
        self._pads = torch.tensor([self._width - len(row) for row in rows])
        for i, row in enumerate(rows):
            token_ids[i, self._width - len(row) :] = torch.tensor(row)
        self._extend(token_ids)
        return token_ids

    def _extend(self, token_ids: Tensor) -> None:
        """Tell the editor which of the new columns each edit reaches; `_width` counts them already."""
        plan, first = self._plan, self._width - token_ids.shape[1]
        self._is_special = torch.cat([self._is_special, torch.isin(token_ids, torch.tensor(plan.special, dtype=torch.int64))], dim=1)
        rows: dict[int, list[int]] = {}  # edited rows of each prompt
        for i, (kind, text) in enumerate(zip(self._kind, self._own, strict=True)):
            if kind == _EDITED:
                rows.setdefault(text // plan.n, []).append(i)
        reached = torch.zeros((len(plan.edits), *token_ids.shape), dtype=torch.bool)
        for index, edit in enumerate(plan.edits):
            for prompt in rows if edit.write.rows is None else edit.write.rows:
                for i in rows.get(prompt, ()):
                    places = range(first - int(self._pads[i]), self._width - int(self._pads[i]))
                    found = [
                        place >= 0 and _reaches(plan, edit, prompt, place, token) for place, token in zip(places, token_ids[i].tolist(), strict=True)
                    ]
                    reached[index, i] = torch.tensor(found)
        self._editor.extend(reached)

    def _forward(self, token_ids: Tensor) -> Tensor:
        """Return the logits of the last column, [rows, vocabulary]."""
        subject, n_new = self._subject, token_ids.shape[1]
        if subject.follows_length and self._cache is None:
            forget_lengths(subject.net)
        if self._ahead is not None and len(edited := self._edited_rows()):  # defaults may go on alone
            found = self._ahead.read(partial(self._arguments, token_ids[edited], self._pads[edited]), n_new)
            self._editor.take_latents(found, edited, len(token_ids))
        taps = self._editor.taps(self._batch(n_new))
        with tapped(subject.net, taps, n_new), torch.no_grad():
            output: Any = subject.net(**self._arguments(token_ids, self._pads, self._cache))
        self._editor.check_met()
        self._cache = output.past_key_values
        if self._cache is None:
            raise InputError(f"{subject.name}, a {subject.net.config.model_type} model, keeps no key-value cache: it cannot generate here.")
        logits = output.logits[:, -1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not bool(torch.isfinite(logits.sum())) and not bool(torch.isfinite(logits).all()):
            row = int((~torch.isfinite(logits)).any(1).nonzero()[0])
            raise NonFiniteError(
                f"The logits of continuation {self._own[row]} after {self._width - int(self._pads[row])} tokens are not finite. Run the model in "
                "float32, or write smaller values."
            )
        return logits

    def _arguments(self, token_ids: Tensor, pads: Tensor, cache: Any) -> dict[str, Any]:
        """Return what a forward of new columns is handed."""
        device, columns = self._subject.device, torch.arange(self._width)
        arguments: dict[str, Any] = {"input_ids": token_ids.to(device), "past_key_values": cache, "use_cache": True}
        if int(pads.max()):
            arguments["attention_mask"] = (columns[None, :] >= pads[:, None]).to(device, torch.int64)
        if "position_ids" in self._takes:
            arguments["position_ids"] = (columns[None, -token_ids.shape[1] :] - pads[:, None]).clamp_min(0).to(device)
        if "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = 1
        return arguments

    def _edited_rows(self) -> Tensor:
        return torch.tensor([row for row, kind in enumerate(self._kind) if kind == _EDITED], dtype=torch.int64)

    def _batch(self, n_new: int) -> Batch:
        is_token = torch.arange(self._width)[None, :] >= self._pads[:, None]
        places = {key: row for row, key in enumerate(zip(self._kind, self._own, strict=True))}
        twins = [
            places.get((_TWIN, text), row) if kind == _EDITED else row for row, (kind, text) in enumerate(zip(self._kind, self._own, strict=True))
        ]
        return Batch(torch.tensor(self._own), torch.tensor(self._kind) == _EDITED, torch.tensor(twins), is_token, self._is_special, n_new)

    def _choose(self, logits: Tensor, index: int) -> dict[tuple[int, int], Token]:
        """Draw a token for every row that writes, and measure it."""
        plan = self._plan
        scores = _filtered(logits, plan)
        if plan.temperature:
            noise = torch.stack([torch.rand(logits.shape[1], generator=generator, dtype=torch.float64) for generator in self._noise])
            gumbel = -(-noise.clamp_min(1e-300).log()).log()
            which = torch.tensor([text % plan.n for text in self._own])
            scores = scores.double() / plan.temperature + gumbel[which].to(logits.device)
        chosen = scores.argmax(1)
        log = logits.log_softmax(1)
        places = {key: row for row, key in enumerate(zip(self._kind, self._own, strict=True))}
        edited = [row for row, kind in enumerate(self._kind) if kind == _EDITED and (plan.compare or plan.score) and not self._editor.is_idle]
        twins = [places[_TWIN, self._own[row]] for row in edited]
        kl = (log[twins].exp() * (log[twins] - log[edited])).sum(1).clamp_min(0.0).tolist()  # rounding can make it negative
        picked = log.gather(1, chosen[:, None])[:, 0].tolist()
        base = log[twins].gather(1, chosen[edited][:, None])[:, 0].tolist()
        beside = dict(zip(edited, zip(base, kl, strict=True), strict=True))
        watched = log[:, list(plan.watch)].tolist() if plan.watch else [()] * len(log)
        told = self._editor.told or [()] * len(log)
        tokens: dict[tuple[int, int], Token] = {}
        for row, (kind, text, token) in enumerate(zip(self._kind, self._own, chosen.tolist(), strict=True)):
            if kind != _TWIN:
                measured = (picked[row], *beside.get(row, (None, None)), tuple(watched[row]), tuple(told[row]))
                tokens[kind, text] = Token(text, kind == _DEFAULT, index, token, *measured)
                self._written[kind, text].append(tokens[kind, text])
        return tokens

    def _remaining(self, written: Mapping[tuple[int, int], Token]) -> list[int]:
        """Return the rows that go on; a twin ends with the row it reads."""
        self._stopped |= {key for key, token in written.items() if token.token in self._plan.stop}
        ended = self._stopped | {(_TWIN, text) for kind, text in self._stopped if kind == _EDITED}
        return [row for row, key in enumerate(zip(self._kind, self._own, strict=True)) if key not in ended]

    def _next(self, rows: list[int], written: Mapping[tuple[int, int], Token]) -> Tensor:
        """Let the others leave, and return the column of new tokens."""
        if len(rows) < len(self._own):
            kept = torch.tensor(rows)
            self._cache.batch_select_indices(kept.to(self._subject.device))
            self._editor.keep(kept)
            if self._ahead is not None:
                self._ahead.keep(torch.isin(self._edited_rows(), kept).nonzero()[:, 0])
            self._pads, self._is_special = self._pads[kept], self._is_special[kept]
            self._kind, self._own = [self._kind[row] for row in rows], [self._own[row] for row in rows]
        pairs = zip(self._kind, self._own, strict=True)
        tokens = [written[_EDITED if kind == _TWIN else kind, text].token for kind, text in pairs]
        self._width += 1
        token_ids = torch.tensor(tokens)[:, None]
        self._extend(token_ids)
        return token_ids


def _filtered(logits: Tensor, plan: GeneratePlan) -> Tensor:
    """Return logits with those that may not be drawn at -inf."""
    if plan.top_k and plan.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(plan.top_k, dim=1).values[:, -1:], -torch.inf)
    if plan.top_p < 1.0 and plan.temperature:
        ordered = (logits / plan.temperature).sort(dim=1, descending=True)
        shares = ordered.values.softmax(1)
        is_out = shares.cumsum(1) - shares >= plan.top_p  # those before it have it together already
        logits = logits.masked_fill(is_out.gather(1, ordered.indices.argsort(1)), -torch.inf)
    return logits
