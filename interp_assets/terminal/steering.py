"""A recipe and a prompt become two texts that are written one under the other: the model's own, and the steered one, with what the edits did."""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from interp_assets.garcon.backend import Token
from interp_assets.garcon.session import Model


def print_steered(out: Console, llm: Model, recipe: str, prompt: str, options: dict[str, Any]) -> None:
    """Write both texts as they come, then what each edit did. Raises `InputError` for a recipe that does not fit the model."""
    ids: dict[bool, list[int]] = {True: [], False: []}
    backend = llm.writing()

    def shown() -> Group:
        lines = [(f"{name:>8}  ", ids[is_default]) for name, is_default in (("default", True), ("steered", False))]
        return Group(*(Text.assemble((name, "bold"), (prompt, "dim"), backend.decode(tokens)) for name, tokens in lines))

    live = Live(console=out, get_renderable=shown, auto_refresh=False)

    def hear(token: Token) -> None:
        ids[token.is_default].append(token.token)
        if out.is_terminal:
            live.start()  # with the first token: a recipe that is refused shows no texts
            live.refresh()

    try:
        texts = llm.generate(prompt, steer=recipe, compare=True, on_token=hear, **options)
    finally:
        live.stop()
        if any(ids.values()) and not out.is_terminal:
            for text in shown().renderables:
                out.print(text, soft_wrap=True)  # whoever reads a pipe has no width
    for warning in texts.warnings:
        out.print(f"Warning: {warning}", markup=False, soft_wrap=True)
    for line in texts.effects().to_dicts():
        read = "" if line["latent"] is None else f"; latent {line['latent']}: {line['before']:.3g} before, {line['after']:.3g} after"
        value = "" if line["value"] is None else f" {line['value']:.4g}"
        fvu = "" if line["fvu"] is None else f"; FVU of the SAE on this text {line['fvu']:.3g}"
        told = f"{line['op']}{value} at {line['point']}: {line['places']} places, moved by {line['moved']:.3g} of their length{read}{fvu}"
        out.print(told, markup=False, soft_wrap=True)
