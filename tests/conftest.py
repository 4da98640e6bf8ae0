"""What all tests share: no network, few threads, reproducible property tests, the golden numbers."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports them: the hub's library and OpenMP read these once; processes that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models of the tests are tiny: a second thread costs more than it brings, and the workers share the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The same examples in every run; no deadline, since the first call of anything in torch is slow.
settings.register_profile(
    "reproducible",
    derandomize=True,
    deadline=None,
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def full_float32() -> None:
    """On GPUs, products of float32 as exact as on CPUs, whatever a training in this process has set."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """The environment as it was: training and evaluation write where their processes meet (MASTER_PORT, RANK ...) into it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    # Lightning's loggers ask this number, which a test that plays another process leaves behind.
    if "lightning_utilities.core.rank_zero" in sys.modules:
        sys.modules["lightning_utilities.core.rank_zero"].rank_zero_only.rank = 0


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Read a file of golden numbers: `golden("data_and_schedule")`."""

    def read(name: str) -> Any:
        return json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())

    return read


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 400 pieces."""
    from tests.support.small_tokenizers import train_small_tokenizer

    return train_small_tokenizer(tmp_path_factory.mktemp("tokenizer"), vocab_size=400)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    """The tokenizer in `tokenizer_folder`."""
    from lit_gpt.tokenizer import Tokenizer

    return Tokenizer(tokenizer_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder but for packed tokens in `data`, to train in; some modules have a folder of their own."""
    from tests.support.training_runs import make_packed_data

    make_packed_data(tmp_path / "data")
    return tmp_path


def pytest_report_header() -> str:
    """How many commands of the documents are run, and how many are only read."""
    from tests.support.documented_commands import count_by_kind

    return f"commands of the documents: {count_by_kind()}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with its reason, what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none here"))
