"""Patterns of several mixers, as published."""

from manyform.catalog.entry import Entry

ENTRIES = [
    Entry.of("striped_hyena", 2023, "Poli et al., StripedHyena, Together AI", "hybrid",
             "modal_hyena : attention", note="the proportions of StripedHyena-Hessian-7B",
             norm_eps=1e-5, tie=False, kv_groups=4, rope_base=500000.0, expansion=3.5),
    Entry.of("jamba", 2024, "Lieber et al., Jamba, arXiv:2403.19887", "hybrid",
             "4 mamba : 1 attention : 3 mamba",
             note="dense channels where the paper alternates experts",
             position="none"),
    Entry.of("griffin", 2024, "De et al., Griffin, arXiv:2402.19427", "hybrid",
             "2 rg_lru : attention(window=256, kv_heads=1)",
             note="window 256 where the paper has 1024; recurrences as wide as the model, as in "
             "RecurrentGemma", activation="gelu_tanh", expansion=3.0),
    Entry.of("minimax_m1", 2025, "MiniMax, MiniMax-M1, arXiv:2506.13585; MiniMax-01, "
             "arXiv:2501.08313", "hybrid", "7 lightning : 1 attention(kv_groups=8)",
             note="dense channels where the paper has experts; a norm behind the embedding and "
             "DeepNorm are its scaled residuals, written another way; rotary positions turn whole "
             "heads, half of each in the paper", rope_base=1e7, residual="deepnorm",
             embedding_norm=True, tie=False, n_layers=8),
    Entry.of("qwen3_next", 2025, "Qwen team, Qwen3-Next (released models and code)", "hybrid",
             "3 gated_delta_net(expand_v=1.0) : 1 attention(gated=True, qk_norm=True)",
             note="dense channels where the model has experts; it turns a quarter of each head and "
             "has half as many key heads, options rotary_dim, key_heads"),
    Entry.of("kimi_linear", 2025, "Kimi Team, Kimi Linear, arXiv:2510.26692", "hybrid",
             "3 kda : 1 mla(position='none')",
             note="dense channels where the paper has experts"),
    Entry.of("samba", 2024, "Ren et al., Samba, arXiv:2406.07522", "hybrid",
             "mamba : attention(window=256)", note="an MLP after each, as in the paper"),
    Entry.of("hymba", 2024, "Dong et al., Hymba, arXiv:2411.13676", "hybrid",
             " : ".join(["parallel_heads", *[
                 "parallel_heads(first='cross_layer_attention(window=256, sinks=32)')",
                 "parallel_heads(first='cross_layer_attention(window=256, sinks=32, "
                 "borrows=True)')"] * 2]),
             note="every fifth layer sees all, where the paper has the first, the middle and the "
             "last of 32; 32 meta tokens (prefix_tokens, and as many sinks, which stay visible "
             "beside the window) where it has 128 and window 1024", prefix_tokens=32),
    Entry.of("titans_mal", 2025, "Behrouz et al., Titans, arXiv:2501.00663", "hybrid",
             "titans + none : attention(window=256)",
             note="memory as a layer; 16 tokens of persistent memory, a number that the paper "
             "leaves open", prefix_tokens=16),
    Entry.of("titans_mag", 2025, "Behrouz et al., Titans, arXiv:2501.00663", "hybrid",
             "parallel_heads(first='attention(window=256, sinks=16)', second='titans', "
             "combine='gate')",
             note="memory as a gate; 16 tokens of persistent memory (prefix_tokens), which stay "
             "visible beside the window (sinks)", prefix_tokens=16),
    Entry.of("lfm2", 2025, "Amini et al., LFM2 technical report, arXiv:2511.23404", "hybrid",
             "2 gated_conv : attention(qk_norm=True, qk_norm_eps=1e-5)", rope_base=1e6,
             norm_eps=1e-5, kv_groups=4),
    Entry.of("zamba2", 2024, "Glorioso et al., The Zamba2 suite, arXiv:2411.15242", "hybrid",
             "5 mamba2 + none : zamba2 + none @ shared",
             note="one shared block, as in the model of 1.2B parameters; the larger ones alternate "
             "two", n_layers=12, d_state=64, norm_eps=1e-5),
]
