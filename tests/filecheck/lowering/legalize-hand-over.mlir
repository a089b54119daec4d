// RUN: sagec opt -p "serve" --split-input-file --verify-diagnostics %s | filecheck %s

// KV goes only between instances that keep it in the same way. Elsewhere these come up at run time,
// as a hang or as wrong tokens.

// Different tp, and an engine that does not re-shard.
// CHECK: error: hand-over @p0 to @d0: tp 1 and 2 differ, and vllm does not re-shard KV
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.device @g2
cluster.link @g0 to @g1
cluster.link @g0 to @g2
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g1, @g2] engine "vllm" role decode model @m {kv_blocks = 40, tp = 2}
pd.graph @tp_differs {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// An engine that re-shards does so while every rank has a KV head of its own.
// CHECK: error: hand-over @p0 to @d0: tp 4 of @d0 is more than 2 KV heads, which are then replicated and do not re-shard
// CHECK: at most 2
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.device @g2
cluster.device @g3
cluster.device @g4
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g1, @g2, @g3, @g4] engine "sim" role decode model @m {kv_blocks = 40, tp = 4}
pd.graph @replicated_heads {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK-LABEL: pd.graph @reshards
// CHECK: pd.steps @d0
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.device @g1
cluster.device @g2
cluster.link @g0 to @g1
cluster.instance @p0 on [@g0] engine "sim" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g1, @g2] engine "sim" role decode model @m {kv_blocks = 40, tp = 2}
pd.graph @reshards {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: hand-over @p0 to @d0: block_tokens 16 and 32 differ
// CHECK: make them the same
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "vllm" role decode model @m {kv_blocks = 40, block_tokens = 32}
pd.graph @block_sizes {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// Only one side has a draft model, so their KV has different layers.
// CHECK: error: hand-over @p0 to @d0: draft_layers 0 and 1 differ (KV of a draft model on one side only)
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "vllm" role decode model @m {kv_blocks = 40, draft_layers = 1, draft_tokens = 3}
pd.graph @draft_model {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: hand-over @p0 to @d0: kv_dtype bf16 and fp8 differ
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "vllm" role decode model @m {kv_blocks = 40, kv_dtype = "fp8"}
pd.graph @precision {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: hand-over @p0 to @d0: kv_layout default and NHD differ
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "vllm" role decode model @m {kv_blocks = 40, kv_layout = "NHD"}
pd.graph @layout {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// CHECK: error: hand-over @p0 to @d0: engines torch and vllm differ
// CHECK: use one on both sides
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "torch" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "vllm" role decode model @m {kv_blocks = 40}
pd.graph @engines {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}

// -----

// Several outputs of one prompt, and prefill and decode apart.
// CHECK: error: "a" asks 2 outputs of one prompt, and prefill and decode are apart
// CHECK: 1, or let one instance do both phases
cluster.model @m {layers = 2, hidden = 64, heads = 8, kv_heads = 2, head_dim = 16, ffn = 112, vocab = 97}
cluster.device @g0
cluster.instance @p0 on [@g0] engine "vllm" role prefill model @m {kv_blocks = 40}
cluster.instance @d0 on [@g0] engine "vllm" role decode model @m {kv_blocks = 40}
pd.graph @samples {mode = "strict"} {
  %new = pd.requests ["a": prompt 20 generate 3 samples 2]
  %kv = pd.prefill %new
  %end = pd.decode %kv
}
