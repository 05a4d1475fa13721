import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install '.[eval]'")

TASK = """
task: ours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def test_lm_evaluation_harness_opens_a_model_folder(model_folder, tmp_path, monkeypatch):
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": "import ", "choices": ["os", "zq"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "ours.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = f"pretrained={model_folder()}"
    results = simple_evaluate("hf", model_args=model, tasks=["ours"], task_manager=manager, device="cpu", batch_size=2)
    # Whichever it prefers, it prefers it every time: half of the answers are right.
    assert results["results"]["ours"]["acc,none"] == 0.5
