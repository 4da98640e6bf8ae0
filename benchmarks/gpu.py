"""What one GPU reaches: training, evaluation and sampling, on one page.

    python benchmarks/gpu.py                        meant to stay under 10 minutes; writes docs/results/gpu.md
    python benchmarks/gpu.py --toy                  every part on a CPU by the same code, about a minute

Prints Markdown, and writes it to `--output`. Training takes forward, backward, clipping and AdamW on one batch
(`training_steps.py`), ours with compiled blocks, beside transformers and litgpt at the same shape where they are installed.
MFU is useful FLOPs per second (no recomputation, no logits that nothing scores) over the GPU's published peak; the matrix
rate is what one large product reaches there in the same arithmetic. Evaluation and sampling run as a loaded checkpoint runs
them. Weights are untrained, so threshold and entropy reveal little at a time, as far as the steps allow. The numbers of a toy
run say nothing about speed.
"""

from __future__ import annotations

import datetime
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu_parts import TOY, Machine, Workload, evaluation_and_sampling, training
from lit_gpt import devices
from lit_gpt.cli import parse, run
from lit_gpt.evaluation import result_pages, versions
from lit_gpt.evaluation.result_pages import check_page, command_line

RESULTS = result_pages.RESULTS / "gpu.md"


@dataclass
class Flags:
    """What is measured."""

    toy: bool = False
    """Tiny sizes, on the CPU unless --device says otherwise."""
    device: str = "auto"
    """cpu, cuda or cuda:N; without --toy it must be a GPU."""
    compile: str = "auto"
    """on, off, or auto: ours is compiled on GPUs."""
    output: str | None = None
    """Write the tables to this file; on a GPU, without --toy, it is docs/results/gpu.md unless given."""


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    flags = parse(Flags, argv, __doc__)
    device = devices.choose_device("cpu" if flags.toy and flags.device == "auto" else flags.device)
    output = check_flags(flags, device)
    started = time.perf_counter()
    if device.type == "cuda":
        # As training sets it.
        torch.set_float32_matmul_precision("high")
    workload = TOY if flags.toy else Workload()
    machine = Machine.of(
        device, device.type == "cuda" if flags.compile == "auto" else flags.compile == "on", workload.product
    )
    sections = [*training(machine, workload), *evaluation_and_sampling(machine, workload)]
    sections = [*heading(machine, flags, time.perf_counter() - started), *sections]
    text = "\n\n".join(sections) + "\n"
    print(text, end="", flush=True)
    if output is not None:
        output.write_text(text)


def check_flags(flags: Flags, device: torch.device) -> Path | None:
    """The file to write, or None.

    Raises:
        ValueError: a full run without a GPU, another word for --compile, or a page of results without a GPU's full run.
    """
    if flags.compile not in ("auto", "on", "off"):
        raise ValueError(f"--compile {flags.compile}: expected auto, on or off")
    full = device.type == "cuda" and not flags.toy
    if not full and not flags.toy:
        raise ValueError("the full run needs a CUDA device, and torch sees none: --toy runs every part on a CPU")
    if flags.output is None:
        return RESULTS if full else None
    output = Path(flags.output)
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}")
    check_page("output", output, full, "a full run on a GPU")
    return output


def heading(machine: Machine, flags: Flags, seconds: float) -> list[str]:
    """What ran where."""
    found = versions.versions(["torch", "transformers", "litgpt", "flash-attn", "xformers"])
    commit = (versions.commit() or "unknown")[:7]
    peak = "unknown" if machine.peak is None else f"{machine.peak / 1e12:.0f} TFLOP/s"
    return [
        f"# One device: {machine.name}" + (" (a toy run: no measure of speed)" if flags.toy else ""),
        f"Commit {commit}, {datetime.date.today()}, {seconds / 60:.1f} minutes: "
        f"`{command_line('benchmarks/gpu.py', flags, but=('output',))}`",
        f"{'bfloat16' if machine.bf16 else 'float32'}; published peak {peak}, matrix rate "
        f"{machine.matrix_rate / 1e12:.3g} TFLOP/s; " + ", ".join(f"{name} {own}" for name, own in found.items()) + ".",
    ]


if __name__ == "__main__":
    run(main)
