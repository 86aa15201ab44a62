"""Softmax attention."""

from manyform.catalog.entry import Entry

ENTRIES = [
    Entry.of("gpt2", 2019, "Radford et al., Language models are unsupervised multitask learners",
             "attention", "attention", norm="layer", channel="mlp", position="learned", bias=True),
    Entry.of("alibi", 2021, "Press et al., Train short, test long, arXiv:2108.12409",
             "attention", "attention", position="alibi", norm="layer_no_bias", channel="mlp"),
    Entry.of("llama", 2023, "Touvron et al., LLaMA, arXiv:2302.13971", "attention", "attention",
             position="rotary"),
    Entry.of("mistral", 2023, "Jiang et al., Mistral 7B, arXiv:2310.06825", "attention",
             "attention", note="window and grouped keys in the published proportions",
             position="rotary", window=256, kv_groups=4),
    Entry.of("deepseek_v2", 2024, "DeepSeek-AI, DeepSeek-V2, arXiv:2405.04434", "attention", "mla",
             note="dense channels where the paper has experts"),
    Entry.of("differential_attention", 2024, "Ye et al., Differential transformer, "
             "arXiv:2410.05258", "attention", "differential_attention"),
    Entry.of("sparse_transformer", 2019, "Child et al., Generating long sequences with sparse "
             "transformers, arXiv:1904.10509", "sparse attention",
             "sparse_transformer(factors='fixed')", norm="layer", channel="mlp",
             note="the factors for text; a stride that grows as the root of the position"),
    Entry.of("longformer", 2020, "Beltagy et al., Longformer, arXiv:2004.05150",
             "sparse attention", "longformer", norm="layer", channel="mlp"),
    Entry.of("bigbird", 2020, "Zaheer et al., Big Bird, arXiv:2007.14062", "sparse attention",
             "bigbird(block=32)", norm="layer", channel="mlp"),
    Entry.of("block_attention", 2020, "Ainslie et al., ETC: Encoding long and structured inputs in "
             "transformers, arXiv:2004.08483; Yang et al., Hierarchical attention networks, 2016",
             "sparse attention", "block_attention", norm="layer", channel="mlp",
             note="causal; a chunk's global token is made by attending over the chunk"),
    Entry.of("native_sparse_attention", 2025, "Yuan et al., Native sparse attention, "
             "arXiv:2502.11089", "sparse attention", "native_sparse_attention",
             note="the published sizes: below some thousand tokens little is left out"),
    Entry.of("reformer", 2020, "Kitaev et al., Reformer, arXiv:2001.04451", "sparse attention",
             "reformer(hashes=8, buckets=8)", norm="layer", channel="mlp", position="learned",
             note="buckets for some hundred tokens; one residual stream, where the paper has two "
                  "reversible ones (residual='reversible' beside tie=False)"),
]
