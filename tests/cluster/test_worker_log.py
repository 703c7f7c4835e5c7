"""Every line of a worker's log says where it comes from."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator

import pytest

from actors.logs import open_log


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a worker would write; the logging of this process is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield io.StringIO()
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name in ("storage", "pipeline", "actors"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_every_line_names_rank_block_and_phase(stream: io.StringIO) -> None:
    log = open_log(3, stream)
    ours, theirs = logging.getLogger("pipeline.worker.block_worker"), logging.getLogger("elsewhere")
    ours.info("before")
    with log.during("advance", (4, None)):
        ours.info("here")
        theirs.info("of no interest")
        theirs.warning("strange")
        warnings.warn("odd", UserWarning, stacklevel=1)
    with log.during("reduce", ()):
        ours.info("sums of the block that was observed")
    with pytest.raises(ValueError, match="bad"), log.during("solve", (5, "stamp")):
        raise ValueError("bad")
    with log.during("fingerprint", (["file"],)):
        ours.info("of no block")
    lines = stream.getvalue().splitlines()
    where = [line.split(" ", 3)[3].split(":")[0] for line in lines if line[:2] == "20"]
    assert where == [
        "rank 3 block - start",
        *["rank 3 block 4 advance"] * 3,
        "rank 3 block 5 reduce",
        "rank 3 block - fingerprint",
    ]
    assert "of no interest" not in stream.getvalue()
    assert "UserWarning: odd" in stream.getvalue()
