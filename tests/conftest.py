import os
from pathlib import Path

import pytest

import phantom


@pytest.fixture(scope="session")
def real_ct() -> Path:
    """The folder of small real CT volumes that the environment variable REAL_CT names."""
    folder = os.environ.get("REAL_CT", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REAL_CT does not name a folder of real CT volumes")
    return Path(folder)


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory) -> Path:
    """A phantom small enough to train on in seconds: all 30 labelled cases and 6 unlabelled ones."""
    folder = tmp_path_factory.mktemp("phantom") / "phantom"
    phantom.write(folder, unlabelled=6, shape=(4, 64, 64))
    return folder


@pytest.fixture
def refusal(capsys):
    """refusal(main, argv) -> the one line on stderr with which main(argv) ends; its exit code is not zero."""

    def run(main, argv) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in argv])
        assert caught.value.code not in (0, None)
        captured = capsys.readouterr()
        lines = captured.err.strip().splitlines() or [str(caught.value.code)]
        assert len(lines) == 1 and "Traceback" not in captured.err, captured.err
        return lines[0]

    return run
