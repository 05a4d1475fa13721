import pytest


@pytest.fixture(autouse=True)
def own_cache_of_datasets(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
