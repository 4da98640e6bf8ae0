"""What may be said when a checkpoint is evaluated: `--model_args`, and the flags of the evaluations' scripts.

Names, defaults and which kind of model they are for; historic spellings end here (`greddy`). Imports nothing heavy, so
that `--help` is quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lit_gpt.sampling.settings import Sampling, sampling_flag, sampling_flags, sampling_values
from lit_gpt.tokenizer import SPECIAL_TOKENS

BEHIND_END = ("cut", "keep")
"""What happens to text behind a generation's end token: the values of `--behind_end`."""


@dataclass
@sampling_flags(without=("algorithm", "cfg_scale"))
class ModelArgs:
    """Settings of an evaluated checkpoint."""

    ckpt_path: str = ""
    """The checkpoint: an export, a run folder or checkpoint, or a published file."""
    model_name: str | int | None = None
    """The size, such as 170, for files that do not say."""
    tokenizer: str | None = None
    """Folder or hub name; by default the checkpoint's own, then TinyLlama's on the hub."""
    special_tokens: str = "ids"
    """What </s>, <s> and <unk> inside a text become: their ids (published), or text, the characters that they are."""
    max_length: int | None = None
    """Longest input in tokens; by default the model's block size."""
    batch_size: int | str = 32
    """Rows of max_length that make a batch, or auto. Changes speed and memory, never a result."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU if there is one."""
    dtype: str = "auto"
    """float32, or bfloat16 for the matrix products; auto is float32 on CPUs and bfloat16 on GPUs that have it."""
    seed: int = 1234
    """Of masks and samples."""
    temperature: float = sampling_flag("temperature", 0.0)
    nll_type: str = "mc"
    """MDM: the estimator by its name, one of `likelihood/estimators.py`."""
    mc_num: int = 1024
    """MDM: draws of mc, the published estimator."""
    budget: int = 128
    """MDM: forward passes that exact may spend on a target."""
    decide: float = 0.0
    """MDM, exact: of a question, no more passes than until the chance that more change its answer is below this, as 0.01; 0
    spends the budget on every answer."""
    cfg: float = 0.0
    """MDM: guidance scale."""
    greedy: bool = False
    """MDM: run the greedy check (also spelt greddy)."""
    padding: bool = False
    """MDM: fill inputs with [MASK] up to what the model reads (2048 for published ones), whatever max_length."""
    mask_id: int | None = None
    """MDM: must be the model's own, 32000 for published ones."""
    steps: int | None = None
    """MDM: denoising steps of generate_until; by default one per new token, as with steps_per_token=1."""
    alg: str = "greedy"
    """MDM: sampling algorithm of generate_until, also spelt algorithm; the other settings of sampling have their names."""

    def sampling(self) -> Sampling:
        """How texts are written where the task does not say."""
        values = sampling_values(self) | {"algorithm": self.alg, "cfg_scale": float(self.cfg)}
        if self.steps is None:
            # Steps of a row, so that rows of different lengths share a batch.
            values |= {"steps": 1, "steps_per_token": values["steps_per_token"] or 1.0}
        return Sampling(**values)


@dataclass
@sampling_flags(without=("cfg_scale",))
class AnswerFlags:
    """Flags of an evaluation by written answers, whatever is asked."""

    ckpt_path: str = ""
    """The checkpoint: an export, a run folder or checkpoint, or a published file."""
    model: str | None = None
    """Size in millions, such as 1028, for checkpoints that do not say; without it their shapes tell."""
    output: str | None = None
    """Where the answers go, a .jsonl; by default it is named after the checkpoint, in out/."""
    existing: str | None = None
    """What to do with answers that are there: continue, refuse or overwrite; by default those made with the same settings
    are continued."""
    steps: int = sampling_flag("steps", 256)
    temperature: float = sampling_flag("temperature", 0.0)
    length: int = 256
    """Tokens of question and answer together."""
    algorithm: str = sampling_flag("algorithm", "greedy")
    batch_size: int = 64
    """Questions that are answered at once; changes speed and memory, never an answer."""
    limit: int | None = None
    """Only the first so many questions of a file."""
    dry_run: bool = False
    """Only tell what it would cost: requests, passes, tokens and FLOPs."""
    tokenizer: str | None = None
    """A folder or a name on the hub; by default the checkpoint's own."""
    special_tokens: str = "ids"
    """What </s>, <s> and <unk> inside a question become: their ids (published), or text, the characters that they are."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """float32 or bfloat16; auto is float32 on CPUs, bfloat16 on GPUs that have it."""


@dataclass
class PerplexityFlags:
    """Flags of the temporal evaluation."""

    type: str = "mdm"
    """arm or mdm."""
    model: str | None = None
    """Size in millions, for checkpoints that do not say."""
    ckpt_path: str = ""
    """The checkpoint: an export, a run folder or checkpoint, or a published file."""
    fineweb: str = "CC-MAIN-2024-10"
    """The crawl: a folder of packed tokens or a .pkl in --data_dir."""
    data_dir: str = "data/fineweb"
    """Where the crawls lie."""
    batch_size: int = 128
    """Rows that are read at once; changes speed and memory, never the result."""
    mc_samples: int = 1024
    """MDM: noise draws of a row (mc), or forward passes (exact)."""
    estimator: str = "mc"
    """MDM: mc, the published law, or exact, the same bound with less noise."""
    seed: int = 1234
    """Of the noise."""
    rows: int | None = None
    """Read only the first so many rows."""
    length: int = 2048
    """Tokens of a row; never more than the model reads."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """float32 or bfloat16; auto is float32 on CPUs, bfloat16 on GPUs that have it."""
    cache: str | None = None
    """Folder of finished rows (~/.cache/smdm/evaluation), or off."""
    dry_run: bool = False
    """Only tell what it would cost: requests, passes, tokens and FLOPs."""


@dataclass
@sampling_flags()
class MtBenchAnswerFlags:
    """Flags of the answers to MT-bench's questions."""

    model_id: str = ""
    """The model's name in the answers; its size in millions, for checkpoints that do not say."""
    model_type: str = "arm"
    """arm or mdm."""
    model_path: str = ""
    """The checkpoint: an export, a run folder or checkpoint, or a published file."""
    answer_file: str | None = None
    """Where answers go, FILE.jsonl; by default data/BENCH/model_answer/MODEL_ID.jsonl."""
    bench_name: str = "mt_bench"
    """The benchmark's folder in data/."""
    question_begin: int | None = None
    """Number of the first question, counted from 0."""
    question_end: int | None = None
    """Number behind the last question."""
    max_new_token: int = 1024
    """Tokens of question and answer together; never more than the model reads."""
    steps: int = sampling_flag("steps", 128)
    cfg_scale: float = sampling_flag("cfg_scale", 0.0)
    seed: int = sampling_flag("seed", 0)
    num_choices: int = 1
    """Answers to each question; an answer's number, from 0, is added to the seed. The first one is judged."""
    batch_size: int = 8
    """Questions that are answered at once; changes speed and memory, never an answer."""
    tokenizer: str | None = None
    """A folder or a name on the hub; by default the checkpoint's own."""
    special_tokens: str = "ids"
    """What </s>, <s> and <unk> inside a question become: their ids (published), or text, the characters that they are."""
    behind_end: str = "cut"
    """What is written behind the end token: cut off, or keep (published: all but special tokens is the answer)."""
    device: str = "auto"
    """cpu, cuda or cuda:N; auto is a GPU if there is one."""
    dtype: str = "auto"
    """float32 or bfloat16; auto is float32 on CPUs, bfloat16 on GPUs that have it. float16 is taken as auto."""
    existing: str | None = None
    """What to do with an answer file that is there: continue it, refuse, or overwrite; by default one made with the same
    settings is continued."""
    dry_run: bool = False
    """Only tell what it would cost: requests, passes, tokens and FLOPs."""
    num_gpus_per_model: int = 1
    """Has no effect: a model is on one device."""
    num_gpus_total: int = 1
    """Has no effect: start the script with torchrun for several GPUs."""
    max_gpu_memory: str | None = None
    """Has no effect: a model is on one device, as a whole."""
    revision: str | None = None
    """Has no effect: the checkpoint is a file."""


@dataclass
class ReproduceFlags:
    """Flags of scripts/reproduce.py."""

    checkpoint: list[str] = field(default_factory=list)
    """Checkpoints to test in place of the released ones; where a claim is about both kinds, one of each (scaling: several)."""
    models: str = "models"
    """Folder of released checkpoints; what is not there is fetched from the hub (nieshen/SMDM)."""
    data: str | None = None
    """fineweb, scaling: the folder of packed text that is read; by default data/fineweb and its two crawls."""
    reverse_data: str | None = None
    """reverse: the folder of the questions, where it is another one than evaluate_reverse.py's."""
    tasks: list[str] = field(default_factory=list)
    """zero_shot: only these of the published tasks; MINE=PUBLISHED runs a task of yours with a published one's settings."""
    limit: int | None = None
    """Only so many questions of a task, or rows of a text."""
    processes: int = 1
    """Processes of this machine, such as one for each GPU."""
    device: str = "auto"
    """cpu, cuda or cuda:N."""
    out: str = "out/reproduce"
    """Folder of the JSON, the Markdown row, and all results."""
    dry_run: bool = False
    """Only tell what it would cost: requests, passes, tokens and FLOPs."""


_MDM_ONLY = {"nll_type", "mc_num", "budget", "decide", "cfg", "greedy", "padding", "mask_id", "alg"}
_MDM_ONLY |= {one.name for one in dataclasses.fields(Sampling) if one.metadata["kind"] == "mdm"}
_ARM_ONLY = {one.name for one in dataclasses.fields(Sampling) if one.metadata["kind"] == "arm"}
_OTHER_SPELLINGS = {"greddy": "greedy", "algorithm": "alg", "cfg_scale": "cfg"}
_KINDS_OF_VALUES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
_TYPES: dict[str, tuple[type, ...]] = {
    **{
        one.name: _KINDS_OF_VALUES[str(one.type)]
        for one in dataclasses.fields(Sampling)
        if one.name not in _OTHER_SPELLINGS
    },
    **dict.fromkeys(("mc_num", "budget", "max_length", "mask_id"), (int,)),
    **dict.fromkeys(("cfg", "decide"), (int, float)),
    **dict.fromkeys(("greedy", "padding"), (bool,)),
    **dict.fromkeys(("ckpt_path", "tokenizer", "special_tokens", "device", "dtype", "nll_type", "alg"), (str,)),
    **dict.fromkeys(("model_name", "batch_size"), (str, int)),
}
# What a number of torch's can hold.
_LONGEST_NUMBER_BITS = 63


def read_model_args(kind: str, values: dict[str, Any]) -> ModelArgs:
    """The settings of a kind of model, checked.

    Args:
        kind: `arm` or `mdm`.
        values: by name, with the types that lm-evaluation-harness gives them.

    Raises:
        ValueError: an unknown name (the known ones are listed), an MDM's setting for an ARM, a value of another type,
            no checkpoint.
    """
    from lit_gpt.checkpoints.loaded import COMPUTE_DTYPES

    known = {field.name for field in dataclasses.fields(ModelArgs)} - (_MDM_ONLY if kind == "arm" else _ARM_ONLY)
    values = {_OTHER_SPELLINGS.get(name, name): value for name, value in values.items()}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(
            f"--model_args: {', '.join(unknown)} is unknown; known are {', '.join(sorted(known))}"
            + (" and greddy for greedy" if kind == "mdm" else "")
        )
    for name, types in _TYPES.items():
        default = getattr(ModelArgs, name)
        value = values.get(name, default)
        if value is not default and (not isinstance(value, types) or isinstance(value, bool) != (bool in types)):
            raise ValueError(f"--model_args: {name}={value}: expected {' or '.join(kind.__name__ for kind in types)}")
        if isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER_BITS:
            raise ValueError(f"--model_args: {name} is a number of {value.bit_length()} bits: too large")
    arguments = ModelArgs(**values)
    if arguments.special_tokens not in SPECIAL_TOKENS:
        raise ValueError(
            f"--model_args: special_tokens={arguments.special_tokens}: choose from {', '.join(SPECIAL_TOKENS)}"
        )
    if not arguments.ckpt_path:
        raise ValueError(
            "--model_args: ckpt_path is missing: name the checkpoint, as in ckpt_path=models/mdm.safetensors"
        )
    if arguments.dtype not in COMPUTE_DTYPES:
        raise ValueError(f"--model_args: dtype={arguments.dtype}: choose from {', '.join(COMPUTE_DTYPES)}")
    size = str(arguments.batch_size)
    if not (size.split(":")[0] == "auto" or (size.isdigit() and int(size) > 0)):
        raise ValueError(f"--batch_size {size}: expected a number from 1 up, or auto")
    return arguments


def usage() -> str:
    """The settings as lines of help; the docstrings after the fields are read from the source by nobody else."""
    fields = ", ".join(
        f"{field.name}={field.default}" for field in dataclasses.fields(ModelArgs) if field.name != "ckpt_path"
    )
    return f"--model_args of ar and mdlm: ckpt_path=FILE and, with their defaults, {fields}"
