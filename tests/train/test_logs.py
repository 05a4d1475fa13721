import logging

import pytest

from train import logs


@pytest.fixture
def as_new(monkeypatch):
    """Makes the root logger what it is in a new process; in the test, for pytest adds to it before."""
    return lambda: monkeypatch.setattr(logging.getLogger(), "handlers", [])


def say():
    logging.getLogger("train.loop").info("step 3")
    logging.getLogger("train.loop").warning("passing over")
    logging.getLogger("others").info("chatter")
    logging.getLogger("others").warning("beware")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_main_process_has_the_terminal_for_itself_and_each_rank_a_file(tmp_path, as_new, capsys, rank):
    as_new()
    logs.to_terminal()
    say()
    path = tmp_path / "run" / "logs" / "rank.log"
    with logs.to_file(path, rank):
        say()
    say()
    assert not any(logging.getLogger(name).isEnabledFor(logging.INFO) for name in logs.OURS)
    warnings = "WARNING train.loop: passing over\nWARNING others: beware\n"
    assert capsys.readouterr().err == (3 if rank == 0 else 2) * warnings  # before it has its file, and after
    lines = path.read_text().splitlines()
    said = ["INFO train.loop: step 3", "WARNING train.loop: passing over", "WARNING others: beware"]
    assert [line.split(" ", 2)[2] for line in lines] == said


def test_the_file_says_what_ended_the_run_and_is_gone_on_with(tmp_path, as_new):
    as_new()
    for number in (1, 2):
        with pytest.raises(ZeroDivisionError), logs.to_file(tmp_path / "rank.log", 0):
            logging.getLogger("train").info("start %d", number)
            1 / 0  # noqa: B018
    text = (tmp_path / "rank.log").read_text()
    assert text.count("ended by ZeroDivisionError") == text.count("Traceback") == 2
    assert text.index("start 1") < text.index("ended by") < text.index("start 2")
    assert not logging.getLogger().handlers
