"""Complete a text, fill its gaps or answer a question in the terminal, with an ARM or an MDM.

    python scripts/chat.py --ckpt_path models/mdm-170M-10e18.safetensors
    python scripts/chat.py --ckpt_path models/mdm-170M-10e18.safetensors --prompt "The ___ sat on the ___3 ." --save sat.gif
    python scripts/chat.py --ckpt_path models/ar-170M-100e18.safetensors --prompt "Once upon a time" --temperature 0.7
    python scripts/chat.py --ckpt_path workdir/finetune/mdm-sharegpt-1028M-cfg=0.0 --chat --cfg_scale 0.6

On a terminal an MDM's text emerges from its masks and an ARM's comes token by token; elsewhere the finished text is
printed. Without --prompt, lines are read until an empty one or Ctrl-D; each is answered by itself. In a text for an MDM
___ is a gap of --gap tokens and ___5 one of five; the row then ends where the text ends. Ctrl-C keeps what is there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import fail, parse, run, warn
from lit_gpt.sampling.settings import Sampling

_PICTURES = (".png", ".gif")
_SAVED = (*_PICTURES, ".jsonl")


@dataclass(frozen=True)
class Flags(Sampling):
    """Flags of the chat: the settings of sampling, and its own."""

    ckpt_path: str = ""
    """A `.safetensors` or `.pth` file, or a run folder."""
    model: str | None = None
    """The size (such as 170), for a checkpoint that does not say."""
    tokenizer: str | None = None
    """A folder or a name on the hub; by default the checkpoint's own."""
    device: str = "auto"
    """cpu, cuda, cuda:N; auto is a GPU if there is one."""
    prompt: str | None = None
    """Complete this text and exit."""
    chat: bool = False
    """Ask as in the ShareGPT fine-tuning (Vicuna 1.1's template); only the answer is shown."""
    context_length: int | None = None
    """Tokens of prompt and answer together; by default all that the model reads."""
    gap: int = 8
    """Tokens of a gap ___ without a number."""
    delay: float = 0.0
    """Seconds that each step stays on the terminal."""
    snapshots: int = 0
    """Where the output is no terminal: print an MDM's text at this many steps, too."""
    save: str | None = None
    """Write the steps: FILE.png or FILE.gif (an MDM's, as a picture), or FILE.jsonl (step, text, tokens, confidence).

    A second line's go to FILE-2, and so on.
    """


def main() -> None:
    """Parse, load, then one completion or many."""
    # A wrong setting of sampling shows here, before the checkpoint is read, which may take a while.
    flags = parse(Flags, None, __doc__)
    _check(flags)

    from rich.console import Console

    from lit_gpt.checkpoints.loaded import load_model
    from lit_gpt.ui.completion import Completer
    from lit_gpt.ui.terminal import TerminalSession, TerminalSettings

    loaded = load_model(
        flags.ckpt_path, model_name=flags.model, tokenizer=flags.tokenizer, device=flags.device, dtype="float32"
    )
    # Opened now: a missing tokenizer ends the command, not a line of the conversation.
    _ = loaded.tokenizer
    if loaded.kind == "arm" and Path(flags.save or "").suffix in _PICTURES:
        raise ValueError(f"--save {flags.save}: a picture shows masks, which an ARM has none of; give FILE.jsonl")
    _warn_of_unused(flags, loaded.kind)
    shown = TerminalSettings(flags.gap, flags.chat, flags.delay, flags.snapshots, flags.save)
    length = loaded.model.config.block_size if flags.context_length is None else flags.context_length
    session = TerminalSession(Completer(loaded), Sampling.of(flags), length, shown, Console(highlight=False))
    if flags.prompt is not None:
        session.complete(flags.prompt)
    else:
        session.complete_lines()


def _check(flags: Flags) -> None:
    """Refuse what no checkpoint can do, before one is loaded."""
    if not flags.ckpt_path:
        fail("which checkpoint? python scripts/chat.py --ckpt_path FILE")
    problems = []
    for name, least in (("gap", 1), ("delay", 0), ("snapshots", 0)):
        if not getattr(flags, name) >= least:
            problems.append(f"--{name} {getattr(flags, name)}: expected {least} or more")
    if flags.context_length is not None and flags.context_length < 1:
        problems.append(f"--context_length {flags.context_length}: expected 1 or more")
    if flags.save is not None and Path(flags.save).suffix not in _SAVED:
        problems.append(f"--save {flags.save}: expected a file that ends in {', '.join(_SAVED)}")
    if problems:
        raise ValueError("; ".join(problems))
    if flags.save is not None:
        from lit_gpt.files import make_folder

        make_folder(Path(flags.save).parent)


def _warn_of_unused(flags: Flags, kind: str) -> None:
    """Name flags that this kind of model has no use for (guidance of an ARM is an error of the sampler)."""
    for name in [*flags.unused(kind), *(["snapshots"] if flags.snapshots and kind == "arm" else [])]:
        if name != "cfg_scale":
            warn(f"--{name} has no effect: this checkpoint is an {kind.upper()}")


if __name__ == "__main__":
    run(main)
