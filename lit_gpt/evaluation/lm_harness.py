"""lm-evaluation-harness with our models: ARMs as `--model ar`, MDMs as `--model mdlm`.

Decisions: the harness's own command line with all its flags, and its own table. Only its cache is replaced (`eval_cache`):
it is keyed by request alone, so that another checkpoint or setting would be served stale scores, and it unpickles.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_gpt.evaluation.generated_answers import checkpoint_name
from lit_gpt.evaluation.harness_command import SPELL_IT_OUT, read_command
from lit_gpt.evaluation.lm_adapter import Adapter
from lit_gpt.evaluation.progress import end_dry_run
from lit_gpt.evaluation.result_cache import results_folder
from lit_gpt.evaluation.settings import read_model_args, usage
from lit_gpt.files import SaveError, make_folder, read_json_object

_MORE_FLAGS = """
--use_cache FOLDER|off: where finished results are kept (never served to other settings)
--dry_run: only tell what it would cost: requests, passes, tokens and FLOPs
"""
HARNESS_MODEL_KINDS = {"ar": "arm", "mdlm": "mdm"}


@dataclass
class HarnessRun:
    """One run of the harness's command line."""

    cache_folder: Path | None
    """Where results are kept; None keeps none."""
    found_folder: Path | None
    """Another folder whose results are found, too."""
    command: list[str]
    """As typed, for the results file."""
    dry_run: bool = False
    """Only tell what the requests cost."""
    built: list[Adapter] = field(default_factory=list)
    """The models, as the harness builds them."""


class DryRunEnd(Exception):
    """All requests of a dry run have been told."""


@functools.cache
def registered_models() -> list[Any]:
    """`ar` and `mdlm` as classes of the harness, registered there once; their attribute `run` says for which run."""
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model

    def registered(kind: str) -> type:
        class Registered(Adapter, LM):  # type: ignore[misc]
            run: HarnessRun

            def __init__(self, /, **values: Any) -> None:
                LM.__init__(self)
                arguments = read_model_args(kind, values)
                run = self.run
                Adapter.__init__(self, kind, arguments, run.cache_folder, run.command, run.found_folder, run.dry_run)
                run.built.append(self)

            @property
            def rank(self) -> int:
                # The harness asks once more when all requests are answered, before it looks at the results.
                if self.dry_run and self.told:
                    raise DryRunEnd
                return self._rank

            @classmethod
            def create_from_arg_obj(
                cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
            ) -> Any:
                flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
                flags.pop("max_batch_size", None)  # a batch is bounded by its tokens
                return cls(**{**flags, **arg_dict})

            def set_cache_hook(self, cache_hook: Any) -> None:
                """The harness would put its own cache around the model, which unpickles."""
                raise ValueError(f"--use_cache: {SPELL_IT_OUT}")

        return Registered

    return [register_model(name)(registered(kind)) for name, kind in HARNESS_MODEL_KINDS.items()]


def evaluate(model: str, argv: Sequence[str]) -> None:
    """Run the harness's command line with our models, as `evaluate_ar.py` and `evaluate_diff.py` do.

    Args:
        model: the `--model` that is meant where none is given.
        argv: the flags as typed; all of the harness's, where `--use_cache` names a folder for our own cache, or `off`.

    Raises:
        ValueError: the user's mistakes, ours and the harness's.
    """
    command = read_command(argv)
    if {"-h", "--help"} & set(command.rest):
        print(usage() + _MORE_FLAGS)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise ValueError(
            f"lm-evaluation-harness is missing ({error}): ./setup.sh eval, or pip install 'smdm[eval]'"
        ) from None
    output_path = command.output_path
    results_before = _result_files(output_path)
    if output_path is not None and not command.typed.dry_run:
        # Before the work: the harness itself only warns when it cannot write, and ends with code 0.
        make_folder(_output_folder(output_path))
    beside_output = None if output_path is None else _output_folder(output_path) / "cache"
    # Beside the output a result is easy to keep with it; what was computed before there was an output counts, too.
    found_folder = None if command.use_cache else results_folder(None)
    folder = results_folder(command.use_cache, beside_output)
    run = HarnessRun(folder, found_folder, [sys.argv[0], *argv], command.typed.dry_run)
    for model_class in registered_models():
        model_class.run = run
    with command.words(model) as words, _one_line_errors(), _folders_named_by_checkpoint(run, output_path):
        sys.argv = ["lm_eval", "run", *words]
        try:
            cli_evaluate()
        except DryRunEnd:
            return end_dry_run()
    for adapter in run.built:
        adapter.close()
    if output_path is not None and os.environ.get("RANK", "0") == "0":
        written = _result_files(output_path) - results_before
        if not any(path.stat().st_size for path in written):
            raise SaveError(f"the results could not be written below {output_path}")


def _output_folder(output_path: str) -> Path:
    """Where the harness writes: `--output_path`, or for a file's name its folder."""
    path = Path(output_path)
    return path.parent if path.suffix == ".json" else path


def _result_files(output_path: str | None) -> set[Path]:
    """What the harness has written so far; it adds the time to a name."""
    if output_path is None:
        return set()
    name = f"{glob.escape(Path(output_path).stem)}_*.json" if output_path.endswith(".json") else "results_*.json"
    return set(_output_folder(output_path).rglob(name))


@contextlib.contextmanager
def _folders_named_by_checkpoint(run: HarnessRun, output_path: str | None) -> Iterator[None]:
    """Results lie in a folder named as the checkpoint is; the harness has one name for all models that it does not know.

    Where that folder has results of another checkpoint of that name, 8 digits of the weights' hash come behind the name.
    """
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
    from lm_eval.utils import sanitize_model_name

    harness_name = GeneralConfigTracker._get_model_name

    def name(model_args: Any) -> str | None:
        path = model_args.get("ckpt_path") if isinstance(model_args, dict) else None
        if not path:
            return harness_name(model_args)
        own = checkpoint_name(str(path))
        if output_path is None or not run.built:
            return own
        weights_hash = run.built[-1].loaded.weights_hash
        others = _checkpoints_of(_output_folder(output_path) / sanitize_model_name(own)) - {weights_hash}
        return f"{own}-{weights_hash[:8]}" if others else own

    GeneralConfigTracker._get_model_name = staticmethod(name)
    try:
        yield
    finally:
        GeneralConfigTracker._get_model_name = staticmethod(harness_name)


def _checkpoints_of(folder: Path) -> set[str]:
    """The hashes of the checkpoints whose results files of the harness are in a folder."""
    found = set()
    for path in folder.glob("results_*.json"):
        with contextlib.suppress(ValueError, OSError):
            config = read_json_object(path).get("config")
            found.add(str(config.get("checkpoint")) if isinstance(config, dict) else "")
    return found


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What the harness and its libraries raise for a user's mistakes, as ValueErrors."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    try:
        yield
    except (KeyError, DatasetsError, TemplateError, ImportError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
