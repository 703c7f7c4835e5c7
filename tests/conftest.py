"""Fixtures that many tests share."""

from __future__ import annotations

import os

# Before torch, transformers and Ray are imported: they read these once. One thread a process,
# because a test may start several processes; child processes inherit all of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.s3_server import S3Server, s3_server
from tests.support.tiny_models import save_tiny_model

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds storage/, pipeline/, actors/, cluster/ and tests/."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data that lies beside a checkout, read-only: text and golden files."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def _tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    built: dict[str, Path] = {}

    def build(architecture: str, options: dict[str, object]) -> Path:
        key = f"{architecture} {sorted(options.items())}"
        if key not in built:
            folder = tmp_path_factory.mktemp("tiny") / "model"
            built[key] = save_tiny_model(folder, architecture, **options)
        return built[key]

    return build


@pytest.fixture
def tiny_model(_tiny_models: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A factory: `tiny_model("qwen2", weight_files=2, tied=True)` is a folder of the test's own.

    Options: those of `tests.support.tiny_models.save_tiny_model` and `tiny_config`. A model is
    built once a session and copied, so a test may damage its copy.
    """

    def make(architecture: str = "llama", **options: object) -> Path:
        number = len(list(tmp_path.glob("tiny-*")))
        folder = tmp_path / f"tiny-{architecture}-{number}"
        shutil.copytree(_tiny_models(architecture, options), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3-compatible server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct, bf16, several weight files. Read-only, kept between runs."""
    from pipeline.demo_model import MODEL_NAME, demo_model
    from storage.errors import ModelError

    cache = Path(tempfile.gettempdir()) / f"prox24-tests-{os.getuid()}"
    try:
        return demo_model(cache / MODEL_NAME)
    except ModelError as error:
        pytest.skip(str(error))
