"""Prompts and a recipe become a plan that generates; what it gave becomes texts beside each other, a table, and what each edit did."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import polars as pl
from pydantic import ValidationError

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Chats, Continuation, Generated, Token, WritingBackend
from interp_assets.garcon.plan import GeneratePlan, SaeAdd, SaeClamp, explain_plan
from interp_assets.garcon.steering.recipe import Edits
from interp_assets.planning.progress import format_count


class Sampling(TypedDict, total=False):
    """How a token is drawn from a prediction; without a temperature the most probable one is taken."""

    temperature: float
    top_k: int
    top_p: float


def is_chat(prompt: object) -> bool:
    """Tell whether a prompt is a conversation, a list of messages, or a list of these."""
    first = prompt[0] if isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) else None
    return isinstance(first, Mapping) or (isinstance(first, Sequence) and not isinstance(first, str) and len(first) > 0 and is_chat(first))


def make_generate_plan(backend: WritingBackend, prompts: Chats, edits: Edits, **options: Any) -> GeneratePlan:
    """Return the plan over prompts. Raises `InputError` for roles that nobody knows and for options that no plan has."""
    wants_roles = any(edit.where == "assistant" for edit in edits.edits)
    if wants_roles and not prompts.assistant:
        raise InputError("An edit is on the assistant's turns, but the prompt is no conversation. Give messages, or say where: generated.")
    if wants_roles and None in prompts.assistant:
        raise InputError(
            f"An edit is on the assistant's turns, but the chat template of {backend.name!r} changes what it is given in conversation "
            f"{prompts.assistant.index(None)}, so whose words stand where is not known. Say where: generated, or positions."
        )
    content = {"rows": prompts.rows, "assistant": prompts.assistant if wants_roles else (), "edits": edits.edits, "freeze": edits.freeze}
    told = {"special": backend.special_tokens if edits.edits else (), "stop": backend.stop_tokens}
    try:
        return GeneratePlan.model_validate({**content, **told, **options})
    except ValidationError as error:
        raise InputError(explain_plan(error)) from error


def odd_saes(saes: Mapping[str, Any], operations: Sequence[Any]) -> list[str]:
    """Return the warnings of SAEs that operations use, also as a condition."""
    used = [name for operation in operations for name in (getattr(operation, "sae", ""), getattr(getattr(operation, "when", None), "sae", ""))]
    return [warning for name in dict.fromkeys(used) if (warning := getattr(saes.get(name), "warning", ""))]


class Texts:
    """Continuations of prompts, those without edits beside them, and what every edit did."""

    def __init__(self, plan: GeneratePlan, generated: Generated, decode: Callable[[Sequence[int]], str]) -> None:
        """`decode` writes token ids as text."""
        self.plan, self.generated, self._decode = plan, generated, decode
        self.warnings: list[str] = []
        """What was odd about the SAEs when they were attached."""

    @property
    def texts(self) -> list[str]:
        """What was added to each prompt: by prompt, and of each its continuations."""
        return [self._text(found) for found in self.generated.texts]

    @property
    def defaults(self) -> list[str]:
        """The same without the edits; empty unless they were to be compared."""
        return [self._text(found) for found in self.generated.defaults]

    @property
    def text(self) -> str:
        """The only continuation. Raises `InputError` where there are several."""
        if len(self.generated.texts) != 1:
            raise InputError(f"There are {format_count(len(self.generated.texts), 'continuation')}: use `.texts`.")
        return self.texts[0]

    def table(self) -> pl.DataFrame:
        """Return one line a token: its text and log probabilities, and the KL divergence of its prediction from the unedited one, in nats.

        Then a column for each latent that was asked for, `sae.latent`: what it read at the position before.
        """
        names = [f"{told.sae}.{latent}" for told in self.plan.latents for latent in told.latents]
        lines = []
        for prompt_text in (*self.generated.texts, *self.generated.defaults):
            for token in prompt_text.tokens:
                line = {"prompt": token.continuation // self.plan.n, "continuation": token.continuation % self.plan.n, "edited": not token.is_default}
                numbers = {"logprob": token.logprob, "base_logprob": token.base_logprob, "kl": token.kl}
                read = dict(zip(names, token.latents, strict=True))
                lines.append({**line, "place": token.place, "token_id": token.token, "token": self._decode([token.token]), **numbers, **read})
        floats: dict[str, Any] = dict.fromkeys(("logprob", "base_logprob", "kl"), pl.Float64)
        return pl.DataFrame(lines, schema_overrides=floats)

    def effects(self) -> pl.DataFrame:
        """Return one line for each edit, continuation and latent: places, how far it moved, what the latent read before and after, the SAE's FVU."""
        lines: list[dict[str, Any]] = []
        for index, (edit, effect) in enumerate(zip(self.plan.edits, self.generated.effects, strict=True)):
            write = edit.write
            is_sae = isinstance(write, SaeClamp | SaeAdd)
            latents: Sequence[Any] = list(zip(write.latents, write.values, strict=True)) if isinstance(write, SaeClamp | SaeAdd) else [(None, None)]
            for text in range(len(effect.n_places)):
                common = {"edit": index, "op": write.op, "point": write.point, "prompt": text // self.plan.n, "continuation": text % self.plan.n}
                measured = {"places": int(effect.n_places[text]), "moved": float(effect.moved[text])}
                for i, (latent, value) in enumerate(latents):
                    read = {name: float(values[text, i]) if is_sae else None for name, values in (("before", effect.before), ("after", effect.after))}
                    fvu = self.generated.fvu.get(write.sae) if isinstance(write, SaeClamp | SaeAdd) else None
                    lines.append({**common, **measured, "latent": latent, "value": value, **read, "fvu": fvu})
        kinds: dict[str, Any] = {"latent": pl.Int64, **dict.fromkeys(("value", "before", "after", "fvu"), pl.Float64)}
        return pl.DataFrame(lines, schema_overrides=kinds)

    def __repr__(self) -> str:
        """Show every text, and the default beside it."""
        lines = list(self.warnings)
        for i, text in enumerate(self.texts):
            lines += [f"[{i}] {text!r}", *([f"    without edits: {self.defaults[i]!r}"] if self.generated.defaults else [])]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show texts beside each other, tokens coloured by the KL divergence of their prediction. Text is escaped."""
        rows = []
        for i, found in enumerate(self.generated.texts):
            default = self._marked(self.generated.defaults[i]) if self.generated.defaults else ""
            rows.append(f"<tr><td>{i}</td><td style='text-align:left'>{self._marked(found)}</td><td style='text-align:left'>{default}</td></tr>")
        head = "<tr><th></th><th>with edits</th><th>without</th></tr>"
        told = "".join(f"<p>{html.escape(warning)}</p>" for warning in self.warnings)
        return f"{told}<table>{head}{''.join(rows)}</table>"

    def _text(self, found: Continuation) -> str:
        tokens = [token.token for token in found.tokens]
        return self._decode(tokens[:-1] if found.is_stopped else tokens)

    def _marked(self, found: Continuation) -> str:
        return "".join(self._marked_token(token) for token in found.tokens)

    def _marked_token(self, token: Token) -> str:
        shade = 0.0 if token.kl is None else min(1.0, token.kl / 2)
        hint = f"logprob {token.logprob:.3f}" + ("" if token.kl is None else f", without edits {token.base_logprob:.3f}, KL {token.kl:.3g}")
        text = html.escape(self._decode([token.token]))
        return f"<span title='{hint}' style='white-space:pre-wrap;background:rgba(255,140,0,{shade:.2f})'>{text}</span>"
