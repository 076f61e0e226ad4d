"""Distillation in a recipe: teachers are what steps make, whatever the method learns from."""

import pytest

import lfm

RECIPE = """lfm: 1
models:
  new:
    config: {{model_type: vit, image_size: 8, patch_size: 4, num_channels: 1, hidden_size: 16, intermediate_size: 32,
             num_hidden_layers: 2, num_attention_heads: 2, num_labels: 10}}
    task: image-classification
  writer:
    config: {{model_type: llama, vocab_size: 257, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2,
             num_attention_heads: 2, max_position_embeddings: 128}}
    tokenizer: bytes
    task: causal-lm
steps:
  seen: {{tune: full, model: new, data: {{path: "sklearn:digits", limit: 64}}, steps: 1}}
  read: {{tune: full, model: writer, data: {{path: "pydoc:topics", limit: 1}}, steps: 1, length: 32}}
  student: {{distill: {method}, student: {{layers: 1}}, steps: 1, {rest}}}
out: run
"""
IMAGES = 'teacher: seen, data: {path: "sklearn:digits", limit: 64}'
TEXTS = 'teacher: read, length: 32, data: {path: "pydoc:topics", limit: 1}'


@pytest.mark.parametrize(
    ("method", "rest"),
    [
        ("response", IMAGES),
        ("noise", "teacher: seen"),
        ("noise_pool", "teacher: {ref: seen, access: probs}, queries: 256"),
        ("response", f"{TEXTS}, cache_teacher: true"),
        ("self_generated", "teacher: read, count: 4, length: 32, min_tokens: 2"),
        ("gkd", f"{TEXTS}, max_new_tokens: 4, batch_size: 2"),
    ],
)
def test_a_step_may_be_the_teacher(tmp_path, monkeypatch, method, rest):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(method=method, rest=rest))
    lfm.run("recipe.yaml", settings=lfm.Settings(quiet=True))
    teacher = "seen" if "seen" in rest else "read"
    sizes = [
        sum(spec.size for spec in lfm.open_checkpoint(f"run/{name}").specs.values()) for name in (teacher, "student")
    ]
    assert sizes[1] < sizes[0]
