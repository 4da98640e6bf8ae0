"""Compare packed files with the hashes of their manifests: whether a copy of a corpus is whole.

    python scripts/check_data.py /dataset/slim_star_combined
    python scripts/check_data.py workdir/data --prefix train_slim

Reads every byte (training compares names and sizes only). Names each file that differs, that misses its index, or that
belongs to no manifest although its name is of the series, and then ends with exit code 2; says what it could not compare.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lit_gpt.cli import parse, run


@dataclass
class Flags:
    """What is checked."""

    folder: str = ""
    """The folder of packed files; may stand without its flag. Required."""
    prefix: str = ""
    """Only manifests whose names begin with this."""


def main() -> None:
    """Check every manifest of a folder."""
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--folder", *arguments]
    flags = parse(Flags, arguments, __doc__)
    if not flags.folder:
        raise ValueError("--folder is missing: the folder of packed files")

    from rich.progress import track

    from lit_gpt.data.packed_manifests import MANIFEST_SUFFIX, index_problems, recorded_hashes, recorded_tokens
    from lit_gpt.files import file_sha256

    folder = Path(flags.folder)
    names = sorted(path.name for path in folder.glob(f"*{MANIFEST_SUFFIX}") if path.name.startswith(flags.prefix))
    if not names:
        raise ValueError(
            f"{folder / flags.prefix}*{MANIFEST_SUFFIX}: no manifest there; files without one have no hashes"
        )
    files = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith(flags.prefix))
    recorded_tokens(folder, names, [path.name for path in folder.glob("*.bin")])
    named = {name: digest for manifest in names for name, digest in recorded_hashes(folder / manifest).items()}
    hashes = {name: digest for name, digest in named.items() if digest}
    wrong = [name for name in track(hashes, "reading") if file_sha256(folder / name) != hashes[name]]
    for name in wrong:
        print(f"{folder / name}: differs from its manifest")
    series = {name.removesuffix(MANIFEST_SUFFIX) for name in names}
    unnamed = [name for name in files if name not in named]
    foreign = [name for name in unnamed if name.rpartition("_")[0] in series]
    problems = [f"{folder / name}: in no manifest, and training reads it" for name in foreign]
    problems += [problem for manifest in names for problem in index_problems(folder / manifest)]
    for problem in problems:
        print(problem)
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(hashes)} files differ: make or copy them again")
    if problems:
        raise ValueError(
            f"{len(problems)} problem(s) beside the hashes: make the data again, or remove what is not its"
        )
    if not hashes:
        raise ValueError(
            f"{folder}: no file has a hash in its manifest: nothing could be compared; make the data again"
        )
    print(f"{len(names)} manifest(s): all {len(hashes)} files with a hash are as they were made")
    if rest := len(named) - len(hashes) + len(unnamed):
        print(f"{rest} file(s) have no hash and were not compared")


if __name__ == "__main__":
    run(main)
