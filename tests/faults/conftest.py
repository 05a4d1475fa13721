import pytest

from tests.faults import harness


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """A folder for runs, with their text and its tokens, in a process that forks quickly."""
    folder = tmp_path_factory.mktemp("faults")
    harness.make_text(folder)
    harness.warm_up(folder)
    return folder


@pytest.fixture(scope="session")
def reference(lab):
    """The end of a run that nothing disturbed, and the file operations of its main rank, by number of ranks and how it saves."""
    known = {}

    def of(ranks=1, checkpoint_async=True):
        name = f"reference-{ranks}-{checkpoint_async}"
        if name not in known:
            config = harness.write_config(lab, name, checkpoint_async=checkpoint_async)
            listed = lab / f"{name}.operations"
            statuses = harness.run(config, lambda rank: rank or harness.list_operations(listed), ranks)
            assert statuses == [0] * ranks, harness.log_of(config)
            known[name] = harness.end_of(config), listed.read_text().splitlines()
        return known[name]

    return of
